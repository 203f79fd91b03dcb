"""How far the loss rises around the weights: in boxes, balls and under noise."""
