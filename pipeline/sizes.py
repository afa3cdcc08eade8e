"""Sizes in bytes as people write them: "24GB", "512 MB"."""

import re

from dirotq.errors import ConfigError

LEAST_VRAM = 10**6
"""Bytes below which a unit was forgotten."""
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(text: str | int, setting: str, least: int = 1) -> int:
    """Read "5GB", "800 MB", "1.5TB" or a plain number of bytes; units are powers of 1000.

    setting  under which it was given
    least    bytes below which nobody can mean it: "24" is 24 bytes, and 24GB were meant

    Raises ConfigError for anything else, and for less.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(text), re.IGNORECASE)
    size = round(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if size <= 0:
        raise ConfigError(f'{setting}: {text!r} is no size in bytes; write it as "24GB" or "500MB"')
    if size < least:
        raise ConfigError(
            f"{setting}: {text!r} is {size} bytes, and anything below {least} is too little: write "
            f'the unit, as in "{str(text).strip() if size < 1000 else 24}GB"'
        )
    return size


def parse_vram(text: str | int, setting: str) -> int:
    """Read an amount of GPU memory as :func:`parse_bytes` does; at least 1 MB."""
    return parse_bytes(text, setting, LEAST_VRAM)
