"""The largest and smallest eigenvalues of an operator."""
