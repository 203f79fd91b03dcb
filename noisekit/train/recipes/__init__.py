"""Recipes: TOML files validated into frozen specifications of runs."""
