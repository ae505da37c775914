"""Metrics of other people's evaluations, by their published definitions."""
