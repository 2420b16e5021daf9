"""Packaging of the PMM toolkit: the metadata is in pyproject.toml; here is the build of the kernels in cpp_ext/.

There are two libraries: of the mix (pmm/_C.so, for torch), and of the search (pmm/_search.so, without torch). The
package works without them (plain torch, numpy; slower), so what is missing to build them is one line, not an error; a
build that was begun and fails is an error, and installs nothing.

    PMM_BUILD_CUDA=auto|0|1    auto: the CUDA kernels too, where torch has CUDA and a CUDA toolkit compiles a probe
    TORCH_CUDA_ARCH_LIST       GPU architectures, as "8.6;9.0+PTX"; default: those of the GPUs here, else all common
                               ones that the toolkit knows; with code that GPUs of newer ones compile (PTX)
    PMM_REQUIRE_EXT=1          an error where the kernels cannot be built
    CXX                        another compiler than g++, for nvcc too
    CXXFLAGS, LDFLAGS          more flags to compile the C++ sources, and to link
    CUDA_HOME, CUDA_PATH       this CUDA toolkit or none; default: /usr/local/cuda, that of the nvcc on PATH, or what
                               pip install "cuda-toolkit[nvcc,nvvm,crt]" puts beside torch

Imported (tests/test_setup.py does), it builds nothing: each decision is a function of the environment and of what
`output_of` hears from the compilers.
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
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a build front end does not
from pmm.utils.build_info import sources_digest  # noqa: E402
from pmm.utils.cuda_toolkit import TOOLKIT, find_toolkit, missing_nvcc, named_toolkit  # noqa: E402
from pmm.utils.hardware import driver_version, nvidia_gpus  # noqa: E402

SOURCES = ROOT / "cpp_ext"
LIBRARIES = ("pmm._C", "pmm._search")
TORCH = [2, 11]  # the oldest that has the stable ABI used here
ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
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


def choice(variable, allowed, default):
    value = os.environ.get(variable, default)
    if value not in allowed:
        sys.exit(f"pmm kernels: {variable}={value}; it must be one of {', '.join(allowed)}")
    return value


def flags_of(variable):
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        sys.exit(f"pmm kernels: {variable}={os.environ[variable]}: {error}")


def compiler():
    return flags_of("CXX") or ["g++"]


def torch_folder():
    """The folder of torch; None where this build cannot see it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def torch_version():
    """From its file, not imported: that takes seconds. Empty if the file does not tell."""
    path = torch_folder() / "version.py"
    match = re.search(r"^__version__.*?['\"](\d+\.\d[^'\"]*)", path.read_text() if path.exists() else "", re.MULTILINE)
    return match[1] if match else ""


def missing():
    """Why no kernels can be built here; empty if some can."""
    if sys.platform != "linux":
        return f"not built: {sys.platform} is not supported"
    if not shutil.which(compiler()[0]):
        return f"not built: no C++ compiler ({compiler()[0]} not found)"
    return ""


def missing_torch():
    """Why those of the mix cannot be built where others can; empty if they can."""
    if not torch_folder():
        return (
            "of the mix, not built: torch is not visible to this build "
            "(install torch first, then pip with --no-build-isolation)"
        )
    version = torch_version()
    if version and [int(digits) for digits in re.findall(r"\d+", version)[:2]] < TORCH:
        return f"of the mix, not built: torch {version} is older than {TORCH[0]}.{TORCH[1]}"
    return ""


class NoCudaError(Exception):
    """Why the CUDA kernels are not built."""


