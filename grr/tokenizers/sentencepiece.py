"""Captions as ids: SentencePiece pieces in the layout that the model reads (GRR-CoCa, section 3.0.1)."""

import hashlib
import io
import logging
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from torch import Tensor

T5_SHA256 = "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"  # google-t5/t5-base, spiece.model
T5_SENTINELS = 100  # ids that T5 keeps for masked spans, behind its 32,000 pieces
PAD, EOS, UNK = 0, 1, 2  # of T5, and of every model trained here

logger = logging.getLogger(__name__)


class Tokenizer:
    """A SentencePiece model with two more ids at its end: BOS = vocab_size - 2 and CLS = vocab_size - 1.

    T5's own model gives a vocabulary of 32,000 pieces + 100 sentinels + 2 = 32,102. `context_length` is the number of
    tokens that the model reads; a caption becomes context_length + 1 ids. `fingerprint` is the file's sha256.
    Raises FileNotFoundError if there is no file, ValueError if it is no SentencePiece model, or one whose pad, eos and
    unk are not 0, 1 and 2, or if context_length has no room for a token.
    """

    pad_id, eos_id, unk_id = PAD, EOS, UNK

    def __init__(self, path: str | Path, *, context_length: int = 64) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"Tokenizer: there is no file {path}; T5's vocabulary is the file spiece.model of google-t5/t5-base on "
                "the Hugging Face hub, or leave the path out to train a vocabulary on the captions"
            )
        if context_length < 4:
            raise ValueError(
                f"Tokenizer: context_length must have room for BOS, a token, EOS and CLS, got {context_length=}"
            )
        self.context_length = context_length
        self._model = Path(path).read_bytes()
        self.fingerprint = hashlib.sha256(self._model).hexdigest()
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except Exception as error:  # sentencepiece raises RuntimeError or SystemError, by the kind of damage
            raise ValueError(f"Tokenizer: {path} is not a SentencePiece model ({error}); download it again") from error
        special = self._pieces.pad_id(), self._pieces.eos_id(), self._pieces.unk_id()
        if special != (PAD, EOS, UNK):
            raise ValueError(
                f"Tokenizer: pad, eos and unk must have the ids 0, 1 and 2, as in T5, got {special} from {path}; "
                "train with pad_id=0, eos_id=1, unk_id=2, or with grr.tokenizers.train_tokenizer"
            )
        self._count: int = self._pieces.get_piece_size()
        sentinels = T5_SENTINELS if self.fingerprint == T5_SHA256 else 0
        self.vocab_size = self._count + sentinels + 2
        self.bos_id, self.cls_id = self.vocab_size - 2, self.vocab_size - 1

    def encode(self, caption: str) -> list[int]:
        """BOS t1 ... tn EOS PAD ... PAD CLS PAD: context_length + 1 ids, the caption cut so that EOS and CLS still fit.

        Any string will do: white space collapses, and what the vocabulary cannot spell is UNK. Only the first
        16 context_length words are looked at, since a word seldom has less than a token.
        """
        room = self.context_length - 3
        tokens = self._tokens(caption)[:room]
        padding = [self.pad_id] * (room - len(tokens))
        return [self.bos_id, *tokens, self.eos_id, *padding, self.cls_id, self.pad_id]

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of ids [s] up to EOS; ids that are not pieces (BOS, CLS, PAD, sentinels) say nothing."""
        pieces = []
        for i in ids.tolist() if isinstance(ids, Tensor) else ids:
            if i == EOS:
                break
            if PAD < i < self._count:
                pieces.append(i)
        text: str = self._pieces.decode(pieces)
        return text

    def save(self, path: str | Path) -> None:
        """Write the vocabulary, aside first, so that a file of this name is always whole."""
        _write(Path(path), self._model)

    def _tokens(self, caption: str) -> list[int]:
        words = (
            caption.encode("utf-8", "replace")
            .decode()
            .split(maxsplit=16 * self.context_length)[: 16 * self.context_length]
        )
        tokens: list[int] = self._pieces.encode(" ".join(words))
        return tokens

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in vars(self).items() if key != "_pieces"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=self._model)


def train_tokenizer(
    captions: Iterable[str], path: str | Path, *, vocab_size: int = 512, context_length: int = 64
) -> Tokenizer:
    """Train a vocabulary of at most vocab_size ids, BOS and CLS among them, and write it to path.

    Byte-pair merges (Sennrich et al. 2016) with T5's special ids, the same for the same captions: even a few sentences
    give whole words. Of more than two million captions, two million are drawn. Raises ValueError if there is no text,
    or more characters than ids.
    """
    lines = (" ".join(c.encode("utf-8", "replace").decode().replace("\0", " ").split()) for c in captions)
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for line in lines if line),
            model_writer=model,
            vocab_size=vocab_size - 2,
            model_type="bpe",
            character_coverage=1.0,
            hard_vocab_limit=False,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            bos_id=-1,
            input_sentence_size=2_000_000,
            shuffle_input_sentence=True,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"train_tokenizer: no vocabulary of {vocab_size=} can be trained on these captions ({error}); "
            "are there captions, and more ids than different characters?"
        ) from error
    _write(Path(path), model.getvalue())
    tokenizer = Tokenizer(path, context_length=context_length)
    if tokenizer.vocab_size < vocab_size:
        logger.info("the captions fill %d of the %d ids of tokenizer.vocab_size", tokenizer.vocab_size, vocab_size)
    return tokenizer


def _write(path: Path, data: bytes) -> None:
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(data)
    aside.replace(path)
