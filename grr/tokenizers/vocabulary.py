"""T5's vocabulary, from a file or from the Hugging Face hub, verified by its sha256."""

import hashlib
from pathlib import Path

from grr.tokenizers.sentencepiece import T5_SHA256, Tokenizer

REPOSITORY, FILE = "google-t5/t5-base", "spiece.model"  # on the Hugging Face hub


def fetch_t5(source: str | Path | None, output: Path) -> Path:
    """Copy T5's vocabulary to output, from a file or from the Hugging Face hub, if it is the very one.

    Raises FileNotFoundError if there is no such file, ImportError if the hub is wanted and huggingface_hub not
    installed, OSError if the hub does not give it, ValueError if the sha256 is another, or if output is another file.
    """
    if output.is_file() and _sha256(output.read_bytes()) == T5_SHA256:
        return output
    if output.exists():
        raise ValueError(f"fetch_t5: {output} is there, and is not T5's vocabulary; name another file (--output FILE)")
    file = _from_hub() if source is None else Path(source)
    if not file.is_file():
        raise FileNotFoundError(f"fetch_t5: there is no file {file}")
    data = file.read_bytes()
    if _sha256(data) != T5_SHA256:
        raise ValueError(
            f"fetch_t5: {file} must be {FILE} of {REPOSITORY}, whose sha256 is {T5_SHA256}, got {len(data):,} bytes of "
            f"{_sha256(data)}; download it again"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    Tokenizer(file).save(output)
    return output


def _from_hub() -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ImportError(
            f"fetch_t5: without a file, {FILE} of {REPOSITORY} is fetched from the Hugging Face hub, which takes "
            'huggingface_hub; pip install "grr-coca[hub]", or download the file and name it: grr tokenizer fetch FILE'
        ) from None
    try:
        return Path(hf_hub_download(REPOSITORY, FILE))
    except Exception as error:  # of the network, of the hub, of its cache
        raise OSError(
            f"fetch_t5: the Hugging Face hub does not give {FILE} of {REPOSITORY} ({' '.join(str(error).split())}); "
            "download it elsewhere, and name the file: grr tokenizer fetch FILE"
        ) from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
