"""Files of weights in whatever wrapping, and tables of what was done with each key. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pmm.utils.errors import InvalidFile, printable
from pmm.utils.extras import import_library

EMA = re.compile(r"(^|[._])ema([._]|$)")
"""In the names of averaged weights."""
TRAINING_STATE = re.compile(
    r"(?!.*\.(weight|bias)$)"  # a layer may have such a name too
    r"((\w*_)?(optim|optimizers?|sched|schedulers?|scaler|rng|progress)(\.|_states?(\.|_|$)|$)"
    r"|\w*optim\w*\.state\.\d)",
    re.IGNORECASE,
)
"""Beginning of the keys that are the state of a training."""
LABELS = 4
"""Groups of keys that a line of the table names."""


def read_weights_file(path: Path, expected: str) -> Any:
    """What a file of torch or of safetensors holds; no code of the file runs.

    Raises InvalidFile, with what was `expected`, if it is damaged or could run code; MissingLibrary for a .safetensors
    file where that library is missing.
    """
    if path.suffix.lower() != ".safetensors":
        from pmm.artifacts.torch_file import read_torch_file

        return read_torch_file(path, expected)
    library = import_library("safetensors.torch")
    try:
        return library.load_file(path)
    except Exception as error:  # its own SafetensorError, OSError, ...
        raise InvalidFile(f"truncated, or not a safetensors file ({error})", path=path, expected=expected) from error


def leaves_of(content: Any) -> dict[str, Any]:
    """Names of dicts within dicts, joined by dots -> what is there; in the file's order."""
    leaves: dict[str, Any] = {}
    waiting, seen = [("", content)], set()
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Mapping) and value and id(value) not in seen:
            seen.add(id(value))  # a file may hold a dict twice, or within itself
            waiting += [(f"{path}.{key}" if path else str(key), item) for key, item in reversed(list(value.items()))]
        else:
            leaves[path] = value
    return leaves


def key_table(label: str, title: str, rows: Mapping[tuple[str, str], list[str]]) -> str:
    """Lines that account for keys: what was done with them, how many, why, and which."""
    lines = [f"{verb:<9}{len(keys):>6}  {reason}: {_groups(keys)}" for (verb, reason), keys in rows.items()]
    return "\n".join(printable(f"{label}: {line}") for line in (title, *lines))


def _groups(keys: list[str]) -> str:
    """`model.stages.*, optimizer.*`: the keys' groups, few enough for a line."""
    for depth in range(max(key.count(".") for key in keys), -1, -1):
        groups = dict.fromkeys(_cut(key, depth) for key in keys)
        if len(groups) <= LABELS:
            return ", ".join(groups)
    return f"{', '.join(list(groups)[:LABELS])}, and {len(groups) - LABELS} more"


def _cut(key: str, depth: int) -> str:
    parts = key.split(".")
    return ".".join(parts[: depth + 1]) + (".*" if len(parts) > depth + 1 else "")
