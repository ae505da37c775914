"""T5's vocabulary, from a file or from the Hugging Face hub, verified by its sha256."""

from pathlib import Path

from grr.files.digest import sha256
from grr.tokenizers.sentencepiece import T5_SHA256, Tokenizer

REPOSITORY, FILE = "google-t5/t5-base", "spiece.model"  # on the Hugging Face hub


def fetch_t5(source: str | Path | None, output: Path) -> Path:
    """Copy T5's vocabulary to output, from a file or from the Hugging Face hub, if its sha256 is right.

    Raises FileNotFoundError if there is no such file; ImportError if huggingface_hub is needed and not installed;
    OSError if the download fails; ValueError if the sha256 is another, or if output exists and is another file.
    """
    if output.is_file() and sha256(output) == T5_SHA256:
        return output
    if output.exists():
        raise ValueError(f"fetch_t5: {output} exists and is not T5's vocabulary; name another file (--output FILE)")
    file = _from_hub() if source is None else Path(source)
    if not file.is_file():
        raise FileNotFoundError(f"fetch_t5: there is no file {file}")
    if (digest := sha256(file)) != T5_SHA256:
        raise ValueError(
            f"fetch_t5: {file} must be {FILE} of {REPOSITORY}, whose sha256 is {T5_SHA256}, got "
            f"{file.stat().st_size:,} bytes of {digest}; download it again"
        )
    Tokenizer(file).save(output)
    return output


def _from_hub() -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ImportError(
            f"fetch_t5: without a file, {FILE} of {REPOSITORY} is fetched from the Hugging Face hub, which needs "
            'huggingface_hub; pip install "grr-coca[hub]", or download the file and name it: grr tokenizer fetch FILE'
        ) from None
    try:
        return Path(hf_hub_download(REPOSITORY, FILE))
    except Exception as error:  # errors of the network, of the hub, or of its cache have many types
        raise OSError(
            f"fetch_t5: {FILE} of {REPOSITORY} was not downloaded from the Hugging Face hub "
            f"({' '.join(str(error).split())}); download it elsewhere, and name the file: grr tokenizer fetch FILE"
        ) from error
