"""Readers of data sets, a module a family of formats."""
