"""Sums over the spectrum: trace, diagonal, Frobenius norm, effective numbers."""
