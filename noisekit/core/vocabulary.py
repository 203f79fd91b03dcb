"""Vocabulary: every quantity once, with its name, symbol, unit, definition and source.

Tables take their columns from here, figures their labels, the report its glossary and
the rules of a fair comparison. Knows no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from noisekit.core.arguments import checked
from noisekit.core.errors import UsageError

Invariance = Literal["raw", "layers", "neurons", "norms"]

INVARIANCES: Mapping[Invariance, str] = MappingProxyType(
    {
        "raw": "changed by rescalings that keep the function",
        "layers": "unchanged when whole layers of a ReLU network are rescaled",
        "neurons": "unchanged when layers or neurons of a ReLU network are rescaled",
        "norms": "unchanged when weights before a BatchNorm are rescaled",
    }
)
"""Which function-preserving rescalings of the weights leave a measure unchanged."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """One measured quantity.

    Attributes:
        name: The column name, a standard term of the field.
        symbol: Matplotlib mathtext, without the dollar signs.
        unit: Unit of measurement; empty for a pure number.
        label: Words for an axis.
        definition: One sentence that a reader can check against the source.
        source: Paper and section, where there is one.
        invariance: For a measure of sharpness, the function-preserving rescalings that
            leave it unchanged; ``None`` for any other quantity.
        fades_with_loss: Whether the value moves with the training loss, nearly always
            falling with it, so that runs compare only at matched training loss.
        invariance_lost_with: Setting that breaks the invariance wherever a measure's
            variant states it, as one that adds a constant to the weights' sizes does.
    """

    name: str
    symbol: str
    unit: str
    label: str
    definition: str
    source: str = ""
    invariance: Invariance | None = None
    fades_with_loss: bool = False
    invariance_lost_with: str = ""

    def invariance_in(self, variant: str) -> Invariance | None:
        """Return the invariance of one variant, such as ``"rho=0.5,eta=0.01"``."""
        stated = {part.partition("=")[0] for part in variant.split(",")}
        if self.invariance is None or self.invariance_lost_with not in stated - {""}:
            return self.invariance
        return "raw"

    @property
    def axis_label(self) -> str:
        """Label, symbol and unit, as written beside an axis.

        A unit that the label names already is left out: "Training loss", "Epoch".
        """
        symbol = f" ${self.symbol}$" if self.symbol else ""
        named = self.unit.removesuffix("s") in self.label.lower()
        unit = f" [{self.unit}]" if self.unit and not named else ""
        return f"{self.label}{symbol}{unit}"


_GRAD = "loss/param"
_GRAD2 = "loss²/param²"
_CURVATURE = "loss/param²"
_GRAD_CURVATURE = "loss³/param⁴"

_SPLIT_WORDS = {"train": "Training", "validation": "Validation", "test": "Test"}

TRAINING_QUANTITIES = (
    # Where in training.
    Quantity("step", "", "updates", "Update", "Optimizer steps taken so far."),
    Quantity(
        "examples_seen",
        "",
        "examples",
        "Examples seen",
        "Training examples that entered a gradient so far, repeats counted.",
    ),
    Quantity(
        "epoch",
        "",
        "epochs",
        "Epoch",
        "Examples seen divided by the number of training examples.",
    ),
    Quantity(
        "batch_size",
        "B",
        "examples",
        "Batch size",
        "Examples per optimizer step, over ranks and accumulation.",
    ),
    Quantity(
        "learning_rate",
        r"\eta",
        "",
        "Learning rate",
        "Step size applied to the mean gradient.",
    ),
    # How well the model does.
    Quantity(
        "batch_loss", "L_B", "loss", "Batch loss", "Mean loss of the step's own batch."
    ),
    *(
        Quantity(
            f"{split}_loss",
            "",
            "loss",
            f"{words} loss",
            f"Mean loss over the whole {words.lower()} set, model in evaluation mode.",
        )
        for split, words in _SPLIT_WORDS.items()
    ),
    *(
        Quantity(
            f"{split}_error",
            "",
            "fraction",
            f"{words} error",
            f"Share of the {words.lower()} set that is misclassified.",
        )
        for split, words in _SPLIT_WORDS.items()
    ),
    # Weights.
    Quantity(
        "weight_norm",
        r"\|w\|",
        "param",
        "Weight norm",
        "Euclidean norm of all trainable parameters.",
    ),
    Quantity(
        "distance_from_start",
        r"\|w-w_0\|",
        "param",
        "Distance from start",
        "Euclidean distance of the parameters from their initial values.",
    ),
    Quantity(
        "distance_from_fork",
        r"\|w-w_f\|",
        "param",
        "Distance from the fork",
        "Euclidean distance of the parameters from the snapshot of another run that "
        "the run began with.",
    ),
)

NOISE_QUANTITIES = (
    Quantity(
        "grad_sq_norm",
        r"\|g_B\|^2",
        _GRAD2,
        "Squared gradient norm",
        "Squared norm of the mean gradient that is applied, before clipping.",
        fades_with_loss=True,
    ),
    Quantity(
        "variance_trace",
        r"\mathrm{tr}\,\Sigma",
        _GRAD2,
        "Gradient variance",
        "Trace of the covariance of per-example gradients, n - 1 denominator.",
        "McCandlish et al. 2018, arXiv:1812.06162, section 2.2",
        fades_with_loss=True,
    ),
    Quantity(
        "debiased_grad_sq_norm",
        r"\|G\|^2",
        _GRAD2,
        "Debiased squared gradient norm",
        "Unbiased estimate of the squared norm of the true gradient; may be negative.",
        "McCandlish et al. 2018, arXiv:1812.06162, appendix A",
        fades_with_loss=True,
    ),
    Quantity(
        "simple_noise_scale",
        r"\mathcal{B}_{\mathrm{simple}}",
        "examples",
        "Simple noise scale",
        "Trace of the gradient covariance over the squared norm of the true gradient.",
        "McCandlish et al. 2018, arXiv:1812.06162, section 2.2",
    ),
    Quantity(
        "example_grad_sq_norm",
        r"\|g_i\|^2",
        _GRAD2,
        "Squared per-example gradient norm",
        "Squared norm of one example's own gradient.",
        fades_with_loss=True,
    ),
)

EstimatorName = Literal[
    "per_example",
    "rows",
    "chunks",
    "accumulation",
    "ranks",
    "random_signs",
    "norm_layers",
    "ghost",
    "preconditioned",
]
"""Ways to estimate gradient noise."""

ESTIMATORS: tuple[str, ...] = get_args(EstimatorName)
"""Their names; a reading may have several, named in front of a column."""

QuantityName = Literal[
    "norm_test",
    "inner_product_test",
    "orthogonality_test",
    "gradient_diversity",
    "cabs",
    "cabs_conv_compat",
    "gsnr",
    "evidence_stopping",
    "grad_histogram",
    "update_size",
    "distance_from_start",
    "gradient_cosine",
    "hessian_noise_scale",
]
"""Names of the step metrics that a probe can compute beside the noise."""

STEP_QUANTITIES = (
    # Whether the batch is large enough.
    Quantity(
        "norm_test",
        r"\theta",
        "",
        "Norm test",
        "Smallest constant with which the batch passes the norm test: standard error "
        "of the mean gradient over its norm.",
        "Byrd, Chin, Nocedal and Wu 2012, Mathematical Programming 134",
    ),
    Quantity(
        "inner_product_test",
        r"\theta_{\parallel}",
        "",
        "Inner-product test",
        "Smallest constant with which the batch passes the inner-product test: the "
        "part of the norm test along the mean gradient.",
        "Bollapragada, Byrd and Nocedal 2018, arXiv:1710.11258, eq. 2.6",
    ),
    Quantity(
        "orthogonality_test",
        r"\nu",
        "",
        "Orthogonality test",
        "Smallest constant with which the batch passes the orthogonality test: the "
        "part of the norm test across the mean gradient.",
        "Bollapragada, Byrd and Nocedal 2018, arXiv:1710.11258, eq. 3.3",
    ),
    Quantity(
        "gradient_diversity",
        r"\Delta_B",
        "",
        "Gradient diversity",
        "Sum of the squared norms of the batch's per-example gradients over the "
        "squared norm of their sum.",
        "Yin et al. 2018, arXiv:1706.05699",
    ),
    Quantity(
        "cabs",
        r"\eta\,\xi/F",
        "examples",
        "CABS batch size",
        "Learning rate times biased variance trace over the batch's loss, neither "
        "averaged over steps nor rounded.",
        "Balles, Romero and Hennig 2017, arXiv:1612.05086",
    ),
    Quantity(
        "cabs_conv_compat",
        "",
        "examples",
        "CABS batch size, positions apart",
        "The CABS batch size with the second moment of convolutions taken position by "
        "position, as in the authors' program, which drops products of two positions.",
        "Balles, Romero and Hennig 2017, arXiv:1612.05086, and their published code",
    ),
    # Signal and noise, parameter by parameter.
    Quantity(
        "gsnr",
        "r",
        "",
        "Gradient signal-to-noise ratio",
        "Squared mean over variance of a single parameter's gradient, averaged over "
        "the parameters whose gradient varies.",
        "Liu et al. 2020, arXiv:2001.07384",
    ),
    Quantity(
        "debiased_gsnr",
        r"\hat{r}",
        "",
        "Debiased signal-to-noise ratio",
        "The gradient signal-to-noise ratio without what the noise of the mean adds, "
        "exact for Gaussian gradients; may be negative.",
        "Liu et al. 2020, arXiv:2001.07384",
    ),
    Quantity(
        "evidence_stopping",
        "",
        "",
        "Evidence-based stopping",
        "One minus the batch size times the gradient signal-to-noise ratio; training "
        "may stop above zero.",
        "Mahsereci, Balles, Lassner and Hennig 2017, arXiv:1703.09580",
    ),
    # How gradient norms are distributed.
    Quantity(
        "example_grad_norm_median",
        "",
        _GRAD,
        "Median per-example gradient norm",
        "Median over the step's examples of the norm of their own gradients.",
    ),
    Quantity(
        "example_grad_norm_q95",
        "",
        _GRAD,
        "Per-example gradient norm, 95 % quantile",
        "Norm that 95 % of the step's examples' own gradients stay below.",
    ),
    Quantity(
        "example_grad_norm_max",
        "",
        _GRAD,
        "Largest per-example gradient norm",
        "Largest norm among the step's examples' own gradients.",
    ),
    # How parameters and gradient move.
    Quantity(
        "update_size",
        r"\|w_{t+1}-w_t\|",
        "param",
        "Update size",
        "Euclidean norm of the change of the parameters by one optimizer step.",
    ),
    Quantity(
        "gradient_cosine",
        r"\cos(g_t, g_{t'})",
        "",
        "Cosine of successive gradients",
        "Cosine between the gradients of this and of the last step that was read.",
    ),
    # Noise that counts curvature.
    Quantity(
        "hessian_noise_scale",
        r"\mathcal{B}_{\mathrm{noise}}",
        "examples",
        "Hessian noise scale",
        "Trace of Hessian times gradient covariance over the curvature along the "
        "gradient.",
        "McCandlish et al. 2018, arXiv:1812.06162, section 2.2",
    ),
    Quantity(
        "noise_curvature",
        r"\mathrm{tr}(H\Sigma)",
        _GRAD_CURVATURE,
        "Curvature along the noise",
        "Unbiased trace of Hessian times covariance of per-example gradients.",
        "McCandlish et al. 2018, arXiv:1812.06162, section 2.2",
        fades_with_loss=True,
    ),
    Quantity(
        "gradient_curvature",
        r"G^{T}HG",
        _GRAD_CURVATURE,
        "Curvature along the gradient",
        "Unbiased product of true gradient, Hessian and true gradient.",
        "McCandlish et al. 2018, arXiv:1812.06162, section 2.2",
        fades_with_loss=True,
    ),
)

STEP_COLUMNS: tuple[str, ...] = (
    *(quantity.name for quantity in STEP_QUANTITIES),
    "distance_from_start",
)
"""Names of all values that step metrics may add to a reading."""

SHARPNESS_QUANTITIES = (
    Quantity(
        "lambda_max",
        r"\lambda_{\max}",
        _CURVATURE,
        "Largest Hessian eigenvalue",
        "Largest algebraic eigenvalue of the Hessian of the mean training loss.",
        invariance="raw",
        fades_with_loss=True,
    ),
    Quantity(
        "lambda_max_pyhessian",
        r"\lambda_{\max}",
        _CURVATURE,
        "Largest Hessian eigenvalue by PyHessian",
        "PyHessian's top eigenvalue of the same problem, as a check of ours.",
        "Yao et al. 2020, arXiv:1912.07145",
        invariance="raw",
        fades_with_loss=True,
    ),
    Quantity(
        "lambda_min",
        r"\lambda_{\min}",
        _CURVATURE,
        "Smallest Hessian eigenvalue",
        "Smallest algebraic eigenvalue of the Hessian of the mean training loss.",
        invariance="raw",
        fades_with_loss=True,
    ),
    Quantity(
        "gauge_fixed_lambda_max",
        r"\bar\lambda_{\max}",
        "loss",
        "Largest eigenvalue at unit row norm",
        "Largest Hessian eigenvalue after every weight row that feeds a BatchNorm "
        "is scaled to unit norm, which leaves the function as it is.",
        "van Laarhoven 2017, arXiv:1706.05350",
        invariance="norms",
        fades_with_loss=True,
    ),
    Quantity(
        "hessian_trace",
        r"\mathrm{tr}\,H",
        _CURVATURE,
        "Hessian trace",
        "Sum of the Hessian's eigenvalues, by random probes.",
        "Hutchinson 1989; Meyer et al. 2021",
        invariance="raw",
        fades_with_loss=True,
    ),
    Quantity(
        "weighted_hessian_trace",
        r"\sum_i w_i^2 H_{ii}",
        "loss",
        "Weighted Hessian trace",
        "Sum of squared weight times diagonal curvature; unchanged by rescalings of "
        "layers or neurons that keep a ReLU network's function.",
        invariance="neurons",
        fades_with_loss=True,
    ),
    Quantity(
        "hessian_frobenius_norm",
        r"\|H\|_F",
        _CURVATURE,
        "Hessian Frobenius norm",
        "Root of the sum of squared Hessian eigenvalues, by random probes.",
        invariance="raw",
        fades_with_loss=True,
    ),
    Quantity(
        "effective_dimension",
        r"\sum_i \lambda_i/(\lambda_i+z)",
        "",
        "Effective dimension",
        "Number of eigenvalues of the Gauss-Newton matrix that are large against a "
        "stated shift.",
        "MacKay 1992; Maddox et al. 2020, arXiv:2003.02139",
        invariance="raw",
        fades_with_loss=True,
    ),
    Quantity(
        "epsilon_sharpness",
        r"\phi_\epsilon",
        "%",
        "Epsilon-sharpness",
        "Largest relative rise of the loss in a small box around the weights; the "
        "value found is a lower bound of the maximum.",
        "Keskar et al. 2017, arXiv:1609.04836, metric 2.1",
        invariance="raw",
        fades_with_loss=True,
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
        invariance="raw",
        fades_with_loss=True,
    ),
    Quantity(
        "worst_case_sharpness",
        r"\max_{|\delta|\leq\rho} \Delta F",
        "loss",
        "Worst-case sharpness",
        "Largest rise of the loss within a radius of the weights, as found by one "
        "gradient step or by ascent; a lower bound of the maximum.",
        "Foret et al. 2021, arXiv:2010.01412",
        invariance="raw",
        fades_with_loss=True,
    ),
    Quantity(
        "adaptive_worst_case_sharpness",
        r"\max_{|\delta/w|\leq\rho} \Delta F",
        "loss",
        "Adaptive worst-case sharpness",
        "Worst-case sharpness with each weight displaced in proportion to its size; "
        "unchanged by rescalings that keep a ReLU network's function.",
        "Kwon et al. 2021, arXiv:2102.11600",
        invariance="neurons",
        fades_with_loss=True,
        invariance_lost_with="eta",
    ),
    Quantity(
        "logit_normalised_worst_case_sharpness",
        "",
        "loss",
        "Logit-normalised worst-case sharpness",
        "Adaptive worst-case sharpness of the loss of centred and normalised logits.",
        "Andriushchenko et al. 2023, arXiv:2302.07011",
        invariance="neurons",
        fades_with_loss=True,
        invariance_lost_with="eta",
    ),
    Quantity(
        "m_sharpness",
        "",
        "loss",
        "Worst-case sharpness of groups",
        "Worst-case sharpness of each group of m examples, averaged (m-sharpness).",
        "Foret et al. 2021, arXiv:2010.01412",
        invariance="raw",
        fades_with_loss=True,
    ),
    Quantity(
        "average_sharpness",
        r"E_\delta \Delta F",
        "loss",
        "Average-case sharpness",
        "Mean rise of the loss when Gaussian noise is put on the weights.",
        invariance="raw",
        fades_with_loss=True,
    ),
    Quantity(
        "adaptive_average_sharpness",
        "",
        "loss",
        "Adaptive average-case sharpness",
        "Mean rise of the loss under Gaussian noise in proportion to each weight; "
        "unchanged by rescalings that keep a ReLU network's function.",
        "Andriushchenko et al. 2023, arXiv:2302.07011",
        invariance="neurons",
        fades_with_loss=True,
        invariance_lost_with="eta",
    ),
    Quantity(
        "logit_normalised_average_sharpness",
        "",
        "loss",
        "Logit-normalised average-case sharpness",
        "Adaptive average-case sharpness of the loss of centred and normalised logits.",
        "Andriushchenko et al. 2023, arXiv:2302.07011",
        invariance="neurons",
        fades_with_loss=True,
        invariance_lost_with="eta",
    ),
    Quantity(
        "pac_bayes_flatness",
        r"1/\sigma^2",
        "",
        "PAC-Bayes flatness",
        "One over the largest variance of weight noise that raises the error by no "
        "more than a target; larger means sharper.",
        "Jiang et al. 2020, arXiv:1912.02178, appendix",
        invariance="raw",
        fades_with_loss=True,
    ),
    Quantity(
        "pac_bayes_sharpness",
        r"1/\alpha^2",
        "",
        "PAC-Bayes sharpness",
        "One over the square of the largest displacement that raises the error by no "
        "more than a target, as found by ascent; a lower bound.",
        "Jiang et al. 2020, arXiv:1912.02178, appendix",
        invariance="raw",
        fades_with_loss=True,
    ),
    Quantity(
        "fisher_rao_norm",
        r"w^\top F w",
        "loss",
        "Squared Fisher-Rao norm",
        "Weights times the Fisher information matrix times weights; unchanged by "
        "rescalings that keep a ReLU network's function.",
        "Liang et al. 2019, arXiv:1711.01530",
        invariance="neurons",
        fades_with_loss=True,
    ),
    Quantity(
        "relative_flatness",
        r"\kappa",
        "loss",
        "Relative flatness",
        "Inner products of a layer's rows times the traces of their Hessian blocks, "
        "summed; larger means sharper.",
        "Petzka et al. 2021, arXiv:2001.00939",
        invariance="layers",
        fades_with_loss=True,
    ),
    Quantity(
        "batch_sharpness",
        r"E_B[g_B^\top H_B g_B/|g_B|^2]",
        _CURVATURE,
        "Batch sharpness",
        "Mean over batches of the curvature of each batch's loss along its own "
        "gradient; under SGD it settles about two over the learning rate.",
        "Andreyev and Beneventano 2024, arXiv:2412.20553",
        invariance="raw",
        fades_with_loss=True,
    ),
    Quantity(
        "batch_sharpness_ratio_of_means",
        "",
        _CURVATURE,
        "Batch sharpness as a ratio of means",
        "Mean curvature of batch losses along their gradients over the mean squared "
        "norm of these.",
        invariance="raw",
        fades_with_loss=True,
    ),
    Quantity(
        "step_sharpness",
        r"s^\top H_B s/s^\top g_B",
        _CURVATURE,
        "Step sharpness",
        "Mean over batches of the curvature of each batch's loss along the step that "
        "the optimizer would take on it, velocity included.",
        "Andreyev et al. 2026, arXiv:2604.14108",
        invariance="raw",
        fades_with_loss=True,
    ),
    Quantity(
        "grad_norm",
        r"\|g\|",
        "loss/param",
        "Gradient norm",
        "Norm of the gradient of the mean training loss.",
        invariance="raw",
        fades_with_loss=True,
    ),
)


QUANTITIES: Mapping[str, Quantity] = MappingProxyType(
    {
        q.name: q
        for q in (
            *TRAINING_QUANTITIES,
            *NOISE_QUANTITIES,
            *STEP_QUANTITIES,
            *SHARPNESS_QUANTITIES,
        )
    }
)
"""Every quantity by its name."""


@checked
def quantity(name: str) -> Quantity:
    """Return the quantity called ``name``.

    Raises:
        UsageError: If the vocabulary has no such name.

    Example:
        >>> nk.quantity("lambda_max").unit
        'loss/param²'
    """
    try:
        return QUANTITIES[name]
    except KeyError:
        known = ", ".join(sorted(QUANTITIES))
        raise UsageError(
            f"name needs to be a quantity of the vocabulary, got {name!r}; there are: "
            f"{known}."
        ) from None
