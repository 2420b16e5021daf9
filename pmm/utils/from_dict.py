"""Parsed JSON -> frozen dataclasses, every type checked: what comes from outside is not trusted to be what it says."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def built(cls: type[T], values: Any, where: str = "") -> T:
    """The dataclass `cls` from a table of plain values.

    Raises ValueError naming the field that is missing, unknown or of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'it'} is no table")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(map(str, set(values) - set(fields)))
    if unknown:
        raise ValueError(f"unknown field {where}{unknown[0]}")
    optional = {name for name, f in fields.items() if f.default is not dataclasses.MISSING}
    missing = sorted(set(fields) - set(values) - optional)
    if missing:
        raise ValueError(f"no field {where}{missing[0]}")
    hints = get_type_hints(cls)
    return cls(**{name: _value(hints[name], value, where + name) for name, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return built(hint, value, where + ".")  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):  # of one type and None, here
        return None if value is None else _value(next(arg for arg in args if arg is not type(None)), value, where)
    if origin is tuple and isinstance(value, list):
        inside = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(inside) == len(value):
            return tuple(_value(*pair, where) for pair in zip(inside, value, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {key: _value(args[1], each, f"{where}.{key}") for key, each in value.items()}
    elif hint is Any or (origin is Literal and type(value) is str and value in args):
        return value
    elif hint is float:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    elif type(value) is hint:
        return value
    expected = f"one of {', '.join(map(str, args))}" if origin is Literal else getattr(hint, "__name__", str(hint))
    raise ValueError(f"{where} is {str(value)[:60]!r}; expected {expected}")
