"""Readings of a training that runs on several processes."""
