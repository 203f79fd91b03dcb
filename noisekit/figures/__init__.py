"""Paper-style figures: each takes tidy tables and returns a ``Plot``.

A ``Plot`` holds the Matplotlib figure, the table that was drawn and a caption.
Nothing in here computes with torch.
"""

from noisekit.figures.batch_sizes import grad_sq_norm_against_batch_size
from noisekit.figures.comparison import paired_arms
from noisekit.figures.curvature import sharpness_against_loss
from noisekit.figures.density import spectral_density
from noisekit.figures.example_norms import example_norm_histograms
from noisekit.figures.forest import claim_forest
from noisekit.figures.landscape import linear_path
from noisekit.figures.noise import noise_over_training, windowed_noise
from noisekit.figures.plot import FORMATS, Plot, writable_folder, write_table
from noisekit.figures.ratios import descriptive_ratios, paired_ratios
from noisekit.figures.slices import loss_lines, loss_surface
from noisekit.figures.theme import (
    ONE_COLUMN,
    TWO_COLUMNS,
    ArmStyle,
    arm_styles,
    snapshot_words,
    themed,
)
from noisekit.figures.timeline import timeline
from noisekit.figures.tradeoff import batch_size_tradeoff
from noisekit.figures.training import training_curves
from noisekit.figures.tuning import rate_tuning

__all__ = [
    "FORMATS",
    "ONE_COLUMN",
    "TWO_COLUMNS",
    "ArmStyle",
    "Plot",
    "arm_styles",
    "batch_size_tradeoff",
    "claim_forest",
    "descriptive_ratios",
    "example_norm_histograms",
    "grad_sq_norm_against_batch_size",
    "linear_path",
    "loss_lines",
    "loss_surface",
    "noise_over_training",
    "paired_arms",
    "paired_ratios",
    "rate_tuning",
    "sharpness_against_loss",
    "snapshot_words",
    "spectral_density",
    "themed",
    "timeline",
    "training_curves",
    "windowed_noise",
    "writable_folder",
    "write_table",
]
