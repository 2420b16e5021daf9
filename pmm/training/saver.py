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

BEST, LAST = "best.pth", "last.pth"
WEIGHTS = ("model", "ema")
"""Keys of a checkpoint whose tensors are written in torch's default memory format, whatever the training uses."""

Buffers = dict[tuple[Any, ...], Tensor]
"""Copies of a checkpoint's tensors in host memory, by their keys from the outermost inwards."""


class Saver:
    """Writes best.pth and last.pth of the run in `out`, each whole or not at all, one at a time.

    The states that it is given are those of `pmm.training.state.snapshot`, with tensors that the next step changes: a
    call returns when they are copied. No thread exists until something is saved after `save_first`: the processes that
    load images are forked before that. All methods but `close` raise the error of an earlier write: CannotWrite if the
    disk is full, the file from before is then intact.
    """

    def __init__(
        self, out: Path, minutes: float, device: torch.device, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`minutes` between two writes of last.pth while the run goes on, by `clock` in seconds."""
        self.out, self.seconds, self.device, self.clock = out, 60 * minutes, device, clock
        self._saved_at = clock()
        self._writer = ThreadPoolExecutor(1, "saver")
        self._writes: list[Future[None]] = []
        self._buffers: Buffers = {}
        """Of last.pth, which is copied only when nothing is being written."""
        self._waiting: deque[Callable[[], None]] = deque(maxlen=1)
        """The write of best.pth that has not begun, which a later one replaces."""

    @property
    def due(self) -> bool:
        """Whether it is time for `save_last`, and nothing is being written."""
        return self.clock() > self._saved_at + self.seconds and not self.writing

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
        """Write best.pth, what is deployed of `state`, once the write that goes on has ended."""
        self.check()
        self._waiting.append(self._copy(BEST, checkpoint.for_deployment(dict(state)), {}))
        self._writes.append(self._writer.submit(self._write_waiting))

    def save_last(self, state: Mapping[str, Any]) -> None:
        """Write last.pth. To be called when it is `due`: else it waits for the writes that go on."""
        self.wait()
        self._writes.append(self._writer.submit(self._copy(LAST, state, self._buffers)))
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
        copied = _copied(state, buffers)
        if self.device.type != "cuda":
            return partial(checkpoint.save, self.out / name, copied)
        # the GPU copies before it changes anything in the next step: that the writer waits for it is enough
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self.device))

        def write() -> None:
            event.synchronize()
            checkpoint.save(self.out / name, copied)

        return write


def _copied(value: Any, buffers: Buffers, place: tuple[Any, ...] = ()) -> Any:
    """`value` with its tensors copied to `buffers`, which get those that are missing; page-locked for a GPU."""
    if isinstance(value, Mapping):
        return {key: _copied(each, buffers, (*place, key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(each, buffers, (*place, index)) for index, each in enumerate(value))
    if not isinstance(value, Tensor):
        return value
    place = (*place, value.shape, value.dtype)
    if place not in buffers:
        layout = torch.contiguous_format if place[0] in WEIGHTS else torch.preserve_format
        pinned = value.is_cuda
        buffers[place] = torch.empty_like(value, device="cpu", memory_format=layout, pin_memory=pinned)
    return buffers[place].copy_(value, non_blocking=value.is_cuda)
