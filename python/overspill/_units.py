"""Byte counts as people write them."""

from __future__ import annotations

import re

from .errors import BudgetError

_FACTORS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_LARGEST = 2**60


def parse_bytes(value: int | str, name: str) -> int:
    """Bytes of ``value``: an int, or text such as ``"12GiB"``, ``"500 MB"`` or ``"1.5g"``.

    Raises:
        BudgetError: ``value`` is negative, larger than 2**60, or not a byte count.

    >>> parse_bytes("1.5GiB", "vram_budget")
    1610612736
    """
    text = str(value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    factor = _FACTORS.get(match[2]) if match else None
    if isinstance(value, (bool, float)) or match is None or factor is None:
        raise _refuse(name, text, "expected bytes as an int, or text such as 12GiB or 500MB")
    count = round(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor
    if not 0 < count <= _LARGEST:
        raise _refuse(name, text, f"expected 1 to {_LARGEST} bytes")
    return count


def format_bytes(count: float) -> str:
    """``count`` for people, in binary units.

    >>> format_bytes(3 * 2**29)
    '1.50 GiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def _refuse(name: str, text: str, reason: str) -> BudgetError:
    return BudgetError(f"{name}={text}: {reason}")
