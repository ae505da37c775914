"""Generation of captions: greedy search, sampling, beam search."""
