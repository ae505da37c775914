"""Experiments: runs, their comparison, sweeps, the catalog of recipes and configs."""
