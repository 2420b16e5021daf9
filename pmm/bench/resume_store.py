"""What a run has found so far, on disk: an interrupted one goes on from there with --resume."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pmm.bench.schema import SCHEMA, Result, Timing
from pmm.bench.workers import file_name
from pmm.utils.errors import UserError
from pmm.utils.files import make_folder, write_file
from pmm.utils.from_dict import from_dict

FOLDER = "unfinished"


def clear(out: Path) -> None:
    """The report in `out` is written: nothing of this is needed any more."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


class Unfinished:
    """Results and timings of the run that writes to `out`, under `out`/unfinished until it is done."""

    def __init__(self, out: Path, facts: Mapping[str, Any], *, resume: bool) -> None:
        """
        Args:
            facts: all that the figures depend on, as plain values.
            resume: keep what an interrupted run of the same facts found; else begin anew.

        Raises:
            UserError: there is nothing to resume, or it was measured under other facts.
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
        """Of a file of the run."""
        return self._folder / name

    def result(self, name: str) -> Result | None:
        """What was kept of a backend that was measured, but for its timings."""
        with contextlib.suppress(OSError, ValueError):
            return from_dict(Result, json.loads(self._of(name).read_text()))
        return None

    def keep_result(self, result: Result) -> None:
        """Keep what was measured of a backend."""
        write_file(self._of(result.name), json.dumps(asdict(result)))

    def timings(self, batch: int, files: Mapping[str, str]) -> dict[str, Timing]:
        """Those of one batch size, all measured side by side; empty if they are still to be measured, or were of
        other files than `files` (name of the result -> sha256)."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            values = json.loads(self.path(f"batch-{batch}.json").read_text())
            if values["files"] == dict(files):
                return {name: from_dict(Timing, each) for name, each in values["timings"].items()}
        return {}

    def keep_timings(self, batch: int, timings: Mapping[str, Timing], files: Mapping[str, str]) -> None:
        """Keep what was measured at one batch size."""
        values = {"files": dict(files), "timings": {name: asdict(timing) for name, timing in timings.items()}}
        write_file(self.path(f"batch-{batch}.json"), json.dumps(values))

    def _of(self, name: str) -> Path:
        return self.path(file_name(name) + ".json")

    def _check(self, facts: dict[str, Any]) -> None:
        try:
            before = json.loads(self.path("facts.json").read_text())
        except (OSError, ValueError):
            raise UserError(f"{self._folder.parent} holds no interrupted run; leave --resume out") from None
        differing = [key for key in {**before, **facts} if before.get(key) != facts.get(key)]
        if differing:
            said = "; ".join(f"{key} was {before.get(key)}, is {facts.get(key)}" for key in differing)
            raise UserError(f"{self._folder.parent}: cannot resume, what was measured was something else: {said}")
