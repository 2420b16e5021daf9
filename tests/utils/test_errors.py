"""Errors are kinds with facts, the line is made of these, and both survive the way between processes."""

import doctest
import pickle
from pathlib import Path

import pytest

from pmm.utils import errors
from pmm.utils.errors import (
    BackendUnavailable,
    CannotWrite,
    ConflictingOptions,
    InvalidFile,
    InvalidInput,
    InvalidValue,
    MissingLibrary,
    OutOfMemory,
    UserError,
)

EACH = [
    UserError("it failed", hint="run pmm info"),
    InvalidValue("--batch-size", 0, "1 or more"),
    InvalidValue("backend", "onx", choices=["onnx", "torch"]),
    ConflictingOptions("--tf32 changes nothing for fp16", "--tf32", "--precision", hint="leave it out"),
    InvalidFile("it is truncated", path="a.onnx", expected="an ONNX file", hint="export it again"),
    CannotWrite("it is a folder", path="out"),
    InvalidInput("crop 3 is empty", index=3, expected="pixels"),
    OutOfMemory("64 images do not fit", hint="lower --batch-size"),
    BackendUnavailable("no NVIDIA GPU is visible"),
    MissingLibrary("openvino", "openvino is not installed", hint="pip install openvino"),
]


def test_the_examples():
    assert doctest.testmod(errors).attempted >= 3
    assert not doctest.testmod(errors).failed


@pytest.mark.parametrize("error", EACH, ids=lambda error: type(error).__name__)
def test_kind_line_and_facts_go_from_one_process_to_another(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), vars(again), again.args) == (str(error), vars(error), error.args)
    assert "\n" not in str(error)


def test_options_have_the_names_of_the_caller():
    error = ConflictingOptions("{a} takes {b}, not {c}", "a", "b", expected="{b}", hint="leave {a} out")
    assert str(error) == "a takes b, not {c}; expected b; leave a out"
    flags = error.renamed({"a": "--a", "b": "--be", "c": "--c"})
    assert (str(flags), flags.options) == ("--a takes --be, not {c}; expected --be; leave --a out", ("--a", "--be"))


def test_a_path_or_value_with_a_line_break_stays_one_line():
    error = InvalidFile("it is\x1b[2J empty", path="a\nb\udcff.jpg")
    assert (str(error), error.path) == ("a\\nb\\xff.jpg: it is\\x1b[2J empty", Path("a\nb\udcff.jpg"))
    assert str(InvalidValue("--out", Path("a\nb"), "a name")) == "--out is a\\nb; expected a name"


def test_facts_that_are_completed_later_are_shown():
    error = InvalidInput("3 images", index=2)
    error.problem, error.path = "4 images", Path("a.plan")
    assert repr(error) == "InvalidInput('a.plan: 4 images')"


@pytest.mark.parametrize("error", EACH, ids=lambda error: type(error).__name__)
def test_the_line_holds_every_fact(error):
    for fact in (error.path, error.problem, error.expected, error.hint):
        assert str(fact or "") in str(error)
