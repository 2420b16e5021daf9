"""TensorRT and TensorRT-RTX engines on an NVIDIA GPU. Needs no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pmm.artifacts.native_contracts import EngineContract
from pmm.artifacts.native_file import read_native
from pmm.data.preprocessing import Crops
from pmm.runtime.base import BoundRun, Embeddings, Runner, RunnerInfo, check_on_gpu, warn_if_unverified
from pmm.runtime.context_pool import ContextPool, EngineBoundRun
from pmm.runtime.cuda_libraries import open_device
from pmm.runtime.gpu_array import CudaArray, GpuArray, is_on_gpu
from pmm.runtime.rtx_cache import RuntimeCache, cache_file
from pmm.runtime.thread_context import ThreadContext
from pmm.runtime.trt_variant import (
    EngineHandle,
    check_engine,
    chosen_gpu,
    engine_precision,
    error_logger,
    library_name,
    load_flavor,
    start,
)
from pmm.utils.errors import InvalidFile, InvalidInput, UserError
from pmm.utils.hardware import gpu_at

CONTEXTS = 4
"""Runs of one engine at a time; more fill the GPU no better, and each needs memory on it."""


class TrtRunner(Runner):
    """An engine. Any thread may call it: a run takes a `ThreadContext` (stream, buffers, contexts) out of a small pool.

    More images than the engine's largest batch go in several runs; fewer than its smallest are padded. Images may be in
    host memory or on the GPU (torch's CUDA tensors, or what has DLPack or the CUDA array interface).
    """

    accepts_gpu_arrays = True
    _path: Path

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
        """Open `path`. TensorRT is not loaded before the file was checked and found to be built for this machine.

        Args:
            device: cuda, cuda:N (counted as they are visible), or auto: the first GPU.
            cuda_graph: capture the work of each batch size once, and replay it with one launch.
            contexts: most runs at a time; further callers wait.
            eager: let TensorRT-RTX compile the kernels of a new batch size before its first run, not beside the runs.
            warn: about embeddings that were never verified.
            log: gets the level and the text of every message of the library.

        Raises:
            InvalidFile: no engine of pmm export trt, a changed one, one for other machines, or not as in its manifest.
            BackendUnavailable: no GPU, or no library.
            UserError: the library refuses a call.
        """
        file = read_native(path, EngineContract)
        self._path, self.manifest, contract = file.path, file.manifest, file.contract
        self._index, gpu = chosen_gpu(self._path, device)
        trt = load_flavor(contract.flavor)
        check_engine(self._path, contract, str(trt.__version__), gpu)
        if warn:
            warn_if_unverified(self._path, self.manifest)
        self.preprocessing, self.embedding = self.manifest.preprocessing, self.manifest.embedding
        self.method = self.manifest.method
        self._batch = contract.batch

        self._lock = threading.Lock()
        self._engine: EngineHandle | None = None
        self._runtime: Any = None
        self._cache: RuntimeCache | None = None
        self._pool: ContextPool | None = None
        first = open_device(self._index)
        try:
            with first.active():
                engine = self._engine = self._load(
                    trt, contract, file.content, error_logger(trt, log), cuda_graph, eager
                )
                self.info = RunnerInfo(
                    backend=library_name(contract.flavor),
                    device=gpu.name,
                    precision=engine_precision(self.manifest, contract, gpu),
                    provider=f"{engine.library} (buffers: {first.name}, {'' if self.cuda_graph else 'no '}CUDA graph)",
                )
            context = ThreadContext(engine, first)
            self._pool = ContextPool(
                self._path, max(1, contexts), lambda: ThreadContext(engine, open_device(self._index)), context
            )
            # one run now: `info` is then of a real run, and the first call is as fast as later ones
            context.step(np.zeros((contract.batch.best, *engine.image_shape), engine.input.dtype))
        except BaseException:
            self.close()
            first.close()
            raise

    @property
    def cuda_graph(self) -> bool:
        """Runs are CUDA graphs: captured here for TensorRT, by the library for TensorRT-RTX."""
        return self._engine is not None and self._engine.graphs != "off"

    def _embed(self, images: Crops | CudaArray) -> Embeddings:
        with self._contexts.borrow() as context:
            located = self._located(context, images)
            embeddings = np.empty((located.shape[0], self.embedding.dim), np.float32)
            for start, stop in self._runs(located):
                context.run(self._fed(located, start, stop), embeddings[start:stop])
        return embeddings

    def _embed_on_gpu(self, images: Crops | CudaArray) -> GpuArray:
        with self._contexts.borrow() as context:
            located = self._located(context, images)
            embeddings = context.new_embeddings(located.shape[0])
            for start, stop in self._runs(located):
                context.run(self._fed(located, start, stop), embeddings.rows(start, stop))
        return embeddings

    def _bind(self, images: Crops) -> BoundRun:
        """The embeddings stay on the GPU. A call between two steps uses the same buffers: the next step then uploads
        its images again. Raises InvalidInput for more images than one run takes."""
        self.manifest.input.check_batch(len(images), self._path)
        if len(images) > self._batch.most:
            problem = f"cannot bind {len(images)} images"
            raise InvalidInput(problem, path=self._path, expected=f"1 to {self._batch.most}")
        step = EngineBoundRun(self._contexts, self.manifest.input.feed(images, self.preprocessing).copy())
        step()
        return step

    def inspect(self, batch: int | None = None) -> str:
        """The engine inspector's JSON on the layers, at a batch size (default: the best)."""
        self._check_usable()
        with self._contexts.borrow() as context:
            return context.inspect(batch or self._batch.best)

    def layer_times(self, batch: int, runs: int) -> dict[str, float]:
        """Layer -> median ms of `runs` runs of `batch` images of noise, without CUDA graph."""
        self._check_usable()
        size = self.preprocessing
        noise = np.random.default_rng(0).integers(0, 256, (batch, size.height, size.width, 3), dtype=np.uint8)
        with self._contexts.borrow() as context:
            return context.layer_times(self._fed(noise, 0, batch), runs)  # type: ignore[arg-type]

    def _release(self) -> None:
        if self._pool is not None:
            if self._cache is not None:
                with contextlib.suppress(UserError), self._pool.borrow() as context, context.active():
                    self._cache.save()
            self._pool.close()
        # contexts first, then their cache, the engine and the runtime that loaded it
        self._cache = self._engine = self._runtime = None

    @property
    def _contexts(self) -> ContextPool:
        assert self._pool is not None
        return self._pool

    def _runs(self, images: Crops | GpuArray) -> Iterator[tuple[int, int]]:
        count, most = images.shape[0], self._batch.most
        return ((start, min(start + most, count)) for start in range(0, count, most))

    def _fed(self, images: Crops | GpuArray, start: int, stop: int) -> npt.NDArray[Any] | GpuArray:
        if isinstance(images, GpuArray):
            return images.rows(start, stop)
        return self.manifest.input.feed(images[start:stop], self.preprocessing)

    def _located(self, context: ThreadContext, images: Crops | CudaArray) -> Crops | GpuArray:
        """The images, where they are. Raises InvalidInput for some on a GPU that the engine cannot take from there."""
        if not is_on_gpu(images):
            return images  # type: ignore[return-value]
        located = context.gpu_images(images)
        check_on_gpu(self, located, self._index, self.manifest.input)
        return located

    def _load(
        self, trt: Any, contract: EngineContract, content: bytes, logger: Any, cuda_graph: bool, eager: bool
    ) -> EngineHandle:
        """Deserialise `content` and check it against the manifest."""
        library = f"{library_name(contract.flavor)} {trt.__version__}"
        self._runtime = start(trt.Runtime, logger, f"{self._path}: {library}")
        self._runtime.engine_host_code_allowed = False
        native = self._runtime.deserialize_cuda_engine(content)
        if native is None:
            reason = logger.take()
            if hasattr(self._runtime, "get_engine_validity"):
                validity, diagnostics = self._runtime.get_engine_validity(content)
                reason += f"; {validity}, diagnostics {diagnostics}"
            raise InvalidFile(f"{library} cannot load it ({reason})", path=self._path, hint=contract.rebuild)
        self._check_interface(trt, native)
        graphs: Literal["captured", "library", "off"] = "captured" if cuda_graph else "off"
        options = None
        if contract.flavor == "rtx":
            graphs = "library" if cuda_graph and _capturing(trt) else "off"
            options = partial(self._rtx_options, trt, native, graphs == "library", eager)
            file = cache_file(self.manifest.sha256, str(trt.__version__), gpu_at(self._index).compute_capability)
            self._cache = RuntimeCache(options(), file)
        return EngineHandle(
            path=self._path,
            trt=trt,
            library=library,
            logger=logger,
            native=native,
            graphs=graphs,
            context_options=options,
            batch=contract.batch,
            image_shape=self.manifest.input.shape(self.preprocessing),
            input=self.manifest.input,
            embedding=self.embedding,
            graphs_failed=self._without_graphs,
        )

    def _rtx_options(self, trt: Any, native: Any, cuda_graph: bool, eager: bool) -> Any:
        """How TensorRT-RTX runs a context; it captures by itself, as it knows when its kernels are final."""
        config = native.create_runtime_config()
        if cuda_graph:
            config.cuda_graph_strategy = _capturing(trt)
        if eager:
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._cache is not None:
            config.set_runtime_cache(self._cache.shared)
        return config

    def _without_graphs(self, reason: str) -> None:
        with self._lock:
            if self._engine is not None and self._engine.graphs != "off":
                self._engine.graphs = "off"
                provider = self.info.provider.removesuffix("CUDA graph)") + f"no CUDA graph: {reason})"
                self.info = dataclasses.replace(self.info, provider=provider)
                logging.getLogger("pmm").warning("%s: runs without CUDA graph: %s", self._path, reason)

    def _check_interface(self, trt: Any, native: Any) -> None:
        """Raises InvalidFile unless the engine's tensors and batch sizes are those of the manifest."""
        images, image_shape = self.manifest.input, self.manifest.input.shape(self.preprocessing)
        types, batch = {trt.uint8: "uint8", trt.float32: "float32"}, images.batch or -1
        actual = set()
        for name in (native.get_tensor_name(index) for index in range(native.num_io_tensors)):
            mode = "takes" if native.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "returns"
            kind = native.get_tensor_dtype(name)
            actual.add(f"{mode} {types.get(kind, kind)} {name} {list(native.get_tensor_shape(name))}")
        declared = {
            f"takes {images.dtype} {images.name} {[batch, *image_shape]}",
            f"returns {self.embedding.dtype} {self.embedding.name} {[batch, self.embedding.dim]}",
        }
        if actual != declared:
            expected = f"one that {_listed(declared)}, by its manifest"
            raise InvalidFile(f"this engine {_listed(actual)}", path=self._path, expected=expected)
        shapes = [
            tuple(tuple(shape) for shape in native.get_tensor_profile_shape(images.name, at))
            for at in range(native.num_optimization_profiles)
        ]
        profiles = [tuple((size, *image_shape) for size in (p.least, p.best, p.most)) for p in self._batch.profiles]
        if shapes != profiles:
            problem = f"its {len(shapes)} batch profile(s) take {shapes}"
            raise InvalidFile(problem, path=self._path, expected=f"{profiles}, by its manifest")


def _capturing(trt: Any) -> Any:
    """None for a release that captures no CUDA graphs."""
    return trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if hasattr(trt, "CudaGraphStrategy") else None


def _listed(tensors: set[str]) -> str:
    return " and ".join(sorted(tensors, reverse=True))
