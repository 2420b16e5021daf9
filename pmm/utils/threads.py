"""Threads that share one computation."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

from threadpoolctl import ThreadpoolController

Part = TypeVar("Part")
Result = TypeVar("Result")


def in_threads(work: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """`work` of each part, at the same time: the first on this thread, each other on one of its own. None outlives the
    call, so the process may fork after it."""
    if len(parts) < 2:
        return [work(part) for part in parts]
    with ThreadPoolExecutor(len(parts) - 1) as pool:
        others = [pool.submit(work, part) for part in parts[1:]]
        return [work(parts[0]), *(other.result() for other in others)]


@contextlib.contextmanager
def single_blas_thread() -> Iterator[None]:
    """Within it, products of matrices run on the thread that asks for them: threads that each wait for BLAS's own would
    mostly wait. It holds for the process, until the last of several such blocks ends."""
    _blas_limit.enter()
    try:
        yield
    finally:
        _blas_limit.leave()


class _BlasLimit:
    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._restore: Callable[[], object] = lambda: None

    def enter(self) -> None:
        with self._lock:
            if not self._users:
                self._restore = _blas().limit(limits=1).restore_original_limits
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._restore()


_blas_limit = _BlasLimit()


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")
