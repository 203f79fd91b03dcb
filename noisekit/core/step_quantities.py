"""What else is computed of the gradients that a training step has at hand."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

from noisekit.core.quantity import Quantity

_GRAD = "loss/param"
_CURVATURE = "loss³/param⁴"

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
"""What a probe may be asked for beside the noise."""

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
        "Euclidean norm of the change of the parameters by one optimiser step.",
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
        _CURVATURE,
        "Curvature along the noise",
        "Unbiased trace of Hessian times covariance of per-example gradients.",
        "McCandlish et al. 2018, arXiv:1812.06162, section 2.2",
    ),
    Quantity(
        "gradient_curvature",
        r"G^{T}HG",
        _CURVATURE,
        "Curvature along the gradient",
        "Unbiased product of true gradient, Hessian and true gradient.",
        "McCandlish et al. 2018, arXiv:1812.06162, section 2.2",
    ),
)

_SEVERAL = {
    "gsnr": ("gsnr", "debiased_gsnr"),
    "grad_histogram": (
        "example_grad_norm_median",
        "example_grad_norm_q95",
        "example_grad_norm_max",
    ),
    "hessian_noise_scale": (
        "hessian_noise_scale",
        "noise_curvature",
        "gradient_curvature",
    ),
}

COLUMNS_OF: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: _SEVERAL.get(name, (name,)) for name in get_args(QuantityName)}
)
"""By what a probe may be asked for: the names of what then is in its readings."""
