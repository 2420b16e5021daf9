"""Kills at random moments: the run ends as one left in peace, and no checkpoint is ever unreadable."""

import json

import pytest

from bench.lab.crash_resume import summary
from tests.conftest import run_python

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("crashes", "epochs", "least"),
    [(6, 6, 1), pytest.param(20, 24, 5, marks=pytest.mark.full)],
    ids=["6 crashes", "20 crashes"],
)
def test_crashes(tmp_path, crashes, epochs, least):
    done = run_python(
        "-m",
        "bench.lab.crash_resume",
        "--crashes",
        str(crashes),
        "--out",
        tmp_path / "crashes",
        "--epochs",
        str(epochs),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "crashes" / "crash_resume.json").read_text())
    assert len(report["crashes"]) == crashes
    assert report["equal"] is True
    assert report["unreadable"] == []
    assert sum(crash["writing"] for crash in report["crashes"]) >= least
    assert sum(crash["step"] > 0 for crash in report["crashes"]) >= least  # not at the ends of epochs alone
    assert summary(report) in done.stdout
