"""Every backend on the same crops, each in its own process: accuracy first, then latency side by side."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pmm.artifacts.dataset_location import DatasetLocation
from pmm.artifacts.origin import override_dataset
from pmm.bench.accuracy import AccuracyEvaluator, Reference, crops_digest
from pmm.bench.candidate_evaluator import BUILDER, CandidateEvaluator
from pmm.bench.candidates import Candidate
from pmm.bench.chain_run import add_chain, check_chain
from pmm.bench.gates import failures
from pmm.bench.preprocessing_cost import PreprocessingCosts
from pmm.bench.request import Request
from pmm.bench.result_schema import Result, Timing, Tracker
from pmm.bench.resume_store import ResumeStore
from pmm.bench.schema import SCHEMA, BenchReport, CheckpointFacts, DatasetFacts, TimingFacts, WrongPreprocessing
from pmm.bench.timing import time_batch
from pmm.bench.tracker_load import TRACKER_SIZES
from pmm.bench.workers import WorkerFailed, WorkerPool
from pmm.data.bad_images import bad_image_lines, refuse_bad_images, unreadable_images
from pmm.data.readers import read_dataset
from pmm.data.samples import ReidDataset
from pmm.data.splits import distractors, unrankable, without_images
from pmm.utils.environment import describe_environment
from pmm.utils.errors import InvalidFile, UserError, printable
from pmm.utils.files import sha256
from pmm.utils.hardware import usable_cores

OPEN_S = 8.0
"""Guess, for the time left: seconds to make, open and embed with one backend."""
MISTAKE_S = 4.0
"""The same: to embed with one mistake in preparing crops."""
EXTRAS_S = 1.0
"""Most seconds each for throughput, device times and end to end, per backend and batch."""
TRACKER_S = {"cpu": 0.8, "cuda": 5.0}
"""Most seconds for the calls of a tracker, per backend; the whole takes up to three times as long."""


class Bench:
    """One run. Use as a context manager: it ends its workers.

    Artifacts are exported to OUT/artifacts and stay there; finished results are in OUT/unfinished until the report is
    written.
    """

    accuracy: AccuracyEvaluator

    def __init__(self, request: Request) -> None:
        self.request, self._plan, self._begin = request, request.options.plan, time.perf_counter()
        self._threads = usable_cores()
        self._results: dict[str, Result] = {}
        self._wrong_preprocessing: WrongPreprocessing | None = None
        self._matrix: dict[str, float] = {}
        self._unreadable = 0
        self._stack = ExitStack()

    def __enter__(self) -> Bench:
        """Raises UserError for a bad source or data set, or one that cannot be resumed."""
        from tqdm import tqdm

        request = self.request
        with ExitStack() as stack:
            options, logs = request.options, request.out / "logs"
            self._workers = stack.enter_context(WorkerPool(logs, threads=self._threads, timeout=options.timeout))
            self._facts = self._workers[BUILDER].call("describe", source=str(request.source))
            trained = DatasetLocation(self._facts.pop("dataset"), self._facts.pop("root"))
            mistakes = self._facts.pop("mistakes")
            self._mistakes = [] if options.wrong_preprocessing == "off" else mistakes
            self._data = override_dataset(trained, request.source, options.dataset, options.root)
            split = read_dataset(self._data.name, self._data.root)
            for note in (*split.notes, *split.left_out):
                print(f"note: {note}")
            split = self._without_bad_images(split)
            if why := unrankable(split.query, split.gallery):
                raise InvalidFile(f"it cannot be ranked: {why}", path=self._data.root, hint="pmm check has the details")
            check_chain(request.chain, split)
            self.accuracy = AccuracyEvaluator(split)
            self._resume_store = ResumeStore(request.out, self._conditions, resume=options.resume)
            seconds = len(request.candidates) * (OPEN_S + len(request.batches) * self._plan.budget)
            seconds += len(self._mistakes) * MISTAKE_S
            form = "{desc:<40.40} {percentage:3.0f}% |{bar}| {elapsed}, about {remaining} left"
            self._bar = stack.enter_context(tqdm(total=seconds, bar_format=form, leave=False, disable=None))
            on_progress = self._bar.set_description_str
            self._evaluator = CandidateEvaluator(
                request, self._workers, self.accuracy, self._resume_store, self._data, on_progress
            )
            self._stack = stack.pop_all()
        return self

    def _without_bad_images(self, split: ReidDataset) -> ReidDataset:
        """`split` without the images that cannot be read, which are known now and not after minutes.

        Raises InvalidFile naming all of them, unless they are to be skipped.
        """
        crops = (*split.query, *split.gallery, *(split.train if self.request.chain.gallery else ()))
        bad = unreadable_images([sample.path for sample in crops], label="reading all crops")
        if not self.request.options.skip_bad_images:
            refuse_bad_images(bad, Path(self._data.root))
        for line in bad_image_lines(bad):
            print(printable(f"note: {line}"))
        kept = without_images(split, bad)
        self._unreadable = sum(len(part) for part in (split.query, split.gallery)) - len((*kept.query, *kept.gallery))
        return kept

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def measure_accuracy(self) -> None:
        """Export, open and embed with every candidate, the reference first, and measure its accuracy.

        Raises UserError if the reference cannot be measured, or the source is no longer the same.
        """
        reference = self.request.reference
        for candidate in self.request.candidates:
            self._bar.set_description_str(candidate.name)
            result = self._results[candidate.name] = self._evaluator.evaluate(candidate)
            self._check_source()
            if candidate == reference and result.status != "ok":
                raise UserError(f"the reference, {reference.name}, cannot be measured: {result.reason}")
            if result.status != "unavailable":  # the table lists those, by reason
                summary = result.reason or f"mAP {result.mAP:.1%}"
                self._bar.write(f"{candidate.name}: {result.status}: {summary}", file=sys.stderr)
            # one that cannot run here will not be timed either
            self._bar.update(OPEN_S if result.status == "ok" else self._bar.total / len(self.request.candidates))
            if candidate == reference and self._mistakes:
                self._wrong_preprocessing = self._measure_mistakes()
        self._workers.end(BUILDER)

    def _measure_mistakes(self) -> WrongPreprocessing:
        sample = self.request.options.wrong_preprocessing == "sample"
        costs = PreprocessingCosts(self.accuracy.split, sample=sample, resume_store=self._resume_store)
        return costs.measure(
            self._mistakes, self.reference, self._evaluator.reference_with, lambda: self._bar.update(MISTAKE_S)
        )

    def _check_source(self) -> None:
        path = self.request.source
        if not path.is_file() or sha256(path) != self._facts["sha256"]:
            problem = "it changed during the bench (is it still being trained?)"
            raise InvalidFile(problem, path=path, hint="bench a copy of it")

    def measure_latency(self) -> None:
        """Time all that ran, side by side, batch by batch."""
        for batch in self.request.batches:
            names = [name for name, result in self._results.items() if result.status == "ok"]
            files = {name: str(self._results[name].artifact_sha256) for name in names}
            timings = self._resume_store.timings(batch, files)
            if set(timings) != set(names):
                timings = self._time_batch(names, batch)
                self._resume_store.store_timings(batch, timings, files)
            for name, timing in timings.items():
                self._update(name, batches=(*self._results[name].batches, timing))
        for candidate in self.request.candidates:
            result = self._results[candidate.name]
            if result.status == "ok" and result.tracker is None:
                self._guarded(candidate.name, partial(self._measure_tracker_load, candidate))
        for name in self._results:
            if name in self._workers and name != self.request.reference.name:
                self._workers.end(name)  # the GPU's rate is measured on a GPU that is free
        if self.request.reference.device == "cuda":
            self._guarded(self.request.reference.name, self._measure_matrix_rate)

    def report(self) -> BenchReport:
        """All results, and the gates that they fail."""
        request, split = self.request, self.accuracy.split
        results = tuple(self._results[candidate.name] for candidate in request.candidates)
        queries = self.accuracy.evaluable
        broken = failures(
            results,
            request.gates,
            reference=request.reference.name,
            queries=queries,
            required=request.required,
            any_precision=request.any_precision,
        )
        return BenchReport(
            schema=SCHEMA,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=time.perf_counter() - self._begin,
            checkpoint=CheckpointFacts(path=str(request.source), **self._facts),
            dataset=DatasetFacts(
                name=self._data.name,
                root=self._data.root,
                queries=len(split.query),
                gallery=len(split.gallery),
                distractors=distractors(split.query, split.gallery),
                identities=len({sample.pid for sample in split.query}),
                cameras=len({sample.camid for sample in self.accuracy.samples}),
                digest=self._conditions["crops"],
                unreadable=self._unreadable,
            ),
            environment=describe_environment(self._threads),
            method=TimingFacts(
                samples=self._plan.samples,
                seconds=self._plan.budget,
                block=self._plan.block,
                threads=self._threads,
                matrix_tflops=self._matrix,
                gflop_per_image=None if self._evaluator.macs is None else 2 * self._evaluator.macs / 1e9,
            ),
            reference=request.reference.name,
            results=results,
            gates=dataclasses.replace(request.gates, failures=tuple(broken)),
            wrong_preprocessing=self._wrong_preprocessing,
        )

    def measure_chain(self, report: BenchReport) -> BenchReport:
        """`report` with the chain from the checkpoint to the index; see `pmm.bench.chain_run`."""
        on_progress = self._bar.set_description_str
        return add_chain(
            report, self.request, self._evaluator, self.accuracy, threads=self._threads, on_progress=on_progress
        )

    @property
    def reference(self) -> Reference:
        """The backend that the others were compared with."""
        return self._evaluator.reference

    @cached_property
    def _conditions(self) -> dict[str, Any]:
        """All that the figures depend on: a run that is resumed must have the same."""
        machine = describe_environment(self._threads)
        return {
            "model": self._facts["sha256"],
            "crops": crops_digest(self.accuracy.samples),
            "device of the reference": self.request.reference.device_name,
            "plan": dataclasses.asdict(self._plan),
            **{name: machine[name] for name in ("pmm", "commit", "cpu", "threads", "gpus", "driver", "versions")},
        }

    def _measure_memory(self, name: str) -> None:
        self._update(name, **self._workers[name].call("memory"))
        self._store_result(name)

    def _measure_tracker_load(self, candidate: Candidate) -> None:
        self._bar.set_description_str(f"tracker load: {candidate.name}")
        self._evaluator.open(candidate)
        worker, seconds = self._workers[candidate.name], min(TRACKER_S[candidate.device], self._plan.budget / 5)
        paths = [str(path) for path in self._crop_paths(TRACKER_SIZES[1])]
        try:
            self._update(candidate.name, tracker=Tracker(**worker.call("tracker_load", paths=paths, seconds=seconds)))
        except WorkerFailed as error:
            if not worker.alive:
                raise
            self._add_untimed(candidate.name, "the tracker load", error)
            return
        self._store_result(candidate.name)

    def _crop_paths(self, count: int) -> list[Path]:
        """Paths of `count` crops of the test part, from the first again if there are fewer."""
        return [self.accuracy.samples[index % len(self.accuracy.samples)].path for index in range(count)]

    def _measure_matrix_rate(self) -> None:
        reference = self.request.reference
        self._evaluator.open(reference)
        device = reference.device_name if reference.gpu else "cuda:0"
        self._matrix = self._workers[reference.name].call("matrix_rate", device=device)

    def _time_batch(self, names: Sequence[str], batch: int) -> dict[str, Timing]:
        """All of `names` at one batch size, side by side."""
        for candidate in self.request.candidates:
            if candidate.name in names:
                self._guarded(candidate.name, partial(self._evaluator.open, candidate))
        workers = {name: (self._workers[name], self._results[name].device) for name in names if name in self._workers}
        budget = self._plan.budget

        def advance(name: str, share: float) -> None:
            self._bar.set_description_str(f"timing batch {batch}: {name}")
            self._bar.update(share * budget)

        timed = time_batch(
            workers,
            self._crop_paths(batch),
            self._plan,
            reference=self.request.reference.name,
            extras_s=min(EXTRAS_S, budget / 5),
            advance=advance,
        )
        for name, reason in timed.refused.items():
            self._add_untimed(name, f"batch {batch}", reason)
        for name, reason in timed.crashed.items():
            self._mark_failed(name, f"while batch {batch} was timed: {reason}")
        for name, least in timed.min_cosine.items():
            before = self._results[name].batch_min_cosine
            self._update(name, batch_min_cosine=least if before is None else min(least, before))
        for name, error in timed.norm_error.items():
            self._update(name, max_norm_error=max(error, self._results[name].max_norm_error or 0.0))
        for name in timed.timings:
            self._guarded(name, partial(self._measure_memory, name))
        return timed.timings

    def _guarded(self, name: str, work: Callable[[], object]) -> None:
        """Do `work` of one backend; an error is that backend's result, and does not stop the others."""
        try:
            work()
        except UserError as error:
            self._mark_failed(name, str(error))

    def _mark_failed(self, name: str, reason: str) -> None:
        self._workers.end(name)
        self._update(name, status="failed", reason=reason)
        self._bar.write(f"{name}: failed: {reason}", file=sys.stderr)

    def _store_result(self, name: str) -> None:
        """Without timings, stored by batch, and without what could not be timed, which --resume tries again."""
        self._resume_store.store_result(dataclasses.replace(self._results[name], batches=(), untimed=()))

    def _add_untimed(self, name: str, what: str, reason: object) -> None:
        self._update(name, untimed=(*self._results[name].untimed, f"{what} could not be timed: {reason}"))

    def _update(self, name: str, **fields: Any) -> None:
        self._results[name] = dataclasses.replace(self._results[name], **fields)
