"""The page of errors: what each message begins with, of which kind it is, and what to do, read from the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pmm.utils import errors

PACKAGE = Path(errors.__file__).parents[1]
KINDS = (
    "InvalidFile",
    "InvalidInput",
    "CannotWrite",
    "BackendUnavailable",
    "ConflictingOptions",
    "OutOfMemory",
    "UserError",
)
"""Whose first argument is what was wrong; InvalidValue's messages all have one form."""
GAP = "…"
"""In place of what differs from case to case."""
OPTION = re.compile(r"\{(\w+|…)\}")
"""An option in a text of ConflictingOptions, which a command line shows as its flag."""
FEWEST = 12
"""Letters that a message has at least; a shorter one says nothing here."""


@dataclass(frozen=True)
class Message:
    """A message as the sources have it."""

    text: str
    hint: str
    where: str
    """The package that raises it."""


def errors_page() -> str:
    """Markdown of the whole page."""
    lines = [HEAD]
    found = sorted(set(messages()), key=lambda message: (message.where, message.text.lower()))
    for where in dict.fromkeys(message.where for message in found):
        lines += [f"## {_title(where)}", "", "| the message | what to do |", "|---|---|"]
        lines += [f"| {_cell(message.text)} | {_cell(message.hint)} |" for message in found if message.where == where]
        lines.append("")
    return "\n".join(lines)


HEAD = f"""# Error messages

Every message says what was wrong, what was expected, and what to do next; on the command line it is one line on
stderr, in Python [an exception of a kind](../api.md#errors) that has the facts as attributes. Search this page for the
first words of yours. {GAP} stands for what differs from case to case: a file, a number, a name.

A value that a flag does not take reads `--flag is VALUE; expected ...`, of the kind `InvalidValue`, and is not listed.
"""


def messages() -> Iterator[Message]:
    """Those of the package's sources."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        parts = path.relative_to(PACKAGE).parts
        where = parts[0] if len(parts) > 1 else ""
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                yield from _messages_of(function, where)


def _messages_of(function: ast.FunctionDef, where: str) -> Iterator[Message]:
    """Those made in `function` itself."""
    texts: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            for name, value in _pairs(node.targets[0], node.value):
                texts.setdefault(name, []).append(value)
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS and node.args:
            hints = [keyword.value for keyword in node.keywords if keyword.arg == "hint"]
            hint = _text(hints[0], texts) if hints else ""
            text = _text(node.args[0], texts)
            if node.func.id == "ConflictingOptions":
                text, hint = (OPTION.sub(_as_flag, each) for each in (text, hint))
            if len(text.replace(GAP, "").strip()) >= FEWEST:
                yield Message(text, hint if hint.strip(f" {GAP};") else "", where)


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        for one, its in zip(target.elts, value.elts, strict=True):
            yield from _pairs(one, its)


def _text(node: ast.expr, texts: dict[str, list[ast.expr]]) -> str:
    """The text of an expression, as far as the sources tell it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, texts) for part in node.values).replace(GAP * 2, GAP)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, texts) + _text(node.right, texts)
    if isinstance(node, ast.Name) and len(texts.get(node.id, [])) == 1:
        (value,) = texts[node.id]
        return _text(value, {name: found for name, found in texts.items() if name != node.id})
    return GAP


def _as_flag(option: re.Match[str]) -> str:
    return GAP if option[1] == GAP else f"--{option[1].replace('_', '-')}"


def _title(where: str) -> str:
    return {"": "Everywhere"}.get(where, where.replace("_", " ").capitalize())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
