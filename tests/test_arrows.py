"""The house: who may import whom, what is imported late, and what importing the package costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Each package or module may import, at whatever level, only these parts of pmm (and itself). A module with
# a line of its own does not share its package's.
BASE = {"errors", "config", "files", "cli", "machine", "runs", "typed"}
DATA = BASE | {"data"}
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "files": {"errors"},
    "cli": {"errors", "scheduling"},
    "cgroup": set(),
    "machine": {"cgroup", "errors"},
    "scheduling": {"machine"},
    "cuda_versions": {"machine"},
    "kernels": set(),
    "typed": set(),
    "runs": {"errors", "config"},
    "data": BASE,
    "ops": {"kernels"},
    "models": {"ops", "config", "errors", "torch_file"},
    "losses": {"models"},
    "distances": {"errors"},
    "ranks": {"distances", "errors"},
    "nearest": {"distances"},
    "reranking": {"distances", "errors", "machine", "nearest"},
    "metrics": {"distances", "errors", "machine", "ranks"},
    "parity": {"distances", "errors", "metrics", "nearest"},
    "torch_file": {"errors", "files"},
    "foreign": {"models", "config", "errors"},
    "processes": {"errors"},
    "trainee": {"config", "errors", "processes"},
    "checkpoint": DATA | {"models", "kernels", "foreign", "torch_file", "trainee"},
    "manifest": {"data", "errors", "files", "typed"},
    "onnx_file": {"errors", "files", "manifest"},
    "runtime": {"data", "errors", "files", "checkpoint", "manifest", "onnx_file", "machine", "cuda_versions"},
    "embed": DATA | {"distances", "metrics", "reranking", "runtime", "index"},
    "index": {"data", "distances", "errors", "files", "manifest", "nearest", "runtime", "typed"},
    "search": DATA | {"embed", "index", "runtime", "visualize.lists"},
    "environment": {"cuda_versions", "kernels", "machine"},
    "info": {
        "errors",
        "files",
        "cli",
        "config",
        "checkpoint",
        "environment",
        "index",
        "kernels",
        "manifest",
        "onnx_file",
        "runtime",
    },
    "engine": DATA | {"models", "losses", "metrics", "embed", "processes", "runtime", "trainee"},
    "progress": {"errors"},
    "journal": {"files"},
    "prepare": DATA,
    "trainer": DATA
    | {
        "checkpoint",
        "engine",
        "kernels",
        "models",
        "ops",
        "processes",
        "progress",
        "trainee",
        "visualize.mixing",
        "journal",
    },
    "train": DATA
    | {"cuda_versions", "models", "prepare", "progress", "kernels", "ops", "processes", "runtime", "trainer"},
    "evaluate": DATA | {"embed", "manifest", "metrics", "reranking", "runtime"},
    "visualize": DATA | {"checkpoint", "embed", "metrics", "models", "ops", "parity", "runtime"},
    "visualize.style": set(),
    "visualize.lists": DATA | {"visualize.style"},
    "visualize.ranked": DATA | {"parity", "visualize.lists"},
    "visualize.curves": DATA | {"visualize.style"},
    "export": DATA | {"manifest", "onnx_file", "parity", "runtime", "checkpoint", "models"},
    "bench": DATA
    | {
        "cuda_versions",
        "export",
        "engine",
        "environment",
        "kernels",
        "losses",
        "manifest",
        "models",
        "onnx_file",
        "ops",
        "runtime",
        "parity",
        "distances",
        "metrics",
        "reranking",
        "embed",
        "checkpoint",
        "processes",
        "trainee",
        "visualize.style",
        "visualize.lists",
        "visualize.ranked",
        "prepare",
        "train",  # for its command line
    },
}
LATE = ("onnx", "onnxruntime", "onnxscript", "tensorrt", "tensorrt_rtx", "openvino", "pycuda", "cuda")
# Modules that may import torch at module level; everything else must load without it.
WITH_TORCH = (
    "ops", "models", "losses", "processes", "progress", "trainee", "engine", "trainer", "torch_file", "foreign",
    "runtime/eager", "runtime/torch_", "runtime/aoti", "data/batches", "data/loader", "data/sampler", "export/fold",
    "export/graph", "visualize/cam", "visualize/mixing", "bench/mix", "bench/training_step", "bench/untrained",
    "bench/gpu_training",
)  # fmt: skip

SOURCES = sorted((ROOT / "pmm").rglob("*.py"))
SCRIPTS = [*sorted((ROOT / "export").glob("*.py")), *sorted((ROOT / "bench").glob("*.py"))]


def imported(path: Path, module_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = _module_level(tree) if module_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _module_level(tree):
    """What runs on import: everything outside functions, but for `if TYPE_CHECKING`."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def part(path: Path) -> str:
    """The key of ALLOWED that holds for a file: its module, or else the nearest package that it is in."""
    names = path.relative_to(ROOT / "pmm").with_suffix("").parts
    keys = [".".join(names[:count]) for count in range(len(names), 0, -1)]
    return next((key for key in keys if key in ALLOWED), keys[-1])


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    mine = part(path)
    if mine == "__init__":
        assert not imported(path)
        return
    allowed = ALLOWED[mine] | {mine}
    for name in imported(path):
        if not name.startswith("pmm."):
            continue
        target = name.removeprefix("pmm.")
        if target.startswith("__"):
            continue
        assert any(target == a or target.startswith(a + ".") for a in allowed), f"{path}: must not import {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_are_imported_late(path):
    top = {name.split(".")[0] for name in imported(path, module_level_only=True)}
    assert not top & set(LATE)
    inside = str(path.relative_to(ROOT / "pmm"))
    if not inside.startswith(WITH_TORCH):
        assert not top & {"torch", "torchvision"}, f"{path} imports torch at module level"


def test_package_inits_are_empty():
    for path in SOURCES:
        if path.name == "__init__.py" and path.parent not in (ROOT / "pmm", ROOT / "pmm" / "ops"):
            assert path.read_text() == "", path


def test_scripts_are_thin_and_shadow_no_library():
    for path in SCRIPTS:
        assert path.stem not in {*LATE, "torch", "profile", "numpy"}
        assert len(path.read_text().splitlines()) <= 90, path
        assert "torch" not in {name.split(".")[0] for name in imported(path)}, path
    assert not list((ROOT / "export").glob("__init__.py"))
    assert not list((ROOT / "bench").glob("__init__.py"))


def test_importing_pmm_is_fast_and_loads_nothing_heavy():
    script = (
        "import sys, time; begin = time.perf_counter(); import pmm; seconds = time.perf_counter() - begin\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'tensorrt', 'PIL', 'tyro'} & set(sys.modules)\n"
        "print(seconds, sorted(heavy))"
    )
    seconds, heavy = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.split(maxsplit=1)
    assert heavy.strip() == "[]"
    assert float(seconds) < 0.1


def test_an_onnx_file_is_run_without_torch(trained, people, tmp_path):
    from pmm.export.onnx import export_onnx

    artifact = export_onnx(trained, tmp_path / "model.onnx")
    script = (
        "import sys; sys.modules['torch'] = None; from pathlib import Path\n"
        "from pmm.runtime.base import open_runner; from pmm.data.readers import read_dataset\n"
        "from pmm.gallery.embed import embed_samples\n"
        "with open_runner(sys.argv[1]) as runner:\n"
        "    print(embed_samples(runner, read_dataset('synthetic', sys.argv[2]).query[:3]).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(artifact.path), str(people)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == "(3, 384)", done.stderr
