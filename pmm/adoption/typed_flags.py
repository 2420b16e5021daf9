"""What was said of a network, as it is typed, so that its file tells how it was adopted. Loads no torch."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

STORED_APART = ("dataset", "root")


def typed_flags(*options: Any, ignore: Sequence[str] = ()) -> str:
    """The flags that give the dataclasses `options` their values, where these are no defaults; patterns of --ignore."""
    words = [word for each in options for word in _words(each)]
    return shlex.join([*words, *(word for pattern in ignore for word in ("--ignore", pattern))])


def _words(options: Any) -> Iterator[str]:
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value == field.default or field.name in STORED_APART:
            continue
        yield f"--{'no-' if value is False else ''}{field.name.replace('_', '-')}"
        if not isinstance(value, bool):
            yield from map(str, value if isinstance(value, tuple) else (value,))
