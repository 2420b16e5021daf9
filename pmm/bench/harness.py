"""Every backend on the same people, each in a process of its own: accuracy first, then latency side by side."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pmm.artifacts.origin import DataSet, instead_of
from pmm.artifacts.runs import resolve_data_root
from pmm.bench.accuracy import AccuracyEvaluator, Reference
from pmm.bench.candidates import REFERENCE, Candidate
from pmm.bench.examiner import BUILDER, CandidateEvaluator
from pmm.bench.gates import NOT_TIMED, failures
from pmm.bench.request import Request
from pmm.bench.resume_store import Unfinished
from pmm.bench.schema import SCHEMA, BenchReport, CheckpointFacts, DatasetFacts, Method, Result, Timing, Tracker
from pmm.bench.timing import time_batch
from pmm.bench.tracking import SIZES
from pmm.bench.workers import WorkerFailed, WorkerPool
from pmm.data.readers import read_dataset
from pmm.data.splits import distractors
from pmm.utils.environment import describe_environment
from pmm.utils.errors import UserError
from pmm.utils.files import make_folder, sha256
from pmm.utils.hardware import usable_cores

OPENING_S = 8.0
"""Guess, for the time left: seconds to make, open and embed with one backend."""
EXTRAS_S = 1.0
"""Most seconds each for throughput, device times and end to end, per backend and batch."""
TRACKER_S = {"cpu": 0.8, "cuda": 5.0}
"""Most seconds for the calls of a tracker, per backend; the whole takes up to three times as long."""


class Bench:
    """One run. Use as a context manager: it ends its workers.

    Artifacts are made in OUT/artifacts and kept there. What is finished is kept in OUT/unfinished.
    """

    judge: AccuracyEvaluator

    def __init__(self, request: Request) -> None:
        self.request, self._begin = request, time.perf_counter()
        self._threads = usable_cores()
        self._results: dict[str, Result] = {}
        self._matrix: dict[str, float] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Bench:
        """Raises UserError for a bad checkpoint or data set, or one that cannot be resumed."""
        from tqdm import tqdm

        request = self.request
        with ExitStack() as stack:
            logs = make_folder(request.out / "logs")
            self._crew = stack.enter_context(WorkerPool(logs, threads=self._threads, timeout=request.options.timeout))
            self._facts = self._crew[BUILDER].ask("describe", checkpoint=str(request.checkpoint))
            data, asked = self._facts["config"]["data"], request.options
            trained = DataSet(data["dataset"], resolve_data_root(data["root"], request.checkpoint))
            self._dataset, self._root = instead_of(trained, request.checkpoint, asked.dataset, asked.root)
            split = read_dataset(self._dataset, self._root)
            for note in split.notes:
                print(f"note: {note}")
            self.judge = AccuracyEvaluator(split)
            self._kept = Unfinished(request.out, self._depends_on, resume=request.options.resume)
            seconds = len(request.candidates) * (OPENING_S + len(request.batches) * request.options.plan.budget)
            form = "{desc:<40.40} {percentage:3.0f}% |{bar}| {elapsed}, about {remaining} left"
            self._bar = stack.enter_context(tqdm(total=seconds, bar_format=form, leave=False, disable=None))
            say = self._bar.set_description_str
            self._examiner = CandidateEvaluator(
                request, self._crew, self.judge, self._kept, self._dataset, self._root, say
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def measure_accuracy(self) -> None:
        """Make, open and embed with every candidate, the reference first, and judge it.

        Raises UserError if the reference cannot be measured, or the checkpoint is no longer the same.
        """
        for candidate in self.request.candidates:
            self._bar.set_description_str(candidate.name)
            result = self._results[candidate.name] = self._examiner.examine(candidate)
            self._same_checkpoint()
            if candidate.name == REFERENCE and result.status != "ok":
                raise UserError(f"the reference, {REFERENCE}, cannot be measured: {result.reason}")
            if result.status != "unavailable":  # the table lists those, by reason
                said = result.reason or f"mAP {result.mAP:.1%}"
                self._bar.write(f"{candidate.name}: {result.status}: {said}", file=sys.stderr)
            # one that cannot run here will not be timed either
            self._bar.update(OPENING_S if result.status == "ok" else self._bar.total / len(self.request.candidates))
        self._crew.end(BUILDER)

    def _same_checkpoint(self) -> None:
        path = self.request.checkpoint
        if not path.is_file() or sha256(path) != self._facts["sha256"]:
            raise UserError(f"{path} changed during the bench (is it still being trained?); bench a copy of it")

    def measure_latency(self) -> None:
        """Time all that ran, side by side, batch by batch."""
        for batch in self.request.batches:
            names = [name for name, result in self._results.items() if result.status == "ok"]
            files = {name: str(self._results[name].artifact_sha256) for name in names}
            timings = self._kept.timings(batch, files)
            if set(timings) != set(names):
                timings = self._time(names, batch)
                self._kept.keep_timings(batch, timings, files)
            for name, timing in timings.items():
                self._change(name, batches=(*self._results[name].batches, timing))
        for candidate in self.request.candidates:
            result = self._results[candidate.name]
            if result.status == "ok" and result.tracker is None:
                self._try(candidate.name, partial(self._ask_tracker, candidate))
        for name in self._results:
            if name in self._crew and name != REFERENCE:
                self._crew.end(name)  # the GPU's rate is measured on a GPU that is free
        if self.request.candidates[0].device == "cuda":
            self._try(REFERENCE, self._ask_matrix_rate)

    def report(self) -> BenchReport:
        """All of it, judged by the gates."""
        request, split, config = self.request, self.judge.split, self._facts["config"]
        results = tuple(self._results[candidate.name] for candidate in request.candidates)
        queries = self.judge.evaluable
        broken = failures(
            results,
            request.gates,
            reference=REFERENCE,
            queries=queries,
            asked=request.asked,
            any_precision=request.any_precision,
        )
        return BenchReport(
            schema=SCHEMA,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=time.perf_counter() - self._begin,
            checkpoint=CheckpointFacts(
                path=str(request.checkpoint),
                method=config["model"]["method"],
                height=config["data"]["height"],
                width=config["data"]["width"],
                **{name: self._facts[name] for name in ("sha256", "epoch", "embedding_dim", "parameters_m")},
            ),
            dataset=DatasetFacts(
                name=self._dataset,
                root=self._root,
                queries=len(split.query),
                gallery=len(split.gallery),
                distractors=distractors(split.query, split.gallery),
                identities=len({sample.pid for sample in split.query}),
                cameras=len({sample.camid for sample in self.judge.samples}),
                digest=self._depends_on["crops"],
            ),
            environment=describe_environment(self._threads),
            method=Method(
                samples=request.options.plan.samples,
                seconds=request.options.plan.budget,
                block=request.options.plan.block,
                threads=self._threads,
                matrix_tflops=self._matrix,
                gflop_per_image=None if self._examiner.macs is None else 2 * self._examiner.macs / 1e9,
            ),
            reference=REFERENCE,
            results=results,
            gates=dataclasses.replace(request.gates, failures=tuple(broken)),
        )

    @property
    def reference(self) -> Reference:
        """What the others were compared with."""
        return self._examiner.reference

    @cached_property
    def _depends_on(self) -> dict[str, Any]:
        """What the figures depend on: a run that is resumed must have the same."""
        crops = hashlib.sha256()
        for sample in self.judge.samples:
            crops.update(f"{sample.path.name} {sample.pid} {sample.camid} {sha256(sample.path)}\n".encode())
        machine = describe_environment(self._threads)
        return {
            "checkpoint": self._facts["sha256"],
            "crops": crops.hexdigest(),
            "device of torch": self.request.candidates[0].place,
            "plan": dataclasses.asdict(self.request.options.plan),
            **{name: machine[name] for name in ("pmm", "commit", "cpu", "threads", "gpus", "driver", "versions")},
        }

    def _ask_memory(self, name: str) -> None:
        self._change(name, **self._crew[name].ask("memory"))
        self._kept.keep_result(dataclasses.replace(self._results[name], batches=()))

    def _ask_tracker(self, candidate: Candidate) -> None:
        self._bar.set_description_str(f"a tracker's calls: {candidate.name}")
        self._examiner.open(candidate)
        worker, budget = self._crew[candidate.name], self.request.options.plan.budget
        paths, seconds = [str(path) for path in self._paths(SIZES[1])], min(TRACKER_S[candidate.device], budget / 5)
        try:
            self._change(candidate.name, tracker=Tracker(**worker.ask("track", paths=paths, seconds=seconds)))
        except WorkerFailed as error:
            if not worker.alive:
                raise
            notes = (*self._results[candidate.name].notes, f"calls of a tracker {NOT_TIMED}: {error}")
            self._change(candidate.name, notes=notes)
            return
        self._kept.keep_result(dataclasses.replace(self._results[candidate.name], batches=()))

    def _paths(self, count: int) -> list[Path]:
        """Of so many crops of the test part, again from the first if there are fewer."""
        return [self.judge.samples[index % len(self.judge.samples)].path for index in range(count)]

    def _ask_matrix_rate(self) -> None:
        reference = self.request.candidates[0]
        self._examiner.open(reference)
        device = reference.place if reference.gpu else "cuda:0"
        self._matrix = self._crew[REFERENCE].ask("matrix_rate", device=device)

    def _time(self, names: Sequence[str], batch: int) -> dict[str, Timing]:
        """All of `names` at one batch size, side by side."""
        for candidate in self.request.candidates:
            if candidate.name in names:
                self._try(candidate.name, partial(self._examiner.open, candidate))
        workers = {name: (self._crew[name], self._results[name].device) for name in names if name in self._crew}
        budget = self.request.options.plan.budget

        def advance(name: str, share: float) -> None:
            self._bar.set_description_str(f"timing batch {batch}: {name}")
            self._bar.update(share * budget)

        timed = time_batch(
            workers,
            self._paths(batch),
            self.request.options.plan,
            reference=REFERENCE,
            extras_s=min(EXTRAS_S, budget / 5),
            advance=advance,
        )
        for name, reason in timed.refused.items():
            self._change(name, notes=(*self._results[name].notes, f"batch {batch} {NOT_TIMED}: {reason}"))
        for name, reason in timed.died.items():
            self._fail(name, f"while batch {batch} was timed: {reason}")
        for name, least in timed.least_cosine.items():
            before = self._results[name].batch_min_cosine
            self._change(name, batch_min_cosine=least if before is None else min(least, before))
        for name, error in timed.length_error.items():
            self._change(name, max_length_error=max(error, self._results[name].max_length_error or 0.0))
        for name in timed.timings:
            self._try(name, partial(self._ask_memory, name))
        return timed.timings

    def _try(self, name: str, work: Callable[[], object]) -> None:
        """Do `work` of one backend; what goes wrong there is its result, and costs the others nothing."""
        try:
            work()
        except UserError as error:
            self._fail(name, str(error))

    def _fail(self, name: str, reason: str) -> None:
        self._crew.end(name)
        self._change(name, status="failed", reason=reason)
        self._bar.write(f"{name}: failed: {reason}", file=sys.stderr)

    def _change(self, name: str, **fields: Any) -> None:
        self._results[name] = dataclasses.replace(self._results[name], **fields)
