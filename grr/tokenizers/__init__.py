"""Tokenizers: captions as ids, by SentencePiece models or by CLIP's byte pairs."""

from collections.abc import Iterable
from pathlib import Path

from grr.tokenizers.clip import ClipTokenizer, installed_merges, is_merges
from grr.tokenizers.sentencepiece import Tokenizer, train_tokenizer

__all__ = ["ClipTokenizer", "Tokenizer", "installed_merges", "load_tokenizer", "open_tokenizer", "train_tokenizer"]


def load_tokenizer(path: str | Path, *, context_length: int = 64) -> Tokenizer:
    """Returns the tokenizer of a vocabulary file, a SentencePiece model or CLIP's merges, as its content shows.

    Raises as `Tokenizer` and `ClipTokenizer` do.
    """
    kind = ClipTokenizer if is_merges(path) else Tokenizer
    return kind(path, context_length=context_length)


def open_tokenizer(
    captions: Iterable[str],
    file: Path,
    resuming: bool = False,
    *,
    path: str | None = None,
    vocab_size: int = 512,
    context_length: int = 64,
) -> Tokenizer:
    """Returns the tokenizer of a run, whose vocabulary is stored in `file`.

    The vocabulary is copied from `path` (T5's spiece.model, for example). Without a path, a run that resumes uses the
    one in `file`, and a new run trains one of vocab_size ids on the captions: a file that a failed start left is
    replaced. One of many processes calls it, by `on_rank_0`.
    """
    if path is not None:
        load_tokenizer(path, context_length=context_length).save(file)
    elif not (resuming and file.is_file()):
        return train_tokenizer(captions, file, vocab_size=vocab_size, context_length=context_length)
    return load_tokenizer(file, context_length=context_length)
