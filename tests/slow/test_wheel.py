"""The wheel: one for every Python, and all that the README shows works from it, outside the clone."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests.conftest import ROOT
from tests.readme import commands, is_too_large, on_fixtures
from tests.wheel import Environment, built_wheel, source_archive

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here"),
]
MIX = """
import json, torch, pmm.ops
from pmm.utils.build_info import LIBRARY, build_info
def is_loaded():
    return str(LIBRARY) in open("/proc/self/maps").read()
loaded = [is_loaded()]
x = torch.randn(4, 3, 24, 8)
mixed, replaced = pmm.ops.hard_mix(x, torch.rand(4, 24, 8), torch.tensor([1, 2, 3, 0]))
assert torch.equal(mixed, torch.where(replaced[:, None], x.roll(-1, 0), x))
loaded.append(is_loaded())
print(json.dumps({"library": str(LIBRARY), "loaded": loaded, **build_info()}))
"""
TWINS = {
    "python bench/run.py": "pmm bench",
    "python bench/compare.py": "pmm compare",
    "python bench/ablation.py": "pmm ablation",
    "python bench/reproduce.py": "pmm reproduce",
    "python export/to_onnx.py": "pmm export onnx",
    "python export/to_trt.py": "pmm export trt",
    "python export/to_aoti.py": "pmm export aoti",
    "python export/to_triton.py": "pmm export triton",
}
"""Scripts of a clone -> the same, of a wheel."""
TOP = ("PKG-INFO", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt", "MANIFEST.in",
       "pyproject.toml", "setup.py", "setup.cfg")  # fmt: skip
"""Files at the top of the source archive."""
LONG = "pmm (bench|ablation)"
PARSE = "import sys; from pmm.training.flags import parse; parse(sys.argv[1:])"


@pytest.fixture(scope="module")
def environment(store, tmp_path_factory):
    """The wheel with all that the tests' environment has, but this clone."""
    made = Environment.with_wheel(tmp_path_factory.mktemp("environment") / "env", built_wheel(store))
    made.add_all()
    return made


def test_the_wheel_of_the_source_archive_serves_every_python_and_brings_its_kernels(store, environment, tmp_path):
    wheel = built_wheel(store)
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"pmm/_C.so", "pmm/_search.so", "pmm/py.typed", "pmm/serving-requirements.txt"} <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"pmm"}
    done = environment.run("python", "-c", MIX, cwd=tmp_path, PMM_REQUIRE_EXT="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["library"] == str(environment.packages / "pmm/_C.so")
    assert found["compiled"]
    assert found["loaded"] == [False, True]  # by the first mix, not by the import


def test_a_package_index_takes_them_and_they_hold_the_package_and_no_more(store):
    wheel, archive = built_wheel(store), source_archive(store)
    checked = [sys.executable, "-m", "twine", "check", "--strict", wheel, archive]
    assert subprocess.run(checked, capture_output=True, text=True).stdout.count("PASSED") == 2
    tracked = subprocess.run(["git", "ls-files", "pmm", "cpp_ext"], cwd=ROOT, capture_output=True, text=True).stdout
    package = {name for name in tracked.split() if name.startswith("pmm/")}
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert inside == package | {"pmm/_C.so", "pmm/_search.so"}
    with tarfile.open(archive) as files:
        names = {member.name.partition("/")[2] for member in files if member.isfile()}
    assert set(tracked.split()) <= names
    assert {name.split("/")[0] for name in names} == {"pmm", "cpp_ext", "pmm_reid.egg-info", *TOP}


def test_every_command_of_the_readme_works_from_the_wheel(environment, people, tmp_path):
    """One after another, outside the clone: its scripts by their twins, and of the long ones the first.

    The flags of the others, which tests/test_readme.py runs in the clone, are those that the command has here.
    """
    shown, tried, long = [], [], []
    for command in commands():
        if command.startswith(("make ", "pip ")):
            continue
        for script, twin in TWINS.items():
            command = command.replace(script, twin)
        if is_too_large(command):
            tried.append(["python", "-c", PARSE, *shlex.split(command.split("train", 1)[1])])
        elif re.match(LONG, command):
            long.append(command)
        else:
            shown.append(shlex.split(on_fixtures(command, people, tmp_path).replace("after/", "runs/first/report/")))
    bench = next(place for place, words in enumerate(shown) if words[:2] == ["pmm", "compare"])
    shown.insert(bench, ["pmm", "bench", "runs/first/best.pth", "--backends", "ort-cpu", "--precisions", "fp32"])
    assert {words[0] for words in shown} == {"pmm", "python"}
    assert len(shown) + len(tried) + len(long) >= 20

    listed = environment.run("pmm", "--help", cwd=tmp_path).stdout
    names = re.findall(r"^  pmm ((?:export )?\w+)  ", listed, re.MULTILINE)
    assert len(names) >= 15
    run = [" ".join(words) for words in shown]
    explained = [
        name
        for name in names
        if re.match(LONG, f"pmm {name}") or not any(line.startswith(f"pmm {name} ") for line in run)
    ]
    helps = [["pmm", *name.split(), "--help"] for name in explained]
    said = environment.run_all(
        [*shown, *tried, *helps],
        tmp_path,
        "torch, torchvision, onnxscript, onnx, matplotlib.figure",
        PMM_FAST="1",
    )
    for command in long:
        known = said[-len(helps) + explained.index(command.split()[1])]
        assert set(re.findall(r" (--[a-z0-9-]+)", command)) <= set(re.findall(r"--[a-z0-9-]+", known)), command
