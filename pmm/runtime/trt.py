"""TensorRT and TensorRT-RTX engines on an NVIDIA GPU. Needs no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pmm.data.crops import Crops
from pmm.errors import Unavailable, UserError
from pmm.files import existing_file
from pmm.machine import Gpu, nvidia_gpus
from pmm.manifest import EngineContract, Manifest, read_manifest
from pmm.runtime.base import Embeddings, Runner, RunnerInfo, Step, warn_if_unverified
from pmm.runtime.buffers import open_device
from pmm.runtime.flavors import (
    RTX_CAPABILITIES,
    error_logger,
    library_name,
    load_flavor,
    started,
    this_platform,
)
from pmm.runtime.fork import refuse_parents_gpu
from pmm.runtime.lane import Lane, Loaded
from pmm.runtime.tf32 import TF32_ON, has_tf32

REBUILD = "build it here from its ONNX file with: python export/to_trt.py"


class TrtRunner(Runner):
    """An engine. Each thread that calls it gets its own stream, buffers and execution contexts (a `Lane`).

    More images than the engine's largest batch go in several runs; fewer than its smallest are padded. `close` is for
    when no call is under way.
    """

    def __init__(self, path: str | Path, device: str = "cuda", *, cuda_graph: bool = True, warn: bool = True) -> None:
        """Open `path`; `warn` about embeddings that were never verified.

        Nothing of TensorRT is touched before the file is known to be ours and built for this machine. Raises UserError
        if it is not, was changed, or does not hold what its manifest promises.
        """
        self._path = existing_file(path, "an engine written by export/to_trt.py")
        content = self._path.read_bytes()
        self.manifest, contract = _promised(self._path, read_manifest(self._path, hashlib.sha256(content).hexdigest()))
        gpu = _gpu(self._path, device)
        trt = load_flavor(contract.flavor)
        _check_origin(self._path, contract, str(trt.__version__), gpu)
        if warn:
            warn_if_unverified(self._path, self.manifest)
        self.preprocessing, self.embedding = self.manifest.preprocessing, self.manifest.embedding
        self._batch = contract.batch

        self._lanes: dict[threading.Thread, Lane] = {}
        self._lock = threading.Lock()
        self._loaded: Loaded | None = None
        self._runtime: Any = None
        first = open_device()
        try:
            with first.active():
                loaded = self._loaded = self._load(trt, contract, content, cuda_graph)
                self.info = RunnerInfo(
                    backend=library_name(contract.flavor),
                    device=gpu.name,
                    precision=_precision(self.manifest, contract, gpu),
                    provider=f"{loaded.library} (buffers: {first.name}, {'' if self.cuda_graph else 'no '}CUDA graph)",
                )
            lane = self._lanes[threading.current_thread()] = Lane(loaded, first)
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

    def __call__(self, images: Crops) -> Embeddings:
        self.check(images)
        lane, most = self._lane(), self._batch.most
        embeddings = np.empty((len(images), self.embedding.dim), np.float32)
        for start in range(0, len(images), most):
            chunk = slice(start, start + most)
            lane.run(self.manifest.input.feed(images[chunk], self.preprocessing), embeddings[chunk])
        return embeddings

    def bind(self, images: Crops) -> Step:
        """As `Runner.bind`; the step has the images on the GPU, and leaves the embeddings there.

        A call between two steps uses the same buffers: the next step then uploads its images again. Raises UserError
        for more images than one run takes.
        """
        self.check(images)
        if not 1 <= len(images) <= self._batch.most:
            raise UserError(f"{self._path}: cannot bind {len(images)} images; one run takes 1 to {self._batch.most}")
        fed = self.manifest.input.feed(images, self.preprocessing).copy()
        self._lane().step(fed)
        return LaneStep(self._lane, fed)

    def inspect(self) -> str:
        """What the engine inspector says of the engine's layers, as JSON."""
        return self._lane().inspect(self._batch.best)

    def close(self) -> None:
        """Free everything on the GPU. May be called again; runs after it raise UserError."""
        with self._lock:
            while self._lanes:
                self._lanes.popitem()[1].close()
            # contexts went first, then the engine, then the runtime that made it
            self._loaded = self._runtime = None

    def _lane(self) -> Lane:
        thread = threading.current_thread()
        lane = self._lanes.get(thread)
        if lane is None:
            with self._lock:
                if self._loaded is None:
                    raise UserError(f"{self._path}: this runner was closed; open it again")
                # threads come and go; what the gone ones held is of no use
                for gone in [other for other in self._lanes if not other.is_alive()]:
                    self._lanes.pop(gone).close()
                lane = self._lanes[thread] = Lane(self._loaded, open_device())
        return lane

    def _load(self, trt: Any, contract: EngineContract, content: bytes, cuda_graph: bool) -> Loaded:
        """Deserialise `content` and check it against the manifest."""
        logger, library = error_logger(trt), f"{library_name(contract.flavor)} {trt.__version__}"
        self._runtime = started(trt.Runtime, logger, f"{self._path}: {library}")
        self._runtime.engine_host_code_allowed = False
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            reason = logger.take()
            if hasattr(self._runtime, "get_engine_validity"):
                validity, diagnostics = self._runtime.get_engine_validity(content)
                reason += f"; {validity}, diagnostics {diagnostics}"
            raise UserError(f"{self._path}: {library} cannot load it ({reason}); {REBUILD}")
        self._check_interface(trt, engine)
        config = _graph_config(trt, engine) if cuda_graph else None
        ours: Literal["captured", "off"] = "captured" if cuda_graph and contract.flavor == "tensorrt" else "off"
        return Loaded(
            path=self._path,
            trt=trt,
            library=library,
            logger=logger,
            engine=engine,
            graphs=ours if config is None else "own",
            config=config,
            batch=contract.batch,
            image_shape=self.manifest.input.shape(self.preprocessing),
            given=self.manifest.input,
            returned=self.embedding,
            graphs_failed=self._without_graphs,
        )

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
        types = {trt.uint8: "uint8", trt.float32: "float32"}
        found = set()
        for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
            mode = "takes" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "returns"
            kind = engine.get_tensor_dtype(name)
            found.add(f"{mode} {types.get(kind, kind)} {name} {list(engine.get_tensor_shape(name))}")
        promised = {
            f"takes {given.dtype} {given.name} {[-1, *image_shape]}",
            f"returns {self.embedding.dtype} {self.embedding.name} {[-1, self.embedding.dim]}",
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


class LaneStep(Step):
    """A run on the lane of the calling thread: `wait` waits for what the same thread enqueued."""

    def __init__(self, lane: Callable[[], Lane], images: npt.NDArray[Any]) -> None:
        super().__init__(lambda: lane().step(images))
        self._lane, self._images = lane, images

    def enqueue(self) -> None:
        self._lane().enqueue(self._images)

    def wait(self) -> None:
        self._lane().wait()

    def device_ms(self) -> float:
        return self._lane().device_ms(self._images)

    def transfers_ms(self) -> tuple[float, float]:
        return self._lane().transfers_ms(self._images)


def _precision(manifest: Manifest, contract: EngineContract, gpu: Gpu) -> str:
    """In which the engine runs: fp32 with leave to use TF32 is tf32, if the GPU has it."""
    found = manifest.precision_found
    return "tf32" if found == "fp32" and TF32_ON in contract.flags and has_tf32(gpu) else found


def _graph_config(trt: Any, engine: Any) -> Any:
    """TensorRT-RTX captures by itself, as it knows when its kernels are final: the config for that, else None."""
    if not hasattr(trt, "CudaGraphStrategy"):
        return None
    wanted = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    config = engine.create_runtime_config()
    config.cuda_graph_strategy = wanted
    return config if config.cuda_graph_strategy == wanted else None


def _promised(path: Path, manifest: Manifest | None) -> tuple[Manifest, EngineContract]:
    if manifest is None:
        raise UserError(
            f"{path}: no manifest beside it ({path.name}.json); an engine is executable code, so only one with its "
            f"manifest is opened; {REBUILD}"
        )
    if manifest.engine is None:
        raise UserError(f"{path}: its manifest describes no engine; {REBUILD}")
    return manifest, manifest.engine


def _gpu(path: Path, device: str) -> Gpu:
    """The GPU that runs it: the first visible one."""
    if device == "cpu":
        raise Unavailable(f"{path}: engines run on NVIDIA GPUs only; run its ONNX file on the CPU")
    if device not in ("auto", "cuda"):
        raise UserError(f"unknown device '{device}'; known for engines: auto, cuda")
    refuse_parents_gpu()
    gpus = nvidia_gpus()
    if not gpus:
        raise Unavailable(f"{path}: engines run on NVIDIA GPUs only, and the CUDA driver sees none here")
    return gpus[0]


def _check_origin(path: Path, contract: EngineContract, version: str, gpu: Gpu) -> None:
    """Raises UserError naming all in which this machine differs from where the engine can run."""
    differs = []
    if version != contract.version:
        differs.append(f"{library_name(contract.flavor)} is {version} here, it was built with {contract.version}")
    if this_platform() != contract.platform:
        differs.append(f"this is {this_platform()}, it was built for {contract.platform}")
    here = f"{gpu.name} (compute capability {gpu.compute_capability})"
    portable = contract.portable
    if not portable and gpu.compute_capability != contract.compute_capability:
        differs.append(f"the GPU is {here}, it was built for {contract.gpu} ({contract.compute_capability})")
    # a portable engine of TensorRT itself says on loading whether this GPU will do
    if portable and contract.flavor == "rtx" and gpu.compute_capability not in RTX_CAPABILITIES:
        differs.append(f"the GPU is {here}, TensorRT-RTX runs on compute capability {', '.join(RTX_CAPABILITIES)}")
    if contract.hardware_compatibility == "none" and not portable and not differs and gpu.name != contract.gpu:
        # of the same machine code; kernels were chosen by times measured there (TensorRT logs the same warning)
        logging.getLogger("pmm").warning("%s: built on %s; on this %s it may be slower", path, contract.gpu, gpu.name)
    if differs:
        raise UserError(f"{path}: this engine cannot run here: {'; '.join(differs)}; {REBUILD}")


def _listed(tensors: set[str]) -> str:
    return " and ".join(sorted(tensors, reverse=True))
