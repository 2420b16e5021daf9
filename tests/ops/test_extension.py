"""The compiled kernels as a part of the package: found or not, required or not, whole or broken."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from pmm import kernels as facts
from pmm.ops import _extension, hard_mix
from tests.conftest import ROOT, run_python

MIX = "pmm.ops.hard_mix(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2), torch.tensor([0]), (1, 1), 1)"


@pytest.fixture
def library(monkeypatch, tmp_path):
    """Sets the file that is taken for the compiled kernels."""
    monkeypatch.setattr(_extension, "missing", _extension.missing.__wrapped__)

    def be(path):
        monkeypatch.setattr(facts, "LIBRARY", path)
        monkeypatch.setattr(_extension, "LIBRARY", path)

    return be


def test_they_are_compiled_here_and_from_these_sources():
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler here")
    found = facts.build_info()
    assert found["compiled"]
    assert re.fullmatch("[0-9a-f]{12}", found["sources"])
    assert found["compiler"] in facts.describe_build()
    assert _extension.kernels(torch.device("cpu")) is not None


def test_without_them_plain_torch_serves_unless_they_are_required(library, tmp_path, monkeypatch):
    library(tmp_path / "nowhere.so")
    assert facts.build_info() == {"compiled": False}
    assert "plain torch" in facts.describe_build()
    assert _extension.kernels(torch.device("cpu")) is None
    mixed, _ = hard_mix(torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2), torch.tensor([0]), (1, 1), 1)
    assert mixed.eq(1).all()
    monkeypatch.setenv("PMM_REQUIRE_EXT", "1")
    with pytest.raises(RuntimeError, match=r"PMM_REQUIRE_EXT=1, but the kernels .* not compiled; run make setup"):
        hard_mix(torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2), torch.tensor([0]), (1, 1), 1)


def test_a_library_that_does_not_load_is_said_once_and_plain_torch_serves(library, tmp_path, monkeypatch):
    broken = tmp_path / "_C.so"
    broken.write_bytes(facts.LIBRARY.read_bytes().replace(b"\x7fELF", b"\x7fBAD", 1))
    library(broken)
    with pytest.warns(UserWarning, match="do not load with torch .* going on with plain torch"):
        assert _extension.kernels(torch.device("cpu")) is None
    monkeypatch.setenv("PMM_REQUIRE_EXT", "1")
    with pytest.raises(RuntimeError, match="PMM_REQUIRE_EXT=1, but the kernels do not load"):
        _extension.kernels(torch.device("cpu"))


def test_kernels_without_cuda_say_so_for_a_gpu(library, monkeypatch):
    monkeypatch.setattr(facts, "build_info", lambda: {"compiled": True, "cuda": None})
    library(facts.LIBRARY)
    assert _extension.kernels(torch.device("cuda")) is None
    monkeypatch.setenv("PMM_REQUIRE_EXT", "1")
    with pytest.raises(RuntimeError, match="built without CUDA; rebuild with PMM_BUILD_CUDA=1"):
        _extension.kernels(torch.device("cuda"))


def build(tmp_path, **env):
    """`setup.py build_ext` into a folder of its own."""
    folders = ("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
    return run_python(ROOT / "setup.py", "build_ext", *folders, **{"PMM_BUILD_CUDA": "0", **env})


def program(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_build_that_fails_names_the_part_and_leaves_no_library(tmp_path):
    old = tmp_path / "lib/pmm/_C.so"
    old.parent.mkdir(parents=True)
    old.write_text("an older build")
    words = 'case "$*" in *mixed_cam.cpp*) echo \'no such register\' >&2; exit 1;; *) exec g++ -O0 "$@";; esac'
    done = build(tmp_path, CXX=program(tmp_path / "g++-for-tests", words))
    assert done.returncode != 0
    assert "no such register" in done.stderr
    assert "compiling cpp_ext/cpu/mixed_cam.cpp failed" in done.stderr
    assert "nothing was installed" in done.stderr
    assert not old.exists()


NO_COMPILER = {"CXX": "no-such-compiler"}
WISHES = {
    "PMM_BUILD_CUDA=yes; it must be one of auto, 0, 1": {"PMM_BUILD_CUDA": "yes"},
    "PMM_REQUIRE_EXT=1, but not built: no C++ compiler (no-such-compiler not found)": {
        "PMM_REQUIRE_EXT": "1",
        **NO_COMPILER,
    },
    "TORCH_CUDA_ARCH_LIST names Hopper; it must look like 8.6;9.0+PTX": {
        "PMM_BUILD_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": "Hopper",
    },
}


@pytest.mark.parametrize("words", WISHES)
def test_wishes_that_cannot_be_met_are_one_line(tmp_path, words):
    if "Hopper" in words and not shutil.which("nvcc"):
        pytest.skip("no CUDA toolkit here, so its architectures are not read")
    done = build(tmp_path, **WISHES[words])
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_compiler_the_package_builds_as_plain_python(tmp_path):
    done = build(tmp_path, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler (no-such-compiler not found); the package works without them, slower" in done.stdout
    assert not list(tmp_path.rglob("*.so"))


def test_with_an_older_torch_the_package_builds_as_plain_python(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "torch/version.py").write_text("from typing import Optional\n\n__version__ = '2.9.1+cpu'\n")
    done = build(tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "not built: torch 2.9.1+cpu is older than 2.11; the package works without them, slower" in done.stdout
    done = build(tmp_path, PYTHONPATH=str(tmp_path), PMM_REQUIRE_EXT="1")
    assert done.stderr == "pmm kernels: PMM_REQUIRE_EXT=1, but not built: torch 2.9.1+cpu is older than 2.11\n"


SETUP = """
import runpy, sys
from pmm import machine
machine.nvidia_gpus = lambda: [machine.Gpu("a card", capability) for capability in {gpus!r}]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.fixture
def built(tmp_path, monkeypatch):
    """What a build says, with a torch that has CUDA and a g++ that only notes how it is called, as `toolkit` does:
    `calls` gives a line each. `env` holds for the builds that follow, too."""
    site, noted = tmp_path / "site/torch", tmp_path / "calls"
    (site / "lib").mkdir(parents=True)
    (site / "lib/libtorch_cuda.so").touch()
    (site / "__init__.py").write_text("raise SystemExit('imported')")
    (site / "version.py").write_text("__version__ = '2.11.0'\n")
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CXX", "CXXFLAGS", "LDFLAGS", "PMM_REQUIRE_EXT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(site.parent))
    program(tmp_path / "bin/g++", f'echo "g++ $*" >> {noted}')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)

    def run(gpus=(), **env):
        for name, value in env.items():
            monkeypatch.setenv(name, str(value))
        noted.write_text("")
        folders = ("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
        done = run_python("-c", SETUP.format(gpus=gpus), "-q", "build_ext", *folders)
        return done.stdout + done.stderr

    run.calls = lambda: noted.read_text().splitlines()
    return run


def toolkit(folder, known="75 80 86 90 90a", version="12.6"):
    """A folder with what a CUDA toolkit has; its nvcc tells its version and architectures, and notes other calls."""
    listed = " ".join(f"compute_{number}" for number in known.split())
    cases = f'--version) echo "release {version}, V{version}";; --list-gpu-arch) printf "%s\\n" {listed};;'
    program(folder / "bin/nvcc", f'case "$1" in {cases} *) echo "nvcc $*" >> {folder.parent}/calls;; esac')
    (folder / "lib64").mkdir()
    (folder / "lib64/libcudart_static.a").touch()
    return folder


CHOICES = {
    "of the default, what the toolkit knows": ({}, "7.5 8.0 8.6 9.0+PTX"),
    "the GPUs here": ({"gpus": ("9.0", "8.0")}, "8.0 9.0"),
    "what is named": ({"gpus": ("8.0",), "TORCH_CUDA_ARCH_LIST": "9.0a; 8.6+PTX;"}, "9.0a 8.6+PTX"),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_architectures_are(built, tmp_path, choice):
    wishes, expected = CHOICES[choice]
    cuda = toolkit(tmp_path / "cuda")
    said = built(PMM_BUILD_CUDA="auto", CUDA_HOME=cuda, **wishes)
    assert f"pmm kernels: CUDA 12.6 in {cuda} for {expected}\n" in said
    compiled = next(line for line in built.calls() if "block_ranking.cu" in line)
    number = [name.split("+")[0].replace(".", "") for name in expected.split()]
    assert re.findall(r"code=sm_(\w+)", compiled) == number
    assert re.findall(r"code=compute_(\w+)", compiled) == [n for n in number if f"{n[:-1]}.{n[-1]}+PTX" in expected]
    assert "-ccbin" not in compiled


KNOWN = "CUDA 13.0 in {} knows 7.5 9.0 10.0"


def test_an_architecture_that_the_toolkit_does_not_know(built, tmp_path):
    cuda = toolkit(tmp_path / "cuda", "75 100 90", "13.0")
    known = KNOWN.format(cuda)
    said = built(gpus=("9.0", "6.1"), PMM_BUILD_CUDA="auto", CUDA_HOME=cuda)
    assert said == f"pmm kernels: no CUDA: a GPU here is 6.1, and {known}\npmm kernels: built _C.so\n"
    assert not any(".cu " in line for line in built.calls())
    said = built(gpus=("6.1",), PMM_BUILD_CUDA="1")
    assert said == f"pmm kernels: PMM_BUILD_CUDA=1, but a GPU here is 6.1, and {known}\n"
    said = built(PMM_BUILD_CUDA="auto", TORCH_CUDA_ARCH_LIST="9.0;12.0+PTX")
    assert said == f"pmm kernels: TORCH_CUDA_ARCH_LIST names 12.0+PTX, but {known}\n"


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_a_toolkit_that_is_named_is_taken_or_none(built, tmp_path, monkeypatch, variable):
    monkeypatch.setenv("PATH", str(toolkit(tmp_path / "other") / "bin"), prepend=os.pathsep)
    why = f"{variable}={tmp_path / 'nowhere'} is no CUDA toolkit (bin/nvcc and lib*/libcudart_static.a)"
    said = built(PMM_BUILD_CUDA="auto", **{variable: tmp_path / "nowhere"})
    assert said == f"pmm kernels: no CUDA: {why}\npmm kernels: built _C.so\n"
    assert built(PMM_BUILD_CUDA="1") == f"pmm kernels: PMM_BUILD_CUDA=1, but {why}\n"


@pytest.mark.parametrize("script", ["#!/no/such/shell", "#!/bin/sh", "#!/bin/sh\necho 'no such card' >&2; exit 1"])
def test_a_broken_nvcc_is_one_line(built, tmp_path, script):
    nvcc = toolkit(tmp_path / "cuda") / "bin/nvcc"
    nvcc.write_text(script)
    said = built(PMM_BUILD_CUDA="1", CUDA_HOME=tmp_path / "cuda")
    assert said.startswith(f"pmm kernels: PMM_BUILD_CUDA=1, but nvcc in {tmp_path / 'cuda'} does not ")
    assert len(said.splitlines()) == 1
    assert ("no such card" in script) == ("no such card" in said)


def test_the_compiler_and_its_flags_are_those_of_the_environment(built, tmp_path):
    assert "built _C.so" in built(CXX="", PMM_BUILD_CUDA="0")
    assert all(line.startswith("g++ ") for line in built.calls())
    facts_of = (tmp_path / "temp/built.h").read_text
    assert r"\"compiler\": \"g++\"" in facts_of()  # it tells no version

    program(tmp_path / "bin/launcher", f'echo "launcher $*" >> {tmp_path}/calls')
    flags = {"CXXFLAGS": "-DONE='a b' -O2", "LDFLAGS": "-Wl,-z,now"}
    built(CXX="launcher g++ -m64", PMM_BUILD_CUDA="auto", CUDA_HOME=toolkit(tmp_path / "cuda"), **flags)
    nvcc, host, link = [], [], []
    for line in built.calls():
        (nvcc if line.startswith("nvcc") else link if "-shared" in line else host).append(line)
    assert len(nvcc) > 1  # the probe is one
    assert all("-ccbin g++ -std" in line for line in nvcc)
    assert sum("-DONE=a b -O2 -c" in line for line in host) == len(host) - 1  # the other asks for the version
    assert [line.endswith("-Wl,-z,now -o " + str(tmp_path / "lib/pmm/_C.so")) for line in link] == [True]
    assert built(LDFLAGS="'-s") == "pmm kernels: LDFLAGS='-s: No closing quotation\n"


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_make_setup_installs_again_what_is_gone_or_was_built_otherwise(tmp_path):
    for name in ("pyproject.toml", "setup.py", "constraints.txt", "pmm/_C.so", ".venv/.installed"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("0\n")

    def installs(path=os.environ["PATH"], **env):
        clean = {k: v for k, v in os.environ.items() if k not in ("PMM_BUILD_CUDA", "CXX", "MAKEFLAGS")}
        words = [shutil.which("make"), "-n", "-C", tmp_path, "-f", ROOT / "Makefile", "setup"]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env={**clean, "PATH": path, **env})
        return "pip install" in done.stdout

    assert not installs()
    assert not installs(PMM_BUILD_CUDA="0")
    assert installs(PMM_BUILD_CUDA="1")
    (tmp_path / "pmm/_C.so").unlink()
    program(tmp_path / "bin/g++", "")
    assert installs(str(tmp_path / "bin"))
    assert not installs(str(tmp_path / "no compiler"))


def test_they_are_loaded_by_the_first_mix_not_by_the_import():
    script = f"import torch, pmm.ops\nbefore = 'pmm/_C.so' in open('/proc/self/maps').read()\n{MIX}\n"
    script += "print(before, 'pmm/_C.so' in open('/proc/self/maps').read())"
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    done = run_python("-c", script, PMM_REQUIRE_EXT="1")
    assert done.stdout.split() == ["False", "True"], done.stderr
