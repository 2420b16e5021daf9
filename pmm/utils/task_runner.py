"""Command lines run one after another, each at most for its time, and not again while nothing they depend on changed.

Loads the standard library only, so that it can say what is missing to run the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pmm.utils.files import make_folder, sha256, write_file

Status = Literal["passed", "failed", "timed out", "not proved", "not run"]
"""not proved: this machine cannot run it. not run: for something that went wrong before it."""
LAST_LINES = 20
NVCC, TOOLKIT = "nvcc", Path("/usr/local/cuda")


@dataclass(frozen=True, kw_only=True)
class Step:
    """A few command lines that succeed or fail together. Paths are relative to the root of the repository."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    """Run in turn; the word python is this interpreter."""
    env: Mapping[str, str] = field(default_factory=dict)
    """On top of the environment."""
    needs: tuple[str, ...] = ()
    """Python packages or programs; "a|b" is either."""
    optional: bool = False
    """Without what it needs it is not proved, and that is no failure."""
    ruled_out: str = ""
    """Why this machine cannot run it, whatever is installed; that is no failure either."""
    uses: tuple[str, ...] = ()
    """Files of earlier steps; if one changes, the step runs again."""
    takes: tuple[str, ...] = ()
    """Files of earlier steps that it does without where they are not there; else as `uses`."""
    makes: tuple[str, ...] = ()
    """Files that are there afterwards; if one is lost or changes, the step runs again."""
    keeps: tuple[str, ...] = ()
    """Names in its own folder that the next attempt of the same step finds: what is made once, checked on each use."""
    limit_s: int = 600
    """For all its commands together."""

    def missing(self) -> list[str]:
        """What it needs and this machine has not."""
        return [need for need in self.needs if not any(map(_present, need.split("|")))]

    def lines(self) -> list[str]:
        """Its command lines, as one would type them."""
        env = "".join(f"{name}={shlex.quote(value)} " for name, value in self.env.items())
        return [env + shlex.join(command) for command in self.commands]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a step."""

    step: Step
    status: Status
    seconds: float = 0.0
    note: str = ""
    log: Path | None = None
    excused: bool = False
    """Not proved, and that is no failure."""

    @property
    def fine(self) -> bool:
        return self.status == "passed" or self.excused


def run_steps(
    steps: Sequence[Step],
    folder: Path,
    *,
    root: Path,
    depends: object,
    again: Collection[str] = (),
    started: Callable[[Step], None],
    finished: Callable[[Outcome], None],
) -> Iterator[Outcome]:
    """Run `steps` in `root`; logs and stamps go to `folder`. After a failure, only what uses its files is left out.

    A step that passed is kept while `depends` (plain values: the sources, the versions of libraries), its command
    lines and its files are the same, and its name is not in `again`. `finished` is told of a step that ran or is not
    proved before that is remembered. Yields what became of each.
    """
    outcomes: list[Outcome] = []
    for step in steps:
        if (outcome := _left_out(step, outcomes, root)) is None:
            if step.name not in again and (kept := _kept(step, folder, root, depends)):
                outcomes.append(kept)
                yield kept
                continue
            started(step)
            outcome = _run(step, folder, root, depends)
        if outcome.status != "not run":
            finished(outcome)
        if outcome.status == "passed":
            stamp = {**_state(step, root, depends), "seconds": outcome.seconds, "finished": time.strftime("%F %R")}
            write_file(_stamp(step, folder), json.dumps(stamp, indent=1) + "\n")
        outcomes.append(outcome)
        yield outcome


def standing(step: Step, folder: Path, root: Path, depends: object) -> Outcome:
    """What is known of a step that is not run now: how it passed before, or that it is ruled out, or nothing."""
    if step.ruled_out:
        return Outcome(step=step, status="not proved", note=step.ruled_out, excused=True)
    return _kept(step, folder, root, depends) or Outcome(step=step, status="not run", note="not reached", excused=True)


def _left_out(step: Step, before: Iterable[Outcome], root: Path) -> Outcome | None:
    """Why a step is not run at all; None if it can be."""
    makers = [o for o in before if o.status != "passed" and set(o.step.makes) & set(step.uses)]
    names = ", ".join(o.step.name for o in makers)
    if failed := [o for o in makers if not o.fine]:
        return Outcome(step=step, status="not run", note=f"without {', '.join(o.step.name for o in failed)}")
    if step.ruled_out:
        return Outcome(step=step, status="not proved", note=step.ruled_out, excused=True)
    if makers:
        return Outcome(step=step, status="not proved", note=f"without {names} ({makers[0].note})", excused=True)
    if without := step.missing():
        note = f"without {', '.join(without)}"
        return Outcome(step=step, status="not proved", note=note, excused=step.optional)
    if absent := [path for path in step.uses if not (root / path).exists()]:
        return Outcome(step=step, status="not run", note=f"{', '.join(absent)} was not made")
    return None


