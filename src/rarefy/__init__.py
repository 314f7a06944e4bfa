"""Compress a trained network under a budget, with proof."""

__version__ = "0.1.0"
