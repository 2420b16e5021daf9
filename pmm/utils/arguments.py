"""Command lines from dataclasses, by argparse: a field is a flag, its default the flag's, its docstring the help."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pmm.utils.errors import InvalidValue, UserError

T = TypeVar("T")

NEGATIVE = re.compile(r"-(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
EXPECTED = {int: "a whole number", float: "a number", Path: "a path"}


@dataclass(frozen=True)
class Arg:
    """Annotation of a field: what the command line needs to know beyond its name, its type and its docstring.

    Args:
        metavar: what help calls the value, as DIR.
        flag: as --config (default: the field's name).
        short: a second flag, as -o.
        positional: without a flag, as `metavar` in help and messages.
        help: the help, where the field has no docstring.
        group: where help lists it (default: options, and the field's name for a dataclass in the dataclass).
        least, most: bounds of a number.
    """

    metavar: str = ""
    flag: str = ""
    short: str = ""
    positional: bool = False
    help: str = ""
    group: str = ""
    least: float | None = None
    most: float | None = None


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
        return self.arg.metavar if self.arg.positional else self.arg.flag or "--" + self.path[-1].replace("_", "-")

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


def arguments(command: type, default: Any = None, path: tuple[str, ...] = (), group: str = "options") -> list[Argument]:
    """The arguments of the dataclass `command`; a `default`, one of its instances, goes before the fields' own."""
    hints = get_type_hints(command, include_extras=True)
    flat, nested = [], []
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
        flat.append(Argument((*path, field.name), command, kind, value, arg, arg.group or group))
    return flat + nested


def parse_words(
    known: Sequence[Argument], words: Sequence[str], *, partial: bool = False
) -> dict[tuple[str, ...], Any]:
    """The values that the command line `words` gives, by `Argument.path`; `partial=True` passes over what is unknown.

    Raises UserError for an unknown flag, a missing or a surplus argument, or a value that its type does not have.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    by_flag = {argument.flag: argument for argument in known}
    for argument in known:
        parser.add_argument(*_names(argument), **_settings(argument))
    dashed = [
        # argparse takes -1e-3 for a flag, but not what begins with a space
        f" {word}" if NEGATIVE.fullmatch(word) else re.sub(r"^--[^=]+", lambda flag: flag[0].replace("_", "-"), word)
        for word in words
    ]
    try:
        chosen, surplus = (parser.parse_known_args if partial else parser.parse_known_intermixed_args)(dashed)
    except argparse.ArgumentError as error:  # a wrong number of values: the rest is left to `_typed`
        argument = next(by_flag[name] for name in str(error.argument_name).split("/") if name in by_flag)
        needs = ("no value", "a value", *(f"{count} values" for count in range(2, 9)))[len(argument.kinds)]
        shape = f": {argument.arg.metavar}" if argument.arg.metavar else ""
        raise UserError(f"{argument.flag} takes {needs}{shape}") from None
    # None or [], and not the default of `Argument`: those that are not there
    values = {by_flag[flag].path: _tuples(value) for flag, value in vars(chosen).items() if value not in (None, [])}
    if partial:
        return values
    flags = surplus[: surplus.index("--")] if "--" in surplus else surplus
    surplus = [word for word in surplus if word != "--"]
    if unknown := [word.partition("=")[0] for word in flags if word[:1] == "-"]:
        several = any(argument.arg.positional and argument.any_number for argument in known)
        dashes = several and any(word[:2] != "--" for word in unknown)
        hint = "write -- before names that begin with -" if dashes else ""
        raise UserError("; ".join(_unknown(flag, by_flag) for flag in dict.fromkeys(unknown)), hint=hint)
    if missing := [argument.flag for argument in known if argument.required and argument.path not in values]:
        raise UserError(f"missing: {', '.join(missing)}")
    if surplus:
        raise UserError(f"unexpected argument{'s' * (len(surplus) > 1)} {' '.join(map(repr, surplus))}")
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


def _names(argument: Argument) -> list[str]:
    return [argument.flag] if argument.arg.positional else [*filter(None, [argument.arg.short]), argument.flag]


def _settings(argument: Argument) -> dict[str, Any]:
    """What argparse is to do with an argument; whether it is missing is not left to it."""
    if not argument.kinds:
        action = "store_true" if argument.flag.startswith("--no-") else argparse.BooleanOptionalAction
        return {"dest": argument.flag, "action": action, "default": None}
    settings: dict[str, Any] = {"type": functools.partial(_typed, argument)}
    if not argument.arg.positional:
        settings["dest"] = argument.flag
    if argument.any_number:
        return settings | {"nargs": "*" if argument.arg.positional else "+", "action": "extend"}
    if len(argument.kinds) > 1:
        settings["nargs"] = len(argument.kinds)
    elif argument.arg.positional:
        settings["nargs"] = "?"
    return settings | ({"action": "append"} if argument.repeatable else {})


def _typed(argument: Argument, word: str) -> Any:
    """A word of the value. Raises InvalidValue."""
    kind, word = argument.kinds[0], re.sub(f"^ (?={NEGATIVE.pattern}$)", "", word)
    if get_origin(kind) is Literal:
        if word not in get_args(kind):
            raise InvalidValue(argument.flag, word, choices=get_args(kind))
        return word
    try:
        if (kind is Path and not word) or (kind is float and not math.isfinite(float(word))):
            raise ValueError
        value = kind(word)
    except ValueError:
        raise InvalidValue(argument.flag, word, EXPECTED[kind]) from None
    least, most = argument.arg.least, argument.arg.most
    if (least is not None and value < least) or (most is not None and value > most):
        raise InvalidValue(argument.flag, value, f"{least:g} or more" if most is None else f"{least:g} to {most:g}")
    return value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _unknown(flag: str, flags: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(flag, flags, n=1)
    return f"unknown flag {flag}" + (f"; did you mean {nearest[0]}?" if nearest else "")
