"""What a refusal says: its kind and its facts, not its sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pmm.utils.errors import UserError


@contextmanager
def refuses(kind: type[UserError], *facts: object, **attributes: Any) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """The block raises exactly `kind`, in one line that holds every fact: a path, a number, a flag, a command.

    Attributes are equal; of the texts `problem`, `expected` and `hint` the error's has to hold the given one.
    """
    with pytest.raises(kind) as caught:
        yield caught
    error, line = caught.value, str(caught.value)
    assert type(error) is kind, f"{type(error).__name__}: {line}"
    assert "\n" not in line
    assert all(_holds(line, str(fact)) for fact in facts), (facts, line)
    for name, value in attributes.items():
        given = getattr(error, name)
        if name in ("problem", "expected", "hint") and value:
            assert _holds(given, value), (name, given)
        else:
            assert given == (Path(value) if name == "path" else value), (name, given)


def _holds(text: str, fact: str) -> bool:
    """A number is not part of a longer one."""
    pattern = re.escape(fact)
    if re.fullmatch(r"[\d.,]+", fact):
        pattern = rf"(?<![\d.,]){pattern}(?![\d]|[.,]\d)"
    return re.search(pattern, text) is not None
