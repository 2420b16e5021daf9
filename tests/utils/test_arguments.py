import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from pmm.utils.arguments import Arg, arguments, build, parse_words
from pmm.utils.errors import InvalidValue, UserError
from tests.refusals import refuses


@dataclass(frozen=True, kw_only=True)
class Inner:
    learning_rate: float = 0.1
    block: tuple[int, int] = (3, 2)
    amp: Literal["off", "bf16"] = "off"


@dataclass(frozen=True, kw_only=True)
class Outer:
    model: Annotated[Path, Arg("MODEL", positional=True)]
    more: Annotated[tuple[Path, ...], Arg("MORE", positional=True)] = ()
    inner: Inner = field(default_factory=Inner)
    out: Annotated[Path, Arg(short="-o")]
    epochs: int = 3
    resume: bool = False
    no_header: bool = False
    limit: float | None = None
    runs: tuple[str, ...] = ()
    batch: tuple[tuple[int, int], ...] = ()


def parse(*words, command=Outer, default=None, **options):
    return build(command, parse_words(arguments(command, default), words, **options), default)


DEFAULT = Outer(model=Path("m"), out=Path("o"))


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ((), {}),
        (("--epochs", "5"), {"epochs": 5}),
        (("--epochs=5", "--epochs", "-6"), {"epochs": -6}),
        (("--resume", "--no-header"), {"resume": True, "no_header": True}),
        (("--limit", "-.5"), {"limit": -0.5}),
        (("--limit", "-1e-3", "--runs", "-2", "a b"), {"limit": -1e-3, "runs": ("-2", "a b")}),
        (("--block", "1", "2"), {"inner": Inner(block=(1, 2))}),
        (("--learning_rate", "1e-3", "--amp", "bf16"), {"inner": Inner(learning_rate=1e-3, amp="bf16")}),
        (("--batch", "1", "8", "--batch", "2", "4"), {"batch": ((1, 8), (2, 4))}),
        (("--runs", "a", "b", "--epochs", "1", "--runs=c"), {"runs": ("a", "b", "c"), "epochs": 1}),
        (("x", "--epochs", "1", "y"), {"more": (Path("x"), Path("y")), "epochs": 1}),
        (("--", "--epochs"), {"more": (Path("--epochs"),)}),
    ],
)
def test_words_are_typed_values_in_any_order(words, changes):
    assert parse("m", "-o", "o", *words) == dataclasses.replace(DEFAULT, **changes)


def test_defaults_are_those_of_the_given_value():
    default = dataclasses.replace(DEFAULT, inner=Inner(learning_rate=7.0), epochs=9)
    assert parse("--block", "1", "1", default=default) == dataclasses.replace(
        default, inner=Inner(learning_rate=7.0, block=(1, 1))
    )


def test_what_a_default_has_on_is_switched_off():
    assert not parse("--no-resume", default=dataclasses.replace(DEFAULT, resume=True)).resume
    assert parse("--no-resume", "--resume", default=DEFAULT).resume


def test_partial_passes_over_what_is_not_there():
    values = parse_words(arguments(Outer), ["--other", "1", "--epochs", "5", "--another=x"], partial=True)
    assert values[("epochs",)] == 5


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (("--epoks", "5"), ("unknown flag --epoks", "--epochs?")),
        (("--epoks", "5", "--zzz"), ("--epoks", "--epochs?", "--zzz")),
        (("-q",), ("unknown flag -q",)),
        (("--epochs",), ("--epochs takes a value",)),
        (("--epochs", "--resume"), ("--epochs takes a value",)),
        (("--block", "1"), ("--block takes 2 values",)),
        (("--batch", "1"), ("--batch takes 2 values",)),
        (("--runs",), ("--runs takes a value",)),
        (("--resume=yes",), ("--resume takes no value",)),
    ],
)
def test_words_that_do_not_fit_are_refused(words, facts):
    with refuses(UserError, *facts):
        parse("m", "-o", "o", *words)


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        ((), ("MODEL", "--out")),
        (("m",), ("--out",)),
        (("-o", "o"), ("MODEL",)),
    ],
)
def test_what_is_missing_is_named(words, facts):
    with refuses(UserError, *facts, "missing") as caught:
        parse(*words)
    assert ("MODEL" in str(caught.value)) == ("MODEL" in facts)


@pytest.mark.parametrize("words", [("x",), ("--", "--amp")])
def test_a_surplus_argument_is_named(words):
    with refuses(UserError, f"'{words[-1]}'", problem="unexpected argument"):
        parse(*words, command=Inner)


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (("--epochs", "many"), ("--epochs is 'many'", "whole number")),
        (("--epochs", "1.5"), ("--epochs is '1.5'", "whole number")),
        (("--limit", "much"), ("--limit is 'much'", "a number")),
        (("--limit", "nan"), ("--limit is 'nan'", "a number")),
        (("--block", "1", "x"), ("--block is 'x'", "whole number")),
        (("--amp", "bf61"), ("--amp is 'bf61'", "off or bf16", "bf16?")),
        (("--out", ""), ("--out is ''", "a path")),
    ],
)
def test_values_of_another_type_are_refused(words, facts):
    with refuses(InvalidValue, *facts):
        parse("m", "-o", "o", *words)
