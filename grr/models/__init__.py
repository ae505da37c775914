"""Models: the contrastive captioner, its builders and presets, and heads for other tasks."""
