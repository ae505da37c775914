"""SentencePiece tokenizer: captions as ids in the layout that the model reads (GRR-CoCa, section 3.0.1)."""

import hashlib
import io
import logging
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from torch import Tensor

from grr.files.atomic import write_atomic

T5_SHA256 = "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"  # google-t5/t5-base, spiece.model
T5_SENTINELS = 100  # ids that T5 reserves for masked spans, after its 32,000 pieces
PAD, EOS, UNK = 0, 1, 2  # of T5, and of every vocabulary that `train_tokenizer` makes

logger = logging.getLogger(__name__)


class Tokenizer:
    """SentencePiece model with two more ids at its end: BOS = vocab_size - 2 and CLS = vocab_size - 1.

    T5's model has a vocabulary of 32,000 pieces + 100 sentinels + 2 = 32,102 ids. `context_length` is the number of
    tokens that the model reads; a caption becomes context_length + 1 ids. `fingerprint` is the file's sha256.
    Raises FileNotFoundError if there is no file; ValueError if the file is not a SentencePiece model, if its pad, eos
    and unk are not 0, 1 and 2, or if context_length is below 4.
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
                f"Tokenizer: context_length must be at least 4, for BOS, a token, EOS and CLS, got {context_length=}"
            )
        self.context_length = context_length
        self._model = Path(path).read_bytes()
        self.fingerprint = hashlib.sha256(self._model).hexdigest()
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except Exception as error:  # sentencepiece raises RuntimeError or SystemError, depending on the damage
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
        """Encode a caption as BOS t1 ... tn EOS PAD ... PAD CLS PAD: context_length + 1 ids.

        The tokens are truncated to context_length - 3. Any string is accepted: white space collapses, and characters
        that the vocabulary does not have become UNK. Only the first 16 context_length words are encoded, because a word
        seldom has less than a token.
        """
        max_tokens = self.context_length - 3  # the others are BOS, EOS and CLS
        tokens = self._tokens(caption)[:max_tokens]
        padding = [self.pad_id] * (max_tokens - len(tokens))
        return [self.bos_id, *tokens, self.eos_id, *padding, self.cls_id, self.pad_id]

    def truncates(self, caption: str) -> bool:
        """Returns whether a caption has more than context_length - 3 tokens, of which `encode` keeps the first."""
        return len(self._tokens(caption)) > self.context_length - 3

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """Decode ids [s] up to EOS; ids that are not pieces (BOS, CLS, PAD, sentinels) are skipped."""
        pieces = []
        for i in ids.tolist() if isinstance(ids, Tensor) else ids:
            if i == EOS:
                break
            if PAD < i < self._count:
                pieces.append(i)
        text: str = self._pieces.decode(pieces)
        return text

    def save(self, path: str | Path) -> None:
        """Write the vocabulary to a temporary file and rename it, so that a file of this name is always complete."""
        write_atomic(Path(path), self._model)

    def _tokens(self, caption: str) -> list[int]:
        text, count = caption.encode("utf-8", "replace").decode(), 16 * self.context_length
        tokens: list[int] = self._pieces.encode(" ".join(text.split(maxsplit=count)[:count]))
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

    The pieces are byte-pair merges (Sennrich et al. 2016), which become whole words even with a few sentences; the
    special ids are T5's. Equal captions lead to equal vocabularies. Of more than two million captions, two million are
    sampled. Raises ValueError if the captions are not strings, have no text, or have more characters than ids.
    """
    if isinstance(captions, str | bytes) or not isinstance(captions, Iterable):
        raise ValueError(
            f"train_tokenizer: captions must be a list of strings, got {type(captions).__name__} "
            f"{str(captions)[:60]!r}; give [caption, ...], or pairs.captions"
        )
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
            f"train_tokenizer: a vocabulary of {vocab_size=} cannot be trained on these captions ({error}); "
            "pass captions that have text, and more ids than they have distinct characters"
        ) from error
    write_atomic(Path(path), model.getvalue())
    tokenizer = Tokenizer(path, context_length=context_length)
    if tokenizer.vocab_size < vocab_size:
        logger.info("the captions need %d of the %d ids of tokenizer.vocab_size", tokenizer.vocab_size, vocab_size)
    return tokenizer
