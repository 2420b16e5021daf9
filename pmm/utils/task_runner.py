"""Run tasks, which are a few command lines each, with a time limit, and again only if something they depend on changed.

Loads the standard library only, so that it can report missing packages.
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

from pmm.utils.cuda_toolkit import find_toolkit
from pmm.utils.files import make_folder, sha256, write_file

Status = Literal["passed", "failed", "timed out", "not proved", "not run"]
"""not proved: this machine cannot run it. not run: an earlier task failed or was interrupted."""
LAST_LINES = 20
NVCC = "nvcc"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A few command lines that succeed or fail together. Paths are relative to the root of the repository."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    """Run in turn; the word python is this interpreter."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables beside those of the environment."""
    requires: tuple[str, ...] = ()
    """Python packages or programs; "a|b" is either."""
    optional: bool = False
    """It is no failure if `requires` is missing."""
    unsupported: str = ""
    """Why this machine cannot run it, with any packages; that is no failure either."""
    inputs: tuple[str, ...] = ()
    """Files of earlier tasks; if one changes, the task runs again."""
    optional_inputs: tuple[str, ...] = ()
    """As `inputs`, but the task also runs without them."""
    outputs: tuple[str, ...] = ()
    """Files that it makes; if one is lost or changes, the task runs again."""
    kept_files: tuple[str, ...] = ()
    """Names in its folder that the next attempt of the same task can use: files that are checked on each use."""
    limit_s: int = 600
    """For all its commands together."""

    def missing(self) -> list[str]:
        """Those of `requires` that this machine lacks."""
        return [names for names in self.requires if not any(map(_is_installed, names.split("|")))]

    def lines(self) -> list[str]:
        """Its command lines, as one would type them."""
        env = "".join(f"{name}={shlex.quote(value)} " for name, value in self.env.items())
        return [env + shlex.join(command) for command in self.commands]


@dataclass(frozen=True, kw_only=True)
class TaskOutcome:
    """The result of a task."""

    task: Task
    status: Status
    seconds: float = 0.0
    note: str = ""
    log: Path | None = None
    excused: bool = False
    """Not proved, and that is no failure."""

    @property
    def ok(self) -> bool:
        return self.status == "passed" or self.excused


def run_tasks(
    tasks: Sequence[Task],
    folder: Path,
    *,
    root: Path,
    depends: object,
    again: Collection[str] = (),
    started: Callable[[Task], None],
    finished: Callable[[TaskOutcome], None],
) -> Iterator[TaskOutcome]:
    """Run `tasks` in `root`; logs and stamps go to `folder`. After a failure, only tasks that use its
    files are left out.

    A task that passed does not run again while `depends` (plain values: the sources, the versions of libraries), its
    command lines and its files are the same, and its name is not in `again`. `finished` is called for a task that ran
    or is not proved, before its stamp is written. Yields the outcome of each.
    """
    outcomes: list[TaskOutcome] = []
    for task in tasks:
        if (outcome := _skipped(task, outcomes, root)) is None:
            if task.name not in again and (earlier := _earlier_pass(task, folder, root, depends)):
                outcomes.append(earlier)
                yield earlier
                continue
            started(task)
            outcome = _run(task, folder, root, depends)
        if outcome.status != "not run":
            finished(outcome)
        if outcome.status == "passed":
            stamp = {
                **_fingerprint(task, root, depends),
                "seconds": outcome.seconds,
                "finished": time.strftime("%F %R"),
            }
            write_file(_stamp(task, folder), json.dumps(stamp, indent=1) + "\n")
        outcomes.append(outcome)
        yield outcome


def earlier_outcome(task: Task, folder: Path, root: Path, depends: object) -> TaskOutcome:
    """The outcome of a task that is not run now: unsupported, passed before, or not run."""
    if task.unsupported:
        return TaskOutcome(task=task, status="not proved", note=task.unsupported, excused=True)
    not_run = TaskOutcome(task=task, status="not run", note="not reached", excused=True)
    return _earlier_pass(task, folder, root, depends) or not_run


def _skipped(task: Task, before: Iterable[TaskOutcome], root: Path) -> TaskOutcome | None:
    """The outcome of a task that cannot run, with the reason; None if it can."""
    makers = [o for o in before if o.status != "passed" and set(o.task.outputs) & set(task.inputs)]
    names = ", ".join(o.task.name for o in makers)
    if failed := [o for o in makers if not o.ok]:
        return TaskOutcome(task=task, status="not run", note=f"without {', '.join(o.task.name for o in failed)}")
    if task.unsupported:
        return TaskOutcome(task=task, status="not proved", note=task.unsupported, excused=True)
    if makers:
        return TaskOutcome(task=task, status="not proved", note=f"without {names} ({makers[0].note})", excused=True)
    if without := task.missing():
        note = f"without {', '.join(without)}"
        return TaskOutcome(task=task, status="not proved", note=note, excused=task.optional)
    if absent := [path for path in task.inputs if not (root / path).exists()]:
        return TaskOutcome(task=task, status="not run", note=f"{', '.join(absent)} was not made")
    return None


