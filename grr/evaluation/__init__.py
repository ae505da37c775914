"""Evaluation: losses, retrieval, caption metrics, zero-shot classification, probes, FLOPs."""
