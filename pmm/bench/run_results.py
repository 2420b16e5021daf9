"""The results of a run so far: an error of one backend is its result, and does not stop the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from pmm.bench.result_schema import Result
from pmm.bench.resume_store import ResumeStore
from pmm.bench.workers import WorkerPool
from pmm.utils.errors import UserError


class RunResults:
    """Results by name, in the order in which they were added."""

    def __init__(self, workers: WorkerPool, resume_store: ResumeStore, on_failure: Callable[[str], None]) -> None:
        """`on_failure` is called with a line on each backend that fails; its worker is ended."""
        self._workers, self._resume_store, self._on_failure = workers, resume_store, on_failure
        self._results: dict[str, Result] = {}

    def __getitem__(self, name: str) -> Result:
        return self._results[name]

    def add(self, result: Result) -> None:
        """Add the result of a backend that was not there before."""
        self._results[result.name] = result

    @property
    def running(self) -> list[str]:
        """Names of the backends that have not failed and are not unavailable."""
        return [name for name, result in self._results.items() if result.status == "ok"]

    def update(self, name: str, **fields: Any) -> None:
        """Set fields of a result."""
        self._results[name] = dataclasses.replace(self._results[name], **fields)

    def add_untimed(self, name: str, what: str, reason: object) -> None:
        """Note what could not be timed, and why."""
        self.update(name, untimed=(*self._results[name].untimed, f"{what} could not be timed: {reason}"))

    def fail(self, name: str, reason: str) -> None:
        """End the worker of a backend that cannot go on."""
        self._workers.end(name)
        self.update(name, status="failed", reason=reason)
        self._on_failure(f"{name}: failed: {reason}")

    def guarded(self, name: str, work: Callable[[], object]) -> None:
        """Do `work` of one backend, which fails if a UserError is raised."""
        try:
            work()
        except UserError as error:
            self.fail(name, str(error))

    def store(self, name: str) -> None:
        """Keep a result for --resume: without timings, stored by batch, and without what could not be timed, which is
        tried again."""
        self._resume_store.store_result(dataclasses.replace(self._results[name], batches=(), untimed=()))
