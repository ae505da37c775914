"""Tokenizers: SentencePiece and CLIP's byte-pair encoding."""
