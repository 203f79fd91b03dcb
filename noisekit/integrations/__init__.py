"""Where probes meet what they do not know themselves, such as the store of runs."""

from noisekit.integrations.recording import attach

__all__ = ["attach"]
