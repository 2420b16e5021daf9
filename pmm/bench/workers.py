"""Workers: one process per backend, with one request at a time, so that none disturbs or takes down another."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from pmm.utils.errors import BackendUnavailable, UserError
from pmm.utils.files import make_folder

COMMAND = (sys.executable, "-m", "pmm.bench.worker")
LAST_LINE = 200  # characters of the log's last line in a message


class WorkerFailed(UserError):
    """A worker's answer is an error, or it crashed, or it did not respond."""


class CannotRun(WorkerFailed, BackendUnavailable):
    """A worker's answer is that this machine cannot run the backend."""


class WorkerProcess:
    """A child process that runs `pmm.bench.worker`."""

    def __init__(self, name: str, log: Path, *, threads: int, timeout: float) -> None:
        """
        Args:
            name: for messages.
            log: file for the output of the worker and its libraries.
            threads: CPU threads that the backend may use.
            timeout: seconds without a response after which a request counts as hung, and the worker is ended.
        """
        self.name, self.log, self.timeout = name, log, timeout
        make_folder(log.parent)
        home = str(Path(__file__).parents[2])
        path = os.pathsep.join(part for part in (home, os.environ.get("PYTHONPATH", "")) if part)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
                start_new_session=True,  # Ctrl-C is for the parent, who then ends the workers
            )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stdout, selectors.EVENT_READ)
        self._pending = b""

    def call(
        self,
        method: str,
        /,
        *,
        progress: Callable[[float], None] = lambda done: None,
        patience: float = 1.0,
        **arguments: Any,
    ) -> Any:
        """What `WorkerSession`'s `method` returns for `arguments`, plain JSON values.

        Args:
            progress: called with the share that is done, as the worker reports it.
            patience: times the timeout that the worker may take to respond.

        Raises:
            CannotRun: this machine cannot run the backend.
            WorkerFailed: any other error, a crash, or no response.
        """
        try:
            self._stdin.write(json.dumps({"method": method, "arguments": arguments}).encode() + b"\n")
            self._stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self._crashed(method) from None
        while True:
            message = json.loads(self._line(method, patience * self.timeout))
            if "progress" not in message:
                return read_answer(message)
            progress(message["progress"])

    @property
    def alive(self) -> bool:
        """The process is running: an error was an answer, not its end."""
        return self._process.poll() is None

    def close(self, *, at_once: bool = False) -> None:
        """End the worker: by closing its input, or by SIGKILL if `at_once` or if it does not end."""
        if at_once and self.alive:
            self._kill()
        with contextlib.suppress(OSError):  # what could not be written to a dead worker
            self._stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._kill()
        self._stdout.close()
        self._selector.close()

    @property
    def _stdin(self) -> Any:
        return self._process.stdin

    @property
    def _stdout(self) -> Any:
        return self._process.stdout

    def _line(self, method: str, timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        while b"\n" not in self._pending:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                self._kill()
                problem = f"no response to '{method}' within {timeout:g} s; the worker was ended"
                raise WorkerFailed(problem, hint="raise --timeout if it needs more time")
            block = os.read(self._stdout.fileno(), 1 << 16)
            if not block:
                raise self._crashed(method)
            self._pending += block
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _crashed(self, method: str) -> WorkerFailed:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._kill()
            code = self._process.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        last = f"; its last output: {lines[-1][:LAST_LINE]}" if lines else ""
        return WorkerFailed(f"crashed ({how}) in '{method}'{last}", hint=f"its log is {self.log}")

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # and its own child processes: compilers
        self._process.wait()


def read_answer(message: Mapping[str, Any]) -> Any:
    """The value in a worker's answer. Raises WorkerFailed or CannotRun if it is an error."""
    if "error" in message:
        raise (CannotRun if message["kind"] == "unavailable" else WorkerFailed)(message["error"])
    return message["answer"]


class WorkerPool:
    """The workers of a run: one that makes artifacts, and one per candidate. Use as a context manager."""

    def __init__(self, logs: Path, *, threads: int, timeout: float) -> None:
        """Arguments as `WorkerProcess`; `logs` is a folder."""
        self.threads, self._logs, self._timeout = threads, logs, timeout
        self._workers: dict[str, WorkerProcess] = {}

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers.values():
            worker.close(at_once=error is not None)

    def __getitem__(self, name: str) -> WorkerProcess:
        """The worker of that name, started if there is none or it has ended."""
        worker = self._workers.get(name)
        if worker is None or not worker.alive:
            log = self._logs / f"{file_name(name)}.log"
            worker = self._workers[name] = WorkerProcess(name, log, threads=self.threads, timeout=self._timeout)
        return worker

    def __contains__(self, name: str) -> bool:
        """Whether a worker of that name is running."""
        return name in self._workers and self._workers[name].alive

    def end(self, name: str) -> None:
        """End the worker of that name, if there is one."""
        if name in self._workers:
            self._workers.pop(name).close()


def file_name(name: str) -> str:
    """A result's name as part of a file's."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in name)
