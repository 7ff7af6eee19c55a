"""gemma-edge: Gemma 4 E2B and E4B on edge devices."""

__version__ = "0.1.0"
