"""Command lines from dataclasses: a field is a flag, its default the flag's, its docstring the help. Loads no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pmm.utils.errors import InvalidValue, UserError

T = TypeVar("T")

EXPECTED = {int: "a whole number", float: "a number", Path: "a path"}


@dataclass(frozen=True)
class Arg:
    """Annotation of a field: what the command line needs to know beyond its name, its type and its docstring.

    Args:
        metavar: what help calls the value, as DIR.
        short: a second flag, as -o.
        positional: without a flag, as `metavar` in help and messages.
        help: the help, where the field has no docstring.
        group: where help lists it (default: options, and the field's name for a dataclass in the dataclass).
    """

    metavar: str = ""
    short: str = ""
    positional: bool = False
    help: str = ""
    group: str = ""


@dataclass(frozen=True)
class Argument:
    """One argument of a command; `path` are the fields that lead to its value, in dataclasses within dataclasses."""

    path: tuple[str, ...]
    owner: type
    kind: Any
    default: Any
    arg: Arg
    group: str

    @property
    def flag(self) -> str:
        """--flag, or the name of a positional argument."""
        return self.arg.metavar if self.arg.positional else "--" + self.path[-1].replace("_", "-")

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is dataclasses.MISSING

    @property
    def repeatable(self) -> bool:
        """Whether the flag may be given several times, for several values."""
        return get_origin(self.kind) is tuple and Ellipsis in get_args(self.kind)

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types of the words of one value: (int, int) for `--block 1 2`, and (Path,) for each of any number."""
        kind = get_args(self.kind)[0] if self.repeatable else self.kind
        if kind is bool:
            return ()
        return get_args(kind) if get_origin(kind) is tuple else (kind,)

    @property
    def any_number(self) -> bool:
        """Whether any number of words may follow the flag."""
        return self.repeatable and get_origin(get_args(self.kind)[0]) is not tuple

    def value(self, words: Sequence[str]) -> Any:
        """`words`, which are as many as `kinds`, as a value. Raises InvalidValue."""
        values = tuple(_typed(word, kind, self.flag) for word, kind in zip(words, self.kinds, strict=True))
        return True if not values else values if len(values) > 1 else values[0]


def arguments(command: type, default: Any = None, path: tuple[str, ...] = (), group: str = "options") -> list[Argument]:
    """The arguments of the dataclass `command`; a `default`, one of its instances, goes before the fields' own."""
    hints = get_type_hints(command, include_extras=True)
    found, nested = [], []
    for field in dataclasses.fields(command):
        kind, *notes = (
            get_args(hints[field.name]) if get_origin(hints[field.name]) is Annotated else [hints[field.name]]
        )
        arg = next((note for note in notes if isinstance(note, Arg)), Arg())
        value = field.default if default is None else getattr(default, field.name)
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            value = kind() if value is dataclasses.MISSING else value
            nested += arguments(kind, value, (*path, field.name), arg.group or field.name)
            continue
        if get_origin(kind) in (Union, UnionType):  # X | None
            kind = next(each for each in get_args(kind) if each is not type(None))
        found.append(Argument((*path, field.name), command, kind, value, arg, arg.group or group))
    return found + nested


def read_words(known: Sequence[Argument], words: Sequence[str], *, partial: bool = False) -> dict[tuple[str, ...], Any]:
    """The values that the command line `words` gives, by `Argument.path`; `partial=True` passes over what is unknown.

    Raises UserError for an unknown flag, a missing or a surplus argument, or a value that its type does not have.
    """
    flags = {flag: argument for argument in known if not argument.arg.positional for flag in _spellings(argument)}
    given, loose = _split(flags, words)
    unknown = [flag for flag, _ in given if flag not in flags]
    if unknown and not partial:
        raise UserError("; ".join(_unknown(flag, flags) for flag in dict.fromkeys(unknown)))
    values: dict[tuple[str, ...], Any] = {}
    for flag, following in given:
        if flag in flags:
            _take(flags[flag], following, values)
    for argument in known:
        if argument.arg.positional:
            count = len(loose) if argument.any_number else 1
            if loose[:count]:
                _take(argument, loose[:count], values)
            loose = loose[count:]
    missing = [argument.flag for argument in known if argument.required and argument.path not in values]
    if partial:
        return values
    if missing:
        raise UserError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    if loose:
        raise UserError(f"unexpected argument{'s' * (len(loose) > 1)} {' '.join(map(repr, loose))}")
    return values


def build(
    command: type[T], values: Mapping[tuple[str, ...], Any], default: T | None = None, path: tuple[str, ...] = ()
) -> T:
    """The dataclass `command` with `values`, by path, in place of its defaults. Raises what its constructors raise."""
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(command):  # type: ignore[arg-type]
        here = (*path, field.name)
        if here in values:
            chosen[field.name] = values[here]
        elif any(key[: len(here)] == here for key in values):
            inner = default and getattr(default, field.name)
            kind = type(inner) if inner else field.default_factory
            chosen[field.name] = build(kind, values, inner, here)  # type: ignore[arg-type]
        elif default is not None:
            chosen[field.name] = getattr(default, field.name)
    return command(**chosen)


def _spellings(argument: Argument) -> Iterable[str]:
    return (argument.arg.short, argument.flag) if argument.arg.short else (argument.flag,)


def _split(flags: Mapping[str, Argument], words: Sequence[str]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Each flag of `words` with the words that are its own, and the words of no flag."""
    given: list[tuple[str, list[str]]] = []
    loose: list[str] = []
    room: float = 0  # how many more words the last flag takes
    for place, word in enumerate(words):
        if word == "--":
            return given, loose + list(words[place + 1 :])
        if re.match(r"-[^\d.]", word):
            flag, equals, value = word.partition("=")
            flag = flag.replace("_", "-") if flag.startswith("--") else flag
            given.append((flag, [value] if equals else []))
            argument = flags.get(flag)
            room = 0 if argument is None else math.inf if argument.any_number else len(argument.kinds)
            room -= bool(equals)
        elif room > 0:
            given[-1][1].append(word)
            room -= 1
        else:
            loose.append(word)
    return given, loose


def _take(argument: Argument, words: Sequence[str], values: dict[tuple[str, ...], Any]) -> None:
    """Put the value that `words` are into `values`; that of a flag which may be repeated is added to those before."""
    width = len(argument.kinds)
    if argument.any_number and words:
        values[argument.path] = values.get(argument.path, ()) + tuple(argument.value([word]) for word in words)
        return
    if len(words) != width:
        needs = ("no value", "a value", *(f"{count} values" for count in range(2, width + 1)))[width]
        raise UserError(
            f"{argument.flag} takes {needs}{f', as {argument.arg.metavar}' if argument.arg.metavar else ''}"
        )
    value = argument.value(words)
    values[argument.path] = (*values.get(argument.path, ()), value) if argument.repeatable else value


def _typed(word: str, kind: Any, flag: str) -> Any:
    if get_origin(kind) is Literal:
        if word not in get_args(kind):
            raise InvalidValue(flag, word, choices=get_args(kind))
        return word
    try:
        if (kind is Path and not word) or (kind is float and not math.isfinite(float(word))):
            raise ValueError
        return kind(word)
    except ValueError:
        raise InvalidValue(flag, word, EXPECTED[kind]) from None


def _unknown(flag: str, flags: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(flag, flags, n=1)
    return f"unknown flag {flag}" + (f"; did you mean {nearest[0]}?" if nearest else "")
