"""bench.lab.camera_threshold: the report and its table."""

import json

from tests.conftest import run_here


def test_the_report(tmp_path):
    out = tmp_path / "thresholds.json"
    done = run_here("-m", "bench.lab.camera_threshold", "--sites", "2", "--out", out, PMM_FAST="1")
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["schema"] == "pmm-camera-threshold-2"
    assert len(report["rows"]) == 8 * 2 * 2
    for row in report["rows"]:
        assert 0 <= row["held"] <= row["sites"] - row["abstained"] <= 2
        assert f"| {row['site']} | {row['stretches']} | " in done.stdout
    assert "100%" in done.stdout, "10 stretches are too few"
