"""What a missing library is told as, and that it agrees with what the package declares."""

import ast
import re
import sys
import tomllib

import pytest

from pmm.utils import command_line, extras
from tests.conftest import ROOT, assert_one_line_error, run_here
from tests.readme import README, commands

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]
SERVING = (ROOT / "pmm/serving-requirements.txt").read_text()


def names(requirements):
    return {re.match(r"[\w-]+", line)[0]: line.partition(";")[0].strip() for line in requirements}


def package_of(module):
    return (extras.EXTRAS.get(module) or extras.RENAMED.get(module, module)).split()[0]


def imported():
    """The modules of others that a file of the package imports, anywhere in it."""
    found = set()
    for path in (ROOT / "pmm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"pmm"}


def test_the_package_asks_for_all_that_it_imports():
    declared = names(PROJECT["dependencies"])
    assert len(imported()) > 10
    for module in imported() - set(extras.EXTRAS):
        assert package_of(module) in declared or f"{package_of(module)}-gpu" in declared, module


def test_each_extra_is_alone_and_of_a_package_that_is_named_here():
    of_libraries = {name: list(names(lines)) for name, lines in OPTIONAL.items() if name not in ("all", "docs", "test")}
    galleries = {"faiss", "milvus", "milvus-lite", "parquet"}
    assert set(of_libraries) == {"tensorrt", "rtx", "openvino", "pycuda", "timm"} | galleries
    for packages in of_libraries.values():
        assert len(packages) == 1
        assert packages[0] in extras.EXTRAS.values()


def test_all_holds_nothing_that_must_be_compiled_or_must_fit_the_driver():
    inside = {name for line in OPTIONAL["all"] for name in re.search(r"\[(.*?)\]", line)[1].split(",")}
    assert inside == {"rtx", "openvino", "faiss", "milvus", "milvus-lite", "parquet", "timm"}


def test_what_serves_has_the_bounds_of_the_package_and_no_torch():
    serving, declared = names(line for line in SERVING.splitlines() if line[:1] != "#"), PROJECT["dependencies"]
    assert "torch" not in serving
    for name, line in serving.items():
        assert line == names(declared)[name]
    gpu = re.search(r"onnxruntime-gpu\[cuda,cudnn\]>=([\d.]+),<", SERVING)[1]
    assert names(declared)["onnxruntime-gpu"] == f"onnxruntime-gpu>={gpu}"


def test_what_the_readme_and_make_install_exists():
    told = README + (ROOT / "Makefile").read_text()
    asked = re.findall(r"(?:pmm[-_]reid[^\s\"]*|\.)\[([\w,]+)\]", told)
    assert {name for names in asked for name in names.split(",")} <= set(OPTIONAL)
    for command in commands():
        if command.startswith("pip ") and "requirements" in command:
            assert f"#   {command}\n" in SERVING


@pytest.mark.parametrize(
    ("module", "facts"),
    [
        ("torch", ["torch is not installed", "pip install torch torchvision", "pip install pmm-reid"]),
        ("matplotlib.figure", ["matplotlib is not installed", "pip install matplotlib", "pip install pmm-reid"]),
        ("PIL", ["pip install pillow"]),
        ("onnxruntime", ["pip install onnxruntime", "onnxruntime-gpu[cuda,cudnn]"]),
        ("openvino", ["openvino is not installed", "pip install openvino"]),
        ("tensorrt_rtx", ["pip install tensorrt-rtx"]),
        ("something_that_another_library_needs", ["pip install something_that_another_library_needs"]),
    ],
)
def test_a_command_names_the_library_that_it_lacks_and_what_to_install(module, facts, monkeypatch, capsys):
    top = module.partition(".")[0]
    monkeypatch.setitem(sys.modules, top, None)
    with pytest.raises(SystemExit) as stop:
        command_line.run(lambda prog: __import__(module), prog="pmm something")
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    for fact in ("pmm something: error: ", *facts):
        assert fact in line
    assert ("pmm-reid" in line) == (top not in extras.EXTRAS)


@pytest.mark.parametrize(
    ("words", "library"),
    [
        (("pmm", "bench", "none.pth"), "jinja2"),
        (("pmm", "bench", "none.pth"), "matplotlib"),
        (("pmm", "ablation", "--methods", "none"), "matplotlib"),
        (("pmm", "visualize", "none.pth"), "matplotlib"),
        (("pmm.train", "--preset", "tiny"), "tensorboard"),
    ],
)
def test_what_is_needed_at_the_end_is_looked_for_at_the_start(words, library, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, library, None)
    done = run_here("-m", *words, cwd=tmp_path)
    assert_one_line_error(done, f"{library} is not installed", f"pip install {library}")
    assert list(tmp_path.iterdir()) == []


def test_a_library_of_another_version_is_to_be_upgraded():
    line = extras.missing_library(ModuleNotFoundError(name="numpy.not_there_yet"))
    assert "numpy.not_there_yet" in line
    assert line.endswith("pip install --upgrade numpy")


@pytest.mark.parametrize("name", ["pmm.not_there", "_bz2", None])
def test_a_module_of_ours_or_of_python_is_a_bug(name):
    def lacking(prog):
        raise ModuleNotFoundError("No module", name=name)

    with pytest.raises(ModuleNotFoundError):
        command_line.run(lacking, prog="pmm something")


@pytest.mark.parametrize(
    ("driver", "package"), [("12.4", "tensorrt-cu12"), ("13.0", "tensorrt-cu13"), ("", "tensorrt")]
)
def test_tensorrt_is_the_one_for_the_driver(driver, package, monkeypatch):
    monkeypatch.setattr(extras, "driver_version", lambda: driver)
    assert extras.install_command("tensorrt") == f"pip install {package}"


def test_a_part_of_a_library_comes_with_it():
    assert extras.install_command("timm.models") == "pip install timm"
