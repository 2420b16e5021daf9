"""The latencies of a bench run: all backends side by side, batch by batch, then each under the load of a tracker."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pmm.bench.candidate_evaluator import CandidateEvaluator
from pmm.bench.candidates import Candidate
from pmm.bench.request import Request
from pmm.bench.result_schema import Timing, Tracker
from pmm.bench.resume_store import ResumeStore
from pmm.bench.run_results import RunResults
from pmm.bench.timing import BatchTimings, time_batch
from pmm.bench.tracker_load import TRACKER_SIZES
from pmm.bench.workers import WorkerFailed, WorkerPool
from pmm.data.samples import Sample

if TYPE_CHECKING:
    from tqdm import tqdm

EXTRAS_S = 1.0
"""Most seconds each for throughput, device times and end to end, per backend and batch."""
TRACKER_S = {"cpu": 0.8, "cuda": 5.0}
"""Most seconds for the calls of a tracker, per backend; the whole takes up to three times as long."""


class LatencyRun:
    """Times the backends whose accuracy was measured, and adds what it finds to their results."""

    def __init__(
        self,
        request: Request,
        workers: WorkerPool,
        evaluator: CandidateEvaluator,
        results: RunResults,
        resume_store: ResumeStore,
        samples: Sequence[Sample],
        bar: tqdm,
    ) -> None:
        """`samples` are the crops to run on; `bar` advances by `request.options.plan.budget` per backend and batch."""
        self._request, self._workers, self._evaluator, self._results = request, workers, evaluator, results
        self._resume_store, self._samples, self._bar = resume_store, samples, bar
        self._budget = request.options.plan.budget

    def measure(self) -> None:
        """Time all of them."""
        for batch in self._request.batches:
            names = self._results.running
            files = {name: str(self._results[name].artifact_sha256) for name in names}
            timings = self._resume_store.timings(batch, files)
            if set(timings) != set(names):
                timings = self._time_batch(names, batch)
                self._resume_store.store_timings(batch, timings, files)
            for name, timing in timings.items():
                self._results.update(name, batches=(*self._results[name].batches, timing))
        for candidate in self._request.candidates:
            if candidate.name in self._results.running and self._results[candidate.name].tracker is None:
                self._results.guarded(candidate.name, partial(self._measure_tracker_load, candidate))

    def matrix_rate(self) -> dict[str, float]:
        """Rate of the GPU's matrix product per precision, TFLOP/s; empty if the reference runs on a CPU.

        Ends all workers but the reference's: the rate is measured on a GPU that is free.
        """
        reference, rates = self._request.reference, dict[str, float]()
        for candidate in self._request.candidates:
            if candidate != reference:
                self._workers.end(candidate.name)

        def measure() -> None:
            self._evaluator.open(reference)
            device = reference.device_name if reference.gpu else "cuda:0"
            rates.update(self._workers[reference.name].call("matrix_rate", device=device))

        if reference.device == "cuda":
            self._results.guarded(reference.name, measure)
        return rates

    def _time_batch(self, names: Sequence[str], batch: int) -> dict[str, Timing]:
        """All of `names` at one batch size, side by side."""
        for candidate in self._request.candidates:
            if candidate.name in names:
                self._results.guarded(candidate.name, partial(self._evaluator.open, candidate))
        workers = {name: (self._workers[name], self._results[name].device) for name in names if name in self._workers}

        def advance(name: str, share: float) -> None:
            self._bar.set_description_str(f"timing batch {batch}: {name}")
            self._bar.update(share * self._budget)

        timed = time_batch(
            workers,
            self._paths(batch),
            self._request.options.plan,
            reference=self._request.reference.name,
            extras_s=min(EXTRAS_S, self._budget / 5),
            advance=advance,
        )
        self._keep(timed, batch)
        return timed.timings

    def _keep(self, timed: BatchTimings, batch: int) -> None:
        """Add all but the timings to the results."""
        for name, reason in timed.refused.items():
            self._results.add_untimed(name, f"batch {batch}", reason)
        for name, reason in timed.crashed.items():
            self._results.fail(name, f"while batch {batch} was timed: {reason}")
        for name, least in timed.min_cosine.items():
            before = self._results[name].batch_min_cosine
            self._results.update(name, batch_min_cosine=least if before is None else min(least, before))
        for name, error in timed.norm_error.items():
            self._results.update(name, max_norm_error=max(error, self._results[name].max_norm_error or 0.0))
        for name in timed.timings:
            self._results.guarded(name, partial(self._measure_memory, name))

    def _measure_memory(self, name: str) -> None:
        self._results.update(name, **self._workers[name].call("memory"))
        self._results.store(name)

    def _measure_tracker_load(self, candidate: Candidate) -> None:
        name = candidate.name
        self._bar.set_description_str(f"tracker load: {name}")
        self._evaluator.open(candidate)
        worker, seconds = self._workers[name], min(TRACKER_S[candidate.device], self._budget / 5)
        paths = [str(path) for path in self._paths(TRACKER_SIZES[1])]
        try:
            self._results.update(name, tracker=Tracker(**worker.call("tracker_load", paths=paths, seconds=seconds)))
        except WorkerFailed as error:
            if not worker.alive:
                raise
            self._results.add_untimed(name, "the tracker load", error)
            return
        self._results.store(name)

    def _paths(self, count: int) -> list[Path]:
        """Paths of `count` crops, from the first again if there are fewer."""
        return [self._samples[index % len(self._samples)].path for index in range(count)]
