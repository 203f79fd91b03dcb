"""How the eigenvalues of an operator are distributed."""
