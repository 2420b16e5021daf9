"""Saves a run while it goes on: the training thread copies its state, another thread writes the file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pmm.artifacts import checkpoint
from pmm.artifacts.run_folder import BEST, LAST

WEIGHTS = ("model", "ema")
"""Keys of a checkpoint whose tensors are written in torch's default memory format, whatever the training uses."""

Place = tuple[Any, ...]
"""Of a tensor in a checkpoint: its keys from the outermost inwards."""
Buffers = dict[Place, Tensor]
"""Copies of a checkpoint's tensors in host memory. All states of a run have the same shapes at the same places."""


class Saver:
    """Writes best.pth and last.pth of the run in `out`, each whole or not at all, one at a time.

    The states that it is given are those of `pmm.training.snapshot.snapshot`, with tensors that the next step changes:
    a call returns when they are copied. No thread exists until something is saved after `save_first`: the processes
    that load images are forked before that. All methods but `close` raise the error of an earlier write: CannotWrite if
    the disk is full, the file from before is then intact.
    """

    def __init__(
        self, out: Path, minutes: float, device: torch.device, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`minutes` between two writes of last.pth while the run goes on, by `clock` in seconds."""
        self.out, self.seconds, self.device, self.clock = out, 60 * minutes, device, clock
        self._saved_at = clock()
        self._writer = ThreadPoolExecutor(1, "saver")
        self._writes: list[Future[None]] = []
        self._last: Future[None] | None = None
        """The write of last.pth that began last; until it has ended, `_buffers` are in use."""
        self._buffers: Buffers = {}
        """Of last.pth; each best.pth is copied to memory of its own."""
        self._waiting: deque[Callable[[], None]] = deque(maxlen=1)
        """The write of best.pth that has not begun, which a later one replaces."""

    @property
    def due(self) -> bool:
        """Whether it is time for `save_last`, which waits for nothing: last.pth is not being written."""
        return self.clock() > self._saved_at + self.seconds and (self._last is None or self._last.done())

    @property
    def writing(self) -> bool:
        """Whether a file is being written, or waits for that."""
        return not all(write.done() for write in self._writes)

    @property
    def failed(self) -> bool:
        """Whether a write has failed, so that `check` raises."""
        return any(write.done() and write.exception() for write in self._writes)

    def check(self) -> None:
        """Raise the error of a write that has failed."""
        done = [write for write in self._writes if write.done()]
        self._writes = [write for write in self._writes if write not in done]
        for write in done:
            write.result()

    def save_first(self, state: Mapping[str, Any]) -> None:
        """Write last.pth, in the calling thread."""
        self._copy(LAST, state, self._buffers)()
        self._saved_at = self.clock()

    def save_best(self, state: Mapping[str, Any]) -> None:
        """Write best.pth, what is deployed of `state`, after the writes that have begun."""
        self.check()
        self._waiting.append(self._copy(BEST, checkpoint.for_deployment(dict(state)), {}))
        self._writes.append(self._writer.submit(self._write_waiting))

    def save_last(self, state: Mapping[str, Any]) -> None:
        """Write last.pth, after the best.pth that it knows of. To be called when it is `due`: else it waits for the
        last.pth before it."""
        if self._last:
            self._last.exception()
        self.check()
        self._last = self._writer.submit(self._copy(LAST, state, self._buffers))
        self._writes.append(self._last)
        self._saved_at = self.clock()

    def save_now(self, state: Mapping[str, Any], *, best: bool = False) -> None:
        """Write last.pth, with `best` best.pth before it, and return when all files are on the disk."""
        if best:
            self.save_best(state)
        self.save_last(state)
        self.wait()

    def wait(self) -> None:
        """Until all is written that was to be written."""
        for write in self._writes:
            write.exception()
        self.check()

    def close(self) -> None:
        """As `wait`, and end the thread."""
        self._writer.shutdown()

    def _write_waiting(self) -> None:
        if self._waiting:  # else it was replaced by a later one, which is written
            self._waiting.popleft()()

    def _copy(self, name: str, state: Mapping[str, Any], buffers: Buffers) -> Callable[[], None]:
        """Copies `state`; what is returned writes the copy to the file `name`."""
        copied = _mapped(partial(_copied, buffers), state)
        event: torch.cuda.Event | None = None
        if self.device.type == "cuda":
            # the GPU copies before it changes anything in the next step: that the writer waits for it is enough
            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.current_stream(self.device))

        def write() -> None:
            if event:
                event.synchronize()
            checkpoint.save(self.out / name, _mapped(_as_written, copied))

        return write


def _mapped(change: Callable[[Place, Tensor], Tensor], value: Any, place: Place = ()) -> Any:
    """`value` with `change` in place of each tensor."""
    if isinstance(value, Mapping):
        return {key: _mapped(change, each, (*place, key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(change, each, (*place, index)) for index, each in enumerate(value))
    return change(place, value) if isinstance(value, Tensor) else value


def _copied(buffers: Buffers, place: Place, value: Tensor) -> Tensor:
    """In `buffers`, which get it if it is missing, page-locked for a GPU; in its own layout, which is fastest."""
    if place not in buffers:
        buffers[place] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return buffers[place].copy_(value, non_blocking=value.is_cuda)


def _as_written(place: Place, value: Tensor) -> Tensor:
    return value.clone(memory_format=torch.contiguous_format) if place[0] in WEIGHTS else value
