"""Every command takes a run of every method; two methods in `make test`, all of them for each change."""

import json
import shutil

import pytest

from pmm.models.registry import METHODS
from tests.conftest import run_here

QUICK = ("pmm", "bdb")


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in METHODS]
)
def test_the_commands_take_its_runs(method, shared, people, tmp_path):
    best = shared.run(method)
    run = shutil.copytree(best.parent, tmp_path / "run", copy_function=shutil.copyfile)
    again = run_here("-m", "pmm.train", "--out", run, "--resume", "--device", "cpu")
    assert "the run is finished (2 epochs)" in again.stdout, again.stderr
    done = run_here("-m", "pmm", "evaluate", best, "--dataset", "synthetic", "--root", people)
    assert "mAP" in done.stdout, done.stderr
    done = run_here("-m", "pmm", "info", best, "--json")
    assert json.loads(done.stdout)["file"]["method"] == method, done.stderr
    done = run_here("export/to_onnx.py", best, "-o", tmp_path / "best.onnx")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("min cosine ")[1].split()[0]) >= 0.99999
