"""A copy of the tree in which one fault at a time is planted, and pytest in it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.mutants.planted import Fault

OWN = "tests/mutants/"  # not in the copies: no planted fault leaves the list true
RELEVANT = (".py", ".cpp", ".h", ".cu", ".cuh", ".toml", ".j2")


class Outcome(NamedTuple):
    """What pytest said."""

    code: int | None
    """Its exit code; None if it took too long."""
    seconds: float
    failed: str
    """The first test that failed."""
    last: str
    """Its last lines."""


class Copy:
    """The tracked files of `tree` and its compiled kernels, in the new folder `home`."""

    def __init__(self, tree: Path, home: Path) -> None:
        self.tree, self.home, self._work = tree, home, home.with_name(f"{home.name}-tmp")
        self._libraries = list(tree.glob("pmm/_*.so"))
        own = tree / ".venv" / "bin" / "python"
        self._python = str(own if own.exists() else sys.executable)
        self._env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(home)}
        self._running: subprocess.Popen[bytes] | None = None
        self._ended = False
        for name in tracked(tree):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, home / name)
        self._put_libraries()

    @contextlib.contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        """With the fault in it. Raises ValueError if it does not compile."""
        path = self.home / fault.file
        before = path.read_bytes()
        try:
            path.write_text(fault.planted(self.home))
            self._forget(path)
            if fault.file.startswith("cpp_ext/"):
                build = [self._python, "setup.py", "--quiet", "build_ext", "--inplace"]
                env = {**self._env, "PMM_BUILD_CUDA": "0"}
                if subprocess.run(build, cwd=self.home, env=env, capture_output=True).returncode:
                    raise ValueError(f"{fault.id}: it does not compile")
            yield
        finally:
            path.write_bytes(before)
            self._forget(path)
            if fault.file.startswith("cpp_ext/"):
                self._put_libraries()

    def pytest(self, *args: str, limit: float) -> Outcome:
        """`pytest ARGS` up to the first failure; after `limit` seconds it is ended, with all that it has started.

        Raises InterruptedError after `end`.
        """
        command = [self._python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-rfE"]
        command += [f"--basetemp={self._work}", *args]
        begin = time.monotonic()
        with tempfile.TemporaryFile() as output:
            self._running = subprocess.Popen(
                command, cwd=self.home, env=self._env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code: int | None = self._running.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            self._kill()
            if self._ended:
                raise InterruptedError
            output.seek(0)
            text = output.read().decode(errors="replace")
        shutil.rmtree(self.home / ".hypothesis", ignore_errors=True)  # a counterexample is of its fault alone
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.MULTILINE)
        last = " / ".join(line for line in text.splitlines()[-4:] if line.strip())
        return Outcome(code, time.monotonic() - begin, failed[1] if failed else "", last)

    def end(self) -> None:
        """What runs here, for good."""
        self._ended = True
        self._kill()

    def _kill(self) -> None:
        if self._running is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._running.pid, signal.SIGKILL)
            self._running.wait()

    def _put_libraries(self) -> None:
        for library in self._libraries:
            shutil.copy2(library, self.home / "pmm")

    @staticmethod
    def _forget(source: Path) -> None:
        """Python takes a compiled file for this one's if second and size are the same: those of two faults may be."""
        for compiled in source.parent.glob(f"__pycache__/{source.stem}.*.pyc"):
            compiled.unlink()


def tracked(tree: Path) -> list[str]:
    """The files of `tree` that git knows, as they are now."""
    done = subprocess.run(["git", "-C", str(tree), "ls-files", "-z"], capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if not name.startswith(OWN) and (tree / name).is_file()]


def state_of(tree: Path) -> str:
    """A digest of all that a verdict depends on."""
    digest = hashlib.sha256()
    for name in tracked(tree):
        if name.endswith(RELEVANT):
            digest.update(name.encode() + b"\0" + (tree / name).read_bytes())
    return digest.hexdigest()[:12]


def tier_of(tree: Path) -> tuple[str, ...]:
    """What makes pytest run the tests of `make test`, of the tiers that `tree` has."""
    settings = tree / "pyproject.toml"
    text = settings.read_text() if settings.is_file() else ""
    others = [f"not {tier}" for tier in ("slow", "full") if f'"{tier}:' in text]
    return ("-m", " and ".join(others)) if others else ()
