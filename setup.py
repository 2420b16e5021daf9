"""Packaging of the PMM toolkit: the metadata is in pyproject.toml; here is the build of the kernels in cpp_ext/.

The package works without them (plain torch, slower), so what is missing to build them is one line, not an error; a
build that was begun and fails is an error, and installs nothing.

    PMM_BUILD_CUDA=auto|0|1    auto: the CUDA kernels too, where torch has CUDA and a CUDA toolkit compiles a probe
    TORCH_CUDA_ARCH_LIST       GPU architectures, as "8.6;9.0+PTX"; default: those of the GPUs here, else all known
    PMM_REQUIRE_EXT=1          an error where the kernels cannot be built
    CXX, CUDA_HOME             another compiler than g++, another toolkit than the one found
"""

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "cpp_ext"
ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
# -ffp-contract=off: a fused multiply-add would make sums depend on the processor
FLAGS = shlex.split("-std=c++17 -O3 -ffp-contract=off -fno-math-errno -fvisibility=hidden -fPIC -Wall -Wextra")
STABLE_ABI = shlex.split("-DTORCH_TARGET_VERSION=0x020b000000000000 -DTORCH_STABLE_ONLY -DUSE_CUDA")  # of torch 2.11


def say(line):
    print(f"pmm kernels: {line}", flush=True)


