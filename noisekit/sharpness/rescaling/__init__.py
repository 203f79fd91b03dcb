"""Rescalings of weights that leave a network's function unchanged."""
