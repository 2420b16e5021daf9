"""Lanes that are checked out for a run and given back: a server with a thread per request makes few of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from pmm.runtime.thread_context import ThreadContext
from pmm.utils.errors import UserError


class ContextPool:
    """At most so many lanes; whoever wants one more waits."""

    def __init__(self, path: Path, most: int, make: Callable[[], ThreadContext], first: ThreadContext) -> None:
        """`path`: of the engine, for messages. `make` opens a lane; it may run in several threads at a time."""
        self._path, self._most, self._make = path, most, make
        self._idle = [first]
        self._count, self._closed = 1, False
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def lane(self, wanted: ThreadContext | None = None) -> Iterator[ThreadContext]:
        """A lane for the calling thread alone: `wanted` if it is idle, else the one used last.

        Raises UserError if the pool was closed or no lane can be opened.
        """
        lane = self._taken(wanted)
        try:
            yield lane
        finally:
            with self._changed:
                self._idle.append(lane)
                self._changed.notify()

    def check_open(self) -> None:
        """Raises UserError if the pool was closed."""
        if self._closed:
            raise UserError(f"{self._path}: this runner was closed; open it again")

    def close(self) -> None:
        """Close every lane, once it is given back. May be called again."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: len(self._idle) == self._count)
            while self._idle:
                self._count -= 1
                self._idle.pop().close()
            self._changed.notify_all()

    def _taken(self, wanted: ThreadContext | None) -> ThreadContext:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._idle or self._count < self._most)
            self.check_open()
            if self._idle:
                return self._idle.pop(self._idle.index(wanted) if wanted in self._idle else -1)
            self._count += 1
        try:
            return self._make()
        except BaseException:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()
            raise
