"""Thin scripts over the package: preparing checkpoints and data."""
