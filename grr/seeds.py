"""Seeds: numbers for a random generator out of any numbers and names, the same on every machine."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Returns a seed of 63 bits, well mixed, that depends on the parts alone."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
