"""Workers of the bench in the process of the test: they answer at once, and torch is imported once."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from pmm.artifacts.artifact import Artifact, manifest_path, read_manifest, selftest_paths
from pmm.bench import harness, workers
from pmm.bench import run as bench_run
from pmm.bench.latency import Clock
from pmm.bench.worker import WorkerSession
from pmm.export import onnx
from pmm.export.options import ExportOptions, VerifyOptions
from pmm.utils.files import sha256
from tests.store import Shared


class WorkerHere:
    """Called as a `WorkerProcess` is; its session and its messages are the bench's."""

    clock: Clock = staticmethod(time.perf_counter)

    def __init__(self, name: str, log: Path, *, threads: int, timeout: float) -> None:
        self.name, self.log, self.alive = name, log, True
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        self._progress: Callable[[float], None] = lambda done: None
        self._session = WorkerSession(lambda done: self._progress(done), self.clock)

    def call(
        self,
        method: str,
        /,
        *,
        progress: Callable[[float], None] = lambda done: None,
        patience: float = 1.0,
        **arguments: Any,
    ) -> Any:
        """As `WorkerProcess.call`."""
        self._progress = progress
        with self.log.open("a") as log, redirect_stdout(log), redirect_stderr(log):
            message = self._session.answer(method, json.loads(json.dumps(arguments)))
        return workers.read_answer(json.loads(json.dumps(message)))

    def close(self, *, at_once: bool = False) -> None:
        """Forget the runner."""
        self.alive = False
        del self._session


@contextmanager
def workers_here(start: Callable[..., Any] = WorkerHere, *, pages: bool = False) -> Iterator[pytest.MonkeyPatch]:
    """The bench starts its workers by `start`, gives each one thread and, unless asked for `pages`, writes report.json
    alone; ends with what the yielded patch has set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "WorkerProcess", start)
        patch.setattr(harness, "usable_cores", lambda: 1)
        if not pages:
            patch.setattr(bench_run, "write_reports", lambda *args: None)
            patch.setattr(bench_run, "pictures", lambda *args: None)
        yield patch


@contextmanager
def exported_before(
    shared: Shared, recipes: Iterable[ExportOptions]
) -> Iterator[list[tuple[ExportOptions, VerifyOptions]]]:
    """Exports take a shared file of the same recipe, one of `recipes`; the list notes what each was asked for."""
    asked: list[tuple[ExportOptions, VerifyOptions]] = []
    files = {recipe: shared.onnx(recipe) for recipe in recipes}

    def export(checkpoint: Path, out: Path, recipe: ExportOptions, verification: VerifyOptions) -> Artifact:
        asked.append((recipe, verification))
        source = files[dataclasses.replace(recipe, calibration_root="", calibration_dataset="")]
        shutil.copyfile(source, out)
        shutil.copyfile(manifest_path(source), manifest_path(out))
        for beside, copy in zip(selftest_paths(source), selftest_paths(out), strict=True):
            shutil.copyfile(beside, copy)
        manifest = read_manifest(out, sha256(out))
        assert manifest is not None
        return Artifact(out, manifest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "export_onnx", export)
        yield asked


def fewer(people: Path, folder: Path, ids: int = 4) -> Path:
    """The first of `people`, of whom a backend embeds 21 crops each."""
    kept = sorted({path.name[:4] for path in (people / "query").iterdir()})[:ids]
    for part in ("bounding_box_train", "query", "bounding_box_test"):
        (folder / part).mkdir(parents=True)
        for path in (people / part).iterdir():
            if part == "bounding_box_train" or path.name[:4] in kept:
                (folder / part / path.name).symlink_to(path)
    return folder
