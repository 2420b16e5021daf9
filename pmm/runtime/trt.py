"""TensorRT and TensorRT-RTX engines on an NVIDIA GPU. Needs no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from pmm.artifacts.manifest import EngineContract
from pmm.artifacts.native_file import read_native
from pmm.data.preprocessing import Crops
from pmm.runtime.base import BoundRun, Embeddings, Runner, RunnerInfo, check_on_gpu, warn_if_unverified
from pmm.runtime.context_pool import ContextPool
from pmm.runtime.cuda_libraries import open_device
from pmm.runtime.engine_origin import check_engine, chosen_gpu, engine_precision
from pmm.runtime.gpu_array import CudaArray, GpuArray, is_on_gpu
from pmm.runtime.rtx_cache import RuntimeCache, cache_file
from pmm.runtime.thread_context import EngineHandle, ThreadContext
from pmm.runtime.trt_variant import (
    error_logger,
    library_name,
    load_flavor,
    started,
)
from pmm.utils.errors import UserError
from pmm.utils.hardware import gpu_at

T = TypeVar("T")

CONTEXTS = 4
"""Runs of one engine at a time; more fill the GPU no better, and each holds memory there."""


class TrtRunner(Runner):
    """An engine. Any thread may call it: a run takes a `ThreadContext` (stream, buffers, contexts) out of a small pool.

    More images than the engine's largest batch go in several runs; fewer than its smallest are padded. Images may be in
    host memory or on the GPU (torch's CUDA tensors, or what has DLPack or the CUDA array interface).
    """

    def __init__(
        self,
        path: str | Path,
        device: str = "cuda",
        *,
        cuda_graph: bool = True,
        contexts: int = CONTEXTS,
        eager: bool = False,
        warn: bool = True,
        log: Callable[[str, str], None] | None = None,
    ) -> None:
        """Open `path`. Nothing of TensorRT is touched before the file is known to be ours and built for this machine.

        Args:
            device: cuda, cuda:N (counted as they are visible), or auto: the first GPU.
            cuda_graph: capture the work of each batch size once, and replay it with one launch.
            contexts: most runs at a time; further callers wait.
            eager: let TensorRT-RTX compile the kernels of a new batch size before its first run, not beside the runs.
            warn: about embeddings that were never verified.
            log: gets the level and the text of all that the library says.

        Raises:
            UserError: the file is not ours, was changed, cannot run here, or does not hold what its manifest promises.
        """
        file = read_native(path, EngineContract)
        self._path, self.manifest, contract = file.path, file.manifest, file.contract
        self._index, gpu = chosen_gpu(self._path, device)
        trt = load_flavor(contract.flavor)
        check_engine(self._path, contract, str(trt.__version__), gpu)
        if warn:
            warn_if_unverified(self._path, self.manifest)
        self.preprocessing, self.embedding = self.manifest.preprocessing, self.manifest.embedding
        self._batch = contract.batch

        self._lock = threading.Lock()
        self._loaded: EngineHandle | None = None
        self._runtime: Any = None
        self._cache: RuntimeCache | None = None
        self._pool: ContextPool | None = None
        first = open_device(self._index)
        try:
            with first.active():
                loaded = self._loaded = self._load(
                    trt, contract, file.content, error_logger(trt, log), cuda_graph, eager
                )
                self.info = RunnerInfo(
                    backend=library_name(contract.flavor),
                    device=gpu.name,
                    precision=engine_precision(self.manifest, contract, gpu),
                    provider=f"{loaded.library} (buffers: {first.name}, {'' if self.cuda_graph else 'no '}CUDA graph)",
                )
            lane = ThreadContext(loaded, first)
            self._pool = ContextPool(
                self._path, max(1, contexts), lambda: ThreadContext(loaded, open_device(self._index)), lane
            )
            # one run now: `info` then says what was found, and the first call is as fast as the others
            lane.step(np.zeros((contract.batch.best, *loaded.image_shape), loaded.given.dtype))
        except BaseException:
            self.close()
            first.close()
            raise

    @property
    def cuda_graph(self) -> bool:
        """Runs are CUDA graphs: ours for TensorRT, its own for TensorRT-RTX."""
        return self._loaded is not None and self._loaded.graphs != "off"

    def __call__(self, images: Crops | CudaArray) -> Embeddings:
        with self._lanes.lane() as lane:
            placed = self._checked(lane, images)
            embeddings = np.empty((placed.shape[0], self.embedding.dim), np.float32)
            for start, stop in self._runs(placed):
                lane.run(self._fed(placed, start, stop), embeddings[start:stop])
        return embeddings

    def embed_on_gpu(self, images: Crops | CudaArray) -> GpuArray:
        with self._lanes.lane() as lane:
            placed = self._checked(lane, images)
            embeddings = lane.new_embeddings(placed.shape[0])
            for start, stop in self._runs(placed):
                lane.run(self._fed(placed, start, stop), embeddings.rows(start, stop))
        return embeddings

    def bind(self, images: Crops) -> BoundRun:
        """As `Runner.bind`; the step has the images on the GPU, and leaves the embeddings there.

        A call between two steps uses the same buffers: the next step then uploads its images again. Raises UserError
        for more images than one run takes, and for another number than a static batch.
        """
        self.check(images)
        self.manifest.input.check_batch(len(images), self._path)
        if not 1 <= len(images) <= self._batch.most:
            raise UserError(f"{self._path}: cannot bind {len(images)} images; one run takes 1 to {self._batch.most}")
        step = EngineBoundRun(self._lanes, self.manifest.input.feed(images, self.preprocessing).copy())
        step()
        return step

    def inspect(self, batch: int | None = None) -> str:
        """What the engine inspector says of the engine's layers, as JSON, at a batch size (default: the best)."""
        with self._lanes.lane() as lane:
            return lane.inspect(batch or self._batch.best)

    def layer_times(self, batch: int, runs: int) -> dict[str, float]:
        """Layer -> median ms of `runs` runs of `batch` images of noise, without CUDA graph."""
        size = self.preprocessing
        noise = np.random.default_rng(0).integers(0, 256, (batch, size.height, size.width, 3), dtype=np.uint8)
        with self._lanes.lane() as lane:
            return lane.layer_times(self._fed(noise, 0, batch), runs)  # type: ignore[arg-type]

    def close(self) -> None:
        """Free everything on the GPU, after the runs under way. May be called again; runs after it raise UserError."""
        if self._pool is not None:
            if self._cache is not None:
                with contextlib.suppress(UserError), self._pool.lane() as lane, lane.active():
                    self._cache.save()
            self._pool.close()
        # contexts went first, then what they were made with, the engine, and the runtime that made it
        self._cache = self._loaded = self._runtime = None

    @property
    def _lanes(self) -> ContextPool:
        assert self._pool is not None
        return self._pool

    def _runs(self, images: Crops | GpuArray) -> Iterator[tuple[int, int]]:
        count, most = images.shape[0], self._batch.most
        return ((start, min(start + most, count)) for start in range(0, count, most))

    def _fed(self, images: Crops | GpuArray, start: int, stop: int) -> npt.NDArray[Any] | GpuArray:
        if isinstance(images, GpuArray):
            return images.rows(start, stop)
        return self.manifest.input.feed(images[start:stop], self.preprocessing)

    def _checked(self, lane: ThreadContext, images: Crops | CudaArray) -> Crops | GpuArray:
        """The images, where they lie. Raises UserError for ones that the engine does not take from there."""
        if not is_on_gpu(images):
            self.check(images)  # type: ignore[arg-type]
            return images  # type: ignore[return-value]
        placed = lane.placed(images)
        check_on_gpu(self, placed, self._index, self.manifest.input)
        return placed

    def _load(
        self, trt: Any, contract: EngineContract, content: bytes, logger: Any, cuda_graph: bool, eager: bool
    ) -> EngineHandle:
        """Deserialise `content` and check it against the manifest."""
        library = f"{library_name(contract.flavor)} {trt.__version__}"
        self._runtime = started(trt.Runtime, logger, f"{self._path}: {library}")
        self._runtime.engine_host_code_allowed = False
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            reason = logger.take()
            if hasattr(self._runtime, "get_engine_validity"):
                validity, diagnostics = self._runtime.get_engine_validity(content)
                reason += f"; {validity}, diagnostics {diagnostics}"
            raise UserError(f"{self._path}: {library} cannot load it ({reason}); {contract.rebuild}")
        self._check_interface(trt, engine)
        graphs: Literal["captured", "own", "off"] = "captured" if cuda_graph else "off"
        options = None
        if contract.flavor == "rtx":
            graphs = "own" if cuda_graph and _capturing(trt) else "off"
            options = partial(self._rtx_options, trt, engine, graphs == "own", eager)
            place = cache_file(self.manifest.sha256, str(trt.__version__), gpu_at(self._index).compute_capability)
            self._cache = RuntimeCache(options(), place)
        return EngineHandle(
            path=self._path,
            trt=trt,
            library=library,
            logger=logger,
            engine=engine,
            graphs=graphs,
            context_options=options,
            batch=contract.batch,
            image_shape=self.manifest.input.shape(self.preprocessing),
            given=self.manifest.input,
            returned=self.embedding,
            graphs_failed=self._without_graphs,
        )

    def _rtx_options(self, trt: Any, engine: Any, cuda_graph: bool, eager: bool) -> Any:
        """How TensorRT-RTX runs a context; it captures by itself, as it knows when its kernels are final."""
        config = engine.create_runtime_config()
        if cuda_graph:
            config.cuda_graph_strategy = _capturing(trt)
        if eager:
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._cache is not None:
            config.set_runtime_cache(self._cache.shared)
        return config

    def _without_graphs(self, reason: str) -> None:
        with self._lock:
            if self._loaded is not None and self._loaded.graphs != "off":
                self._loaded.graphs = "off"
                provider = self.info.provider.removesuffix("CUDA graph)") + f"no CUDA graph: {reason})"
                self.info = dataclasses.replace(self.info, provider=provider)
                logging.getLogger("pmm").warning("%s: runs without CUDA graph: %s", self._path, reason)

    def _check_interface(self, trt: Any, engine: Any) -> None:
        """The engine takes and returns what the manifest promises, at the batch sizes it promises."""
        given, image_shape = self.manifest.input, self.manifest.input.shape(self.preprocessing)
        types, batch = {trt.uint8: "uint8", trt.float32: "float32"}, given.batch or -1
        found = set()
        for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
            mode = "takes" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "returns"
            kind = engine.get_tensor_dtype(name)
            found.add(f"{mode} {types.get(kind, kind)} {name} {list(engine.get_tensor_shape(name))}")
        promised = {
            f"takes {given.dtype} {given.name} {[batch, *image_shape]}",
            f"returns {self.embedding.dtype} {self.embedding.name} {[batch, self.embedding.dim]}",
        }
        if found != promised:
            raise UserError(f"{self._path}: it {_listed(found)}; its manifest promises that it {_listed(promised)}")
        shapes = [
            tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(given.name, at))
            for at in range(engine.num_optimization_profiles)
        ]
        expected = [tuple((size, *image_shape) for size in (p.least, p.best, p.most)) for p in self._batch.profiles]
        if shapes != expected:
            raise UserError(
                f"{self._path}: its {len(shapes)} batch profile(s) take {shapes}; its manifest promises {expected}"
            )


class EngineBoundRun(BoundRun):
    """A run on a lane of the pool: on the one that has the images, while nobody else needs it."""

    def __init__(self, lanes: ContextPool, images: npt.NDArray[Any]) -> None:
        super().__init__(lambda: self._on(lambda lane: lane.step(images)))
        self._lanes, self._images = lanes, images
        self._last: ThreadContext | None = None

    def enqueue(self) -> None:
        self._on(lambda lane: lane.enqueue(self._images))

    def wait(self) -> None:
        self._lanes.check_open()
        if self._last is not None:
            self._last.wait()

    def device_ms(self) -> float:
        return self._on(lambda lane: lane.device_ms(self._images))

    def transfers_ms(self) -> tuple[float, float]:
        return self._on(lambda lane: lane.transfers_ms(self._images))

    def _on(self, work: Callable[[ThreadContext], T]) -> T:
        with self._lanes.lane(self._last) as lane:
            self._last = lane
            return work(lane)


def _capturing(trt: Any) -> Any:
    """None for a release that has no CUDA graphs of its own."""
    return trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if hasattr(trt, "CudaGraphStrategy") else None


def _listed(tensors: set[str]) -> str:
    return " and ".join(sorted(tensors, reverse=True))
