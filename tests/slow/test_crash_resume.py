"""Kills at random moments: the run ends as one left in peace, and no checkpoint is ever unreadable."""

import json

import pytest

from bench.lab.crash_resume import summary
from tests.conftest import run_python

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("kills", "epochs", "least"),
    [(6, 6, 1), pytest.param(20, 24, 3, marks=pytest.mark.full)],
    ids=["6 kills", "20 kills"],
)
def test_kills(tmp_path, kills, epochs, least):
    done = run_python(
        "-m", "bench.lab.crash_resume", "--kills", str(kills), "--out", tmp_path / "kills", "--epochs", str(epochs)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "kills" / "kills.json").read_text())
    assert len(report["kills"]) == kills
    assert report["equal"] is True
    assert report["unreadable"] == []
    assert sum(kill["writing"] for kill in report["kills"]) >= least
    assert sum(kill["step"] > 0 for kill in report["kills"]) >= least  # not at the ends of epochs alone
    assert summary(report) in done.stdout
