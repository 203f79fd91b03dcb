"""What is measured of curvature and sharpness."""

from noisekit.core.quantity import Quantity

_CURVATURE = "loss/param²"

SHARPNESS_QUANTITIES = (
    Quantity(
        "lambda_max",
        r"\lambda_{\max}",
        _CURVATURE,
        "Largest Hessian eigenvalue",
        "Largest algebraic eigenvalue of the Hessian of the mean training loss.",
    ),
    Quantity(
        "lambda_max_pyhessian",
        r"\lambda_{\max}",
        _CURVATURE,
        "Largest Hessian eigenvalue by PyHessian",
        "PyHessian's top eigenvalue of the same problem, as a check of ours.",
        "Yao et al. 2020, arXiv:1912.07145",
    ),
    Quantity(
        "lambda_min",
        r"\lambda_{\min}",
        _CURVATURE,
        "Smallest Hessian eigenvalue",
        "Smallest algebraic eigenvalue of the Hessian of the mean training loss.",
    ),
    Quantity(
        "gauge_fixed_lambda_max",
        r"\bar\lambda_{\max}",
        "loss",
        "Largest eigenvalue at unit row norm",
        "Largest Hessian eigenvalue after every weight row that feeds a BatchNorm "
        "is scaled to unit norm, which leaves the function as it is.",
        "van Laarhoven 2017, arXiv:1706.05350",
    ),
    Quantity(
        "hessian_trace",
        r"\mathrm{tr}\,H",
        _CURVATURE,
        "Hessian trace",
        "Sum of the Hessian's eigenvalues, by random probes.",
        "Hutchinson 1989; Meyer et al. 2021",
    ),
    Quantity(
        "weighted_hessian_trace",
        r"\sum_i w_i^2 H_{ii}",
        "loss",
        "Weighted Hessian trace",
        "Sum of squared weight times diagonal curvature; unchanged by rescalings of "
        "layers or neurons that keep a ReLU network's function.",
    ),
    Quantity(
        "hessian_frobenius_norm",
        r"\|H\|_F",
        _CURVATURE,
        "Hessian Frobenius norm",
        "Root of the sum of squared Hessian eigenvalues, by random probes.",
    ),
    Quantity(
        "effective_dimension",
        r"\sum_i \lambda_i/(\lambda_i+z)",
        "",
        "Effective dimension",
        "Number of eigenvalues of the Gauss-Newton matrix that are large against a "
        "stated shift.",
        "MacKay 1992; Maddox et al. 2020, arXiv:2003.02139",
    ),
    Quantity(
        "epsilon_sharpness",
        r"\phi_\epsilon",
        "%",
        "Epsilon-sharpness",
        "Largest relative rise of the loss in a small box around the weights; the "
        "value found is a lower bound of the maximum.",
        "Keskar et al. 2017, arXiv:1609.04836, metric 2.1",
    ),
    Quantity(
        "first_order_share",
        "",
        "",
        "First-order share",
        "Part of epsilon-sharpness that the gradient alone accounts for.",
    ),
    Quantity(
        "edge_of_stability_ratio",
        r"\eta\lambda_{\max}/2",
        "",
        "Edge-of-stability ratio",
        "Largest Hessian eigenvalue over the curvature up to which the update rule is "
        "stable, which is two over the learning rate without momentum; full-batch "
        "training is locally unstable above one.",
        "Cohen et al. 2021, arXiv:2103.00065",
    ),
    Quantity(
        "worst_case_sharpness",
        r"\max_{|\delta|\leq\rho} \Delta F",
        "loss",
        "Worst-case sharpness",
        "Largest rise of the loss within a radius of the weights, as found by one "
        "gradient step or by ascent; a lower bound of the maximum.",
        "Foret et al. 2021, arXiv:2010.01412",
    ),
    Quantity(
        "adaptive_worst_case_sharpness",
        r"\max_{|\delta/w|\leq\rho} \Delta F",
        "loss",
        "Adaptive worst-case sharpness",
        "Worst-case sharpness with each weight displaced in proportion to its size; "
        "unchanged by rescalings that keep a ReLU network's function.",
        "Kwon et al. 2021, arXiv:2102.11600",
    ),
    Quantity(
        "logit_normalised_worst_case_sharpness",
        "",
        "loss",
        "Logit-normalised worst-case sharpness",
        "Adaptive worst-case sharpness of the loss of centred and normalised logits.",
        "Andriushchenko et al. 2023, arXiv:2302.07011",
    ),
    Quantity(
        "m_sharpness",
        "",
        "loss",
        "Worst-case sharpness of groups",
        "Worst-case sharpness of each group of m examples, averaged (m-sharpness).",
        "Foret et al. 2021, arXiv:2010.01412",
    ),
    Quantity(
        "average_sharpness",
        r"E_\delta \Delta F",
        "loss",
        "Average-case sharpness",
        "Mean rise of the loss when Gaussian noise is put on the weights.",
    ),
    Quantity(
        "adaptive_average_sharpness",
        "",
        "loss",
        "Adaptive average-case sharpness",
        "Mean rise of the loss under Gaussian noise in proportion to each weight; "
        "unchanged by rescalings that keep a ReLU network's function.",
        "Andriushchenko et al. 2023, arXiv:2302.07011",
    ),
    Quantity(
        "logit_normalised_average_sharpness",
        "",
        "loss",
        "Logit-normalised average-case sharpness",
        "Adaptive average-case sharpness of the loss of centred and normalised logits.",
        "Andriushchenko et al. 2023, arXiv:2302.07011",
    ),
    Quantity(
        "pac_bayes_flatness",
        r"1/\sigma^2",
        "",
        "PAC-Bayes flatness",
        "One over the largest variance of weight noise that raises the error by no "
        "more than a target; larger means sharper.",
        "Jiang et al. 2020, arXiv:1912.02178, appendix",
    ),
    Quantity(
        "pac_bayes_sharpness",
        r"1/\alpha^2",
        "",
        "PAC-Bayes sharpness",
        "One over the square of the largest displacement that raises the error by no "
        "more than a target, as found by ascent; a lower bound.",
        "Jiang et al. 2020, arXiv:1912.02178, appendix",
    ),
    Quantity(
        "fisher_rao_norm",
        r"w^\top F w",
        "loss",
        "Squared Fisher-Rao norm",
        "Weights times the Fisher information matrix times weights; unchanged by "
        "rescalings that keep a ReLU network's function.",
        "Liang et al. 2019, arXiv:1711.01530",
    ),
    Quantity(
        "relative_flatness",
        r"\kappa",
        "loss",
        "Relative flatness",
        "Inner products of a layer's rows times the traces of their Hessian blocks, "
        "summed; larger means sharper.",
        "Petzka et al. 2021, arXiv:2001.00939",
    ),
    Quantity(
        "batch_sharpness",
        r"E_B[g_B^\top H_B g_B/|g_B|^2]",
        _CURVATURE,
        "Batch sharpness",
        "Mean over batches of the curvature of each batch's loss along its own "
        "gradient; under SGD it settles about two over the learning rate.",
        "Andreyev and Beneventano 2024, arXiv:2412.20553",
    ),
    Quantity(
        "batch_sharpness_ratio_of_means",
        "",
        _CURVATURE,
        "Batch sharpness as a ratio of means",
        "Mean curvature of batch losses along their gradients over the mean squared "
        "norm of these.",
    ),
    Quantity(
        "step_sharpness",
        r"s^\top H_B s/s^\top g_B",
        _CURVATURE,
        "Step sharpness",
        "Mean over batches of the curvature of each batch's loss along the step that "
        "the optimiser would take on it, velocity included.",
        "Andreyev et al. 2026, arXiv:2604.14108",
    ),
    Quantity(
        "grad_norm",
        r"\|g\|",
        "loss/param",
        "Gradient norm",
        "Norm of the gradient of the mean training loss.",
    ),
)