def last_lines(log: Path, root: Path) -> list[str]:
    """The end of a log, without where this machine keeps the repository."""
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    return [without_places(line, root) for line in lines if line.strip()][-LAST_LINES:]


def without_places(text: str, root: Path) -> str:
    """`text` without the folders of this machine: it can be published."""
    return text.replace(f"{root}/", "").replace(str(Path.home()), "~")


def digest(root: Path, files: Iterable[Path]) -> str:
    """Of the names below `root` and the contents of `files`, in their order."""
    found = hashlib.sha256()
    for path in files:
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def environment(root: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """Of a process that imports our packages from `root`."""
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **extra}


def start_group(command: Sequence[str], root: Path, env: Mapping[str, str], output: object) -> subprocess.Popen[bytes]:
    """Start a command line in a process group of its own: a Ctrl-C is ours to pass on. The word python is this
    interpreter."""
    words = [sys.executable if word == "python" else word for word in command]
    return subprocess.Popen(
        words, cwd=root, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # type: ignore[call-overload]  # fmt: skip


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process, if it still runs, and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _run(step: Step, folder: Path, root: Path, depends: object) -> Outcome:
    """Its own folder is emptied first, but for what it keeps: nothing else of an attempt gets into the next."""
    _stamp(step, folder).unlink(missing_ok=True)
    _empty(step, folder, _key(step, depends))
    log, begin = folder / f"{step.name}.log", time.monotonic()
    env = environment(root, step.env)
    status: Status = "passed"
    note = ""
    with log.open("w") as output:
        for line, command in zip(step.lines(), step.commands, strict=True):
            print(f"$ {line}", file=output, flush=True)
            code = _call(command, root, env, output, begin + step.limit_s - time.monotonic())
            if code is None:
                status, note = "timed out", f"stopped after {step.limit_s} s: {line}"
            elif code:
                status, note = "failed", f"exit code {code}: {line}"
            if code != 0:
                break
    lost = [path for path in step.makes if not (root / path).exists()]
    if status == "passed" and lost:
        status, note = "failed", f"{', '.join(lost)} was not made"
    return Outcome(step=step, status=status, seconds=round(time.monotonic() - begin, 1), note=note, log=log)


def _call(command: Sequence[str], root: Path, env: Mapping[str, str], output: object, limit: float) -> int | None:
    """Exit code; None if it took longer than `limit` seconds. Nothing that it started is left running."""
    process = start_group(command, root, env, output)
    try:
        return process.wait(max(limit, 0.0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        end_group(process)


def _kept(step: Step, folder: Path, root: Path, depends: object) -> Outcome | None:
    """How an earlier run passed, if it still counts."""
    try:
        stamp = json.loads(_stamp(step, folder).read_text())
        if any(stamp[key] != value for key, value in _state(step, root, depends).items()):
            return None
        return Outcome(step=step, status="passed", seconds=stamp["seconds"], note=f"on {stamp['finished']}")
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _state(step: Step, root: Path, depends: object) -> dict[str, object]:
    """All that the outcome depends on. Raises OSError if a file is not there."""
    files = {path: sha256(root / path) for path in (*step.uses, *step.makes)}
    files |= {path: sha256(root / path) if (root / path).exists() else "" for path in step.takes}
    return {"key": _key(step, depends), "files": files}


def _key(step: Step, depends: object) -> str:
    text = json.dumps([depends, step.lines(), step.limit_s])
    return hashlib.sha256(text.encode()).hexdigest()


def _empty(step: Step, folder: Path, key: str) -> None:
    """The step's own folder, but for what it keeps from an attempt with the same `key`."""
    own, attempt = make_folder(folder / step.name), folder / f"{step.name}.attempt"
    same = attempt.is_file() and attempt.read_text() == key
    for path in own.iterdir():
        if not (same and path.name in step.keeps):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_file(attempt, key)


def _stamp(step: Step, folder: Path) -> Path:
    return folder / f"{step.name}.json"


def _present(need: str) -> bool:
    if need == NVCC:  # where setup.py looks for it: in the toolkit that is named, or else in the usual one or on PATH
        named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        folder = Path(named) if named else TOOLKIT
        if named or folder.exists():
            return (folder / "bin" / NVCC).exists()
    return bool(shutil.which(need) or find_spec(need))
