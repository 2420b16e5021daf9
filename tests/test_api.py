"""What `import pmm` gives: each name is typed, documented, and its example runs as it stands."""

import doctest
import inspect
import os
import shutil

import numpy as np
import pytest

import pmm
from tests.conftest import ROOT, run_python
from tests.refusals import refuses

FUNCTIONS = [name for name in pmm.__all__ if inspect.isfunction(getattr(pmm, name))]


@pytest.fixture(scope="module")
def folder(trained, exported, people, tmp_path_factory):
    """What the examples read: a checkpoint, its ONNX file, a data set, a folder of crops and a crop to look for."""
    home = tmp_path_factory.mktemp("api")
    shutil.copy(trained, home / "best.pth")
    for ending in ("", ".json", ".selftest.json", ".selftest.npz"):
        shutil.copy(f"{exported}{ending}", home / f"best.onnx{ending}")
    (home / "market").symlink_to(people)
    (home / "crops").mkdir()
    for file in sorted((people / "bounding_box_test").glob("*.jpg"))[:12]:
        shutil.copy(file, home / "crops")
    shutil.copy(min((people / "query").glob("*.jpg")), home / "query.jpg")
    return home


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_of_a_function_runs(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    function = getattr(pmm, name)
    (example,) = doctest.DocTestFinder(recurse=False).find(function, name, globs={"pmm": pmm, "np": np})
    assert example.examples, f"pmm.{name} has no example"
    assert any(f"pmm.{name}(" in line.source for line in example.examples)
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(example)
    assert not result.failed


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_and_result_is_typed(name):
    signature = inspect.signature(getattr(pmm, name))
    assert signature.return_annotation is not signature.empty
    assert all(each.annotation is not each.empty for each in signature.parameters.values())


def test_the_names_for_type_checkers_are_those_that_are_there():
    source = (ROOT / "pmm" / "__init__.py").read_text()
    typed = {line.split(" as ")[1] for line in source.splitlines() if line.startswith("    from ")}
    assert typed == set(pmm._EXPORTS) == set(pmm.__all__) - {"__version__"}
    assert set(pmm.__all__) <= set(dir(pmm))
    assert all(getattr(pmm, name) is not None for name in pmm.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'.*open_runner"):
        _ = pmm.nothing


def test_a_name_loads_no_more_than_it_needs():
    script = "import sys, pmm; pmm.{}; print({{'torch', 'onnx', 'onnxruntime', 'tensorrt'}} & set(sys.modules))"
    for name in ("evaluate", "evaluate_ranking", "open_runner", "search", "build_engine"):
        assert run_python("-c", script.format(name), **os.environ).stdout.strip() == "set()", name


def test_no_function_replaces_what_it_reads_or_what_is_something_else(folder, tmp_path):
    for name in ("best.pth", "best.onnx"):
        shutil.copy(folder / name, tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    checkpoint, onnx = tmp_path / "best.pth", tmp_path / "best.onnx"
    text = tmp_path / "x.txt"
    for call, path, fact in (
        (lambda: pmm.export_onnx(checkpoint, checkpoint), checkpoint, "file to read"),
        (lambda: pmm.export_onnx(checkpoint, text), text, ".onnx"),
        (lambda: pmm.build_engine(checkpoint, checkpoint), checkpoint, "file to read"),
        (lambda: pmm.build_engine(onnx, onnx), onnx, "file to read"),
        (lambda: pmm.build_engine(onnx, text), text, ".plan"),
        (lambda: pmm.embed(onnx, folder / "crops", checkpoint), checkpoint, "it is a file"),
        (lambda: pmm.embed(onnx, folder / "crops", folder), folder, "it holds"),
    ):
        with refuses(pmm.CannotWrite, fact, path=path):
            call()
    with refuses(pmm.ConflictingOptions, "--no-verify", "--verify-root"):
        pmm.VerifyOptions(no_verify=True, verify_root="x")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
