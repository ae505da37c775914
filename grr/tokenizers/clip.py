"""Captions as ids of CLIP's byte-pair vocabulary (Radford et al. 2021, section 2.4), for weights trained with it."""

import gzip
import hashlib
import html
import importlib.util
import re
import sys
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from itertools import groupby, pairwise
from pathlib import Path

from torch import Tensor

from grr.tokenizers.sentencepiece import Tokenizer

MERGES = 48_894  # those that CLIP takes of OpenAI's list, for 49,408 ids in all
VERSION = "#version: 0.2"  # the end of a list's first line
END = "</w>"  # marks, in the list, what ends a word
OPEN_CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"


class ClipTokenizer(Tokenizer):
    """CLIP's byte pairs in the layout that the model reads, and CLS as one more id at the end.

    `path` is the list of merges, OpenAI's bpe_simple_vocab_16e6.txt.gz or Hugging Face's merges.txt; it is not part of
    this library. The ids are CLIP's: 256 bytes, 256 bytes at the end of a word, a merge each, BOS, EOS; then CLS =
    vocab_size - 1 = 49,408. PAD is open_clip's, 0, which is also an exclamation mark that another sign follows without
    a merge: rare, and read as padding there and here. Every text can be spelled. It is mended by ftfy and lower case.
    `fingerprint` is the sha256 of the merges. Raises FileNotFoundError if there is no file, ImportError if ftfy is not
    installed, ValueError if the file is no list of merges or if context_length has no room for a token.
    """

    unk_id = -1  # there is none

    def __init__(self, path: str | Path, *, context_length: int = 77) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"ClipTokenizer: there is no file {path}; CLIP's merges are {OPEN_CLIP_FILE} in the package "
                "open_clip_torch, or merges.txt beside any CLIP on the Hugging Face hub"
            )
        if context_length < 4:
            raise ValueError(
                f"ClipTokenizer: context_length must have room for BOS, a token, EOS and CLS, got {context_length=}"
            )
        if not is_merges(path):
            raise ValueError(
                f"ClipTokenizer: the first line of a list of merges ends with {VERSION}, that of {path} "
                f"does not; give {OPEN_CLIP_FILE} or merges.txt"
            )
        pairs = [line.strip() for line in _read(path).rstrip().split("\n")[1 : MERGES + 1]]
        if wrong := [pair for pair in pairs if not _is_pair(pair)]:
            raise ValueError(f"ClipTokenizer: a line of {path} must be two pieces, got {wrong[0]!r}; copy it again")
        _mend("")
        self.context_length = context_length
        self._model = "\n".join([VERSION, *pairs, ""]).encode()
        self._open()

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of ids [s] up to EOS, or without it to the PAD at the end; BOS and CLS say nothing."""
        kept: list[int] = []
        for i in ids.tolist() if isinstance(ids, Tensor) else ids:
            if i == self.eos_id:
                break
            if 0 <= i < len(self._bytes):
                kept.append(i)
        while kept and kept[-1] == self.pad_id:
            kept.pop()
        return b"".join(self._bytes[i] for i in kept).decode("utf-8", "replace").strip()

    def _tokens(self, caption: str) -> list[int]:
        words = _words().findall(" ".join(_mend(caption).split()).lower())
        return [i for word in words[: self.context_length] for i in self._spell(word)]

    def _spelled(self, word: str) -> tuple[int, ...]:
        """The ids of a word: of its bytes, the pair that comes first in the list is merged, again and again."""
        letter = {byte: letter for letter, byte in _letters().items()}
        parts = [letter[byte] for byte in word.encode()][: 16 * self.context_length]  # more than there is room for
        parts[-1] += END
        while len(parts) > 1:
            first = min(pairwise(parts), key=lambda pair: self._ranks.get(pair, MERGES))
            if first not in self._ranks:
                break
            parts = list(_merged(parts, first))
        return tuple(self._ids[part] for part in parts)

    def _open(self) -> None:
        self.fingerprint = hashlib.sha256(self._model).hexdigest()
        pairs = [(first, second) for first, second in map(str.split, self._model.decode().split("\n")[1:-1])]
        letters = _letters()
        pieces = [*letters, *(letter + END for letter in letters), *(first + second for first, second in pairs)]
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self._ids = {piece: i for i, piece in enumerate(pieces)}
        self._bytes = [
            bytes(letters[c] for c in piece.removesuffix(END)) + b" " * piece.endswith(END) for piece in pieces
        ]
        self._spell = lru_cache(maxsize=2**16)(self._spelled)
        self.vocab_size = len(pieces) + 3
        self.bos_id, self.eos_id, self.cls_id = range(len(pieces), self.vocab_size)

    def __getstate__(self) -> dict[str, object]:
        return {"context_length": self.context_length, "_model": self._model}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._open()


def is_merges(path: str | Path) -> bool:
    """Whether a file is a list of merges, packed or not, by its first line."""
    try:
        return _read(path).partition("\n")[0].rstrip().endswith(VERSION)
    except (OSError, EOFError, zlib.error):
        return False


def installed_merges() -> Path:
    """CLIP's merges, where the package open_clip_torch has them. Raises FileNotFoundError if it is not installed."""
    spec = importlib.util.find_spec("open_clip")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / OPEN_CLIP_FILE).is_file():
            return file
    raise FileNotFoundError(
        "installed_merges: CLIP's merges are not part of this library, and open_clip_torch, which has them, is not "
        f"installed; give the path of {OPEN_CLIP_FILE}, or of the merges.txt beside any CLIP on the Hugging Face hub"
    )


def _read(path: str | Path) -> str:
    data = Path(path).read_bytes()
    packed = data.startswith(b"\x1f\x8b")
    return (gzip.decompress(data) if packed else data).decode("utf-8", "replace")


def _is_pair(line: str) -> bool:
    pieces = line.split(" ")
    return len(pieces) == 2 and all(pieces) and set("".join(pieces)) <= _letters().keys()


def _mend(text: str) -> str:
    """Wrongly decoded text as it was meant, straight quotes, and the characters that HTML writes by name."""
    try:
        import ftfy
    except ImportError as error:
        raise ImportError(
            'ClipTokenizer: ftfy, which mends captions, is not installed; pip install "grr-coca[clip]"'
        ) from error
    return html.unescape(html.unescape(ftfy.fix_text(text)))


@cache
def _words() -> re.Pattern[str]:
    """What CLIP takes for a word: the end of a contraction, letters, a single digit, or signs."""
    runs = [(kind, list(run)) for kind, run in groupby(map(chr, range(sys.maxunicode + 1)), _kind)]
    letters, digits = ("".join(f"{run[0]}-{run[-1]}" for kind, run in runs if kind == wanted) for wanted in "LN")
    return re.compile(rf"(?i:'(?:s|t|re|ve|m|ll|d))|[{letters}]+|[{digits}]|[^\s{letters}{digits}]+")


def _kind(character: str) -> str:
    """L for letters, N for digits and other numbers."""
    return unicodedata.category(character)[0]


@cache
def _letters() -> dict[str, int]:
    """What stands for each byte in the list of merges, in the order of ids: its character of Latin-1, where that can be
    seen, and for the others the characters that follow behind Latin-1.
    """
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(unseen)}


def _merged(parts: list[str], pair: tuple[str, str]) -> Iterator[str]:
    i = 0
    while i < len(parts):
        together = tuple(parts[i : i + 2]) == pair
        yield "".join(pair) if together else parts[i]
        i += 1 + together
