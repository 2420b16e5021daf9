"""Plain values of JSON -> frozen dataclasses, every type checked."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pmm.utils.errors import InvalidValue

T = TypeVar("T")


def from_dict(cls: type[T], values: Any, where: str = "") -> T:
    """The dataclass `cls` from a table of plain values, as JSON has them; what has a default may be missing.

    Whole numbers pass for floats, lists for tuples. `where` is the name of the table in errors.

    Raises ValueError naming the field that is missing, unknown (and the known ones) or of another type, and
    InvalidValue with the path of a field whose value the dataclass refuses.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'it'} is {_short(values)}; expected a table of fields")
    hints, fields = get_type_hints(cls), dataclasses.fields(cls)  # type: ignore[arg-type]
    if unknown := [_path(where, key) for key in values if key not in {field.name for field in fields}]:
        raise ValueError(f"unknown field {', '.join(sorted(unknown))}; known: {', '.join(f.name for f in fields)}")
    arguments = {}
    for field in fields:
        if field.name in values:
            arguments[field.name] = _value(hints[field.name], values[field.name], _path(where, field.name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"no field {_path(where, field.name)}")
    try:
        return cls(**arguments)
    except InvalidValue as error:
        if error.name not in {field.name for field in fields}:
            raise
        name = _path(where, error.name)
        raise InvalidValue(name, error.value, error.expected, choices=error.choices, hint=error.hint) from error


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    expected = getattr(hint, "__name__", str(hint))
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):  # of one type and None, here
        return None if value is None else _value(next(arg for arg in args if arg is not type(None)), value, where)
    if origin is tuple and isinstance(value, list | tuple):
        inside = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(inside) == len(value):
            return tuple(_value(*pair, where) for pair in zip(inside, value, strict=True))
        expected = f"{len(inside)} values"
    elif origin is dict and isinstance(value, Mapping):
        return {key: _value(args[1], each, _path(where, key)) for key, each in value.items()}
    elif origin is Literal:
        if type(value) is str and value in args:
            return value
        expected = f"one of {', '.join(map(str, args))}"
    elif hint is float:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
        expected = "a finite float"
    elif hint is Any or type(value) is hint:
        return value
    raise ValueError(f"{where} is {_short(value)}; expected {expected}")


def _path(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _short(value: Any) -> str:
    return repr(value)[:60]
