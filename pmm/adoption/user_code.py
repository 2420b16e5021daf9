"""Errors of the user's own code, as one line that says where."""

from __future__ import annotations

import contextlib
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from pmm.utils.errors import UserError, reason_of

_PACKAGE = Path(__file__).resolve().parents[1]
_STANDARD = Path(sysconfig.get_path("stdlib"))


class CannotAdopt(UserError):
    """A network that cannot be adopted, or a factory that makes none; the path, if any, is a line of its code."""


@contextlib.contextmanager
def user_code(what: str, place: str = "", *, hint: str = "", passes: type[Exception] | None = None) -> Iterator[None]:
    """Whatever the block raises becomes CannotAdopt: `what`, then the error, at its line of the user's code, or at
    `place` if it arose in none. Errors of the kind `passes` remain, as do ours."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if passes and isinstance(error, passes):
            raise
        raise CannotAdopt(
            f"{what} {type(error).__name__}: {reason_of(error)}",  # type: ignore[arg-type]
            path=line_of(error) or place or None,
            hint=hint,
        ) from error


def line_of(error: BaseException) -> str:
    """`my_model.py:12`: the last line of the user's code on the way to `error`; empty if there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if is_user_code(frame.filename)]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""


def is_user_code(file: str) -> bool:
    """Whether it is neither of torch, of Python nor of this package."""
    path = Path(file)
    if file.startswith("<") or path.is_relative_to(_PACKAGE):
        return False
    if "site-packages" in path.parts or "dist-packages" in path.parts:
        return path.parts[
            path.parts.index("site-packages" if "site-packages" in path.parts else "dist-packages") + 1
        ] not in ("torch", "torchgen")
    return not path.is_relative_to(_STANDARD)
