"""What setup.py decides: compiler, flags, CUDA and architectures. All in this process and with compilers that only
answer, but for one true run."""

import json
import os
import re
import subprocess
import types
from pathlib import Path

import pytest
import torch
from setuptools import Distribution

from pmm.utils import hardware
from tests.conftest import ROOT, run_python

VARIABLES = (
    "PMM_BUILD_CUDA",
    "PMM_REQUIRE_EXT",
    "TORCH_CUDA_ARCH_LIST",
    "CUDA_HOME",
    "CUDA_PATH",
    "CXX",
    "CXXFLAGS",
    "LDFLAGS",
)


def load():
    """setup.py as a module; it builds nothing then."""
    module = types.ModuleType("setup_py")
    module.__file__ = str(ROOT / "setup.py")
    exec(compile((ROOT / "setup.py").read_text(), module.__file__, "exec"), module.__dict__)
    return module


class Compilers:
    """In place of `output_of`: answers as g++ and nvcc do, and notes each call as a line."""

    def __init__(self, known="75 80 86 90 90a", version="12.6"):
        self.known, self.version = known, version
        self.calls = []
        self.fail_on = None

    def __call__(self, command, text=""):
        words = [str(word) for word in command]
        self.calls.append(" ".join([Path(words[0]).name, *words[1:]]))
        answer = ""
        if words[0].endswith("nvcc") and words[1:] == ["--version"]:
            answer = f"release {self.version}, V{self.version}"
        if words[0].endswith("nvcc") and words[1:] == ["--list-gpu-arch"]:
            answer = "\n".join(f"compute_{number}" for number in self.known.split())
        failed = self.fail_on is not None and self.fail_on in self.calls[-1]
        return subprocess.CompletedProcess(words, int(failed), answer, "no such register" if failed else "")


