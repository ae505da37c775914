"""Readers of data sets, one module for each family of formats."""
