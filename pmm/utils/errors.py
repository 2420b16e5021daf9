"""Errors that are the user's to mend: kinds with their facts. Command lines print one as a line and exit with 1.

The line is made from the facts, `PATH: problem; expected THIS; do THAT`, so tests assert the facts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path


class UserError(Exception):
    """What was wrong, what was expected and what to do next, in one line.

    Args:
        problem: what was wrong, without the path.
        path: the file or folder it is about.
        expected: what would have been right.
        hint: what to do next, as a command or a flag that exists.

    Examples:
        >>> str(UserError("it is empty", path="crops", expected="images", hint="run pmm synthetic"))
        'crops: it is empty; expected images; run pmm synthetic'
    """

    def __init__(self, problem: str, *, path: str | Path | None = None, expected: str = "", hint: str = "") -> None:
        super().__init__(problem)
        self.problem, self.expected, self.hint = problem, expected, hint
        self.path = None if path is None else Path(path)

    def __str__(self) -> str:
        place = "" if self.path is None else f"{self.path}: "
        expected = self.expected and f"expected {self.expected}"
        return printable(place + "; ".join(part for part in (self.problem, expected, self.hint) if part))

    def __repr__(self) -> str:  # from the facts, which callers may complete
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[object, ...]:  # a subclass is not made from `args` alone
        return _remade, (type(self), self.__dict__, self.args)


class UsageError(UserError):
    """A command line that does not fit the command, which exits with code 2."""


class InvalidValue(UserError):
    """A flag or an argument has a value that it cannot have.

    Args:
        name: the flag (`--threads`) or the argument (`batch_size`).
        value: what it was.
        expected: what it can be; or `choices`, the words to choose from, of which the nearest is suggested.

    Examples:
        >>> str(InvalidValue("--threads", -1, "0 or more"))
        '--threads is -1; expected 0 or more'
        >>> str(InvalidValue("backend", "onxruntime", choices=["auto", "onnxruntime"]))
        "backend is 'onxruntime'; expected auto or onnxruntime; did you mean onnxruntime?"
    """

    def __init__(
        self, name: str, value: object, expected: str = "", *, choices: Iterable[str] = (), hint: str = ""
    ) -> None:
        self.name, self.value, self.choices = name, value, tuple(choices)
        if self.choices:
            expected = expected or one_of(self.choices)
            nearest = difflib.get_close_matches(str(value), self.choices, n=1)
            hint = hint or (f"did you mean {nearest[0]}?" if nearest else "")
        shown = f"'{value}'" if isinstance(value, str) else value
        super().__init__(f"{name} is {shown}", expected=expected, hint=hint)


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raises InvalidValue, for the `value` of `name`, unless `condition` holds."""
    if not condition:
        raise InvalidValue(name, value, expected)


class ConflictingOptions(UserError):
    """Options that cannot be together, or one that would change nothing here.

    Args:
        problem: text in which `{name}` stands for the option `name`.
        options: the options that it is about: flags (`--tf32`) or fields (`batch_size`).
        expected: as `problem`.
        hint: as `problem`.

    Examples:
        >>> error = ConflictingOptions("{extend} needs {resume}", "extend", "resume")
        >>> str(error), str(error.renamed({"extend": "--extend", "resume": "--resume"}))
        ('extend needs resume', '--extend needs --resume')
    """

    def __init__(self, problem: str, *options: str, expected: str = "", hint: str = "") -> None:
        self.options, self._templates = options, (problem, expected, hint)
        problem, expected, hint = self._filled(dict(zip(options, options, strict=True)))
        super().__init__(problem, expected=expected, hint=hint)

    def renamed(self, names: Mapping[str, str]) -> ConflictingOptions:
        """The same error with other names for its options, as a command line has them."""
        names = {option: names.get(option, option) for option in self.options}
        problem, expected, hint = self._filled(names)
        return ConflictingOptions(problem, *names.values(), expected=expected, hint=hint)

    def _filled(self, names: Mapping[str, str]) -> list[str]:
        texts = list(self._templates)
        for option, name in names.items():
            texts = [text.replace(f"{{{option}}}", name) for text in texts]
        return texts


class InvalidFile(UserError):
    """The file or folder `path` is missing, damaged or of another kind, or holds what cannot be used."""


class CannotWrite(UserError):
    """The file or folder `path` cannot be written, or would replace what is to be kept."""


class InvalidInput(UserError):
    """Arrays, boxes, embeddings or tables of fields from the caller that cannot be used; `index` says which of several,
    from 0, and `path` which artifact does not take them."""

    def __init__(
        self,
        problem: str,
        *,
        index: int | None = None,
        path: str | Path | None = None,
        expected: str = "",
        hint: str = "",
    ) -> None:
        super().__init__(problem, path=path, expected=expected, hint=hint)
        self.index = index


class OutOfMemory(UserError):
    """What was asked for does not fit the memory that there is, or that was allowed."""


class BackendUnavailable(UserError):
    """This machine cannot do what was asked for: no GPU, no such instructions, a library that does not work."""


class MissingLibrary(BackendUnavailable):
    """The module `library` cannot be imported; the hint is the command that installs it."""

    def __init__(self, library: str, problem: str, *, hint: str) -> None:
        super().__init__(problem, hint=hint)
        self.library = library


class TrainingInterrupted(Exception):
    """A run was told to end by signal `number`, and is saved `where` it was."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__(where)
        self.number, self.where = number, where


def printable(text: object) -> str:
    """`text` on one line and safe for every terminal: bytes that are no UTF-8 and control characters are escaped."""
    return "".join(
        letter
        if letter.isprintable()
        else f"\\x{ord(letter) - 0xDC00:02x}"
        if "\udc80" <= letter <= "\udcff"
        else letter.encode("unicode_escape").decode()
        for letter in str(text)
    )


def one_of(words: Iterable[str]) -> str:
    """`a, b or c`."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def reason_of(error: Exception) -> str:
    """The first line of what a library said, at most 200 characters; the kind of error if it said nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _remade(kind: type[UserError], facts: dict[str, object], args: tuple[object, ...]) -> UserError:
    """An error that went from one process to another: all its facts, whatever its constructor takes."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(facts)
    return error