@pytest.fixture
def clean(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def setup_py(tmp_path, monkeypatch, clean):
    """setup.py beside a torch 2.11 with CUDA, a g++ and no GPU; its `output_of` is `setup_py.compilers`."""
    module = load()
    stub = tmp_path / "site/torch"
    (stub / "lib").mkdir(parents=True)
    (stub / "lib/libtorch_cuda.so").touch()
    (stub / "version.py").write_text("from typing import Optional\n\n__version__ = '2.11.0'\n")
    module.torch_folder = lambda: stub
    module.nvidia_gpus, module.driver_version = gpus(), lambda: ""
    module.read_output = module.output_of
    module.output_of = module.compilers = Compilers()
    program(tmp_path / "bin/g++", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    return module


@pytest.fixture
def build(setup_py, tmp_path, monkeypatch, capsys):
    """Builds a library with `env` set, from then on; the lines that were said, and that ended the build."""

    def run(what="build_library", **env):
        for name, value in env.items():
            monkeypatch.setenv(name, str(value))
        setup_py.compilers.calls.clear()
        try:
            getattr(setup_py, what)(tmp_path / "lib/_C.so", tmp_path / "temp")
        except SystemExit as ended:
            print(ended.code)
        return capsys.readouterr().out

    return run


def program(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def toolkit(folder):
    """A folder with what a CUDA toolkit has."""
    program(folder / "bin/nvcc", "exit 1")
    (folder / "lib64").mkdir()
    (folder / "lib64/libcudart_static.a").touch()
    return folder


def gpus(*capabilities):
    return lambda: [hardware.Gpu("a card", capability) for capability in capabilities]


def test_a_compile_that_fails_names_its_source_and_leaves_no_library(setup_py, build, tmp_path):
    old = tmp_path / "lib/_C.so"
    old.parent.mkdir()
    old.write_text("an older build")
    setup_py.compilers.fail_on = "mixed_cam.cpp"
    said = build(PMM_BUILD_CUDA="0")
    assert "no such register" in said
    assert "compiling cpp_ext/cpu/mixed_cam.cpp failed" in said
    assert "nothing was installed" in said
    assert not old.exists()
    setup_py.compilers.fail_on = "-shared"
    assert "linking failed (above); nothing was installed" in build()


def test_an_older_build_in_place_goes_before_anything_can_fail(setup_py, tmp_path, monkeypatch):
    monkeypatch.setattr(setup_py, "ROOT", tmp_path)
    old = [tmp_path / "pmm" / name for name in ("_C.so", "_search.so")]
    (tmp_path / "pmm").mkdir()
    for library in old:
        library.write_text("an older build")
    monkeypatch.setenv("PMM_BUILD_CUDA", "yes")
    command = setup_py.BuildKernels(Distribution({"ext_modules": setup_py.extensions()}))
    command.build_lib, command.build_temp, command.inplace = str(tmp_path / "lib"), str(tmp_path / "temp"), True
    command.ensure_finalized()
    with pytest.raises(SystemExit, match="PMM_BUILD_CUDA=yes; it must be one of auto, 0, 1"):
        command.run()
    assert not any(library.exists() for library in old)


def test_without_a_compiler_the_package_is_plain_python_unless_the_kernels_are_required(setup_py, monkeypatch, capsys):
    assert [extension.name for extension in setup_py.extensions()] == ["pmm._C", "pmm._search"]
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert setup_py.extensions() == []
    reason = "no C++ compiler (no-such-compiler not found)"
    assert f"{reason}; the package works without them, slower" in capsys.readouterr().out
    monkeypatch.setenv("PMM_REQUIRE_EXT", "1")
    with pytest.raises(SystemExit, match=re.escape(f"PMM_REQUIRE_EXT=1, but not built: {reason}")):
        setup_py.extensions()
    monkeypatch.setenv("PMM_REQUIRE_EXT", "yes")
    with pytest.raises(SystemExit, match="PMM_REQUIRE_EXT=yes; it must be one of 0, 1"):
        setup_py.extensions()


def test_with_an_older_torch_or_none_only_the_search_is_compiled(setup_py, monkeypatch, capsys):
    version = setup_py.torch_folder() / "version.py"
    for older in ("2.9.1+cpu", "1.13.0"):
        version.write_text(f"__version__ = '{older}'\n")
        assert [extension.name for extension in setup_py.extensions()] == ["pmm._search"]
        assert f"torch {older} is older than 2.11" in capsys.readouterr().out
    for recent in ("2.11.0a0+git1", "2.100.0", "3.0"):
        version.write_text(f"__version__: str = '{recent}'\n")
        assert setup_py.missing_torch() == ""
    version.unlink()  # another torch may tell it elsewhere
    assert setup_py.missing_torch() == ""
    monkeypatch.setattr(setup_py, "torch_folder", lambda: None)
    assert [extension.name for extension in setup_py.extensions()] == ["pmm._search"]
    assert "install torch first, then pip with --no-build-isolation" in capsys.readouterr().out
    monkeypatch.setenv("PMM_REQUIRE_EXT", "1")
    with pytest.raises(SystemExit, match="PMM_REQUIRE_EXT=1, but of the mix, not built: torch"):
        setup_py.extensions()
    monkeypatch.setenv("PMM_REQUIRE_EXT", "0")
    monkeypatch.setattr(setup_py.sys, "platform", "win32")
    assert setup_py.extensions() == []
    assert "not built: win32 is not supported" in capsys.readouterr().out


def test_the_search_is_compiled_without_torch_and_cuda(setup_py, build, tmp_path, monkeypatch):
    monkeypatch.setattr(setup_py, "torch_folder", lambda: None)
    said = build("build_search", CXX="launcher g++ -m64", CXXFLAGS="-O2", LDFLAGS="-Wl,-z,now")
    assert said == "pmm kernels: built _C.so\n"
    compiled = [line for line in setup_py.compilers.calls if " -c " in line]
    assert len(compiled) == len(list((ROOT / "cpp_ext/search").glob("*.cpp")))
    assert all(line.startswith("launcher g++ -m64 ") and "-ffp-contract=off" in line for line in compiled)
    assert all(" -O2 -c " in line and "torch" not in line.lower() for line in compiled)
    (link,) = [line for line in setup_py.compilers.calls if "-shared" in line]
    assert link.endswith(f" -Wl,-z,now -o {tmp_path / 'lib/_C.so'}")
    assert not [word for word in link.split() if word.startswith("-l")]
    setup_py.compilers.fail_on = "scan_plain.cpp"
    assert "compiling cpp_ext/search/scan_plain.cpp failed (above); nothing was installed" in build("build_search")


def test_the_torch_of_this_environment_is_seen_without_importing_it(clean):
    module = load()
    assert module.torch_folder() == Path(torch.__file__).parent
    assert module.torch_version() == torch.__version__


CHOICES = {
    "of the default, what the toolkit knows": ((), "", "7.5 8.0 8.6 9.0+PTX"),
    "the GPUs here": (("9.0", "8.0", "9.0"), "", "8.0 9.0+PTX"),
    "the one GPU here": (("8.6",), "", "8.6+PTX"),
    "for GPUs newer than the toolkit, what they compile": (("12.0", "8.9", "8.7"), "", "8.6+PTX 9.0+PTX"),
    "what is named": (("8.0",), "9.0a; 8.6+PTX;", "9.0a 8.6+PTX"),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_architectures_are(setup_py, build, tmp_path, choice):
    here, wanted, expected = CHOICES[choice]
    cuda = toolkit(tmp_path / "cuda")
    setup_py.nvidia_gpus = gpus(*here)
    said = build(PMM_BUILD_CUDA="auto", CUDA_HOME=cuda, TORCH_CUDA_ARCH_LIST=wanted)
    assert said == f"pmm kernels: CUDA 12.6 in {cuda} for {expected}\npmm kernels: built _C.so\n"
    compiled = [line for line in setup_py.compilers.calls if ".cu " in line]
    assert len(compiled) == len(list((ROOT / "cpp_ext/cuda").glob("*.cu")))
    number = [name.split("+")[0].replace(".", "") for name in expected.split()]
    for line in compiled:
        assert re.findall(r"-gencode=arch=compute_(\S+),code=sm_(\S+)", line) == [(n, n) for n in number]
        ptx = [(n, n) for n in number if f"{n[:-1]}.{n[-1]}+PTX" in expected]
        assert re.findall(r"-gencode=arch=compute_(\S+),code=compute_(\S+)", line) == ptx
        assert "-ccbin" not in line


def test_an_architecture_that_the_toolkit_does_not_know(setup_py, build, tmp_path):
    cuda = toolkit(tmp_path / "cuda")
    setup_py.output_of = setup_py.compilers = Compilers("75 100 90", "13.0")
    known = f"CUDA 13.0 in {cuda} knows 7.5 9.0 10.0"
    setup_py.nvidia_gpus = gpus("9.0", "6.1")
    said = build(PMM_BUILD_CUDA="auto", CUDA_HOME=cuda)
    assert said == f"pmm kernels: no CUDA: a GPU here is 6.1, and {known}\npmm kernels: built _C.so\n"
    assert not any(".cu " in line for line in setup_py.compilers.calls)
    assert build(PMM_BUILD_CUDA="1") == f"pmm kernels: PMM_BUILD_CUDA=1, but a GPU here is 6.1, and {known}\n"
    said = build(PMM_BUILD_CUDA="auto", TORCH_CUDA_ARCH_LIST="9.0;12.0+PTX")
    assert said == f"pmm kernels: TORCH_CUDA_ARCH_LIST names 12.0+PTX, but {known}\n"
    for malformed in ("Hopper", "9.0PTX"):
        said = build(TORCH_CUDA_ARCH_LIST=f"9.0;{malformed}")
        assert said == f"pmm kernels: TORCH_CUDA_ARCH_LIST names {malformed}; it must look like 8.6;9.0+PTX\n"
    setup_py.nvidia_gpus, setup_py.compilers.known = gpus(), "35 37"
    said = build(TORCH_CUDA_ARCH_LIST="")
    assert "no CUDA: no GPU is here, and CUDA 13.0" in said


def test_a_toolkit_of_a_later_cuda_than_the_driver_serves(setup_py, build, tmp_path):
    cuda = toolkit(tmp_path / "cuda")
    for driver, version, fits in (("12.8", "13.0", False), ("12.2", "12.9", True), ("13.0", "12.6", True)):
        setup_py.driver_version = lambda driver=driver: driver
        setup_py.output_of = setup_py.compilers = Compilers(version=version)
        said = build(PMM_BUILD_CUDA="auto", CUDA_HOME=cuda)
        assert (f"CUDA {version} in {cuda} for 7.5" in said) == fits
        assert ("no CUDA" in said and f"serves CUDA {driver} at most" in said) == (not fits)


def test_without_a_toolkit_it_says_what_makes_one_of_torchs_packages(setup_py, build, monkeypatch):
    monkeypatch.setitem(setup_py.__dict__, "find_toolkit", lambda: None)
    for package, fact in (
        ("cuda-toolkit[nvcc]==13.0", "or pip install 'cuda-toolkit[nvcc]==13.0'"),
        ("", "CUDA_HOME\n"),
    ):
        monkeypatch.setitem(setup_py.__dict__, "missing_nvcc", lambda package=package: package)
        assert fact in build(PMM_BUILD_CUDA="1")


def test_a_toolkit_that_does_not_tell_what_it_knows(setup_py, build, tmp_path):
    setup_py.compilers.known = ""
    said = build(PMM_BUILD_CUDA="1", CUDA_HOME=toolkit(tmp_path / "cuda"))
    assert said.endswith(f"nvcc in {tmp_path / 'cuda'} does not tell its version and architectures\n")


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_a_toolkit_that_is_named_is_taken_or_none(build, tmp_path, monkeypatch, variable):
    monkeypatch.setenv("PATH", str(toolkit(tmp_path / "other") / "bin"), prepend=os.pathsep)
    why = f"{variable}={tmp_path / 'nowhere'} is no CUDA toolkit (bin/nvcc and lib*/libcudart_static.a)"
    said = build(PMM_BUILD_CUDA="auto", **{variable: tmp_path / "nowhere"})
    assert said == f"pmm kernels: no CUDA: {why}\npmm kernels: built _C.so\n"
    (toolkit(tmp_path / "nowhere") / "lib64/libcudart_static.a").unlink()  # without it, it cannot link
    assert build(PMM_BUILD_CUDA="1") == f"pmm kernels: PMM_BUILD_CUDA=1, but {why}\n"


def test_no_cuda_where_none_is_wanted_or_torch_has_none(setup_py, build, tmp_path):
    said = build(PMM_BUILD_CUDA="0", CUDA_HOME=toolkit(tmp_path / "cuda"))
    assert said == "pmm kernels: no CUDA: PMM_BUILD_CUDA=0\npmm kernels: built _C.so\n"
    (setup_py.torch_folder() / "lib/libtorch_cuda.so").unlink()
    assert build(PMM_BUILD_CUDA="1") == "pmm kernels: PMM_BUILD_CUDA=1, but this torch has no CUDA\n"


BROKEN = ("#!/no/such/shell", "#!/bin/sh", "#!/bin/sh\necho 'no such card' >&2; echo more >&2; exit 1")


@pytest.mark.parametrize("script", BROKEN)
def test_a_broken_nvcc_is_one_line(setup_py, build, tmp_path, script):
    nvcc = toolkit(tmp_path / "cuda") / "bin/nvcc"
    nvcc.write_text(script)
    setup_py.output_of = setup_py.read_output
    said = build(PMM_BUILD_CUDA="1", CUDA_HOME=tmp_path / "cuda")
    assert said.startswith(f"pmm kernels: PMM_BUILD_CUDA=1, but nvcc in {tmp_path / 'cuda'} does not ")
    assert len(said.splitlines()) == 1
    assert ("no such card" in script) == ("no such card" in said)


def test_the_compiler_and_its_flags_are_those_of_the_environment(setup_py, build, tmp_path):
    assert "built _C.so" in build(CXX="", PMM_BUILD_CUDA="0")
    assert all(line.startswith("g++ ") for line in setup_py.compilers.calls)

    flags = {"CXXFLAGS": "-DONE='a b' -O2", "LDFLAGS": "-Wl,-z,now"}
    build(CXX="launcher g++ -m64", PMM_BUILD_CUDA="auto", CUDA_HOME=toolkit(tmp_path / "cuda"), **flags)
    nvcc, host, link = [], [], []
    for line in setup_py.compilers.calls:
        (nvcc if line.startswith("nvcc") else link if "-shared" in line else host).append(line)
    questions = [line for line in nvcc if line in ("nvcc --version", "nvcc --list-gpu-arch")]
    assert all("-ccbin g++ -std" in line for line in nvcc if line not in questions)
    assert len(nvcc) - len(questions) == 1 + len(list((ROOT / "cpp_ext/cuda").glob("*.cu")))  # 1: the probe
    assert all(line.startswith("launcher g++ -m64 ") for line in [*host, *link])
    assert sum("-DONE=a b -O2 -c" in line for line in host) == len(host) - 1  # the other asks for the version
    assert [line.endswith("-Wl,-z,now -o " + str(tmp_path / "lib/_C.so")) for line in link] == [True]
    for variable in ("LDFLAGS", "CXXFLAGS", "CXX"):
        assert build(**{variable: "'-s"}) == f"pmm kernels: {variable}='-s: No closing quotation\n"
        assert not any(" -c " in line for line in setup_py.compilers.calls)
        build(**{variable: ""})


def test_setup_py_run_as_build_front_ends_do_and_without_importing_torch(tmp_path, monkeypatch, clean):
    """The one true run, with a shell script for each compiler: environment, processes and folders hold together."""
    noted = tmp_path / "calls"
    stub = tmp_path / "site/torch"
    (stub / "lib").mkdir(parents=True)
    (stub / "lib/libtorch_cuda.so").touch()
    (stub / "__init__.py").write_text("raise SystemExit('imported')")
    (stub / "version.py").write_text("__version__ = '2.11.0'\n")
    cuda = toolkit(tmp_path / "cuda")
    answers = '--version) echo "release 12.6, V12.6";; --list-gpu-arch) echo compute_86;;'
    program(cuda / "bin/nvcc", f'case "$1" in {answers} *) echo "nvcc $*" >> {noted};; esac')
    program(tmp_path / "bin/g++", f'echo "g++ $*" >> {noted}')
    done = run_python(
        *(ROOT / "setup.py", "-q", "build_ext"),
        *("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"),
        PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        PYTHONPATH=str(stub.parent),
        PMM_BUILD_CUDA="1",
        PMM_REQUIRE_EXT="1",
        CUDA_HOME=str(cuda),
        TORCH_CUDA_ARCH_LIST="8.6",
    )
    assert done.returncode == 0, done.stderr
    built = [f"CUDA 12.6 in {cuda} for 8.6", "built _C.so", "built _search.so"]
    assert done.stdout == "".join(f"pmm kernels: {line}\n" for line in built), done.stderr
    calls = noted.read_text().splitlines()
    for source in (ROOT / "cpp_ext").rglob("*.c*"):
        compiler = "nvcc" if source.suffix == ".cu" else "g++"
        assert len([line for line in calls if line.startswith(compiler) and f" -c {source} -o " in line]) == 1
    links = [line for line in calls if "-shared" in line]
    ends = [f" -o {tmp_path / 'lib/pmm' / name}" for name in ("_C.so", "_search.so")]
    assert [line.endswith(end) for line, end in zip(links, ends, strict=True)] == [True, True]
    facts = []
    for folder in ("temp", "temp/search"):
        (embedded,) = re.findall("#define PMM_BUILT (.*)", (tmp_path / folder / "built.h").read_text())
        facts.append(json.loads(json.loads(embedded)))
    assert facts[0].pop("sources") != facts[1].pop("sources")
    assert facts == [{"compiler": "g++", "cuda": "12.6", "architectures": ["8.6"]}, {"compiler": "g++"}]
