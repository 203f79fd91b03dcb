"""Where a run is in training, how well the model does, and its weights."""

from noisekit.core.quantity import Quantity

_SPLIT_WORDS = {"train": "Training", "validation": "Validation", "test": "Test"}

TRAINING_QUANTITIES = (
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
