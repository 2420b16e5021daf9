"""A wheel with the CPU kernels: one for every Python, and it works away from the sources."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow
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


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
def test_the_wheel_of_the_source_archive_serves_every_python_and_brings_its_kernels(tmp_path):
    source = tmp_path / "source"  # as a user has it: what is tracked, nothing built
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.split():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    sdist = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path / "sdist"]
    subprocess.run(sdist, cwd=source, check=True, env=_env(PYTHONPATH=""))
    (archive,) = (tmp_path / "sdist").glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    quick = _env(PMM_BUILD_CUDA="0", CXXFLAGS="-O0 -DPMM_CLONES=")
    subprocess.run([*pip, "wheel", *options, "-w", tmp_path / "wheels", archive], check=True, env=quick)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    assert "pmm/_C.so" in zipfile.ZipFile(wheel).namelist()

    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", tmp_path / "there", wheel], check=True)
    done = subprocess.run(
        [sys.executable, "-c", MIX],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=_env(PYTHONPATH=str(tmp_path / "there"), PMM_REQUIRE_EXT="1"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["library"] == str(tmp_path / "there/pmm/_C.so")
    assert found["compiled"]
    assert found["loaded"] == [False, True]  # by the first mix, not by the import


def _env(**changes):
    return {**os.environ, **changes}
