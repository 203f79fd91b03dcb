"""Per-example gradients of each kind of layer."""
