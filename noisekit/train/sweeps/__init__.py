"""Sweeps: many runs of one recipe, scheduled over workers."""
