"""Generation of captions: sampling, beam search, the decoding state."""
