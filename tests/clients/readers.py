"""The foreign programs that `make clients` installs, each as a command that embeds: COMMAND MODEL.onnx OUT IMAGE..."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.conftest import ROOT

EXAMPLES = ROOT / "docs/examples"


def client_folder(name: str) -> Path:
    """Of the environment `name`. Fails if it was not made."""
    folder = ROOT / os.environ.get("PMM_CLIENTS", ".venv-clients") / name
    assert (folder / ".installed").exists(), f"{folder} is missing: make clients"
    return folder


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    words = list(map(str, command))
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, **env})


def python_client(environment: str, library: str) -> list[str | Path]:
    return [client_folder(environment) / "bin/python", "-I", EXAMPLES / "client.py", library]


def node_client(home: Path) -> list[str | Path]:
    """Run in `home`, where node finds the packages beside the example."""
    if not (home / "node_modules").exists():
        (home / "node_modules").symlink_to(client_folder("node") / "node_modules")
        shutil.copy(EXAMPLES / "client.mjs", home)
    return ["node", home / "client.mjs"]


def opencv_cpp_client(home: Path, build: str) -> list[str | Path]:
    """Compiled in `home` by the command `build`, as if Debian's OpenCV were installed."""
    folder = client_folder("opencv-cpp")
    libraries = str(folder / "lib")
    if not (home / "opencv_client").exists():
        shutil.copy(EXAMPLES / "opencv_client.cpp", home)
        headers = str(folder / "usr/include/opencv4")
        paths = {"CPLUS_INCLUDE_PATH": headers, "LIBRARY_PATH": libraries, "LD_LIBRARY_PATH": libraries}
        done = run(*build.split(), cwd=home, **paths)
        assert done.returncode == 0, done.stderr
    return ["env", f"LD_LIBRARY_PATH={libraries}", home / "opencv_client"]


def boxmot_client() -> list[str | Path]:
    return [client_folder("boxmot") / "bin/python", ROOT / "tests/clients/boxmot_client.py"]
