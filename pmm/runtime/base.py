"""The runner contract: what executes an artifact takes uint8 crops and returns float32 embeddings. Loads no torch."""

from __future__ import annotations

import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from pmm.artifacts.manifest import EmbeddingContract, InputContract, Manifest
from pmm.data.preprocessing import Crops, Preprocessing
from pmm.runtime.fork import around_forks, keep_for_ever
from pmm.runtime.gpu_array import CudaArray, GpuArray, is_on_gpu
from pmm.utils.errors import UserError

Embeddings = npt.NDArray[np.float32]
R = TypeVar("R", bound="Runner")
S = TypeVar("S", bound="BoundRun")
T = TypeVar("T", bound="Runner | BoundRun")


@dataclass(frozen=True, kw_only=True)
class RunnerInfo:
    """What really runs: found, not asked for."""

    backend: str
    """torch, ort-cpu, ..."""
    device: str
    """cpu or the GPU's name."""
    precision: str
    """fp32, tf32, fp16, bf16 or int8."""
    provider: str
    """The library and version that executes, and its provider if it has several."""


class BoundRun:
    """A run on images that are already where the backend wants them, for timing."""

    def __new__(cls: type[S], *_: Any, **__: Any) -> S:
        return _of_this_process(super().__new__(cls))

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run

    def __call__(self) -> None:
        """Run; returns when the result is complete."""
        self._run()

    def enqueue(self) -> None:
        """Start a run, without waiting for it where the backend can; `wait` does."""
        self._run()

    def wait(self) -> None:
        """Until every run that was enqueued is complete."""

    def device_ms(self) -> float | None:
        """Run once; what it took by the GPU's own clock, in ms. None on a CPU."""
        return None

    def transfers_ms(self) -> tuple[float, float] | None:
        """Copy the images to the GPU and the embeddings back; what each took, in ms. None on a CPU."""
        return None


class Runner(ABC):
    """An opened model. Use as a context manager, in the process that opened it: after `os.fork` a child opens its own,
    and the one that it has inherited raises UserError.

    Whatever the artifact itself takes (uint8 or float, RGB or BGR), a runner takes uint8 RGB crops.
    """

    info: RunnerInfo
    preprocessing: Preprocessing
    embedding: EmbeddingContract

    def __new__(cls: type[R], *_: Any, **__: Any) -> R:
        return _of_this_process(super().__new__(cls))

    @abstractmethod
    def __call__(self, images: Crops) -> Embeddings:
        """images uint8 RGB [B, H, W, 3] at the size of `preprocessing` -> embeddings float32 [B, D].

        Raises UserError for images of another type or size.
        """

    def embed_on_gpu(self, images: Crops | CudaArray) -> GpuArray:
        """As a call, but the embeddings stay on the GPU: float32 [B, D] there, complete, and the caller's to keep.

        Raises UserError for a runner that does not work on a GPU.
        """
        raise UserError(f"{self.info.backend} leaves no embeddings on a GPU: it runs on {self.info.device}; call it")

    @abstractmethod
    def bind(self, images: Crops) -> BoundRun:
        """A step that runs on `images` already in place."""

    def close(self) -> None:  # noqa: B027 - most runners hold nothing that the garbage collector does not free
        """Free what the runner holds."""

    def __enter__(self: R) -> R:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check(self, images: Crops | GpuArray) -> None:
        """Raises UserError if `images` are not uint8 [B, H, W, 3] crops of the model's size, where this runner is."""
        if is_on_gpu(images) and not isinstance(images, GpuArray):
            raise UserError(
                f"the images lie on a GPU, and this runner takes them in host memory (it runs on {self.info.device}): "
                "copy them, as with .cpu().numpy() in torch"
            )
        expected = (self.preprocessing.height, self.preprocessing.width, 3)
        if images.dtype != np.uint8 or len(images.shape) != 4 or images.shape[1:] != expected:
            raise UserError(
                f"images are {images.dtype} {list(images.shape)}; expected uint8 [B, {', '.join(map(str, expected))}]"
            )


def check_on_gpu(runner: Runner, images: GpuArray, index: int, takes: InputContract | None = None) -> None:
    """Raises UserError for images on another GPU than `index`, of another type or size, or to be converted for a file
    that `takes` others."""
    if images.device != index:
        raise UserError(
            f"the images lie on cuda:{images.device}, and this runner is on cuda:{index}; open it there (device=), or "
            "move them"
        )
    runner.check(images)
    if takes is not None and (takes.dtype, takes.colour) != ("uint8", "rgb"):
        raise UserError(
            f"the file takes {takes.dtype} {takes.colour.upper()} images, to which images on a GPU are not converted; "
            "export it with --input uint8 --input-colour rgb, or give them in host memory"
        )


def in_runs(run: Callable[[Crops], Embeddings], images: Crops, batch: int | None) -> Embeddings:
    """`run` on any number of images, of a file that may take `batch` of them only.

    Those go in runs of `batch`; the last is filled up with black images, whose embeddings are dropped.
    """
    if batch is None:
        return run(images)
    runs = max(1, -(-len(images) // batch))
    filled = np.zeros((runs * batch, *images.shape[1:]), images.dtype)
    filled[: len(images)] = images
    return np.concatenate([run(filled[k : k + batch]) for k in range(0, len(filled), batch)])[: len(images)]


def _of_this_process(made: T) -> T:
    _MADE.add(made)
    return made


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise UserError(
        "this runner was opened before fork(), and the threads that it runs with stayed in the process that opened it; "
        "open it in each process that uses it (with gunicorn --preload: in post_fork)"
    )


class _ParentsBoundRun(BoundRun):
    """What a step becomes in a forked child."""

    __call__ = enqueue = wait = device_ms = transfers_ms = _refuse


class _ParentsRunner(Runner):
    """What a runner becomes in a forked child. Closing it does nothing: what it holds is the parent's to free."""

    __call__ = bind = _refuse


def _leave_to_parent() -> None:
    for made in list(_MADE):
        keep_for_ever(made)
        made.__class__ = _ParentsRunner if isinstance(made, Runner) else _ParentsBoundRun


_MADE: weakref.WeakSet[Runner | BoundRun] = weakref.WeakSet()
around_forks(in_child=_leave_to_parent)


def warn_if_unverified(path: Path, manifest: Manifest) -> None:
    """One line on stderr (logger "pmm") for an artifact whose embeddings were never compared with the checkpoint's."""
    if not manifest.sha256:
        logging.getLogger("pmm").warning(
            "%s: no manifest beside it, only the copy inside: whether it was changed or verified cannot be told", path
        )
    elif manifest.parity is None:
        logging.getLogger("pmm").warning("%s: its embeddings were never verified against the checkpoint", path)
