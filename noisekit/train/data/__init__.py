"""Data sets, and the order in which a run visits their examples."""