def last_lines(log: Path, root: Path) -> list[str]:
    """The end of a log, without the folders of this machine."""
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    return [strip_paths(line, root) for line in lines if line.strip()][-LAST_LINES:]


def strip_paths(text: str, root: Path) -> str:
    """`text` without the folders of this machine: it can be published."""
    return text.replace(f"{root}/", "").replace(str(Path.home()), "~")


def digest(root: Path, files: Iterable[Path]) -> str:
    """SHA-256 of the names below `root` and the contents of `files`, in their order."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def environment(root: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that imports our packages from `root`."""
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **extra}


def start_group(command: Sequence[str], root: Path, env: Mapping[str, str], output: object) -> subprocess.Popen[bytes]:
    """Start a command line in a new process group, which Ctrl-C does not reach. The word python is this interpreter."""
    words = [sys.executable if word == "python" else word for word in command]
    return subprocess.Popen(
        words, cwd=root, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # type: ignore[call-overload]  # fmt: skip


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process, if it still runs, and its child processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _run(task: Task, folder: Path, root: Path, depends: object) -> TaskOutcome:
    """Run a task in its folder, which is emptied first but for its `kept_files`: no other file of an attempt stays."""
    _stamp(task, folder).unlink(missing_ok=True)
    _empty(task, folder, _key(task, depends))
    log, begin = folder / f"{task.name}.log", time.monotonic()
    env = environment(root, task.env)
    status: Status = "passed"
    note = ""
    with log.open("w") as output:
        for line, command in zip(task.lines(), task.commands, strict=True):
            print(f"$ {line}", file=output, flush=True)
            code = _call(command, root, env, output, begin + task.limit_s - time.monotonic())
            if code is None:
                status, note = "timed out", f"stopped after {task.limit_s} s: {line}"
            elif code:
                status, note = "failed", f"exit code {code}: {line}"
            if code != 0:
                break
    lost = [path for path in task.outputs if not (root / path).exists()]
    if status == "passed" and lost:
        status, note = "failed", f"{', '.join(lost)} was not made"
    return TaskOutcome(task=task, status=status, seconds=round(time.monotonic() - begin, 1), note=note, log=log)


def _call(command: Sequence[str], root: Path, env: Mapping[str, str], output: object, limit: float) -> int | None:
    """Exit code; None if it took longer than `limit` seconds. Its child processes are ended."""
    process = start_group(command, root, env, output)
    try:
        return process.wait(max(limit, 0.0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        end_group(process)


def _earlier_pass(task: Task, folder: Path, root: Path, depends: object) -> TaskOutcome | None:
    """The outcome of an earlier run that passed, if nothing it depends on has changed."""
    try:
        stamp = json.loads(_stamp(task, folder).read_text())
        if any(stamp[key] != value for key, value in _fingerprint(task, root, depends).items()):
            return None
        return TaskOutcome(task=task, status="passed", seconds=stamp["seconds"], note=f"on {stamp['finished']}")
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fingerprint(task: Task, root: Path, depends: object) -> dict[str, object]:
    """All that the outcome depends on. Raises OSError if a file does not exist."""
    files = {path: sha256(root / path) for path in (*task.inputs, *task.outputs)}
    files |= {path: sha256(root / path) if (root / path).exists() else "" for path in task.optional_inputs}
    return {"key": _key(task, depends), "files": files}


def _key(task: Task, depends: object) -> str:
    text = json.dumps([depends, task.lines(), task.limit_s])
    return hashlib.sha256(text.encode()).hexdigest()


def _empty(task: Task, folder: Path, key: str) -> None:
    """Empty the task's folder, but for its `kept_files` of an attempt with the same `key`."""
    task_folder, attempt = make_folder(folder / task.name), folder / f"{task.name}.attempt"
    same = attempt.is_file() and attempt.read_text() == key
    for path in task_folder.iterdir():
        if not (same and path.name in task.kept_files):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_file(attempt, key)


def _stamp(task: Task, folder: Path) -> Path:
    return folder / f"{task.name}.json"


def _is_installed(name: str) -> bool:
    if name == NVCC:
        return find_toolkit() is not None
    return bool(shutil.which(name) or find_spec(name))
