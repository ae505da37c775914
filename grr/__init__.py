"""GRR: contrastive captioners (CoCa) built from the parts modern language models use."""

__version__ = "0.2.0"
