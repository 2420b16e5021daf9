"""Twenty kills at random moments: the run ends as one left in peace, and no checkpoint is ever unreadable."""

import json

import pytest

from pmm.bench.kills import summary
from tests.conftest import run_python

pytestmark = pytest.mark.slow


def test_twenty_kills(tmp_path):
    done = run_python("bench/kills.py", "--kills", "20", "--out", tmp_path / "kills", "--epochs", "24")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "kills" / "kills.json").read_text())
    assert len(report["kills"]) == 20
    assert report["equal"] is True
    assert report["unreadable"] == []
    assert sum(kill["writing"] for kill in report["kills"]) >= 3
    assert sum(kill["step"] > 0 for kill in report["kills"]) >= 3  # not at the ends of epochs alone
    assert summary(report) in done.stdout
