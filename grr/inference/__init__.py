"""Inference on image files with a trained model."""
