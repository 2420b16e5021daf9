"""The report that leaves the machine: no folder of it, and no people where they are left out."""

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.bench.schema import GateFailure, read_report
from pmm.shipping.pages import FOLDERS, without_folders, without_people, write_pages
from tests.bench.pages.sample_reports import GATES, REFERENCE, absent, lost, ran, report_of
from tests.conftest import examples

ROOT = "/home/ann/my data/market"
CROPS = [f"{ROOT}/query/000{k}_c1s1_000001_00.jpg" for k in range(9)]
SENTENCES = ["{}", "({})", "'{}': no", "see {}", "{}; {}", "a: {}"]
PARTS = st.text("abcXYZ019._-é", min_size=1, max_size=8)


@pytest.fixture
def report():
    """With paths wherever a bench writes them."""
    int8 = ran("ort-cpu int8", 3.0)
    int8 = dataclasses.replace(
        int8, artifact="/home/ann/runs/a/model.onnx", worst_crop=CROPS[0], worst_queries=lost(CROPS, 3)
    )
    failed = absent(
        "openvino fp32", "failed", "/home/ann/.cache/x.bin: cannot be read, nor /var/tmp/y; see /etc/z.conf"
    )
    said = f"the worst embedding ({CROPS[0]}) has cosine 0.9 with the reference's; at least 0.97 is required for int8"
    gates = dataclasses.replace(GATES, failures=(GateFailure(result=int8.name, gate="--min-cosine", message=said),))
    base = report_of(ran(REFERENCE, 18.0), int8, failed, gates=gates)
    return dataclasses.replace(
        base,
        dataset=dataclasses.replace(base.dataset, root=ROOT),
        checkpoint=dataclasses.replace(base.checkpoint, path="/home/ann/runs/a/best.pth"),
    )


@pytest.mark.parametrize("pictures", [True, False])
def test_no_file_of_it_names_a_folder_of_the_machine(report, tmp_path, pictures):
    write_pages(report, tmp_path / "none", tmp_path, pictures=pictures)
    files = sorted(path for path in tmp_path.iterdir() if path.is_file())
    assert [path.name for path in files] == ["report.html", "report.json", "report.md"]
    for path in files:
        text = path.read_text()
        assert not re.search(r"/home|ann/|/var|my data|\.cache", text)
        assert ("0000_c1s1" in text.replace("\\", "")) == pictures
    shown = read_report(tmp_path / "report.json")
    assert shown.checkpoint.path == "best.pth"
    assert shown.results[1].artifact == "model.onnx"
    assert shown.results[2].reason == "x.bin: cannot be read, nor y; see z.conf"
    if pictures:
        assert shown.results[1].worst_crop == "query/0000_c1s1_000001_00.jpg"


def test_all_figures_stay(report):
    def figures(each):
        return [(r.name, r.mAP, r.min_cosine, r.per_query_ap, r.batches, r.artifact_sha256) for r in each.results]

    shown = without_folders(without_people(report))
    assert figures(shown) == figures(report)
    assert shown.dataset.digest == report.dataset.digest
    assert [failure.gate for failure in shown.gates.failures] == ["--min-cosine"]
    assert "0.9 with the reference" in shown.gates.failures[0].message
    assert json.loads(shown.to_json())["environment"] == json.loads(report.to_json())["environment"]


def test_lost_queries_and_ranked_lists_are_shown_where_they_may_be(report, people, tmp_path):
    from PIL import Image

    crops = [str(path) for path in sorted((people / "query").iterdir())[:9]]
    bad = dataclasses.replace(report.results[1], worst_queries=lost(crops, 3))
    report = dataclasses.replace(
        report,
        results=(report.results[0], bad, report.results[2]),
        dataset=dataclasses.replace(report.dataset, root=str(people)),
    )
    Image.new("RGB", (20, 10), (200, 0, 0)).save(tmp_path / "ranked-lists.png")
    for pictures in (True, False):
        out = tmp_path / str(pictures)
        out.mkdir()
        write_pages(report, tmp_path, out, pictures=pictures)
        assert (out / "ranked-lists.png").exists() == pictures
        assert (out / "report.html").read_text().count("data:image/jpeg") == 2 * pictures


@examples(200)
@given(
    st.lists(PARTS, min_size=2, max_size=5), st.sampled_from(["{}", "({})", "'{}': no", "see {}", "{}; {}", "a: {}"])
)
def test_of_an_absolute_path_the_name_stays(parts, sentence):
    path = "/" + "/".join(parts)
    assert FOLDERS.sub("", sentence.format(path, path)) == sentence.format(parts[-1], parts[-1])


@pytest.mark.parametrize(
    "text", ["images/s", "p50/p95/p99", "1 / 2 / 3", "-/+", "https://example.org/a/b", "query/a/b.jpg", "a/b", "/x", ""]
)
def test_what_is_no_absolute_path_stays(text):
    assert FOLDERS.sub("", text) == text