def run(what, command):
    """Run a compiler. A failure ends the build with its output and what it was doing."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\npmm kernels: {what} failed (above); nothing was installed")


def words_of(variable, allowed, default):
    value = os.environ.get(variable, default)
    if value not in allowed:
        sys.exit(f"pmm kernels: {variable}={value}; it must be one of {', '.join(allowed)}")
    return value


def compiler():
    return shlex.split(os.environ.get("CXX", "g++"))


def torch_folder():
    """Where torch lies, not imported: that takes seconds. None where this build cannot see it."""
    found = importlib.util.find_spec("torch")
    return Path(found.origin).parent if found and found.origin else None


def missing():
    """Why no kernels can be built here; empty if they can."""
    if sys.platform == "win32":
        return "not built on Windows"
    if not torch_folder():
        return "not built: torch is not visible to this build (install torch first, then pip with --no-build-isolation)"
    if not shutil.which(compiler()[0]):
        return f"not built: no C++ compiler ({compiler()[0]} not found)"
    return ""


class Cuda:
    """The CUDA part: the toolkit and the architectures. `why_not` says why there is none."""

    def __init__(self):
        self.toolkit, self.why_not = None, "PMM_BUILD_CUDA=0"
        wanted = words_of("PMM_BUILD_CUDA", ("auto", "0", "1"), "auto")
        if wanted != "0":
            self.why_not = self._find()
            if wanted == "1" and self.why_not:
                sys.exit(f"pmm kernels: PMM_BUILD_CUDA=1, but {self.why_not}")

    def _find(self):
        if not list((torch_folder() / "lib").glob("libtorch_cuda*")):
            return "this torch has no CUDA"
        guesses = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
        if nvcc := shutil.which("nvcc"):  # which may be a wrapper in another folder than the toolkit's
            guesses.append(Path(nvcc).resolve().parents[1])
        for guess in filter(None, guesses):
            if (Path(guess) / "bin" / "nvcc").exists() and list(Path(guess).glob("lib*/libcudart_static.a")):
                return self._probed(Path(guess))
        return "no CUDA toolkit (nvcc with libcudart_static) was found; set CUDA_HOME"

    def _probed(self, toolkit):
        probe = [toolkit / "bin" / "nvcc", "-std=c++17", "-x", "cu", "-c", "-o", os.devnull, "-"]
        done = subprocess.run(probe, input="#include <cuda_runtime.h>\n", capture_output=True, text=True)
        if done.returncode:
            return f"nvcc in {toolkit} does not compile a probe: {(done.stderr.strip() or 'no reason').splitlines()[0]}"
        self.toolkit = toolkit
        version = subprocess.run([toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
        self.version = re.search(r"release ([\d.]+)", version).group(1)
        self.architectures = re.split(
            r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or self._here() or ARCHITECTURES
        )
        if wrong := [a for a in self.architectures if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", a)]:
            sys.exit(f"pmm kernels: TORCH_CUDA_ARCH_LIST names {wrong[0]}; it must look like 8.6;9.0+PTX")
        return ""

    @staticmethod
    def _here():
        sys.path.insert(0, str(ROOT))
        from pmm.machine import nvidia_gpus

        return ";".join(sorted({gpu.compute_capability for gpu in nvidia_gpus()}))

    def command(self):
        command = [self.toolkit / "bin" / "nvcc", "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        for architecture in self.architectures:
            number = architecture.split("+")[0].replace(".", "")
            command.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if architecture.endswith("+PTX"):
                command.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return command


class BuildKernels(build_ext):
    """g++ and nvcc, called plainly: the sources need no generated code and no build system."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"  # no Python in it, so no Python version in its name

    def run(self):
        if self.inplace or self.editable_mode:  # whatever happens now, an old build does not pass for this one
            (ROOT / "pmm" / self.get_ext_filename("_C")).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext):
        target, cuda, objects = Path(self.get_ext_fullpath(ext.name)), Cuda(), Path(self.build_temp).absolute()
        target.unlink(missing_ok=True)
        for folder in (target.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        self._write_facts(objects / "built.h", cuda)
        say(f"CUDA {cuda.version} for {' '.join(cuda.architectures)}" if cuda.toolkit else f"no CUDA: {cuda.why_not}")

        sources = [*SOURCES.glob("cpu/*.cpp"), SOURCES / "bindings_cpu.cpp"]
        libraries = [f"-L{torch_folder() / 'lib'}", "-ltorch_cpu"]
        if cuda.toolkit:
            sources += [*SOURCES.glob("cuda/*.cu"), SOURCES / "bindings_cuda.cpp"]
            libraries += ["-ltorch_cuda", *(f"-L{path}" for path in cuda.toolkit.glob("lib*"))]
            libraries += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        host = [*compiler(), *FLAGS, "-Wno-psabi", *STABLE_ABI, f"-I{objects}", "-isystem", torch_folder() / "include"]

        def compiled(source):
            made = objects / f"{source.parent.name}_{source.stem}.o"
            command = cuda.command() if source.suffix == ".cu" else host
            run(f"compiling {source.relative_to(ROOT)}", [*command, "-c", source, "-o", made])
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(compiled, sources))
        run("linking", [*compiler(), "-shared", *made, *libraries, "-o", target])
        say(f"built {target.name}")

    @staticmethod
    def _write_facts(path, cuda):
        version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True).stdout.splitlines()[0]
        digest = hashlib.sha256()
        for source in sorted(SOURCES.rglob("*.*")):
            digest.update(source.relative_to(SOURCES).as_posix().encode() + b"\0" + source.read_bytes())
        facts = {
            "compiler": version,
            "cuda": cuda.version if cuda.toolkit else None,
            "architectures": cuda.architectures if cuda.toolkit else [],
            "sources": digest.hexdigest()[:12],
        }
        path.write_text(f"#define PMM_BUILT {json.dumps(json.dumps(facts))}\n")


class Wheel(bdist_wheel):
    """One wheel for every Python 3: the kernels are bound to torch's stable ABI, not to Python's."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform if self.distribution.ext_modules else "any"


def extensions():
    reason = missing()
    if not reason:
        return [Extension("pmm._C", [])]
    if words_of("PMM_REQUIRE_EXT", ("0", "1"), "0") == "1":
        sys.exit(f"pmm kernels: PMM_REQUIRE_EXT=1, but {reason}")
    say(f"{reason}; the package works without them, slower")
    return []


setup(
    packages=find_packages(include=["pmm", "pmm.*"]),
    package_data={"pmm.bench": ["*.html.j2"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
