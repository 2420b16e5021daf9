"""What import-linter (`make lint`) cannot see: names in strings, late imports of heavy libraries, and costs."""

import ast
import functools
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from pmm.__main__ import COMMANDS
from tests.conftest import ROOT

HEAVY = (
    "onnx", "onnxruntime", "onnxscript", "tensorrt", "tensorrt_rtx", "openvino", "pycuda", "cuda", "pynvml", "scipy",
    "matplotlib", "tensorboard",
)  # fmt: skip
# Modules that may import torch at module level; everything else must load without it.
WITH_TORCH = (
    "ops/", "models/", "adoption/adopt", "adoption/embeddings", "adoption/program", "adoption/weights",
    "artifacts/checkpoint_import", "artifacts/init", "artifacts/torch_file", "data/batches", "data/loader",
    "data/sampler", "runtime/eager", "runtime/torch_", "runtime/aoti", "runtime/deployed_graph",
    "export/graph", "visualize/cam", "visualize/mixing", "training/announce", "training/distributed",
    "training/failures", "training/losses", "training/occlusion_table", "training/pictures", "training/precision",
    "training/progress", "training/saver", "training/snapshot", "training/state", "training/step", "training/trainer",
    "training/validation", "training/weight_average",
)  # fmt: skip
MAX_FILES = 14
"""Directly under pmm/: what is more belongs into a room."""

SOURCES = sorted((ROOT / "pmm").rglob("*.py"))
SCRIPTS = [*sorted((ROOT / "export").glob("*.py")), *sorted((ROOT / "bench").glob("*.py"))]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in [*SOURCES, *(ROOT / "bench" / "lab").glob("*.py")]}


@functools.cache
def nodes(path: Path, on_import: bool = False) -> list[ast.AST]:
    """Of a file, without `if TYPE_CHECKING`; `on_import`: what runs then, so nothing within functions."""
    waiting, found = [ast.parse(path.read_text())], []
    while waiting:
        node = waiting.pop()
        functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        if on_import and isinstance(node, functions):
            continue
        found.append(node)
        type_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        waiting += node.orelse if type_only else ast.iter_child_nodes(node)
    return found


