"""Packaging of the PMM toolkit: the metadata is in pyproject.toml; here is the build of the kernels in cpp_ext/.

The package works without them (plain torch, slower), so what is missing to build them is one line, not an error; a
build that was begun and fails is an error, and installs nothing.

    PMM_BUILD_CUDA=auto|0|1    auto: the CUDA kernels too, where torch has CUDA and a CUDA toolkit compiles a probe
    TORCH_CUDA_ARCH_LIST       GPU architectures, as "8.6;9.0+PTX"; default: those of the GPUs here, else all common
                               ones that the toolkit knows
    PMM_REQUIRE_EXT=1          an error where the kernels cannot be built
    CXX                        another compiler than g++, for nvcc too
    CXXFLAGS, LDFLAGS          more flags to compile the C++ sources, and to link
    CUDA_HOME, CUDA_PATH       another CUDA toolkit than the one found: this one or none
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a build front end does not
from pmm.kernels import sources_digest  # noqa: E402
from pmm.machine import nvidia_gpus  # noqa: E402

SOURCES = ROOT / "cpp_ext"
TORCH = [2, 11]  # the oldest that has the stable ABI used here
ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]  # of these, the newest with PTX for newer ones
# -ffp-contract=off: a fused multiply-add would make sums depend on the processor
FLAGS = shlex.split("-std=c++17 -O3 -ffp-contract=off -fno-math-errno -fvisibility=hidden -fPIC -Wall -Wextra")
STABLE_ABI = shlex.split("-DTORCH_TARGET_VERSION=0x020b000000000000 -DTORCH_STABLE_ONLY -DUSE_CUDA")


def say(line):
    print(f"pmm kernels: {line}", flush=True)


def output_of(command, text=""):
    """The finished process; one that cannot start is one that failed."""
    words = [str(word) for word in command]
    try:
        return subprocess.run(words, input=text, capture_output=True, encoding="utf-8", errors="replace")
    except OSError as error:
        return subprocess.CompletedProcess(words, 127, "", str(error))


def run(what, command):
    """Run a compiler. A failure ends the build with its output and what it was doing."""
    done = output_of(command)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\npmm kernels: {what} failed (above); nothing was installed")


def words_of(variable, allowed, default):
    value = os.environ.get(variable, default)
    if value not in allowed:
        sys.exit(f"pmm kernels: {variable}={value}; it must be one of {', '.join(allowed)}")
    return value


def flags_of(variable):
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        sys.exit(f"pmm kernels: {variable}={os.environ[variable]}: {error}")


COMPILER, CXXFLAGS, LDFLAGS = flags_of("CXX") or ["g++"], flags_of("CXXFLAGS"), flags_of("LDFLAGS")


def torch_folder():
    """Where torch lies; None where this build cannot see it."""
    found = importlib.util.find_spec("torch")
    return Path(found.origin).parent if found and found.origin else None


def torch_version():
    """From its file, not imported: that takes seconds. Empty if the file does not tell."""
    path = torch_folder() / "version.py"
    found = re.search(r"^__version__.*?['\"](\d+\.\d[^'\"]*)", path.read_text() if path.exists() else "", re.MULTILINE)
    return found[1] if found else ""


def missing():
    """Why no kernels can be built here; empty if they can."""
    if sys.platform != "linux":
        return f"not built: {sys.platform} is not supported"
    if not torch_folder():
        return "not built: torch is not visible to this build (install torch first, then pip with --no-build-isolation)"
    version = torch_version()
    if version and [int(digits) for digits in re.findall(r"\d+", version)[:2]] < TORCH:
        return f"not built: torch {version} is older than {TORCH[0]}.{TORCH[1]}"
    if not shutil.which(COMPILER[0]):
        return f"not built: no C++ compiler ({COMPILER[0]} not found)"
    return ""


class Cuda:
    """The CUDA part: the toolkit and the architectures. `why_not` says why there is none; empty if there is one."""

    def __init__(self):
        self.why_not = "PMM_BUILD_CUDA=0"
        wanted = words_of("PMM_BUILD_CUDA", ("auto", "0", "1"), "auto")
        if wanted != "0":
            self.why_not = self._no_toolkit() or self._no_probe() or self._no_architectures()
            if wanted == "1" and self.why_not:
                sys.exit(f"pmm kernels: PMM_BUILD_CUDA=1, but {self.why_not}")

    def _no_toolkit(self):
        if not list((torch_folder() / "lib").glob("libtorch_cuda*")):
            return "this torch has no CUDA"
        named = next((name for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)), None)
        guesses = [os.environ[named] if named else "/usr/local/cuda"]
        if not named and (nvcc := shutil.which("nvcc")):  # which may be a wrapper in another folder than the toolkit's
            guesses.append(Path(nvcc).resolve().parents[1])
        for self.toolkit in map(Path, guesses):
            self.nvcc = [self.toolkit / "bin" / "nvcc"]
            if self.nvcc[0].exists() and list(self.toolkit.glob("lib*/libcudart_static.a")):
                return ""
        wanted = "CUDA toolkit (bin/nvcc and lib*/libcudart_static.a)"
        return f"{named}={guesses[0]} is no {wanted}" if named else f"no {wanted} was found; set CUDA_HOME"

    def _no_probe(self):
        if flags_of("CXX"):  # the compiler alone, which may follow a launcher, as in "ccache g++ -m64"
            self.nvcc += ["-ccbin", [*takewhile(lambda word: not word.startswith("-"), COMPILER)][-1]]
        probe = [*self.nvcc, "-std=c++17", "-x", "cu", "-c", "-o", os.devnull, "-"]
        done = output_of(probe, "#include <cuda_runtime.h>\n")
        if done.returncode == 0:
            return ""
        said = (done.stderr + done.stdout).strip() or "no reason"
        return f"nvcc in {self.toolkit} does not compile a probe: {said.splitlines()[0]}"

    def _no_architectures(self):
        version = re.search(r"release ([\d.]+)", output_of([self.nvcc[0], "--version"]).stdout)
        listed = re.findall(r"compute_(\d+)(\d)", output_of([self.nvcc[0], "--list-gpu-arch"]).stdout)
        if not version or not listed:
            return f"nvcc in {self.toolkit} does not tell its version and architectures"
        self.version, known = version[1], sorted({f"{major}.{minor}" for major, minor in listed}, key=float)

        wanted = re.findall(r"[^;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
        here = sorted({gpu.compute_capability for gpu in nvidia_gpus()})
        self.architectures = wanted or here or [name for name in ARCHITECTURES if name in known]
        if malformed := [name for name in wanted if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name)]:
            sys.exit(f"pmm kernels: TORCH_CUDA_ARCH_LIST names {malformed[0]}; it must look like 8.6;9.0+PTX")
        unknown = [name for name in self.architectures if re.match(r"[\d.]+", name)[0] not in known]  # 9.0a is of 9.0
        knows = f"CUDA {self.version} in {self.toolkit} knows {' '.join(known)}"
        if wanted and unknown:
            sys.exit(f"pmm kernels: TORCH_CUDA_ARCH_LIST names {unknown[0]}, but {knows}")
        if unknown or not self.architectures:
            return f"{f'a GPU here is {unknown[0]}' if unknown else 'no GPU is here'}, and {knows}"
        if not wanted and not here:
            self.architectures[-1] += "+PTX"
        return ""

    def command(self):
        command = [*self.nvcc, "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
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
        found = "" if cuda.why_not else f"CUDA {cuda.version} in {cuda.toolkit} for {' '.join(cuda.architectures)}"
        say(found or f"no CUDA: {cuda.why_not}")

        sources = [*SOURCES.glob("cpu/*.cpp"), SOURCES / "bindings_cpu.cpp"]
        libraries = [f"-L{torch_folder() / 'lib'}", "-ltorch_cpu"]
        if not cuda.why_not:
            sources += [*SOURCES.glob("cuda/*.cu"), SOURCES / "bindings_cuda.cpp"]
            libraries += ["-ltorch_cuda", *(f"-L{path}" for path in cuda.toolkit.glob("lib*"))]
            libraries += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        host = [*COMPILER, *FLAGS, "-Wno-psabi", *STABLE_ABI, f"-I{objects}", "-isystem", torch_folder() / "include"]
        host += CXXFLAGS

        def compiled(source):
            made = objects / f"{source.parent.name}_{source.stem}.o"
            command = cuda.command() if source.suffix == ".cu" else host
            run(f"compiling {source.relative_to(ROOT)}", [*command, "-c", source, "-o", made])
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(compiled, sources))
        run("linking", [*COMPILER, "-shared", *made, *libraries, *LDFLAGS, "-o", target])
        say(f"built {target.name}")

    @staticmethod
    def _write_facts(path, cuda):
        version = output_of([*COMPILER, "--version"]).stdout.strip() or COMPILER[0]
        facts = {
            "compiler": version.splitlines()[0],
            "cuda": None if cuda.why_not else cuda.version,
            "architectures": [] if cuda.why_not else cuda.architectures,
            "sources": sources_digest(SOURCES),
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
    package_data={"pmm.bench.pages": ["*.html.j2"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
