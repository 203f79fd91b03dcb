"""Optional per-step quantities, computed from the training step's own backward pass."""