@dataclass
class Cuda:
    """A toolkit that compiles here, and the GPU architectures to compile for."""

    folder: Path
    nvcc: list
    version: str
    architectures: list

    def command(self):
        command = [*self.nvcc, "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        for architecture in self.architectures:
            number = architecture.split("+")[0].replace(".", "")
            command.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if architecture.endswith("+PTX"):
                command.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return command


def find_cuda():
    """The CUDA part of this build. Raises NoCudaError; where PMM_BUILD_CUDA=1 asks for one, ends the build."""
    requested = choice("PMM_BUILD_CUDA", ("auto", "0", "1"), "auto")
    if requested == "0":
        raise NoCudaError("PMM_BUILD_CUDA=0")
    try:
        folder = toolkit_folder()
        nvcc = working_nvcc(folder)
        version, known = versions_of(folder)
        toolkit, driver = f"CUDA {version} in {folder}", driver_version()
        if driver and int(version.split(".")[0]) > int(driver.split(".")[0]):
            raise NoCudaError(f"{toolkit} is too new for the driver, which serves CUDA {driver} at most")
        return Cuda(folder, nvcc, version, choose_architectures(known, toolkit))
    except NoCudaError as reason:
        if requested == "1":
            sys.exit(f"pmm kernels: PMM_BUILD_CUDA=1, but {reason}")
        raise


def toolkit_folder():
    """The folder of the CUDA toolkit that `find_toolkit` finds, for a torch with CUDA."""
    if not list((torch_folder() / "lib").glob("libtorch_cuda*")):
        raise NoCudaError("this torch has no CUDA")
    if folder := find_toolkit():
        return folder
    if named := named_toolkit():
        raise NoCudaError(f"{named[0]}={named[1]} is no {TOOLKIT}")
    packages = missing_nvcc()
    install = f", or pip install '{packages}'" if packages else ""
    raise NoCudaError(f"no {TOOLKIT} was found; set CUDA_HOME{install}")


def working_nvcc(folder):
    """The words that call nvcc, with the compiler that CXX names; they compile a probe."""
    nvcc = [folder / "bin" / "nvcc"]
    if flags_of("CXX"):  # the compiler alone, which may follow a launcher, as in "ccache g++ -m64"
        nvcc += ["-ccbin", [*takewhile(lambda word: not word.startswith("-"), compiler())][-1]]
    done = output_of([*nvcc, "-std=c++17", "-x", "cu", "-c", "-o", os.devnull, "-"], "#include <cuda_runtime.h>\n")
    if done.returncode:
        said = (done.stderr + done.stdout).strip() or "no reason"
        raise NoCudaError(f"nvcc in {folder} does not compile a probe: {said.splitlines()[0]}")
    return nvcc


def versions_of(folder):
    """The version of a toolkit and the architectures that it knows, as "9.0", ascending."""
    nvcc = folder / "bin" / "nvcc"
    version = re.search(r"release ([\d.]+)", output_of([nvcc, "--version"]).stdout)
    listed = re.findall(r"compute_(\d+)(\d)", output_of([nvcc, "--list-gpu-arch"]).stdout)
    if not version or not listed:
        raise NoCudaError(f"nvcc in {folder} does not tell its version and architectures")
    return version[1], sorted({f"{major}.{minor}" for major, minor in listed}, key=float)


def choose_architectures(known, toolkit):
    """Those that TORCH_CUDA_ARCH_LIST names; else those of the GPUs here, or all common ones of the `known`, the newest
    with PTX.

    Ends the build where the list cannot be met. `toolkit` is its name in messages.
    """
    wanted = re.findall(r"[^;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    here = sorted({gpu.compute_capability for gpu in nvidia_gpus()}, key=float)
    chosen = wanted or [nearest(gpu, known) for gpu in here] or [name for name in ARCHITECTURES if name in known]
    if malformed := [name for name in wanted if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name)]:
        sys.exit(f"pmm kernels: TORCH_CUDA_ARCH_LIST names {malformed[0]}; it must look like 8.6;9.0+PTX")
    unknown = [name for name in chosen if re.match(r"[\d.]+", name)[0] not in known]  # 9.0a is of 9.0
    knows = f"{toolkit} knows {' '.join(known)}"
    if wanted and unknown:
        sys.exit(f"pmm kernels: TORCH_CUDA_ARCH_LIST names {unknown[0]}, but {knows}")
    if unknown or not chosen:
        raise NoCudaError(f"{f'a GPU here is {unknown[0]}' if unknown else 'no GPU is here'}, and {knows}")
    return chosen if wanted else [*dict.fromkeys(chosen[:-1]), f"{chosen[-1].removesuffix('+PTX')}+PTX"]


def nearest(capability, known):
    """The architecture to compile for a GPU: its own, or for one that the toolkit does not know yet, PTX of the newest
    one before it."""
    older = [name for name in known if float(name) < float(capability)]
    return capability if capability in known or not older else f"{older[-1]}+PTX"


def build_library(target, objects):
    """Compile the kernels of the mix into the library `target`, by way of the folder `objects`; an older one goes
    first."""
    cxxflags, ldflags = flags_of("CXXFLAGS"), flags_of("LDFLAGS")
    try:
        cuda, why_not = find_cuda(), ""
    except NoCudaError as reason:
        cuda, why_not = None, str(reason)
    target.unlink(missing_ok=True)
    for folder in (target.parent, objects):
        folder.mkdir(parents=True, exist_ok=True)
    cuda_facts = {"cuda": cuda.version if cuda else None, "architectures": cuda.architectures if cuda else []}
    write_facts(objects / "built.h", SOURCES, **cuda_facts)
    say(f"CUDA {cuda.version} in {cuda.folder} for {' '.join(cuda.architectures)}" if cuda else f"no CUDA: {why_not}")

    sources = [*SOURCES.glob("cpu/*.cpp"), SOURCES / "bindings_cpu.cpp"]
    libraries = [f"-L{torch_folder() / 'lib'}", "-ltorch_cpu"]
    if cuda:
        sources += [*SOURCES.glob("cuda/*.cu"), SOURCES / "bindings_cuda.cpp"]
        libraries += ["-ltorch_cuda", *(f"-L{path}" for path in cuda.folder.glob("lib*"))]
        libraries += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    host = [*compiler(), *FLAGS, "-Wno-psabi", *STABLE_ABI, f"-I{objects}", "-isystem", torch_folder() / "include"]
    host += cxxflags

    commands = {source: cuda.command() if source.suffix == ".cu" else host for source in sources}
    compile_and_link(target, objects, commands, [*libraries, *ldflags])


def build_search(target, objects):
    """Compile the kernel of the search into the library `target`, as `build_library`."""
    cxxflags, ldflags = flags_of("CXXFLAGS"), flags_of("LDFLAGS")
    target.unlink(missing_ok=True)
    for folder in (target.parent, objects):
        folder.mkdir(parents=True, exist_ok=True)
    write_facts(objects / "built.h", SOURCES / "search")
    host = [*compiler(), *FLAGS, "-Wno-psabi", f"-I{objects}", *cxxflags]
    compile_and_link(target, objects, dict.fromkeys(sorted(SOURCES.glob("search/*.cpp")), host), ldflags)


def compile_and_link(target, objects, commands, libraries):
    """Compile each source with its command, several at once, and link them with `libraries` into `target`."""

    def compiled(source):
        made = objects / f"{source.parent.name}_{source.stem}.o"
        run(f"compiling {source.relative_to(ROOT)}", [*commands[source], "-c", source, "-o", made])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(compiled, commands))
    run("linking", [*compiler(), "-shared", *made, *libraries, "-o", target])
    say(f"built {target.name}")


