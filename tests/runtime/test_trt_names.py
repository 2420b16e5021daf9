"""Every name of TensorRT that the code touches exists in all four versions, or its use is guarded by hasattr."""

import ast
import json

import pytest

from tests.conftest import ROOT
from tests.runtime.standin import LISTS

APIS = {name: json.loads(path.read_text())["api"] for name, path in LISTS.items()}
FILES = [*sorted((ROOT / "pmm" / "runtime").glob("*.py")), *sorted((ROOT / "pmm" / "export").glob("*.py"))]


def unguarded(source: str) -> list[str]:
    """Chains `trt.X.Y` (also `self.trt.X`) that some version lacks, outside of any function or `if` with
    `hasattr(..., "name that is missing")`; in a function for TensorRT-RTX, those that its versions lack."""
    found = []

    def visit(node: ast.AST, guarded: frozenset[str], versions: str = "") -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.If | ast.IfExp):
            guarded |= _guards(node)
        if isinstance(node, ast.FunctionDef) and "_rtx_" in node.name:
            versions = "tensorrt_rtx"
        chain = _chain(node)
        if chain and not (lacking := _lacking(chain, versions)) <= guarded:
            found.append(f"trt.{'.'.join(chain)} (line {node.lineno}): {sorted(lacking)}")
        if not chain:  # the inner part of a chain is the same chain, shorter
            for child in ast.iter_child_nodes(node):
                visit(child, guarded, versions)

    visit(ast.parse(source), frozenset())
    return found


def _guards(node: ast.AST) -> frozenset[str]:
    calls = (call for call in ast.walk(node) if isinstance(call, ast.Call))
    asked = [call.args[1] for call in calls if getattr(call.func, "id", "") == "hasattr" and len(call.args) == 2]
    return frozenset(arg.value for arg in asked if isinstance(arg, ast.Constant))


def _chain(node: ast.AST) -> list[str]:
    names = []
    while isinstance(node, ast.Attribute) and node.attr not in ("trt", "_trt"):
        names.insert(0, node.attr)
        node = node.value
    is_module = getattr(node, "id", "") == "trt" or getattr(node, "attr", "") in ("trt", "_trt")
    return names if is_module else []


def _lacking(chain: list[str], versions: str) -> set[str]:
    """The names of the chain that some version, of those whose name begins with `versions`, does not have. Deeper than
    two the lists do not reach."""
    lacking = set()
    for api in (api for name, api in APIS.items() if name.startswith(versions)):
        if chain[0].startswith("__"):
            continue
        if chain[0] not in api:
            lacking.add(chain[0])
        elif len(chain) > 1 and not chain[1].startswith("__") and chain[1] not in api[chain[0]]:
            lacking.add(chain[1])
    return lacking


def test_the_lists_are_there():
    assert {name.rsplit("-")[0] for name in LISTS} == {"tensorrt", "tensorrt_rtx"}
    assert len(LISTS) == 4
    assert all("ICudaEngine" in api and "Builder" in api for api in APIS.values())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_exist_in_every_version_or_are_guarded(path):
    assert unguarded(path.read_text()) == []


def test_the_runner_names_something():
    """Else the scan above proves nothing."""
    text = "".join(path.read_text() for path in FILES)
    assert "trt.Runtime" in text
    assert "trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE" in text


@pytest.mark.parametrize(
    "source",
    [
        "trt.Nope",
        "trt.BuilderFlag.FP16",  # in 10, gone in 11
        "config.set_flag(trt.BuilderFlag.FP16)",
        "x = self.trt.IInt8Calibrator",
        "def f():\n    return trt.CudaGraphStrategy.DISABLED",  # RTX only
        "if hasattr(trt, 'EngineStat'):\n    x = 1\ntrt.EngineStat",
        "if hasattr(trt, 'EngineStat'):\n    trt.CudaGraphStrategy",
        "def _rtx_options():\n    return trt.BuilderFlag.FP16",
        "def options():\n    return trt.CudaGraphStrategy.DISABLED",
    ],
)
def test_the_scan_finds(source):
    assert len(unguarded(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "trt.Runtime(logger)",
        "trt.__version__.split('.')",
        "self.trt.TensorIOMode.INPUT",
        "trt.ILogger.Severity.ERROR",
        "if hasattr(trt, 'CudaGraphStrategy'):\n    trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
        "def f():\n    if not hasattr(trt, 'EngineStat'):\n        return\n    x(trt.EngineStat.TOTAL_WEIGHTS_SIZE)",
        "def _rtx_options():\n    if eager:\n        return trt.CudaGraphStrategy.DISABLED",
        "x = trt.BuilderFlag.FP16 if hasattr(trt.BuilderFlag, 'FP16') else None",
    ],
)
def test_the_scan_lets_pass(source):
    assert unguarded(source) == []
