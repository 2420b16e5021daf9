"""The runner contract: what executes an artifact takes uint8 crops and returns float32 embeddings. Loads no torch."""

from __future__ import annotations

import logging
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pmm.artifacts.manifest import EmbeddingContract, InputContract, Manifest
from pmm.data.preprocessing import Crops, Preprocessing
from pmm.runtime.gpu_array import CudaArray, GpuArray, is_on_gpu
from pmm.runtime.memory import batch_fits
from pmm.runtime.opened import Opened
from pmm.utils.errors import InvalidInput, UserError

Embeddings = npt.NDArray[np.float32]
R = TypeVar("R", bound="Runner")


@dataclass(frozen=True, kw_only=True)
class RunnerInfo:
    """What really runs, read back from the library rather than taken from the request."""

    backend: str
    """torch, ort-cpu, ..."""
    device: str
    """cpu or the GPU's name."""
    precision: str
    """fp32, tf32, fp16, bf16 or int8."""
    provider: str
    """The library and version that executes, and its provider if it has several."""


class BoundRun(Opened):
    """A run on images that are already where the backend wants them, for timing. Backends override the methods with an
    underscore.

    After its runner was closed, and in a process that was forked from the runner's, every method raises UserError.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step

    def __call__(self) -> None:
        """Run; returns when the result is complete."""
        self._check_usable()
        self._run()

    def enqueue(self) -> None:
        """Start a run, without waiting for it where the backend can; `wait` does."""
        self._check_usable()
        self._enqueue()

    def wait(self) -> None:
        """Until every run that was enqueued is complete."""
        self._check_usable()
        self._wait()

    def device_ms(self) -> float | None:
        """Run once; what it took by the GPU's own clock, in ms. None on a CPU."""
        self._check_usable()
        return self._device_ms()

    def transfers_ms(self) -> tuple[float, float] | None:
        """Copy the images to the GPU and the embeddings back; what each took, in ms. None on a CPU."""
        self._check_usable()
        return self._transfers_ms()

    def _run(self) -> None:
        self._step()

    def _enqueue(self) -> None:
        self._run()

    def _wait(self) -> None:
        pass

    def _device_ms(self) -> float | None:
        return None

    def _transfers_ms(self) -> tuple[float, float] | None:
        return None


