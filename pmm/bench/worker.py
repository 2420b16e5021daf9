"""The child's side of `pmm.bench.workers`: one backend in a process of its own, told line by line what to do.

Requests and answers are JSON. Whatever libraries print goes to the log, never between the answers.
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
from pmm.bench.schema import EMBED_BATCH
from pmm.bench.tracking import track
from pmm.data.crops import iter_crops, load_crops
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


class Session:
    """What the worker holds between requests: an open runner, and steps bound to their images."""

    def __init__(self, tell: Callable[[float], None], clock: Clock = time.perf_counter) -> None:
        """`tell` is told the share of a request that is done; steps are timed by `clock`."""
        self._tell, self._clock = tell, clock
        self._opened: Runner | None = None
        self._steps: dict[int, BoundRun] = {}
        self._graph = False

    @property
    def _runner(self) -> Runner:
        if self._opened is None:
            raise RuntimeError("asked before `open`")
        return self._opened

    def answer(self, do: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The message that answers a request: what the method `do` returns, or in one line what went wrong."""
        try:
            return {"answer": getattr(self, do)(**arguments)}
        except BackendUnavailable as error:
            return {"error": str(error), "kind": "unavailable"}
        except Exception as error:  # of whatever kind: the parent reports it, and the other backends go on
            traceback.print_exc()
            plain = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            said = missing_library(error) or plain
            return {"error": said.strip().split("\n")[0], "kind": "failed"}

    def describe(self, checkpoint: str) -> dict[str, Any]:
        """What the report says of a checkpoint, and its configuration."""
        from pmm.bench.artifacts import describe_checkpoint

        return describe_checkpoint(Path(checkpoint))

    def make(self, **wanted: Any) -> dict[str, Any]:
        """The artifact of a candidate: exported and built, unless an earlier run left it."""
        from pmm.bench.artifacts import make_artifact

        return make_artifact(**wanted)

    def open(self, artifact: str, **candidate: Any) -> dict[str, Any]:
        """Open the runner and run it once. The answer is what really runs."""
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
            raise UserError(f"asked for {candidate['device']}, but {info.provider} runs on {info.device}")
        if info.precision != candidate["precision"]:
            raise UserError(f"asked for {candidate['precision']}, but {info.provider} runs in {info.precision}")
        return {
            "provider": info.provider,
            "device": info.device,
            "load_s": opened - begin,
            "first_inference_s": first,
            "dim": runner.embedding.dim,
            "normalised": runner.embedding.normalised,
            "flip_tta": runner.embedding.flip_tta,
        }

    def embed(self, paths: str, out: str, mirrored: bool = False) -> None:
        """Write the embeddings [N, D] of the files that the JSON list `paths` names to the .npy file `out`."""
        runner, files = self._runner, [Path(path) for path in json.loads(Path(paths).read_text())]
        size, done = runner.preprocessing, 0
        embeddings = np.empty((len(files), runner.embedding.dim), np.float32)
        for crops in iter_crops(files, size.height, size.width, EMBED_BATCH):
            images = np.ascontiguousarray(crops[:, :, ::-1]) if mirrored else crops
            embeddings[done : done + len(crops)] = self._embedded(images)
            done += len(crops)
            self._tell(done / len(files))
        with replacing(Path(out)) as temporary:
            np.save(temporary, embeddings)

    def compare_batch_sizes(self, paths: list[str]) -> dict[str, float]:
        """How far a crop's embedding in a small batch is from that in a batch of all."""
        crops = self._crops(paths)
        rows, start = [], 0
        for count in SMALL_BATCHES:
            if start < len(crops):
                rows.append(self._embedded(crops[start : start + count]))
                start += count
        small = np.concatenate(rows)
        return _apart(self._embedded(crops)[: len(small)], small)

    def bind(self, paths: list[str], plan: dict[str, Any]) -> dict[str, Any]:
        """Bind the crops of `paths` as one batch and warm up until steady; how long one run takes, ms, what an engine's
        profile for it is made for, and how far an embedding in this batch is from the same crop's in a batch of 64, as
        accuracy is measured."""
        batch, chosen = len(paths), LatencyPlan(**plan)
        crops = self._crops(paths)
        apart = _apart(self._in_full_batches(crops), self._embedded(crops))
        step = self._steps[batch] = self._runner.bind(crops)
        seconds, steady, run_ms = warm_up(step, chosen, self._clock)
        self._check_graph()
        manifest: Manifest | None = getattr(self._runner, "manifest", None)
        engine = manifest and manifest.engine
        profile = engine.batch.profiles[engine.batch.runs_as(batch)[0]].best if engine else None
        return {"warmup_s": seconds, "steady": steady, "run_ms": run_ms, "profile": profile, **apart}

    def turn(self, batch: int, plan: dict[str, Any]) -> list[float]:
        """One block of samples, ms."""
        return run_turn(self._steps[batch], LatencyPlan(**plan), self._clock)

    def push(self, batch: int, in_flight: int, seconds: float) -> float:
        """Throughput, images/s: calls submitted `in_flight` at a time."""
        step = self._steps[batch]
        return throughput(step, batch=batch, in_flight=in_flight, seconds=seconds, clock=self._clock)

    def device_times(self, batch: int, seconds: float) -> dict[str, float | None]:
        """Medians, ms: work on the GPU by its own clock, images to it, embeddings back; None on a CPU."""
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

        def once() -> tuple[float, float]:
            begin = time.perf_counter()
            crops = self._crops(paths)
            decoded = time.perf_counter()
            self._runner(crops)
            return (time.perf_counter() - begin) * 1000, (decoded - begin) * 1000

        once()
        found = _repeated(once, seconds)
        return {"end_to_end_ms": _median([whole for whole, _ in found]), "decode_ms": _median([d for _, d in found])}

    def track(self, paths: list[str], seconds: float) -> dict[str, int | float | None]:
        """Calls of 1 to 40 of the crops of `paths`, as a tracker makes them; see `pmm.bench.schema.Tracker`."""
        found = track(self._runner, self._crops(paths), seconds, self._clock)
        self._check_graph()
        return found

    def matrix_rate(self, device: str) -> dict[str, float]:
        """Rate of the GPU's matrix product per precision, TFLOP/s."""
        from pmm.bench.runner_factory import matrix_tflops

        return matrix_tflops(device)

    def memory(self) -> dict[str, int | None]:
        """Most host memory that this process held, and what it holds on the GPU, bytes."""
        return {"peak_memory": _peak_memory(), "gpu_memory": gpu_memory_of(os.getpid())}

    def _in_full_batches(self, crops: Crops) -> Embeddings:
        """Embeddings in batches of 64, the last one filled up."""
        filled = np.resize(crops, (-(-len(crops) // EMBED_BATCH) * EMBED_BATCH, *crops.shape[1:]))
        rows = [self._embedded(filled[k : k + EMBED_BATCH]) for k in range(0, len(filled), EMBED_BATCH)]
        return np.concatenate(rows)[: len(crops)]

    def _check_graph(self) -> None:
        """Raises UserError if runs were to be CUDA graphs, and the runner went on without."""
        if self._graph and getattr(self._runner, "cuda_graph", True) is False:
            raise UserError(f"asked for CUDA graphs, but {self._runner.info.provider} runs without")

    def _crops(self, paths: list[str]) -> Crops:
        size = self._runner.preprocessing
        return load_crops([Path(path) for path in paths], size.height, size.width)

    def _embedded(self, crops: Crops) -> Embeddings:
        found = self._runner(crops)
        expected = (len(crops), self._runner.embedding.dim)
        if found.shape != expected or found.dtype != np.float32:
            raise UserError(f"embeddings are {found.dtype} {list(found.shape)}; expected float32 {list(expected)}")
        return found


def serve() -> None:
    """Answer requests from stdin until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere a worker ends when it next looks for a request
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # answers go out through a descriptor of their own; what anything prints to stdout goes to stderr, the log
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)

        def say(message: dict[str, Any]) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        session = Session(lambda done: say({"progress": done}))
        for line in sys.stdin:
            request = json.loads(line)
            say(session.answer(request["do"], request["with"]))
        # some libraries crash when they are torn down; nothing is lost any more
        os._exit(0)


def _peak_memory() -> int:
    """Bytes. Not from getrusage on Linux: there a process inherits its parent's peak."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _apart(expected: Embeddings, found: Embeddings) -> dict[str, float]:
    """The least cosine, and the largest relative difference of lengths, of rows of two batches."""
    parity = numeric_parity(expected, found)
    return {"least_cosine": parity.min_cosine, "length_error": parity.max_length_error}


def _repeated(call: Callable[[], Any], seconds: float) -> list[Any]:
    """What 3 to 50 calls within `seconds` give; one None is the last."""
    found: list[Any] = []
    begin = time.perf_counter()
    while len(found) < 3 or (len(found) < 50 and time.perf_counter() - begin < seconds):
        found.append(call())
        if found[-1] is None:
            break
    return found


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


if __name__ == "__main__":
    serve()
