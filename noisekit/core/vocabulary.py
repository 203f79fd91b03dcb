"""Every quantity once: its name, symbol, unit, meaning and source.

Tables take their columns from here, figures their labels, the report its glossary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from noisekit.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Quantity:
    """One measured quantity.

    Attributes:
        name: The column name, a standard term of the field.
        symbol: Matplotlib mathtext, without the dollar signs.
        unit: What one of it is; empty where it is a pure number.
        label: Words for an axis.
        definition: One sentence that a reader can check against the source.
        source: Paper and section, where there is one.
    """

    name: str
    symbol: str
    unit: str
    label: str
    definition: str
    source: str = ""

    @property
    def axis_label(self) -> str:
        """Label, symbol and unit, as written beside an axis."""
        symbol = f" ${self.symbol}$" if self.symbol else ""
        unit = f" [{self.unit}]" if self.unit else ""
        return f"{self.label}{symbol}{unit}"


_GRAD2 = "loss²/param²"
_CURVATURE = "loss/param²"
_SPLIT_WORDS = {"train": "Training", "validation": "Validation", "test": "Test"}

_ALL = (
    # Where in training.
    Quantity("step", "", "updates", "Update", "Optimiser steps taken so far."),
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
        "Examples per optimiser step, over ranks and accumulation.",
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
    # Gradient noise.
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
    # Sharpness.
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
)

QUANTITIES: Mapping[str, Quantity] = MappingProxyType({q.name: q for q in _ALL})


def quantity(name: str) -> Quantity:
    """Return the quantity called ``name``.

    Raises:
        UsageError: If the vocabulary has no such name.
    """
    try:
        return QUANTITIES[name]
    except KeyError:
        known = ", ".join(sorted(QUANTITIES))
        raise UsageError(f"no quantity is called {name!r}; known: {known}.") from None
