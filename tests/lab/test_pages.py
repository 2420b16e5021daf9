"""The pages that are made: every command, the errors of the sources, and results that were proved before timing."""

import json

import pytest

from bench.lab.pages.benchmarks import DEMO, TABLES, benchmarks_page
from bench.lab.pages.cli import cli_page
from bench.lab.pages.errors import errors_page, messages
from pmm.__main__ import COMMANDS
from tests.conftest import ROOT

RESULTS = ROOT / "bench/results"


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def test_every_command_has_its_usage_and_its_flags():
    page = cli_page()
    for name in COMMANDS:
        section = page.split(f"## pmm {name} {{")[1].split("\n## ")[0]
        assert f"pmm {name}" in section.split("```text")[1]
    assert "| `--device DEVICE` |" in page
    assert "| `-o, --out DIR` |" in page


def test_errors_are_read_from_the_sources():
    found = list(messages())
    assert len(found) > 300
    page = errors_page()
    assert "cannot be extended: its phases are shares of its epochs | start another run, with more --epochs |" in page
    assert "| an ONNX file without a manifest |" in page


@pytest.mark.parametrize(("title", "name"), [(title, name) for title, name, _, _ in TABLES])
def test_each_table_is_of_a_result_and_names_its_machine(title, name):
    section = benchmarks_page(RESULTS).split(f"## {title}\n")[1].split("\n## ")[0]
    environment = result(name)["environment"]
    assert f"{environment['cpu']}, {environment['cores']} cores" in section
    assert f"commit {environment['commit']}; `bench/results/{name}.json`" in section
    assert section.count("\n| ") >= 3


def test_what_is_timed_was_proved_first():
    assert result(DEMO)["gates"]["failures"] == []
    assert result("2026-11-22-amd-epyc-2-cores-ops-n32-fp32")["equal"]
    assert result("2026-11-30-intel-xeon-2-cores-saving")["equal"]
    trained, random = result("2026-12-01-amd-epyc-2-cores-ranking")["market"]["settings"]
    assert trained["off_by"] <= 1e-9 >= random["off_by"]
    assert not any(setting["wrong"] for setting in result("2026-11-28-amd-epyc-2-cores-loading")["settings"])
    checks = result("2026-11-30-intel-xeon-2-cores-gallery-search")["checks"]
    assert all(check["other_rows"] == 0 for check in checks.values())
    for each in result("2026-11-23-amd-epyc-2-cores-bench-paper")["results"]:
        assert next(timing for timing in each["batches"] if timing["batch"] == 8)["flags"] == []
