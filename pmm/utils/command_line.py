"""Command lines from dataclasses, and where an error becomes one line and an exit code. Loads no torch."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NoReturn, TypeVar

from pmm.utils.arguments import Argument, arguments, build, parse_words
from pmm.utils.errors import ConflictingOptions, InvalidValue, UsageError, UserError, printable
from pmm.utils.extras import missing_library
from pmm.utils.help_text import help_text
from pmm.utils.scheduling import configure_threads, use_short_time_slices

T = TypeVar("T")

INTERRUPTED = 130
OF_USAGE = (UsageError, InvalidValue, ConflictingOptions)
"""Errors of what was typed."""


def parse(command: type[T], *, prog: str, description: str) -> T:
    """Parse `sys.argv` into the dataclass `command`; see `parse_args`."""
    return parse_args(command, sys.argv[1:], prog=prog, description=description)


def parse_args(
    command: type[T],
    args: Sequence[str],
    *,
    prog: str,
    description: str,
    default: T | None = None,
    partial: bool = False,
) -> T:
    """The command line `args` as the dataclass `command`, whose fields `default` fills where no flag does.

    `--help` prints the help, which `description` heads, and exits. `partial=True` passes over arguments that `command`
    does not have, and over `--help`.

    Raises UsageError, also for values that the constructor of `command` refuses; its cause is the error of their kind.
    """
    known = arguments(command, default)
    if not partial and {"-h", "--help"} & set(args):
        width = shutil.get_terminal_size().columns
        print(help_text(known, prog=prog, description=description, width=width))
        raise SystemExit(0)
    with _usage_errors(known, prog):
        return build(command, parse_words(known, args, partial=partial), default)


def check_args(command: type, args: Sequence[str], *, prog: str) -> None:
    """Raises UsageError for words that are no command line of `command`, whatever its defaults are."""
    known = arguments(command)
    with _usage_errors(known, prog):
        parse_words(known, args)


@contextlib.contextmanager
def _usage_errors(known: Sequence[Argument], prog: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UsageError(str(_with_flags(error, known)), hint=f"see {prog} --help") from error


def _with_flags(error: UserError, known: Sequence[Argument]) -> UserError:
    """The error with flags in place of the fields that it names, and a value of several words as it is typed."""
    flags = {argument.path[-1]: argument.flag for argument in known}
    if isinstance(error, InvalidValue) and error.name in flags:
        value = " ".join(map(str, error.value)) if isinstance(error.value, tuple) else error.value
        return InvalidValue(flags[error.name], value, error.expected, choices=error.choices, hint=error.hint)
    return error.renamed(flags) if isinstance(error, ConflictingOptions) else error


def run(main: Callable[[str], int | None], *, prog: str) -> NoReturn:
    """Call `main` with the name it is known by, `prog`, and exit.

    UserError, OSError and a library that is not installed are one line and 1, those of `OF_USAGE` one line and 2,
    wherever they are noticed, Ctrl-C is 130; the rest is a bug, and shown.

    Before that, says how torch's threads shall wait, for `main` to load it (see `pmm.utils.scheduling`).
    """
    configure_threads()
    use_short_time_slices()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that the terminal cannot show costs no results
    try:
        with _warnings_of(prog):
            code = main(prog)
    except UserError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, OF_USAGE) else 1) from None
    except ModuleNotFoundError as error:
        if not (line := missing_library(error)):
            raise
        print(f"{prog}: error: {line}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:  # `... | head`: the reader has gone, nothing left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:  # a folder without permission, a full disk: the user's machine, not our bug
        print(f"{prog}: error: {error.filename or 'file system'}: {error.strerror or error}", file=sys.stderr)
        raise SystemExit(1) from None
    raise SystemExit(code or 0)


def note(prog: str, text: object) -> None:
    """A line on stderr that begins as errors do: what the user should know, and what is no result and no progress."""
    print(printable(f"{prog}: note: {text}"), file=sys.stderr)


@contextlib.contextmanager
def _warnings_of(prog: str) -> Iterator[None]:
    """What the package warns of is a line on stderr that begins as errors do."""
    handler = logging.StreamHandler()
    handler.format = lambda record: printable(f"{prog}: warning: {record.getMessage()}")  # type: ignore[method-assign]
    logger = logging.getLogger("pmm")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back until the yielded function is called, which then raises KeyboardInterrupt; a second one is let
    through at once.

    Raised wherever it falls, an interrupt can land in a destructor or a fork hook, where Python drops it and goes on.
    """
    with deferred_signals(signal.SIGINT) as first_signal:

        def release() -> None:
            if first_signal():
                raise KeyboardInterrupt

        yield release
        release()


@contextlib.contextmanager
def deferred_signals(*numbers: int, leave: Callable[[], object] = lambda: None) -> Iterator[Callable[[], int]]:
    """Hold the signals `numbers` back; the yielded function tells which came first, 0 for none. A second Ctrl-C calls
    `leave`, and is let through at once if that returns."""
    # those that are ignored stay so, as a shell starts its background jobs
    deferred = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        deferred = []
    arrived: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in arrived:
            leave()
            raise KeyboardInterrupt
        arrived.append(number)

    before = [(number, signal.signal(number, hold)) for number in deferred]
    try:
        yield lambda: arrived[0] if arrived else 0
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def flags_in(args: Sequence[str] | None = None) -> set[str]:
    """The --flags of `args` (default: of this command line), without their values."""
    args = sys.argv[1:] if args is None else args
    return {arg.split("=", 1)[0].replace("_", "-") for arg in args if arg.startswith("--")}


def numbers(text: str, *, flag: str, least: int = 1) -> list[int]:
    """`1,8` -> [1, 8]. Raises InvalidValue for an empty list, a non-number or a number below `least`."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(re.fullmatch(r"-?\d+", part) for part in parts) or min(map(int, parts)) < least:
        raise InvalidValue(flag, text, f"whole numbers of at least {least} with commas between, as 1,8")
    return sorted(set(map(int, parts)))


def names(text: str, *, flag: str) -> list[str]:
    """`a,b` -> ["a", "b"]. Raises InvalidValue for an empty list."""
    words = [part.strip() for part in text.split(",") if part.strip()]
    if not words:
        raise InvalidValue(flag, text, "names with commas between")
    return list(dict.fromkeys(words))


def size(text: str, *, flag: str) -> int:
    """`500MB` -> 500,000,000 bytes; B, kB, MB, GB and TB, of 1000 each. Raises InvalidValue."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b\s*", text, re.IGNORECASE)
    if match is None:
        raise InvalidValue(flag, text, "a size, as 500MB or 2GB")
    return int(float(match[1]) * 1000 ** " kmgt".index(match[2].lower() or " "))
