"""The same quantity by several packages, and why they differ."""
