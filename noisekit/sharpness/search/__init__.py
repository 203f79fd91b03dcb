"""Maximization of the loss in balls and boxes around the weights."""
