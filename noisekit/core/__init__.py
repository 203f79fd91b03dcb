"""Foundations shared by every layer; import the modules, this package is empty."""
