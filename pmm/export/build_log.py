"""The builder's messages, written to a file beside the engine as they come, also when the build fails."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from pmm.runtime.trt_variant import first_line
from pmm.utils.errors import UserError
from pmm.utils.files import cannot_write, make_folder, output_file


def log_path(engine: Path) -> Path:
    """`best.plan` -> `best.plan.log`."""
    return engine.with_name(engine.name + ".log")


class BuildLog:
    """Messages to a file, in place of an earlier build's, and with `show` to stderr."""

    def __init__(self, path: Path, show: bool) -> None:
        self.path, self._show = path, show
        self.serious: list[str] = []
        """Warnings and errors, a line each."""
        # a line at a time, in place: it is read most where the library ended the process
        self._file = path.open("w", buffering=1, errors="backslashreplace")

    def write(self, level: str, message: str) -> None:
        """Add a message; a disk that is full costs the rest of the log, and a warning."""
        if level in ("WARNING", "ERROR", "INTERNAL_ERROR"):
            self.serious.append(first_line(message))
        line = f"[{level}] {message.rstrip()}"
        if self._show:
            print(line, file=sys.stderr)
        try:
            if not self._file.closed:
                self._file.write(line + "\n")
        except OSError as error:
            logging.getLogger("pmm").warning("%s ends early: %s", self.path, error.strerror or error)
            self._close()

    def end(self) -> None:
        """End the log: later messages of the library are neither kept nor shown."""
        self._show = False
        self._close()

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


@contextlib.contextmanager
def build_log(engine: Path, *, show: bool) -> Iterator[BuildLog]:
    """The log of the build of `engine`; an error of the build names it.

    Raises CannotWrite if it cannot be written.
    """
    path = output_file(log_path(engine))
    make_folder(path.parent)
    try:
        log = BuildLog(path, show)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield log
    except UserError as error:
        error.hint = "; ".join(part for part in (error.hint, f"the builder's log is {path}") if part)
        raise
    finally:
        log.end()
