"""Repositories of models on the Hugging Face hub: listed and downloaded by its own client, and verified."""

import hashlib
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from grr.files.digest import sha256

PREFIX = "hf-hub:"
NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
TIMEOUT = 10  # seconds for the list of files, before what is in the cache is used
LIKELY = ("config.json", "open_clip_config.json", "open_clip_pytorch_model.bin")  # a repository of a model has one


class Repository(NamedTuple):
    """A repository at one of its commits; `fetch` downloads its files."""

    name: str  # owner/name
    revision: str  # a branch, tag or commit, by which the cache of the client knows the commit
    commit: str
    files: frozenset[str]
    offline: str | None  # why only what is in the cache can be used; None: the hub was reached

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}@{self.commit}"

    def fetch(self, *names: str) -> Path:
        """Download files unless they are in the cache, verify each, and return the folder that they are in.

        Raises OSError if a file cannot be downloaded, ValueError if its content does not have the hash that the hub
        names it by.
        """
        folder = Path()
        for name in names:
            try:
                file = _client().hf_hub_download(
                    self.name, name, revision=self.revision, local_files_only=self.offline is not None
                )
            except Exception as error:  # errors of the network, of the hub, or of its cache have many types
                raise OSError(
                    f"load: {name} of {PREFIX}{self.name} must be downloaded, or be in the cache of the Hugging Face "
                    f"hub, got {_first_line(error)}; connect and load it again"
                ) from error
            verify(Path(file), f"{name} of {PREFIX}{self.name}")
            folder = Path(file).parent
            if folder.name != self.commit:
                raise OSError(
                    f"load: {name} of {PREFIX}{self.name} must be of the commit {self.commit}, got {folder.name}: "
                    "there is a new commit since the files were listed; load it again"
                )
        return folder


def is_hub_name(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path names a repository on the hub, hf-hub:owner/name, instead of a folder."""
    return os.fspath(path).startswith(PREFIX)


def split_name(name: str, *, who: str = "load") -> tuple[str, str]:
    """Returns owner/name and the revision of a name, which may start with hf-hub: and end with @revision.

    Raises ValueError for another name; the message begins with `who`.
    """
    match = NAME.fullmatch(name.removeprefix(PREFIX))
    if match is None:
        raise ValueError(
            f"{who}: the name of a model on the Hugging Face hub must be {PREFIX}owner/name or "
            f"{PREFIX}owner/name@revision, got {name!r}; copy owner/name from its page, or see grr models"
        )
    return match["repository"], match["revision"] or "main"


def open_repository(name: str) -> Repository:
    """List the files of a repository by the hub's client, or those in its cache without a connection.

    name: hf-hub:owner/name or hf-hub:owner/name@revision, a branch, tag or commit. The client's environment variables
    apply: HF_HOME for the cache, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT. Raises ImportError without huggingface_hub,
    ValueError for another name, FileNotFoundError if there is no such repository or revision, OSError if the hub
    cannot be reached and the cache does not hold it.
    """
    repository, revision = split_name(name)
    client = _client()
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = client.HfApi().model_info(repository, revision=revision, timeout=TIMEOUT)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"load: {PREFIX}{repository}@{revision} must be a repository that you may read, got {_first_line(error)}; "
            "copy owner/name from its page, accept its terms there if it has some, and set HF_TOKEN if it is private"
        ) from error
    except Exception as error:  # errors of the network, and of the offline mode, have many types
        found = [client.try_to_load_from_cache(repository, file, revision=revision) for file in LIKELY]
        folders = [Path(file).parent for file in found if isinstance(file, str)]
        if not folders:
            raise OSError(
                f"load: {PREFIX}{repository}@{revision} must be downloaded once, and is not in the cache of the "
                f"Hugging Face hub, got {_first_line(error)}; connect and load it again"
            ) from error
        files = frozenset(file.name for file in folders[0].iterdir())
        return Repository(repository, revision, folders[0].name, files, _first_line(error))
    names = frozenset(file.rfilename for file in info.siblings)
    return Repository(repository, revision, info.sha, names, None)


def push(files: Mapping[str, Path | bytes], name: str, *, private: bool = False) -> str:
    """Upload files, by their names in the repository, as one commit; returns the address of the commit.

    The repository is created if there is none. The client takes HF_TOKEN, or what `hf auth login` stored. Raises
    ImportError without huggingface_hub, ValueError for another name or for weights that are not safetensors, OSError if
    the hub refuses.
    """
    repository, revision = split_name(name, who="push")
    if revision != "main" or name.endswith("@main"):
        raise ValueError(f"push: the name must be owner/name without a revision, got {name!r}; leave out @{revision}")
    if wrong := [file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]:
        raise ValueError(
            f"push: weights must be safetensors, which hold no code, got {', '.join(wrong)}; save the model with "
            "save_pretrained"
        )
    client = _client(who="push")
    try:
        api = client.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        changes = [client.CommitOperationAdd(file, content) for file, content in files.items()]
        return str(api.create_commit(repository, changes, commit_message="Upload a model of GRR").commit_url)
    except Exception as error:  # errors of the network and of the hub have many types
        raise OSError(
            f"push: {PREFIX}{repository} must be a repository that you may write to, got {_first_line(error)}; see "
            "that the hub can be reached, and log in with `hf auth login`, or set HF_TOKEN to a token that may write"
        ) from error


def card_start(name: str, metadata: Mapping[str, str | None] | None = None) -> str:
    """Returns the beginning of a model card of owner/name: the metadata that the hub reads, and how to load it."""
    lines = {"library_name": "grr", "pipeline_tag": "image-to-text", **(metadata or {})}
    head = "\n".join(f"{key}: {value}" for key, value in lines.items() if value is not None)
    return f"""---
{head}
tags:
- coca
- image-captioning
- zero-shot-image-classification
---

# {name.partition("/")[2]}

A contrastive captioner (CoCa): it captions images, and embeds images and texts in one space.

```
pip install "grr-coca[hub]"
```

```python
import grr

captioner = grr.load("{PREFIX}{name}")
captioner.caption(["photo.jpg"])
captioner.embed_images("photo.jpg") @ captioner.embed_texts(["a red fox"]).T
```
"""


def verify(file: Path, what: str) -> None:
    """Raise ValueError if a file in the hub's cache does not have the hash by which the cache names it.

    That is the sha256 of a large file and git's sha1 of a small one. The client itself compares sizes only. Where the
    cache has no symbolic links, files have no such names and are not verified.
    """
    stored = file.resolve()
    if re.fullmatch("[0-9a-f]{64}", stored.name):
        kind, digest = "sha256", sha256(stored)
    elif re.fullmatch("[0-9a-f]{40}", stored.name):
        content = stored.read_bytes()
        kind, digest = "git sha1", hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    else:
        return
    if digest != stored.name:
        raise ValueError(
            f"load: {what} must have the {kind} {stored.name}, got {digest} of {stored.stat().st_size:,} bytes: it was "
            f"damaged in the download or on the disk; delete {stored} and load it again"
        )


@cache
def _client(*, who: str = "load") -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f'{who}: models on the Hugging Face hub need its client, huggingface_hub; pip install "grr-coca[hub]"'
        ) from error
    return huggingface_hub


def _first_line(error: BaseException) -> Any:
    return " ".join(f"{type(error).__name__}: {error}".partition("\n")[0].split())