def write_facts(path, sources, **more):
    """What a build of `sources` is, as a header: the library embeds it, and pmm/utils/build_info.py reads it there."""
    version = output_of([*compiler(), "--version"]).stdout.strip() or compiler()[0]
    facts = {"compiler": version.splitlines()[0], **more, "sources": sources_digest(sources)}
    path.write_text(f"#define PMM_BUILT {json.dumps(json.dumps(facts))}\n")


class BuildKernels(build_ext):
    """g++ and nvcc, called plainly: the sources need no generated code and no build system."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"  # no Python in it, so no Python version in its name

    def run(self):
        if self.inplace or self.editable_mode:  # whatever happens now, an old build does not pass for this one
            for name in LIBRARIES:
                (ROOT / self.get_ext_filename(name)).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext):
        target, objects = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp).absolute()
        if ext.name == "pmm._C":
            build_library(target, objects)
        else:
            build_search(target, objects / "search")


class Wheel(bdist_wheel):
    """One wheel for every Python 3: the kernels are bound to torch's stable ABI or to none, not to Python's."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform if self.distribution.ext_modules else "any"


def extensions():
    reason = missing()
    buildable = [] if reason else ["pmm._search"]
    reason = reason or missing_torch()
    if not reason:
        buildable.insert(0, "pmm._C")
    elif choice("PMM_REQUIRE_EXT", ("0", "1"), "0") == "1":
        sys.exit(f"pmm kernels: PMM_REQUIRE_EXT=1, but {reason}")
    else:
        say(f"{reason}; the package works without them, slower")
    return [Extension(name, []) for name in buildable]


if __name__ == "__main__":  # for build front ends, too: they execute this file under that name
    setup(
        packages=find_packages(include=["pmm", "pmm.*"]),
        package_data={"pmm": ["py.typed", "*.txt"], "pmm.bench.pages": ["*.html.j2"]},
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    )
