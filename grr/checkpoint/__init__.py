"""Checkpoints: training state, model folders, when a run saves and resumes."""
