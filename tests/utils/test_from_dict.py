"""Plain values become the dataclass they describe, or an error that names the field."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from pmm.utils.from_dict import from_dict


@dataclass(frozen=True)
class Inner:
    size: int = 3
    ratio: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    pair: tuple[int, float] = (1, 2.0)
    many: tuple[Inner, ...] = ()
    table: dict[str, int] = field(default_factory=dict)
    kind: Literal["a", "b"] = "a"
    maybe: Inner | None = None
    free: Any = None


def test_every_kind_of_field_is_built():
    values = {
        "name": "x",
        "inner": {"size": 1, "ratio": 2},
        "pair": [3, 4],
        "many": [{}, {"size": 5}],
        "table": {"k": 6},
        "kind": "b",
        "maybe": {},
        "free": [1],
    }
    built = from_dict(Outer, values)
    expected = Outer(
        name="x", inner=Inner(1, 2.0), pair=(3, 4.0), many=(Inner(), Inner(5)), table={"k": 6}, kind="b",
        maybe=Inner(), free=[1],
    )  # fmt: skip
    assert built == expected
    assert type(built.inner.ratio) is float
    assert from_dict(Outer, {"name": "x", "maybe": None}) == Outer(name="x"), "what has a default may be missing"


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (3, "t is 3; expected a table of fields"),
        ({}, "no field t.name"),
        ({"name": "x", "inner": {"sise": 1}}, "unknown field t.inner.sise; known: size, ratio"),
        ({"name": 1}, "t.name is 1; expected str"),
        ({"name": "x", "inner": None}, "t.inner is None; expected a table of fields"),
        ({"name": "x", "inner": {"size": True}}, "t.inner.size is True; expected int"),
        ({"name": "x", "inner": {"ratio": float("inf")}}, "t.inner.ratio is inf; expected a finite float"),
        ({"name": "x", "pair": [1]}, r"t.pair is \[1\]; expected 2 values"),
        ({"name": "x", "pair": "12"}, "t.pair is '12'; expected tuple"),
        ({"name": "x", "table": {"k": "v"}}, "t.table.k is 'v'; expected int"),
        ({"name": "x", "kind": "c"}, "t.kind is 'c'; expected one of a, b"),
        ({"name": "x" * 99, "kind": ["y" * 99]}, "t.kind is .{60}; expected one of a, b"),
    ],
)
def test_the_field_that_is_wrong_is_named(values, problem):
    with pytest.raises(ValueError, match=f"^{problem}$"):
        from_dict(Outer, values, "t")
