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
        "Sum of the Hessian's eigenvalues, by Hutchinson probes.",
        "Hutchinson 1989",
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
        "Learning rate times the largest Hessian eigenvalue over two; gradient "
        "descent is locally unstable above one.",
        "Cohen et al. 2021, arXiv:2103.00065",
    ),
    Quantity(
        "grad_norm",
        r"\|g\|",
        "loss/param",
        "Gradient norm",
        "Norm of the gradient of the mean training loss.",
    ),
)
