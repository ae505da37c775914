"""Seeds and hashes that are the same on every machine and in every version."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Returns a seed of 63 bits, well mixed, that depends on the parts alone."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stable_hash(name: str) -> int:
    """Returns a hash of a name, uniform over [0, 2**64)."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest(), "big")
