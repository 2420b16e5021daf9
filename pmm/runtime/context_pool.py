"""Thread contexts that are borrowed for a run, and runs bound to one: a server with many threads needs few of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy.typing as npt

from pmm.runtime.base import BoundRun
from pmm.runtime.opened import closed_runner
from pmm.runtime.thread_context import ThreadContext

T = TypeVar("T")


class ContextPool:
    """At most `most` contexts; a thread that needs one more waits."""

    def __init__(self, path: Path, most: int, make: Callable[[], ThreadContext], first: ThreadContext) -> None:
        """`path`: of the engine, for messages. `make` opens a context; it may run in several threads at a time."""
        self._path, self._most, self._make = path, most, make
        self._idle = [first]
        self._count, self._closed = 1, False
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def borrow(self, preferred: ThreadContext | None = None) -> Iterator[ThreadContext]:
        """A context for the calling thread alone: `preferred` if it is idle, else the one used last.

        Raises UserError if the pool was closed or no context can be opened.
        """
        context = self._take(preferred)
        try:
            yield context
        finally:
            with self._changed:
                self._idle.append(context)
                self._changed.notify()

    def check_open(self) -> None:
        """Raises UserError if the pool was closed."""
        if self._closed:
            raise closed_runner(self._path)

    def close(self) -> None:
        """Close every context, once it is back. May be called again."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: len(self._idle) == self._count)
            while self._idle:
                self._count -= 1
                self._idle.pop().close()
            self._changed.notify_all()

    def _take(self, preferred: ThreadContext | None) -> ThreadContext:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._idle or self._count < self._most)
            self.check_open()
            if self._idle:
                return self._idle.pop(self._idle.index(preferred) if preferred in self._idle else -1)
            self._count += 1
        try:
            return self._make()
        except BaseException:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()
            raise


class EngineBoundRun(BoundRun):
    """A run on a context of the pool: the one that has the images, if it is idle."""

    def __init__(self, contexts: ContextPool, images: npt.NDArray[Any]) -> None:
        super().__init__(lambda: self._on(lambda context: context.step(images)))
        self._contexts, self._images = contexts, images
        self._last: ThreadContext | None = None

    def _enqueue(self) -> None:
        self._on(lambda context: context.enqueue(self._images))

    def _wait(self) -> None:
        self._contexts.check_open()
        if self._last is not None:
            self._last.wait()

    def _device_ms(self) -> float:
        return self._on(lambda context: context.device_ms(self._images))

    def _transfers_ms(self) -> tuple[float, float]:
        return self._on(lambda context: context.transfers_ms(self._images))

    def _on(self, work: Callable[[ThreadContext], T]) -> T:
        with self._contexts.borrow(self._last) as context:
            self._last = context
            return work(context)