def imported(path: Path, on_import: bool = False) -> set[str]:
    found = set()
    for node in nodes(path, on_import):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def named(path: Path) -> set[str]:
    """What strings name as modules: `importlib` imports some of them."""
    strings = {node.value for node in nodes(path) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {match[1] for text in strings if (match := re.fullmatch(r"((?:pmm|bench)(?:\.\w+)+)(:\w+)?", text))}


def module_in(name: str) -> str | None:
    """The module that an imported name is, or is of."""
    return next((known for known in (name, name.rpartition(".")[0]) if known in MODULES), None)


def test_no_circle_of_files_not_even_by_names_in_strings():
    arrows = {
        module: {found for name in imported(path) | named(path) if (found := module_in(name))} - {module}
        for module, path in MODULES.items()
    }
    assert "pmm.models.pmm" in arrows["pmm.models.registry"]  # by name only
    assert len([*TopologicalSorter(arrows).static_order()]) == len(MODULES)


def test_the_walls_hold_and_notice_what_is_wrong(tmp_path):
    """An import upwards, a circle in a package, a use of the laboratory: each a late one, in a copy of the house."""
    shutil.copytree(ROOT / "pmm", tmp_path / "pmm", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def lint():
        command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout

    code, said = lint()
    assert (code, said.count("KEPT")) == (0, 3), said
    for room, line in (
        ("models/backbone", "from pmm.artifacts.torch_file import read_torch_file"),
        ("utils/errors", "import pmm.utils.files"),
        ("bench/schema", "import bench.lab.loading"),
    ):
        with (tmp_path / "pmm" / f"{room}.py").open("a") as file:
            file.write(f"\n\ndef late():\n    {line}\n")
    code, said = lint()
    assert (code, said.count("BROKEN")) == (1, 3), said


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_are_imported_late(path):
    top = {name.split(".")[0] for name in imported(path, on_import=True)}
    assert not top & set(HEAVY)
    if not str(path.relative_to(ROOT / "pmm")).startswith(WITH_TORCH):
        assert not top & {"torch", "torchvision"}, f"{path} imports torch at module level"


def test_modules_that_may_import_torch_do():
    """The list above says no more than it must."""
    paths = {str(path.relative_to(ROOT / "pmm")): path for path in SOURCES}
    for start in WITH_TORCH:
        found = [path for name, path in paths.items() if name.startswith(start)]
        assert any("torch" in {name.split(".")[0] for name in imported(path, on_import=True)} for path in found), start


def test_the_ground_floor_is_small_and_package_inits_are_empty():
    floor = [path for path in (ROOT / "pmm").iterdir() if path.is_file() and path.suffix != ".so"]
    assert len(floor) <= MAX_FILES, sorted(path.name for path in floor)
    for path in SOURCES:
        if path.name == "__init__.py" and path.parent not in (ROOT / "pmm", ROOT / "pmm" / "ops"):
            assert path.read_text() == "", path


MODULE_NAME = re.compile(r"(?<![\w./-])((?:pmm|bench\.lab|tests)\.[A-Za-z]\w*(?:\.\w+)*)")
FILE_NAME = re.compile(r"(?<![\w./-])((?:pmm|bench|export|tests|cpp_ext)/[\w./-]*\.(?:py|cpp|cu|h|toml|json|j2|txt))\b")
COMMAND_NAME = re.compile(r"(?<![\w.-])pmm ([a-z]+)")
MADE_UP = {"pmm.plan", "pmm.nothing", "pmm.not_there", "bench/results/DATE-MACHINE-ablation.json"}
PROSE = {"kernels", "loads", "did", "cannot"}
"""What follows "pmm" besides commands."""


def texts() -> list[Path]:
    """Whatever names modules, files and commands, but for tests of made-up trees."""
    kinds = (".py", ".toml", ".h", ".cpp", ".cu", ".j2")
    folders = ("pmm", "bench", "export", "tests", "cpp_ext")
    found = [path for name in folders for path in (ROOT / name).rglob("*") if path.suffix in kinds]
    found += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", "setup.py")]
    return sorted({*found} - {ROOT / "tests/mutants/test_planted.py", ROOT / "tests/lab/test_gpu.py"})


@functools.cache
def is_module_or_inside(name: str) -> bool:
    words = name.split(".")
    homes = [ROOT.joinpath(*words[:count]) for count in range(len(words), 0, -1)]
    home = next(each for each in homes if each.is_dir() or each.with_suffix(".py").is_file())
    inside = words[len(home.relative_to(ROOT).parts) :]
    source = home / "__init__.py" if home.is_dir() else home.with_suffix(".py")
    return not inside or re.search(rf"\b{inside[0]}\b", source.read_text()) is not None


def test_modules_files_and_commands_that_texts_name_exist():
    for path in texts():
        text = path.read_text()
        for name in {*MODULE_NAME.findall(text)} - MADE_UP:
            assert is_module_or_inside(name), f"{path}: {name}"
        for name in {*FILE_NAME.findall(text)} - MADE_UP:
            assert any((folder / name).is_file() for folder in (ROOT, ROOT / "tests", ROOT / "pmm")), f"{path}: {name}"
        if "tests" not in path.parts:
            assert {*COMMAND_NAME.findall(text)} <= {name.split()[0] for name in COMMANDS} | PROSE, path


def test_a_class_name_is_one_class():
    """So that a reader who searches for it finds it."""
    homes: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in nodes(path):
            if isinstance(node, ast.ClassDef) and path.name != "__init__.py":
                homes.setdefault(node.name, []).append(module)
    assert not {name: places for name, places in homes.items() if len(places) > 1}


def test_scripts_are_thin_and_shadow_no_library():
    for path in SCRIPTS:
        assert path.stem not in {*HEAVY, "torch", "profile", "numpy"}
        assert len(path.read_text().splitlines()) <= 12, path
        assert "torch" not in {name.split(".")[0] for name in imported(path)}, path
    assert not list((ROOT / "export").glob("__init__.py"))
    assert not list((ROOT / "bench").glob("__init__.py"))


def test_importing_pmm_is_fast_and_loads_nothing_heavy():
    script = (
        "import sys, time; begin = time.perf_counter(); import pmm; seconds = time.perf_counter() - begin\n"
        "heavy = {'torch', 'numpy', 'scipy', 'onnx', 'onnxruntime', 'tensorrt', 'PIL'} & set(sys.modules)\n"
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
        "from pmm.runtime.open import open_runner; from pmm.data.readers import read_dataset\n"
        "from pmm.embedding.embed import embed_samples\n"
        "with open_runner(sys.argv[1]) as runner:\n"
        "    print(embed_samples(runner, read_dataset('synthetic', sys.argv[2]).query[:3]).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(artifact.path), str(people)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == "(3, 384)", done.stderr
