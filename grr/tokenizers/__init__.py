"""Tokenizers: SentencePiece, and the byte-pair encoding of CLIP."""
