"""Protobuf's text format, as configuration files use it: written here, so that no protobuf is needed to export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bare:
    """A word of the configuration language, written without quotes."""

    word: str


Value = str | int | Bare | Mapping[str, "Value"] | Sequence["Value"]


def text_format(message: Mapping[str, Value], indent: str = "") -> str:
    """Protobuf text format, one field per line; a list is a repeated field."""
    lines = []
    for key, value in message.items():
        for each in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
            if isinstance(each, Mapping):
                lines.append(f"{indent}{key} {{\n{text_format(each, indent + '  ')}{indent}}}\n")
            elif isinstance(each, Bare):
                lines.append(f"{indent}{key}: {each.word}\n")
            else:
                lines.append(f"{indent}{key}: {_quoted(each) if isinstance(each, str) else each}\n")
    return "".join(lines)


def _quoted(text: str) -> str:
    """A string literal in printable ASCII: every other byte of the UTF-8 text as three octal digits."""
    # "replace": JSON can hold half a surrogate pair, protobuf strings cannot
    content = text.encode("utf-8", "replace")
    return '"' + "".join(chr(x) if 32 <= x < 127 and x not in b'"\\' else f"\\{x:03o}" for x in content) + '"'
