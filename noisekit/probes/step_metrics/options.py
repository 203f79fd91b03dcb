"""Which quantities a probe may be asked for beside the noise, and where not."""

import torch

from noisekit.core.distributed import Ranks
from noisekit.core.errors import UsageError
from noisekit.core.vocabulary import COLUMNS_OF
from noisekit.probes.options import ProbeOptions

OF_PRODUCTS = frozenset({"inner_product_test", "orthogonality_test"})
"""From every example's inner product with the step's gradient."""
OF_SQUARES = frozenset({"gsnr", "evidence_stopping"})
"""From second moments element by element."""
OF_LOSS = frozenset({"cabs", "cabs_conv_compat"})
OF_CALLS = OF_PRODUCTS | OF_SQUARES | {"cabs_conv_compat"}
"""Those that read layers' calls themselves."""
OF_MOVEMENT = frozenset({"update_size", "distance_from_start", "gradient_cosine"})
DERIVED = OF_LOSS | {"norm_test", "gradient_diversity", "hessian_noise_scale"}
"""Those that follow from the noise, and from sums that all ranks can add up."""
FEWEST_CHUNKS = 3

_NOT_OVER_RANKS = {
    **dict.fromkeys(
        OF_PRODUCTS,
        "the applied gradient is known only after its reduction, when the ranks' "
        "examples are gone",
    ),
    **dict.fromkeys(
        OF_SQUARES,
        "each parameter's second moment would have to be summed over the ranks, a "
        "second exchange of the gradient's size",
    ),
    "grad_histogram": "it would count one rank's own examples only",
}


def refuse_quantities(
    options: ProbeOptions, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> None:
    """Refuse quantities that do not exist or that the loop cannot give.

    Raises:
        UsageError: With what is possible instead.
    """
    names = options.quantities
    unknown = [name for name in names if name not in COLUMNS_OF]
    if unknown:
        raise UsageError(
            f"quantities needs names among {', '.join(COLUMNS_OF)}, got "
            f"{', '.join(map(repr, unknown))}."
        )
    if len(set(names)) < len(names):
        raise UsageError(f"quantities needs each name once, got {', '.join(names)}.")
    _refuse_without_loss(options, optimizer)
    if "hessian_noise_scale" in names:
        _refuse_hessian(options, ranks)
    for name in names:
        if not ranks.alone and name in _NOT_OVER_RANKS:
            raise UsageError(
                f"quantities={name!r} needs one process, got {ranks.size} ranks: "
                f"{_NOT_OVER_RANKS[name]}; leave it out, or measure at frozen weights."
            )


def _refuse_without_loss(
    options: ProbeOptions, optimizer: torch.optim.Optimizer
) -> None:
    for name in options.quantities:
        if name in OF_LOSS and not isinstance(optimizer, torch.optim.SGD):
            raise UsageError(
                f"quantities={name!r} needs torch.optim.SGD, whose learning rate the "
                f"rule is about, got {type(optimizer).__name__}; leave it out."
            )
        if name in OF_LOSS | {"hessian_noise_scale"} and options.loss_fn is None:
            raise UsageError(
                f"quantities={name!r} needs the loss to be seen, got loss_fn=None; "
                "give it to attach() and call it through probe.loss_fn."
            )


def _refuse_hessian(options: ProbeOptions, ranks: Ranks) -> None:
    asked = options.estimator
    names = (asked,) if isinstance(asked, str) else asked
    if "ghost" in names and not ranks.alone:
        raise UsageError(
            "quantities='hessian_noise_scale' of ghost batches needs one process, got "
            f"{ranks.size} ranks; leave estimator='ghost' out, or the quantity."
        )
    if options.hessian_every < 1:
        raise UsageError(
            f"hessian_every needs 1 or more readings, got {options.hessian_every}."
        )
    if options.num_chunks < FEWEST_CHUNKS:
        raise UsageError(
            f"quantities='hessian_noise_scale' needs num_chunks of {FEWEST_CHUNKS} or "
            f"more in each half of the batch, got {options.num_chunks}."
        )
