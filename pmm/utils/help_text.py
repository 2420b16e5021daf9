"""What `--help` prints: the usage and the arguments of a command, as wide as the terminal is. Loads no torch."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pmm.utils.arguments import Argument

COLUMN = 26
"""Where the texts of the arguments begin."""
USAGE = "usage: "
WIDEST = 120
"""Longer lines are hard to read."""
METAVARS = {int: "N", float: "X", Path: "PATH"}


def help_text(arguments: Sequence[Argument], *, prog: str, description: str, width: int) -> str:
    """The help of a command, in lines of at most `width` characters.

    Args:
        description: paragraphs, with an empty line between; lines that begin with `pmm` or `python` are the usage.
    """
    width = max(40, min(width, WIDEST))
    examples, texts = split_description(description)
    usages = [_usage(line, prog, width) for part in examples for line in part.splitlines()] or [f"{prog} [options]"]
    blocks = [USAGE + f"\n{' ' * len(USAGE)}".join(usages)]
    blocks += ["\n".join(_lines(" ".join(text.split()), width)) for text in texts]
    blocks += [
        "\n".join([f"{title}:", *(_entry(each, width) for each in group)])
        for title, group in by_group(arguments).items()
    ]
    return "\n\n".join(blocks)


def split_description(description: str) -> tuple[list[str], list[str]]:
    """The paragraphs of a docstring that are examples of use, and the others."""
    paragraphs = [part.strip() for part in inspect.cleandoc(description).split("\n\n") if part.strip()]
    examples = [part for part in paragraphs if re.match(r"(pmm|python|make|PYTHONPATH=\.) ", part)]
    return examples, [part for part in paragraphs if part not in examples]


def by_group(arguments: Sequence[Argument]) -> dict[str, list[Argument]]:
    """Title -> its arguments, those without a flag first, then the options, then the other groups; none is empty."""
    groups: dict[str, list[Argument]] = {"arguments": [], "options": []}
    for argument in arguments:
        groups.setdefault("arguments" if argument.arg.positional else argument.group, []).append(argument)
    return {title: group for title, group in groups.items() if group}


def _usage(line: str, prog: str, width: int) -> str:
    """An example of use in a docstring, with the name that the command was called by; a flag and its value stay on one
    line."""
    line = re.sub(r"^pmm( [a-z]+)+", prog, line)
    glued = re.sub(r"\[[^]]*\]|--?[a-z-]+ [^-\s[]\S*", lambda match: match[0].replace(" ", "\0"), line)
    indent = len(USAGE) + 2
    return f"\n{' ' * indent}".join(_lines(glued, width - indent)).replace("\0", " ")


def _entry(argument: Argument, width: int) -> str:
    """An argument: how it is given, and beside it, or below if that is long, its help."""
    flags = ", ".join(flag for flag in (argument.arg.short, argument.flag) if flag)
    head = "  " + " ".join(part for part in (flags, "" if argument.arg.positional else metavar(argument)) if part)
    lines = _lines(explanation(argument), width - COLUMN)
    if len(head) <= COLUMN - 2:
        head = f"{head:<{COLUMN}}{lines.pop(0)}"
    return "\n".join([head, *(" " * COLUMN + line for line in lines)])


def explanation(argument: Argument) -> str:
    """The docstring below the field, re-flowed, and the default if it says something and the text does not."""
    text = " ".join((argument.arg.help or _docstrings(argument.owner)[argument.path[-1]]).split())
    value = argument.default
    if argument.required:
        return text if argument.arg.positional else f"{text.rstrip('.')} (required)."
    if isinstance(value, bool) or value in (None, "", ()) or "(default: " in text:
        return text
    return f"{text.rstrip('.')} (default: {_shown(value)})."


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def metavar(argument: Argument) -> str:
    """What stands for the value of a flag, as DIR or {fp32,fp16}; empty for a switch."""
    if argument.arg.metavar:
        return argument.arg.metavar
    words = [
        f"{{{','.join(get_args(kind))}}}"
        if get_origin(kind) is Literal
        else METAVARS.get(kind, argument.path[-1].rpartition("_")[2].upper())
        for kind in argument.kinds
    ]
    return " ".join(words) + " ..." * argument.any_number


@functools.cache
def _docstrings(owner: type) -> dict[str, str]:
    """Field -> the docstring below it, of the dataclass `owner` and those that it inherits from."""
    texts: dict[str, str] = {}
    for base in reversed([each for each in owner.__mro__ if dataclasses.is_dataclass(each)]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                texts[field.target.id] = ast.literal_eval(text.value)
    return texts


def _lines(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(20, width), break_on_hyphens=False, break_long_words=False) or [""]
