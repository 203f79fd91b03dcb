"""What is measured of gradients and their noise."""

from noisekit.core.quantity import Quantity

_GRAD2 = "loss²/param²"

NOISE_QUANTITIES = (
    Quantity(
        "grad_sq_norm",
        r"\|g_B\|^2",
        _GRAD2,
        "Squared gradient norm",
        "Squared norm of the mean gradient that is applied, before clipping.",
    ),
    Quantity(
        "variance_trace",
        r"\mathrm{tr}\,\Sigma",
        _GRAD2,
        "Gradient variance",
        "Trace of the covariance of per-example gradients, n - 1 denominator.",
        "McCandlish et al. 2018, arXiv:1812.06162, section 2.2",
    ),
    Quantity(
        "debiased_grad_sq_norm",
        r"\|G\|^2",
        _GRAD2,
        "Debiased squared gradient norm",
        "Unbiased estimate of the squared norm of the true gradient; may be negative.",
        "McCandlish et al. 2018, arXiv:1812.06162, appendix A",
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
    ),
)
