"""The table of resizes: what was measured is what the contract and the page say, and still so."""

import dataclasses
import json
import re

import pytest

from bench.lab.resizes import SCHEMA, measure
from bench.lab.resizes import markdown as table_of
from pmm.artifacts.client_contract import client_contract
from pmm.artifacts.resize_calls import OTHER, RESIZE_CALLS, verdict
from pmm.data.crops import load_crops
from pmm.utils.errors import InvalidFile
from tests.artifacts.test_manifest import MANIFEST, STATISTICS, THRESHOLDS
from tests.conftest import ROOT
from tests.refusals import refuses

PAGE = (ROOT / "docs" / "contract.md").read_text()
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"


@pytest.fixture(scope="module")
def report():
    (path,) = re.findall(r"\(\.\./(bench/results/[\w-]+\.json)\)", PAGE)
    return json.loads((ROOT / path).read_text())


def test_the_contract_and_the_page_have_the_figures_of_the_report(report):
    assert report["schema"] == SCHEMA
    measured = {
        name: [{key: value for key, value in dataclasses.asdict(call).items() if value is not None} for call in calls]
        for name, calls in RESIZE_CALLS.items()
    }
    assert json.loads(json.dumps(measured)) == report["resizes"]
    assert PAGE.split(BEGIN)[1].split(END)[0] == table_of(report["resizes"])


def test_what_is_equal_and_what_is_another_resize_is_so_on_other_crops(people):
    pytest.importorskip("openvino")
    crops = load_crops(sorted((people / "query").glob("*.jpg"))[:12:6], 128, 64)
    found_on = measure(crops)
    for name, rows in found_on.items():
        for call, row in zip(RESIZE_CALLS[name], rows, strict=True):
            for direction in ("shrunk", "enlarged") if call.library not in ("sharp", "DALI") else ():
                said, found = verdict(getattr(call, direction)), verdict(row[direction])
                if said.startswith("equal"):
                    assert found.startswith("equal"), (name, row)
                else:  # how far it is depends on the crop, but not whether it is another
                    assert row[direction][1] > 2, (name, row)
    assert any(verdict(row["shrunk"]) == OTHER for row in found_on["PIL's bilinear"] if "shrunk" in row)


def test_a_folder_without_sharp_is_refused(people, tmp_path):
    crops = load_crops(sorted((people / "query").glob("*.jpg"))[:1], 128, 64)
    with refuses(InvalidFile, "sharp", path=tmp_path / "node_modules" / "sharp" / "package.json"):
        measure(crops, tmp_path)


def test_each_key_of_the_page_is_one_of_the_table():
    whole = client_contract(dataclasses.replace(MANIFEST, crop_statistics=STATISTICS, thresholds=(THRESHOLDS,)))
    keys = re.findall(r"^\| `([\w.]+)` \|", PAGE, re.M)
    assert {key.split(".")[0] for key in keys} == whole.keys()
    for key in keys:
        table = whole
        for part in key.split("."):
            table = table[part]
    assert len(PAGE.encode()) <= 6 << 10
