"""Nested facts as plain values for JSON, or as aligned lines of text; without the home folder, which names the user."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pmm.utils.errors import printable


def plain(value: Any) -> Any:
    """Plain JSON values; texts without the home folder in them, and without what would upset a terminal."""
    if isinstance(value, dict):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    home = str(Path.home())
    text = str(value).replace(home, "~") if len(home) > 1 else str(value)
    return printable(text)


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"k": 3}} -> {"model.k": 3}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def how_many(number: int, noun: str) -> str:
    """1 run, 2 runs, 1,200 runs."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def aligned(facts: dict[str, Any]) -> Iterator[str]:
    """A line per value, nested tables as a.b, a blank line between the parts."""
    for title, part in facts.items():
        lines = dict(_in_words(part))
        wide = max(map(len, lines))
        yield f"{title}:"
        yield from (f"  {key:<{wide}}  {value}" for key, value in lines.items())
        if title != list(facts)[-1]:
            yield ""


def _in_words(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _in_words(item, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        yield from _in_words({str(at): item for at, item in enumerate(value, 1)}, prefix)
    elif isinstance(value, list | dict):
        yield prefix, ", ".join(map(str, value)) or "none"
    else:
        yield prefix, {"None": "unknown", "": "none", "True": "yes", "False": "no"}.get(str(value), str(value))
