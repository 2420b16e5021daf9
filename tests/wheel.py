"""The wheel as a user gets it, and environments that have it and cannot see this clone. Needs no network."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT
from tests.store import Store

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]

RUN_EACH = """
import gc, json, os, runpy, sys
import PRELOAD
gc.freeze()  # the others need not look at all that again when they end

def run(program, *words):
    if program != "python":
        sys.argv = [os.path.join(os.path.dirname(sys.executable), program), *words]
        runpy.run_path(sys.argv[0], run_name="__main__")
    elif words[0] == "-m":
        sys.argv = [*words[1:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        assert words[0] == "-c"
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})

said = []
for words in json.loads(sys.argv[1]):
    log = os.open("log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND)
    if not (child := os.fork()):
        os.dup2(log, 1), os.dup2(log, 2)
        sys.exit(run(*words))
    os.close(log)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said.append(open("log").read())
    if code:
        sys.exit(f"{words} ended with {code}:\\n{said[-1]}")
print(json.dumps(said))
"""


def built_wheel(store: Store) -> Path:
    """Built once, from the source archive of what git lists; its kernels are compiled fast, and run slowly."""
    return next(store.get("wheel", _build).glob("*.whl"))


def source_archive(store: Store) -> Path:
    """What the wheel was built from."""
    return next(store.get("wheel", _build).glob("*.tar.gz"))


def _build(home: Path) -> None:
    work = home.with_name("wheel-source")
    source = work / "source"  # as a user has it: what is tracked, nothing built
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    sdist = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", home]
    subprocess.run(sdist, cwd=source, check=True, env={**os.environ, "PYTHONPATH": ""})
    (archive,) = home.glob("*.tar.gz")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    quick = {**os.environ, "PMM_BUILD_CUDA": "0", "CXXFLAGS": "-O0 -DPMM_CLONES="}
    subprocess.run([*PIP, "wheel", *options, "-w", home, archive], check=True, env=quick)
    shutil.rmtree(work)


def _installed(name: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:  # ONNX Runtime has another name where it serves GPUs
        return metadata.distribution(f"{name}-gpu")


class Environment:
    """A virtual environment, for commands that run outside the clone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.python = folder, folder / "bin" / "python"

    @classmethod
    def with_wheel(cls, folder: Path, wheel: Path, python: str | Path = sys.executable) -> "Environment":
        """One of that `python` that has the wheel and no other package yet."""
        subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
        made = cls(folder)
        pip = [*PIP, "--python", made.python, "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run([*pip, wheel], check=True)
        return made

    @property
    def packages(self) -> Path:
        """Its site-packages."""
        return next(self.folder.glob("lib/python3.*/site-packages"))

    def add_all(self, other: Path = Path(sys.prefix)) -> None:
        """All packages of another environment (default: the tests'), but this clone: .pth files in it do not count."""
        (self.packages / "other.pth").write_text(str(Environment(other).packages))

    def add(self, requirements: Iterable[str]) -> list[str]:
        """Of those packages, what `pip install REQUIREMENTS` would install. Returns their names."""
        waiting, added = [Requirement(line) for line in requirements], {}
        while waiting:
            wanted = waiting.pop()
            name = canonicalize_name(wanted.name)
            if name in added or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
                continue
            package = added[name] = _installed(name)
            assert package.version in wanted.specifier, f"{name} {package.version}, and {wanted} is wanted"
            waiting += map(Requirement, package.requires or ())
            for top in {file.parts[0] for file in package.files or () if file.parts[0] != ".."}:
                if top != "__pycache__" and not (self.packages / top).exists():
                    (self.packages / top).symlink_to(package.locate_file(top))
        return sorted(added)

    def run(self, *words: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
        """`pmm ...` or `python ...`, as a user of this environment runs it."""
        program, *rest = map(str, words)
        command = [str(self.folder / "bin" / program), *rest]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, env=self._variables(env))

    def run_all(self, commands: Sequence[Sequence[str]], cwd: Path, preload: str, **env: str) -> list[str]:
        """As `run`, one after another, each forked from one process that has loaded the modules `preload`.

        Returns what each has printed. Raises AssertionError with that of the first that fails.
        """
        script = RUN_EACH.replace("PRELOAD", preload)
        done = self.run("python", "-c", script, json.dumps([list(words) for words in commands]), cwd=cwd, **env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def _variables(self, env: dict[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PMM_"))}
        return {**kept, "PATH": os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"]]), **env}
