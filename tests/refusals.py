"""What a refusal says: its kind and its facts, not its sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pmm.utils.errors import UserError


@contextmanager
def refuses(kind: type[UserError], *facts: object, **attributes: Any) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """The block raises exactly `kind`, in one line that holds every fact: a path, a number, a flag, a command.

    Attributes are compared; of those that are texts (`hint="pmm export onnx"`) the error's has to hold the given one.
    """
    with pytest.raises(kind) as caught:
        yield caught
    error, line = caught.value, str(caught.value)
    assert type(error) is kind, f"{type(error).__name__}: {line}"
    assert "\n" not in line
    assert all(str(fact) in line for fact in facts), (facts, line)
    for name, value in attributes.items():
        there = getattr(error, name)
        if isinstance(there, Path) or name == "path":
            value = Path(value)
        assert value in there if isinstance(there, str) and isinstance(value, str) else there == value, (name, there)
