"""The ways to estimate gradient noise from what a step has left."""
