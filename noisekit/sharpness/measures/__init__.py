"""Sharpness measures: one family of measures per file."""
