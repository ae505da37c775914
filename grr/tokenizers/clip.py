"""CLIP's byte-pair encoding (Radford et al. 2021, section 2.4), for weights that were trained with it."""

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

MERGES = 48_894  # those that CLIP uses of OpenAI's list, for 49,408 ids in total
VERSION = "#version: 0.2"  # the end of a list's first line
END = "</w>"  # the suffix, in the list, of a piece at the end of a word
OPEN_CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"


class ClipTokenizer(Tokenizer):
    """CLIP's byte-pair encoding in the layout that the model reads, with CLS as one more id at the end.

    `path` is the list of merges, OpenAI's bpe_simple_vocab_16e6.txt.gz or Hugging Face's merges.txt; it is not part of
    this library. The ids are CLIP's: 256 bytes, 256 bytes at the end of a word, one for each merge, BOS, EOS; then
    CLS = vocab_size - 1 = 49,408. PAD is 0 as in open_clip, which is also the id of an exclamation mark inside a run of
    signs that has no merge: this is rare, and open_clip reads it as padding too. Text is repaired by ftfy and written
    in lower case; every text can be encoded. `fingerprint` is the sha256 of the merges. Raises FileNotFoundError if
    there is no file; ImportError if ftfy is not installed; ValueError if the file is not a list of merges or if
    context_length is below 4.
    """

    unk_id = -1  # bytes encode every text, so there is not an unknown token

    def __init__(self, path: str | Path, *, context_length: int = 77) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"ClipTokenizer: there is no file {path}; CLIP's merges are {OPEN_CLIP_FILE} in the package "
                "open_clip_torch, or merges.txt beside any CLIP on the Hugging Face hub"
            )
        if context_length < 4:
            raise ValueError(
                "ClipTokenizer: context_length must be at least 4, for BOS, a token, EOS and CLS, got "
                f"{context_length=}"
            )
        if not is_merges(path):
            raise ValueError(
                f"ClipTokenizer: the first line of a list of merges ends with {VERSION}, that of {path} "
                f"does not; pass {OPEN_CLIP_FILE} or merges.txt"
            )
        pairs = [line.strip() for line in _read(path).rstrip().split("\n")[1 : MERGES + 1]]
        if wrong := [pair for pair in pairs if not _is_pair(pair)]:
            raise ValueError(f"ClipTokenizer: a line of {path} must be two pieces, got {wrong[0]!r}; copy it again")
        _repair("")  # raises ImportError at construction, not at the first caption
        self.context_length = context_length
        self._model = "\n".join([VERSION, *pairs, ""]).encode()
        self._open()

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """Decode ids [s] up to EOS, or without EOS up to the trailing PAD; BOS and CLS are skipped."""
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
        words = _words().findall(" ".join(_repair(caption).split()).lower())
        return [i for word in words[: self.context_length] for i in self._word_ids(word)]

    def _merge(self, word: str) -> tuple[int, ...]:
        """Returns the ids of a word: starting from its bytes, merge the pair of lowest rank until none is listed."""
        letter = {byte: letter for letter, byte in _letters().items()}
        parts = [letter[byte] for byte in word.encode()][: 16 * self.context_length]  # the rest would be cut off
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
        self._word_ids = lru_cache(maxsize=2**16)(self._merge)
        self.vocab_size = len(pieces) + 3
        self.bos_id, self.eos_id, self.cls_id = range(len(pieces), self.vocab_size)

    def __getstate__(self) -> dict[str, object]:
        return {"context_length": self.context_length, "_model": self._model}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._open()


def is_merges(path: str | Path) -> bool:
    """Returns whether a file is a list of merges, compressed or not, by its first line."""
    try:
        return _read(path).partition("\n")[0].rstrip().endswith(VERSION)
    except (OSError, EOFError, zlib.error):
        return False


def installed_merges() -> Path:
    """Returns the path of CLIP's merges in the package open_clip_torch.

    Raises FileNotFoundError if it is not installed.
    """
    spec = importlib.util.find_spec("open_clip")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / OPEN_CLIP_FILE).is_file():
            return file
    raise FileNotFoundError(
        "installed_merges: CLIP's merges are not part of this library, and open_clip_torch, which has them, is not "
        f"installed; pass the path of {OPEN_CLIP_FILE}, or of the merges.txt beside any CLIP on the Hugging Face hub"
    )


def _read(path: str | Path) -> str:
    data = Path(path).read_bytes()
    compressed = data.startswith(b"\x1f\x8b")
    return (gzip.decompress(data) if compressed else data).decode("utf-8", "replace")


def _is_pair(line: str) -> bool:
    pieces = line.split(" ")
    return len(pieces) == 2 and all(pieces) and set("".join(pieces)) <= _letters().keys()


def _repair(text: str) -> str:
    """Repair wrongly decoded text, straighten quotes, and replace HTML entities, as CLIP does."""
    try:
        import ftfy
    except ImportError as error:
        raise ImportError(
            'ClipTokenizer: ftfy, which repairs captions, is not installed; pip install "grr-coca[clip]"'
        ) from error
    return html.unescape(html.unescape(ftfy.fix_text(text)))


@cache
def _words() -> re.Pattern[str]:
    """Returns CLIP's pattern of a word: the end of a contraction, letters, a single digit, or signs."""
    runs = [(kind, list(run)) for kind, run in groupby(map(chr, range(sys.maxunicode + 1)), _kind)]
    letters, digits = ("".join(f"{run[0]}-{run[-1]}" for kind, run in runs if kind == wanted) for wanted in "LN")
    return re.compile(rf"(?i:'(?:s|t|re|ve|m|ll|d))|[{letters}]+|[{digits}]|[^\s{letters}{digits}]+")


def _kind(character: str) -> str:
    """Returns the Unicode class of a character: L for letters, N for digits and other numbers."""
    return unicodedata.category(character)[0]


@cache
def _letters() -> dict[str, int]:
    """Returns the character that represents each byte in the list of merges, in the order of ids.

    It is the Latin-1 character of the byte if that is visible; the other bytes are numbered from U+0100.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    invisible = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(invisible)}


def _merged(parts: list[str], pair: tuple[str, str]) -> Iterator[str]:
    i = 0
    while i < len(parts):
        is_pair = tuple(parts[i : i + 2]) == pair
        yield "".join(pair) if is_pair else parts[i]
        i += 1 + is_pair
