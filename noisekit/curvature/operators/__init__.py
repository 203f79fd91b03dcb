"""Products with Hessian, Gauss-Newton, Fisher and covariance matrices."""
