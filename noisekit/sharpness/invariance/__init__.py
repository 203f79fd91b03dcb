"""Rescalings that keep a network's function, and which measures see them."""
