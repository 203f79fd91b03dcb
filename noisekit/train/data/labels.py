"""Training labels that are replaced by wrong or random ones."""

import torch

from noisekit.core.errors import UsageError
from noisekit.core.randomness import stream
from noisekit.train.data.section import DataSection, TensorPair


def relabelled(
    train: TensorPair, num_classes: int, spec: DataSection
) -> tuple[TensorPair, str]:
    """Return the training examples with the labels that ``spec`` asks for.

    Which examples, and their new labels, depend on ``split_seed`` and on the number of
    training examples alone. A larger share replaces the labels of the same examples
    and of more. ``label_noise`` draws from the other classes, so that exactly
    the stated share, rounded to whole examples, is wrong; ``random_labels`` draws from
    all classes.

    Returns:
        The examples, and what was done in words; empty where nothing was.

    Raises:
        UsageError: If examples have a target per position, or all the same one.

    Source:
        Zhang et al. 2017, arXiv:1611.03530, section 2 (random labels).
    """
    share = spec.label_noise or spec.random_labels
    if share == 0.0:
        return train, ""
    if train.targets.dim() > 1:
        raise UsageError(
            "data.label_noise and data.random_labels need one label per example, got "
            f"targets of shape {tuple(train.targets.shape)}; leave them out."
        )
    if num_classes < 2:
        raise UsageError(
            f"data.label_noise and data.random_labels need 2 classes or more, got "
            f"{num_classes} in {spec.name}; leave them out."
        )
    count = round(share * len(train))
    generator = stream(spec.split_seed, "labels", spec.name)
    chosen = torch.randperm(len(train), generator=generator)[:count]
    targets = train.targets.clone()
    if spec.label_noise:
        # Adding 1 to classes - 1, modulo classes, gives each other class evenly.
        shift = torch.randint(1, num_classes, (len(train),), generator=generator)
        targets[chosen] = (targets[chosen] + shift[:count]) % num_classes
        what = "replaced by other classes"
    else:
        drawn = torch.randint(num_classes, (len(train),), generator=generator)
        targets[chosen] = drawn[:count]
        what = "drawn anew from all classes"
    words = f"{count} of {len(train)} training labels {what}"
    return TensorPair(train.inputs, targets), words
