"""The command line: ``noisekit --help``."""
