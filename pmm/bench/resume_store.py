"""Finished results of a bench run on disk, from which an interrupted run goes on with --resume."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pmm.bench.result_schema import Result, Timing
from pmm.bench.schema import SCHEMA, PreprocessingCost
from pmm.bench.workers import file_name
from pmm.utils.errors import InvalidFile
from pmm.utils.files import make_folder, write_file
from pmm.utils.from_dict import from_dict

FOLDER = "unfinished"
T = TypeVar("T")


def clear(out: Path) -> None:
    """Remove the stored results: the report in `out` is written."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


class ResumeStore:
    """Results and timings of the run that writes to `out`, under `out`/unfinished until it is done."""

    def __init__(self, out: Path, facts: Mapping[str, Any], *, resume: bool) -> None:
        """
        Args:
            facts: all that the figures depend on, as plain values.
            resume: keep the results of an interrupted run of the same facts; else begin anew.

        Raises:
            InvalidFile: there is nothing to resume, or it was measured with other facts.
        """
        self._folder = out / FOLDER
        now = json.loads(json.dumps({"schema": SCHEMA, **facts}))
        if resume:
            self._check(now)
        else:
            shutil.rmtree(self._folder, ignore_errors=True)
        make_folder(self._folder)
        write_file(self._folder / "facts.json", json.dumps(now, indent=1))

    def path(self, name: str) -> Path:
        """Path of a file of the run."""
        return self._folder / name

    def result(self, name: str) -> Result | None:
        """The stored result of that name, without timings; None if there is none."""
        return self._read(Result, self._result_path(name))

    def store_result(self, result: Result) -> None:
        """Store a result, without timings."""
        write_file(self._result_path(result.name), json.dumps(asdict(result)))

    def preprocessing_cost(self, key: str) -> PreprocessingCost | None:
        """The stored cost of a mistake; None if there is none."""
        return self._read(PreprocessingCost, self.path(f"mistake-{key}.json"))

    def store_preprocessing_cost(self, key: str, cost: PreprocessingCost) -> None:
        """Store the cost of a mistake on some crops, both of which `key` names."""
        write_file(self.path(f"mistake-{key}.json"), json.dumps(asdict(cost)))

    def timings(self, batch: int, files: Mapping[str, str]) -> dict[str, Timing]:
        """The stored timings of one batch size, all measured side by side; empty if there are none, or they are of
        other files than `files` (name of the result -> sha256)."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            values = json.loads(self.path(f"batch-{batch}.json").read_text())
            if values["files"] == dict(files):
                return {name: from_dict(Timing, each) for name, each in values["timings"].items()}
        return {}

    def store_timings(self, batch: int, timings: Mapping[str, Timing], files: Mapping[str, str]) -> None:
        """Store the timings of one batch size."""
        values = {"files": dict(files), "timings": {name: asdict(timing) for name, timing in timings.items()}}
        write_file(self.path(f"batch-{batch}.json"), json.dumps(values))

    @staticmethod
    def _read(cls: type[T], path: Path) -> T | None:
        with contextlib.suppress(OSError, ValueError):
            return from_dict(cls, json.loads(path.read_text()))
        return None

    def _result_path(self, name: str) -> Path:
        return self.path(file_name(name) + ".json")

    def _check(self, facts: dict[str, Any]) -> None:
        try:
            before = json.loads(self.path("facts.json").read_text())
        except (OSError, ValueError):
            problem = "it holds no interrupted run"
            raise InvalidFile(problem, path=self._folder.parent, hint="leave --resume out") from None
        differing = [key for key in {**before, **facts} if before.get(key) != facts.get(key)]
        if differing:
            changes = "; ".join(f"{key} was {before.get(key)}, is now {facts.get(key)}" for key in differing)
            problem = f"the interrupted run cannot be resumed: {changes}"
            raise InvalidFile(problem, path=self._folder.parent, hint="leave --resume out to measure anew")
