"""The commands tokenizer fetch and tokenizer train."""

import argparse
from pathlib import Path
from shlex import quote
from typing import Any

from grr.cli.parser import Parser, add_command, count
from grr.experiments import catalog


def add_tokenizer(subparsers: Any) -> None:
    summary = "Download T5's vocabulary, or train a vocabulary."
    details = "A run whose config names no vocabulary trains one on its captions."
    parser: Parser = subparsers.add_parser("tokenizer", help=summary, description=f"{summary}\n\n{details}")
    parser.add_commands((add_fetch, add_train))


def add_fetch(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        fetch,
        "fetch",
        "Download T5's vocabulary, which the paper uses, and verify its checksum.",
        """
        The file is spiece.model of google-t5/t5-base. It is read from a file on disk, or downloaded from the Hugging
        Face hub (pip install "grr-coca[hub]").

          grr tokenizer fetch
          grr tokenizer fetch downloads/spiece.model --output data/spiece.model

        Next: grr run pretrain/photos tokenizer.path=spiece.model
        """,
    )
    parser.add_argument("file", metavar="FILE", nargs="?", help="default: from the hub")
    parser.add_argument("--output", metavar="FILE", default="spiece.model", help="default: spiece.model")


def fetch(options: argparse.Namespace) -> int:
    """Write T5's vocabulary to a file after verifying its checksum."""
    from grr.tokenizers.vocabulary import fetch_t5

    print(f"{fetch_t5(options.file, Path(options.output))}: T5's vocabulary; the checksum is correct")
    print(f"next: grr run pretrain/photos tokenizer.path={quote(options.output)}")
    return 0


def add_train(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        train,
        "train",
        "Train a vocabulary on captions.",
        """
        The captions are lines of text files, or the data of configs; section.key=value changes the configs.

          grr tokenizer train captions.txt --vocab-size 4000 --output mine.model
          grr tokenizer train mine.yaml data.path=my_photos --vocab-size 4000 --output mine.model

        Next: grr run pretrain/photos tokenizer.path=mine.model
        """,
    )
    parser.add_argument("captions", metavar="CAPTIONS", nargs="+", help="text files, configs, section.key=value")
    parser.add_argument("--vocab-size", type=count, metavar="N", required=True, help="the largest number of ids")
    parser.add_argument("--output", metavar="FILE", required=True)


def train(options: argparse.Namespace) -> int:
    """Train a vocabulary on the captions of text files and configs."""
    from grr.cli.vocabulary import train_vocabulary
    from grr.config import OVERRIDE

    overrides = [word for word in options.captions if OVERRIDE.match(word)]
    sources = [word for word in options.captions if word not in overrides]
    tokenizer = train_vocabulary(
        [catalog.config_file(s) if _is_config(s) else Path(s) for s in sources],
        overrides,
        Path(options.output),
        vocab_size=options.vocab_size,
    )
    print(f"{options.output}: {tokenizer.vocab_size:,} ids")
    print(f"next: grr run pretrain/photos tokenizer.path={quote(options.output)}")
    return 0


def _is_config(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or (not Path(name).exists() and "/" in name and "." not in name)