class Runner(Opened, ABC):
    """An opened model. Use it as a context manager, in the process that opened it: after `os.fork` a child opens its
    own. A runner that was closed, or inherited from a parent process, raises UserError.

    Whatever the artifact itself takes (uint8 or float, RGB or BGR), a runner takes uint8 RGB crops.
    """

    info: RunnerInfo
    preprocessing: Preprocessing
    embedding: EmbeddingContract
    method: str = ""
    """The method that trained the model, as --method names it, or adopted; empty for a model that is no file's."""
    accepts_gpu_arrays: bool = False
    """Images may lie on its GPU, and embeddings may stay there."""
    _bound_runs: weakref.WeakSet[BoundRun]

    def __new__(cls: type[R], *_: Any, **__: Any) -> R:
        runner = super().__new__(cls)
        runner._bound_runs = weakref.WeakSet()
        return runner

    def __call__(self, images: Crops | CudaArray | Sequence[npt.NDArray[Any]]) -> Embeddings:
        """Embeddings float32 [B, D] of B crops.

        Args:
            images: uint8 RGB [B, H, W, 3] at the size of `preprocessing`, in host memory or, for a runner that
                `accepts_gpu_arrays`, on its GPU; or a list or tuple of crops of any size, which are resized as
                `preprocessing` says: uint8 RGB [h, w, 3], grey [h, w] or RGBA [h, w, 4] (see `pmm.load_crops`, which
                reads files and floats too).

        Raises:
            InvalidInput: images of another type or size, an empty list, or a crop that is none (its `index`).
            OutOfMemory: too many images at once.
            UserError: the runner was closed.
        """
        images = self._ready(images)
        with batch_fits(images):
            return self._embed(images)

    def embed_on_gpu(self, images: Crops | CudaArray | Sequence[npt.NDArray[Any]]) -> GpuArray:
        """As a call, but the embeddings, float32 [B, D], stay on the GPU; they are complete, and belong to the caller.

        Raises UserError for a runner that does not work on a GPU.
        """
        self._check_usable()
        if not self.accepts_gpu_arrays:
            backend, device = self.info.backend, self.info.device
            raise UserError(f"{backend} leaves no embeddings on a GPU: it runs on {device}", hint="call the runner")
        images = self._ready(images)
        with batch_fits(images):
            return self._embed_on_gpu(images)

    def bind(self, images: Crops) -> BoundRun:
        """A run on a copy of `images` [B, H, W, 3], which is already where the backend wants it.

        Raises UserError as a call, for no images, and for another number than a static batch.
        """
        self._check_usable()
        if is_on_gpu(images):
            raise _on_gpu("bind copies them from host memory")
        self.check(images)
        if not len(images):
            raise InvalidInput("cannot bind 0 images", expected="1 or more")
        with batch_fits(images):
            bound = self._bind(images)
        bound._path = self._path
        self._bound_runs.add(bound)
        return bound

    def close(self) -> None:
        """Free what the runner holds; later calls raise UserError. May be called again. In a forked child it does
        nothing, as the parent frees what the runner holds."""
        if self._inherited:
            return
        self._closed = True
        for bound in list(self._bound_runs):
            bound._closed = True
        self._release()

    @abstractmethod
    def _embed(self, images: Crops | CudaArray) -> Embeddings:
        """`images` that were checked, or that lie on a GPU -> embeddings float32 [B, D]."""

    def _embed_on_gpu(self, images: Crops | CudaArray) -> GpuArray:
        """As `_embed`, of a runner that `accepts_gpu_arrays`."""
        raise NotImplementedError

    @abstractmethod
    def _bind(self, images: Crops) -> BoundRun:
        """As `bind`, for one or more images that were checked."""

    def _release(self) -> None:
        """Free what the runner holds; may be called again."""

    def __enter__(self: R) -> R:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ready(self, images: Crops | CudaArray | Sequence[npt.NDArray[Any]]) -> Crops | CudaArray:
        """Crops of the model's size, or an array on a GPU, which is checked where its content is."""
        self._check_usable()
        if isinstance(images, (list, tuple)):
            return self._resized(images)
        if not (self.accepts_gpu_arrays and is_on_gpu(images)):
            self.check(images)
        return images  # type: ignore[return-value]

    def _resized(self, crops: Sequence[npt.NDArray[Any]]) -> Crops:
        from pmm.data.crops import load_crops  # loads PIL, which crops of the model's size do without

        for index, crop in enumerate(crops):
            if isinstance(crop, (str, os.PathLike)):
                raise InvalidInput(f"crop {index} is a path", index=index, expected="arrays", hint=READ_FILES)
        return load_crops(crops, self.preprocessing)

    def check(self, images: Any) -> None:
        """Raises InvalidInput unless `images` are crops uint8 [B, H, W, 3] of the model's size, where the runner is."""
        if is_on_gpu(images) and not (self.accepts_gpu_arrays and isinstance(images, GpuArray)):
            raise _on_gpu(f"this runner takes them in host memory (it runs on {self.info.device})")
        size = (self.preprocessing.height, self.preprocessing.width, 3)
        is_array = isinstance(images, (np.ndarray, GpuArray))
        if not is_array or images.dtype != np.uint8 or len(images.shape) != 4 or images.shape[1:] != size:
            kind, shape = getattr(images, "dtype", f"a {type(images).__name__}"), getattr(images, "shape", None)
            raise InvalidInput(
                f"the images are {kind}{'' if shape is None else f' {list(shape)}'}",
                expected=f"uint8 [B, {', '.join(map(str, size))}] of numpy, or a list of crops of any size",
                hint=READ_FILES if isinstance(images, (str, os.PathLike)) else "",
            )


READ_FILES = "read files with pmm.load_crops(paths)"


def _on_gpu(problem: str) -> InvalidInput:
    hint = "copy them, as with .cpu().numpy() in torch"
    return InvalidInput(f"the images lie on a GPU, and {problem}", hint=hint)


def check_on_gpu(runner: Runner, images: GpuArray, index: int, contract: InputContract | None = None) -> None:
    """Raises InvalidInput for images on another GPU than `index`, of another type or size, or that would have to be
    converted for a file of this input `contract`."""
    if images.device != index:
        raise InvalidInput(
            f"the images lie on cuda:{images.device}, and this runner is on cuda:{index}",
            hint="open it there (device=), or move them",
        )
    runner.check(images)
    if contract is not None and (contract.dtype, contract.layout, contract.colour) != ("uint8", "NHWC", "rgb"):
        raise InvalidInput(
            f"the file takes {contract.dtype} {contract.layout} {contract.colour.upper()} images, and images on a GPU "
            "are not converted",
            hint="export it with --input uint8 --input-colour rgb, or pass the images in host memory",
        )


def run_in_batches(run: Callable[[Crops], Embeddings], images: Crops, batch: int | None) -> Embeddings:
    """`run` on any number of images, of a file whose `batch` may be static (None: it is not).

    They then go in runs of `batch`; the last is filled up with black images, whose embeddings are dropped.
    """
    if batch is None:
        return run(images)
    runs = max(1, -(-len(images) // batch))
    filled = np.zeros((runs * batch, *images.shape[1:]), images.dtype)
    filled[: len(images)] = images
    return np.concatenate([run(filled[k : k + batch]) for k in range(0, len(filled), batch)])[: len(images)]


def warn_if_unverified(path: Path, manifest: Manifest) -> None:
    """One line (logger "pmm") for an artifact without a manifest beside it, or never compared with its source."""
    if not manifest.sha256:
        logging.getLogger("pmm").warning(
            "%s: no manifest beside it, only the copy inside: whether it was changed or verified is unknown", path
        )
    elif manifest.parity is None:
        logging.getLogger("pmm").warning(
            "%s: its embeddings were never verified against %s", path, manifest.source_name
        )
