"""What else comes of the same pass: tests, moments, movement, curvature."""
