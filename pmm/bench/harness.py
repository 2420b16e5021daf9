"""Every backend on the same crops, each in its own process: accuracy first, then latency side by side."""

from __future__ import annotations

import dataclasses
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pmm.artifacts.dataset_location import DatasetLocation
from pmm.artifacts.origin import override_dataset
from pmm.bench.accuracy import AccuracyEvaluator, Reference, crops_digest
from pmm.bench.candidate_evaluator import BUILDER, CandidateEvaluator
from pmm.bench.chain_run import add_chain, check_chain
from pmm.bench.gates import failures
from pmm.bench.latency_run import LatencyRun
from pmm.bench.preprocessing_cost import PreprocessingCosts
from pmm.bench.request import Request
from pmm.bench.resume_store import ResumeStore
from pmm.bench.run_results import RunResults
from pmm.bench.schema import SCHEMA, BenchReport, CheckpointFacts, DatasetFacts, TimingFacts, WrongPreprocessing
from pmm.bench.workers import WorkerPool
from pmm.data.bad_images import bad_image_lines, refuse_bad_images, unreadable_images
from pmm.data.readers import read_dataset
from pmm.data.samples import ReidDataset
from pmm.data.splits import distractors, unrankable, without_images
from pmm.utils import command_line
from pmm.utils.environment import describe_environment
from pmm.utils.errors import InvalidFile, UserError
from pmm.utils.files import sha256
from pmm.utils.hardware import usable_cores

OPEN_S = 8.0
"""Guess, for the time left: seconds to make, open and embed with one backend."""
MISTAKE_S = 4.0
"""The same: to embed with one mistake in preparing crops."""


class Bench:
    """One run. Use as a context manager: it ends its workers.

    Artifacts are exported to OUT/artifacts and stay there; finished results are in OUT/unfinished until the report is
    written.
    """

    accuracy: AccuracyEvaluator

    def __init__(self, request: Request, prog: str = "pmm bench") -> None:
        """`prog` is the command, as notes name it."""
        self.request, self._plan, self._begin = request, request.options.plan, time.perf_counter()
        self._threads, self._prog = usable_cores(), prog
        self._wrong_preprocessing: WrongPreprocessing | None = None
        self._matrix_tflops: dict[str, float] = {}
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
            mistakes = self._facts.pop("mistakes")
            self._mistakes = [] if options.wrong_preprocessing == "off" else mistakes
            trained = DatasetLocation(self._facts.pop("dataset"), self._facts.pop("root"))
            self._data = override_dataset(trained, request.source, options.dataset, options.root)
            self.accuracy = AccuracyEvaluator(self._read_data())
            self._resume_store = ResumeStore(request.out, self._conditions, resume=options.resume)
            seconds = len(request.candidates) * (OPEN_S + len(request.batches) * self._plan.budget)
            seconds += len(self._mistakes) * MISTAKE_S
            form = "{desc:<40.40} {percentage:3.0f}% |{bar}| {elapsed}, about {remaining} left"
            self._bar = stack.enter_context(tqdm(total=seconds, bar_format=form, leave=False, disable=None))
            on_progress = self._bar.set_description_str
            self._evaluator = CandidateEvaluator(
                request, self._workers, self.accuracy, self._resume_store, self._data, on_progress
            )
            self._results = RunResults(self._workers, self._resume_store, self._write)
            self._stack = stack.pop_all()
        return self

    def _read_data(self) -> ReidDataset:
        """Raises UserError for a data set that cannot be ranked, or is too small for the chain."""
        split = read_dataset(self._data.name, self._data.root)
        for note in (*split.notes, *split.left_out):
            command_line.note(self._prog, note)
        split = self._without_bad_images(split)
        if why := unrankable(split.query, split.gallery):
            raise InvalidFile(f"it cannot be ranked: {why}", path=self._data.root, hint="pmm check has the details")
        check_chain(self.request.chain, split)
        return split

    def _without_bad_images(self, split: ReidDataset) -> ReidDataset:
        """`split` without the images that cannot be read, which are known now and not after minutes.

        Raises InvalidFile naming all of them, unless they are to be skipped.
        """
        crops = (*split.query, *split.gallery, *(split.train if self.request.chain.gallery else ()))
        bad = unreadable_images([sample.path for sample in crops], label="reading all crops")
        if not self.request.options.skip_bad_images:
            refuse_bad_images(bad, Path(self._data.root))
        for line in bad_image_lines(bad):
            command_line.note(self._prog, line)
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
            result = self._evaluator.evaluate(candidate)
            self._results.add(result)
            self._check_source()
            if candidate == reference and result.status != "ok":
                raise UserError(f"the reference, {reference.name}, cannot be measured: {result.reason}")
            if result.status != "unavailable":  # the table lists those, by reason
                summary = result.reason or f"mAP {result.mAP:.1%}"
                self._write(f"{candidate.name}: {result.status}: {summary}")
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
            raise InvalidFile(problem, path=path, hint="run pmm bench on a copy of it")

    def measure_latency(self) -> None:
        """Time all that ran, side by side, batch by batch."""
        samples = self.accuracy.samples
        latencies = LatencyRun(
            self.request, self._workers, self._evaluator, self._results, self._resume_store, samples, self._bar
        )
        latencies.measure()
        self._matrix_tflops = latencies.matrix_rate()

    def report(self) -> BenchReport:
        """All results, and the gates that they fail."""
        request = self.request
        results = tuple(self._results[candidate.name] for candidate in request.candidates)
        broken = failures(
            results,
            request.gates,
            reference=request.reference.name,
            queries=self.accuracy.evaluable,
            required=request.required,
            any_precision=request.any_precision,
        )
        return BenchReport(
            schema=SCHEMA,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=time.perf_counter() - self._begin,
            checkpoint=CheckpointFacts(path=str(request.source), **self._facts),
            dataset=self._dataset_facts(),
            environment=describe_environment(self._threads),
            timing=self._timing_facts(),
            reference=request.reference.name,
            results=results,
            gates=dataclasses.replace(request.gates, failures=tuple(broken)),
            wrong_preprocessing=self._wrong_preprocessing,
        )

    def _dataset_facts(self) -> DatasetFacts:
        split = self.accuracy.split
        return DatasetFacts(
            name=self._data.name,
            root=self._data.root,
            queries=len(split.query),
            gallery=len(split.gallery),
            distractors=distractors(split.query, split.gallery),
            identities=len({sample.pid for sample in split.query}),
            cameras=len({sample.camid for sample in self.accuracy.samples}),
            digest=self._conditions["crops"],
            unreadable=self._unreadable,
        )

    def _timing_facts(self) -> TimingFacts:
        return TimingFacts(
            samples=self._plan.samples,
            seconds=self._plan.budget,
            block=self._plan.block,
            threads=self._threads,
            matrix_tflops=self._matrix_tflops,
            gflop_per_image=None if self._evaluator.macs is None else 2 * self._evaluator.macs / 1e9,
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

    def _write(self, line: str) -> None:
        self._bar.write(line, file=sys.stderr)

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
