"""Numbers drawn by a hash of a text: the same on every machine and in every version of Python."""

import hashlib


def hash_number(key: str) -> int:
    """Return 256 bits."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest(), "big")


def percent(key: str) -> int:
    """Return 0 to 99."""
    return (hash_number(key) >> 192) % 100
