"""How each kind of layer tells its examples' gradients."""
