"""A vocabulary trained on the captions of text files and of configs."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from grr.cli.check import read_config
from grr.experiments import catalog
from grr.tokenizers import Tokenizer, train_tokenizer


def train_vocabulary(sources: Sequence[Path], overrides: Sequence[str], output: Path, *, vocab_size: int) -> Tokenizer:
    """Train a vocabulary on the captions of text files, one per line, and of the section `data` of configs.

    overrides: section.key=value for the configs. Raises ValueError if output exists, if a config is wrong or its recipe
    has no captions, or as `train_tokenizer` does; FileNotFoundError if a file is missing.
    """
    if output.exists():
        raise ValueError(f"train_vocabulary: {output} exists already; name another file, or delete it")
    captions = [caption for source in sources for caption in _captions(source, overrides)]
    return train_tokenizer(captions, output, vocab_size=vocab_size)


def _captions(source: Path, overrides: Sequence[str]) -> Iterator[str]:
    if source.suffix in (".yaml", ".yml"):
        cfg, sections = read_config(source, overrides, catalog.recipe_of(source))
        if "data" not in sections:
            raise ValueError(f"train_vocabulary: {source} has no section data, so it has no captions")
        yield from cfg.build("data").captions
        return
    if not source.is_file():
        raise FileNotFoundError(f"train_vocabulary: there is no file of captions {source}")
    with source.open(encoding="utf-8-sig", errors="replace") as lines:
        yield from lines
