"""Many measures of one model on the same data."""
