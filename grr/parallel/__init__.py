"""Processes and devices: process groups, sharding, precision, compilation, initialization."""
