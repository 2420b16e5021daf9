"""The child's side of `pmm.bench.workers`: one backend in its own process.

Requests and answers are lines of JSON. The output of libraries goes to the log, never between the answers.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pmm.artifacts.manifest import Manifest
from pmm.bench.latency import Clock, LatencyPlan, run_turn, throughput, warm_up
from pmm.bench.result_schema import EMBED_BATCH
from pmm.bench.tracker_load import measure_tracker_load
from pmm.data.crops import iter_crops, load_crops
from pmm.data.mistakes import likely_mistakes
from pmm.data.preprocessing import Crops
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.runtime.base import BoundRun, Embeddings, Runner
from pmm.runtime.open import BACKENDS
from pmm.utils.errors import BackendUnavailable, UserError
from pmm.utils.extras import missing_library
from pmm.utils.files import replacing
from pmm.utils.hardware import gpu_memory_of

PR_SET_PDEATHSIG = 1
"""prctl: what a process gets when its parent is gone."""
SMALL_BATCHES = (1, 3, 7, 1, 32)
"""Alone, odd and ragged: their rows must be the rows of a batch of 64."""


class WorkerSession:
    """The state of a worker between requests: an open runner, and steps bound to their images."""

    def __init__(self, on_progress: Callable[[float], None], clock: Clock = time.perf_counter) -> None:
        """`on_progress` is called with the share of a request that is done; steps are timed by `clock`."""
        self._on_progress, self._clock = on_progress, clock
        self._opened: Runner | None = None
        self._steps: dict[int, BoundRun] = {}
        self._graph = False

    @property
    def _runner(self) -> Runner:
        if self._opened is None:
            raise RuntimeError("no runner is open: `open` comes first")
        return self._opened

    def answer(self, method: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request: what `method` returns, or one line about the error and its kind."""
        try:
            return {"answer": getattr(self, method)(**arguments)}
        except BackendUnavailable as error:
            return {"error": str(error), "kind": "unavailable"}
        except Exception as error:  # of whatever kind: the parent reports it, and the other backends go on
            traceback.print_exc()
            line = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            line = missing_library(error) or line
            return {"error": line.strip().split("\n")[0], "kind": "failed"}

    def describe(self, source: str) -> dict[str, Any]:
        """Facts of a checkpoint or adopted ONNX file; see `describe_source`."""
        from pmm.bench.artifacts import describe_source

        return describe_source(Path(source))

    def make(self, **candidate: Any) -> dict[str, Any]:
        """Export and build the artifact of a candidate, unless an earlier run left it; see `make_artifact`."""
        from pmm.bench.artifacts import make_artifact

        return make_artifact(**candidate)

    def open(self, artifact: str, **candidate: Any) -> dict[str, Any]:
        """Open the runner and run it once. The answer is the library, device and embeddings that it really has."""
        from pmm.bench.runner_factory import open_candidate

        BACKENDS[candidate["backend"]].load_library()  # so that opening a file is timed without it
        begin = time.perf_counter()
        runner = self._opened = open_candidate(Path(artifact), **candidate)
        opened = time.perf_counter()
        size = runner.preprocessing
        runner(np.zeros((1, size.height, size.width, 3), np.uint8))
        first = time.perf_counter() - opened
        info, self._graph = runner.info, bool(candidate["cuda_graph"])
        self._check_graph()
        if (info.device == "cpu") != (candidate["device"] == "cpu"):
            raise UserError(f"{info.provider} runs on {info.device}", expected=candidate["device"])
        if info.precision != candidate["precision"]:
            raise UserError(f"{info.provider} runs in {info.precision}", expected=candidate["precision"])
        return {
            "provider": info.provider,
            "device": info.device,
            "load_s": opened - begin,
            "first_inference_s": first,
            "dim": runner.embedding.dim,
            "normalised": runner.embedding.normalised,
            "flip_tta": runner.embedding.flip_tta,
        }

    def embed(self, paths: str, out: str, mirrored: bool = False, mistake: str = "") -> None:
        """Write the embeddings [N, D] of the files that the JSON list `paths` names to the .npy file `out`: of their
        mirror images, if they are to be `mirrored`; or prepared with the `mistake` of that name."""
        runner, files = self._runner, [Path(path) for path in json.loads(Path(paths).read_text())]
        known = {str(each.name): each for each in likely_mistakes(runner.preprocessing)}
        wrong = known[mistake] if mistake else None
        done = 0
        embeddings = np.empty((len(files), runner.embedding.dim), np.float32)
        for crops in iter_crops(files, wrong.made if wrong else runner.preprocessing, EMBED_BATCH):
            images = np.ascontiguousarray(crops[:, :, ::-1]) if mirrored else wrong.fed(crops) if wrong else crops
            embeddings[done : done + len(crops)] = self._embed_batch(images)
            done += len(crops)
            self._on_progress(done / len(files))
        with replacing(Path(out)) as temporary:
            np.save(temporary, embeddings)

    def compare_batch_sizes(self, paths: list[str]) -> dict[str, float]:
        """Least cosine and largest norm error of embeddings in small batches with those of the same crops in one."""
        crops = self._crops(paths)
        rows, start = [], 0
        for count in SMALL_BATCHES:
            if start < len(crops):
                rows.append(self._embed_batch(crops[start : start + count]))
                start += count
        small = np.concatenate(rows)
        return _agreement(self._embed_batch(crops)[: len(small)], small)

    def bind(self, paths: list[str], plan: dict[str, Any]) -> dict[str, Any]:
        """Bind the crops of `paths` as one batch and warm up until steady. The answer: the time of one run, ms, the
        batch that an engine's profile for it is made for, and least cosine and largest norm error of embeddings in this
        batch with those of the same crops in batches of 64, in which accuracy is measured."""
        batch, chosen = len(paths), LatencyPlan(**plan)
        crops = self._crops(paths)
        agreement = _agreement(self._in_full_batches(crops), self._embed_batch(crops))
        step = self._steps[batch] = self._runner.bind(crops)
        seconds, steady, run_ms = warm_up(step, chosen, self._clock)
        self._check_graph()
        manifest: Manifest | None = getattr(self._runner, "manifest", None)
        engine = manifest and manifest.engine
        profile = engine.batch.profiles[engine.batch.runs_as(batch)[0]].best if engine else None
        return {"warmup_s": seconds, "steady": steady, "run_ms": run_ms, "profile": profile, **agreement}

    def turn(self, batch: int, plan: dict[str, Any]) -> list[float]:
        """One block of samples, ms."""
        return run_turn(self._steps[batch], LatencyPlan(**plan), self._clock)

    def throughput(self, batch: int, in_flight: int, seconds: float) -> float:
        """Throughput, images/s, of calls submitted `in_flight` at a time."""
        step = self._steps[batch]
        return throughput(step, batch=batch, in_flight=in_flight, seconds=seconds, clock=self._clock)

    def device_times(self, batch: int, seconds: float) -> dict[str, float | None]:
        """Medians, ms, of the work on the GPU by its clock, of the upload and of the download; None on a CPU."""
        step = self._steps[batch]
        work = _repeated(step.device_ms, seconds)
        moved = [each for each in _repeated(step.transfers_ms, seconds) if each is not None]
        return {
            "device_ms": _median([value for value in work if value is not None]),
            "upload_ms": _median([up for up, _ in moved]),
            "download_ms": _median([down for _, down in moved]),
        }

    def end_to_end(self, paths: list[str], seconds: float) -> dict[str, float | None]:
        """Medians, ms: from files to embeddings, and the part of it before inference."""

        def call() -> tuple[float, float]:
            begin = time.perf_counter()
            crops = self._crops(paths)
            decoded = time.perf_counter()
            self._runner(crops)
            return (time.perf_counter() - begin) * 1000, (decoded - begin) * 1000

        call()
        times = _repeated(call, seconds)
        return {"end_to_end_ms": _median([whole for whole, _ in times]), "decode_ms": _median([d for _, d in times])}

    def tracker_load(self, paths: list[str], seconds: float) -> dict[str, int | float | None]:
        """Calls of 1 to 40 of the crops of `paths`, as a tracker makes them; see `pmm.bench.result_schema.Tracker`."""
        figures = measure_tracker_load(self._runner, self._crops(paths), seconds, self._clock)
        self._check_graph()
        return figures

    def matrix_rate(self, device: str) -> dict[str, float]:
        """Rate of the GPU's matrix product per precision, TFLOP/s."""
        from pmm.bench.runner_factory import matrix_tflops

        return matrix_tflops(device)

    def memory(self) -> dict[str, int | None]:
        """Peak host memory of this process, and the GPU memory that it has now, bytes."""
        return {"peak_memory": _peak_memory(), "gpu_memory": gpu_memory_of(os.getpid())}

    def _in_full_batches(self, crops: Crops) -> Embeddings:
        """Embeddings in batches of 64, the last one filled up."""
        filled = np.resize(crops, (-(-len(crops) // EMBED_BATCH) * EMBED_BATCH, *crops.shape[1:]))
        rows = [self._embed_batch(filled[k : k + EMBED_BATCH]) for k in range(0, len(filled), EMBED_BATCH)]
        return np.concatenate(rows)[: len(crops)]

    def _check_graph(self) -> None:
        """Raises UserError if CUDA graphs were requested, and the runner runs without."""
        if self._graph and getattr(self._runner, "cuda_graph", True) is False:
            raise UserError(f"{self._runner.info.provider} runs without CUDA graphs, which were requested")

    def _crops(self, paths: list[str]) -> Crops:
        return load_crops([Path(path) for path in paths], self._runner.preprocessing)

    def _embed_batch(self, crops: Crops) -> Embeddings:
        embeddings = self._runner(crops)
        shape = (len(crops), self._runner.embedding.dim)
        if embeddings.shape != shape or embeddings.dtype != np.float32:
            problem = f"embeddings are {embeddings.dtype} {list(embeddings.shape)}"
            raise UserError(problem, expected=f"float32 {list(shape)}")
        return embeddings


def serve() -> None:
    """Answer requests from stdin until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere a worker ends when it next reads a request
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # answers have their own descriptor; all other output to stdout goes to stderr, the log
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)

        def send(message: dict[str, Any]) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        session = WorkerSession(lambda done: send({"progress": done}))
        for line in sys.stdin:
            request = json.loads(line)
            send(session.answer(request["method"], request["arguments"]))
        # some libraries crash when they are torn down; nothing can be lost now
        os._exit(0)


def _peak_memory() -> int:
    """Bytes. Not from getrusage on Linux: there a process inherits its parent's peak."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _agreement(expected: Embeddings, embeddings: Embeddings) -> dict[str, float]:
    """The least cosine, and the largest relative difference of norms, of rows of two batches."""
    parity = numeric_parity(expected, embeddings)
    return {"min_cosine": parity.min_cosine, "norm_error": parity.max_norm_error}


def _repeated(call: Callable[[], Any], seconds: float) -> list[Any]:
    """Results of 3 to 50 calls within `seconds`; a None is the last."""
    results: list[Any] = []
    begin = time.perf_counter()
    while len(results) < 3 or (len(results) < 50 and time.perf_counter() - begin < seconds):
        results.append(call())
        if results[-1] is None:
            break
    return results


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


if __name__ == "__main__":
    serve()
