"""The Hessian noise scale of a data set at frozen weights."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch, count_examples, take_examples
from noisekit.core.errors import BatchSizeError, CoupledExamplesError, UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.core.settings import PositiveInt
from noisekit.curvature import HessianOperator
from noisekit.noise.hessian_noise import HessianNoiseScale, hessian_noise_of_sums


@checked
def hessian_weighted_noise(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    chunk_size: PositiveInt = 1,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
) -> HessianNoiseScale:
    r"""Return ``tr(HΣ) / G'HG`` of a data set at frozen weights, with its error.

    ``H`` is the whole data set's. With ``chunk_size=1`` ``tr(HΣ)`` is exact for the
    set (covariance with n - 1); larger chunks are cheaper and noisier. ``G'HG`` is
    that of what the data are a sample of, without what the noise adds. Errors are a
    jackknife over chunks given ``H``, whose own error is not in them.

    Costs one Hessian-vector product with the whole data and one gradient for every
    chunk; holds a few copies of the parameters.

    Args:
        model: The model, left as it was, or an :class:`EmpiricalRisk` in place of it,
            of ``loss_fn`` and of ``batches``.
        loss_fn: Called with outputs and targets; returns a scalar.
        batches: Yields ``(inputs, targets)``.
        chunk_size: Examples behind one gradient; has to divide every batch.
        bn: BatchNorm policy; ``"batch"`` couples the examples and is refused.
        normaliser: What the loss of a batch is divided by, given its targets.
        params: Names or patterns of the parameters to measure; all by default.

    Raises:
        CoupledExamplesError: If examples have no gradients of their own.
        BatchSizeError: If batches do not make whole chunks, or fewer than 3.
        UsageError: If the data are spread over several processes.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, section 2.2.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> noise = nk.hessian_weighted_noise(model, loss_fn, batches * 50)
        >>> print(noise.hessian_noise_scale)
        1.02 [0.7338, 1.674]
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    _check(risk, chunk_size)
    num_chunks = risk.num_examples // chunk_size
    with risk.evaluating(), HessianOperator(risk) as hessian:
        _, gradient = risk.value_and_grad()
        pulled = hessian @ gradient
        rows, diagonal = [], []
        for part in _parts(risk, chunk_size):
            own = part * num_chunks
            rows.append(own @ pulled * num_chunks)
            diagonal.append(own @ (hessian @ own))
    return hessian_noise_of_sums(
        torch.stack(rows), torch.stack(diagonal), chunk_size=chunk_size
    )


def _check(risk: EmpiricalRisk, chunk_size: int) -> None:
    if not risk.ranks.alone:
        raise UsageError(
            "hessian_weighted_noise needs all data in one process, got "
            f"{risk.ranks.size} ranks; call it on one rank with the model unwrapped."
        )
    if risk.bn == "batch":
        raise CoupledExamplesError(
            "gradients of single examples need BatchNorm's running statistics, got "
            "bn='batch', which couples the examples; use bn='running' or "
            "'recalibrated'."
        )
    sizes = [count_examples(batch) for _, batch in risk.weighted_batches()]
    if any(size % chunk_size for size in sizes):
        raise BatchSizeError(
            "hessian_weighted_noise needs a chunk_size that divides every batch, got "
            f"{chunk_size} and batches of {min(sizes)} to {max(sizes)} examples; use "
            "chunk_size=1."
        )


def _parts(risk: EmpiricalRisk, chunk_size: int) -> Iterator[Tensor]:
    """Yield every chunk's part of the risk's gradient."""
    for _, batch in risk.weighted_batches():
        for start in range(0, count_examples(batch), chunk_size):
            index = torch.arange(start, start + chunk_size)
            part = risk.on([take_examples(batch, index)])
            yield part.value_and_grad()[1] * (part.total / risk.total)
