"""What only the process that opened it may use, until it is closed: runners, and the runs bound to them. Loads no
torch."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, TypeVar

from pmm.runtime.fork import around_forks, never_free
from pmm.utils.errors import UserError

T = TypeVar("T", bound="Opened")


class Opened:
    """An object that refuses to run after it was closed, and in a process forked from the one that opened it."""

    _path: Path | None = None
    """The file, for messages."""
    _closed = _inherited = False

    def __new__(cls: type[T], *_: Any, **__: Any) -> T:
        instance = super().__new__(cls)
        _INSTANCES.add(instance)
        return instance

    def _check_usable(self) -> None:
        """Raises UserError."""
        if self._inherited:
            raise UserError(
                "this runner was opened before fork(), and its threads stayed in the process that opened it",
                hint="open it in each process that uses it (with gunicorn --preload: in post_fork)",
            )
        if self._closed:
            raise closed_runner(self._path)


def closed_runner(path: Path | None) -> UserError:
    """What every use of a runner that was closed raises."""
    return UserError("this runner was closed", path=path, hint="open it again")


def _leave_to_parent() -> None:
    for instance in list(_INSTANCES):
        never_free(instance)
        instance._inherited = True


_INSTANCES: weakref.WeakSet[Opened] = weakref.WeakSet()
around_forks(in_child=_leave_to_parent)
