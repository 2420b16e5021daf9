"""A finished bench is judged again by its stored figures alone."""

import dataclasses
import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.bench.accuracy import crops_digest
from pmm.bench.schema import SCHEMA
from pmm.data.readers import read_dataset
from pmm.shipping.choice import NothingShips, chosen
from pmm.shipping.stored import check_same_data, judged_again
from pmm.utils.errors import InvalidFile, InvalidValue
from pmm.utils.files import sha256
from tests.bench.pages.sample_reports import GATES, REFERENCE, absent, dropped, ran, report_of
from tests.conftest import examples
from tests.refusals import refuses

TORCH = ran(REFERENCE, 18.0)
FP32 = ran("ort-cpu fp32", 8.0)
INT8 = ran("ort-cpu int8", 3.0, map_delta=-0.004, min_cosine=0.99)
FACTS = report_of(TORCH).checkpoint


@pytest.fixture
def stored(tmp_path):
    """A checkpoint, and a function that stores a report of it."""
    checkpoint = tmp_path / "best.pth"
    checkpoint.write_bytes(b"weights")
    facts = dataclasses.replace(FACTS, sha256=sha256(checkpoint))

    def store(*results, **changes):
        folder = tmp_path / "bench"
        folder.mkdir(exist_ok=True)
        report = report_of(*results, **{"checkpoint": facts, **changes})
        (folder / "report.json").write_text(report.to_json())
        return folder, report

    return checkpoint, store


def test_other_gates_choose_another_file_and_no_figure_changes(stored):
    checkpoint, store = stored
    folder, report = store(TORCH, FP32, INT8)
    loose, strict = (dataclasses.replace(GATES, max_map_drop=most) for most in (0.005, 0.003))
    for gates, expected in ((loose, INT8.name), (strict, FP32.name)):
        judged = judged_again(folder, checkpoint, gates, ["ort-cpu"])
        assert judged.results == report.results
        assert chosen(judged, ["ort-cpu"], "fastest").name == expected
    assert [failure.gate for failure in judged.gates.failures] == ["--max-map-drop"]
    assert judged.gates.max_map_drop == 0.003
    none = dataclasses.replace(strict, max_p95_ms=0.001)
    with refuses(NothingShips, hint="ort-cpu fp32 fails --max-p95-ms"):
        chosen(judged_again(folder, checkpoint, none, ["ort-cpu"]), ["ort-cpu"], "fastest")


@examples(60)
@given(st.floats(0, 0.01), st.floats(0, 0.01))
def test_a_result_passes_exactly_where_its_stored_drop_is_allowed(tmp_path_factory, drop, most):
    home = tmp_path_factory.mktemp("stored")
    checkpoint = home / "best.pth"
    checkpoint.write_bytes(b"weights")
    result = dataclasses.replace(INT8, map_delta=-drop)
    facts = dataclasses.replace(FACTS, sha256=sha256(checkpoint))
    (home / "report.json").write_text(report_of(TORCH, result, checkpoint=facts).to_json())
    judged = judged_again(home, checkpoint, dataclasses.replace(GATES, max_map_drop=most), ["ort-cpu"])
    assert ("--max-map-drop" in [failure.gate for failure in judged.gates.failures]) == (drop > most)


def test_failures_of_the_earlier_gates_are_gone(stored):
    checkpoint, store = stored
    folder, _ = store(TORCH, INT8, gates=dataclasses.replace(GATES, failures=(dropped(INT8),)))
    assert judged_again(folder, checkpoint, GATES, ["ort-cpu"]).gates.failures == ()


def test_what_was_not_measured_does_not_ship(stored):
    checkpoint, store = stored
    folder, _ = store(TORCH, absent("openvino fp32", "unavailable", "not installed"))
    with refuses(NothingShips, hint="--backends"):
        chosen(judged_again(folder, checkpoint, GATES, ["openvino"]), ["openvino"], "fastest")
    with refuses(NothingShips, hint="none was measured, but torch"):
        chosen(judged_again(folder, checkpoint, GATES, ["ort-cpu"]), ["ort-cpu"], "fastest")
    unknown = dataclasses.replace(INT8, map_delta=None)
    folder, _ = store(TORCH, unknown)
    with refuses(NothingShips, hint="could not be compared"):
        chosen(judged_again(folder, checkpoint, GATES, ["ort-cpu"]), ["ort-cpu"], "fastest")


def test_another_model_no_report_and_another_version_are_refused(stored, tmp_path):
    checkpoint, store = stored
    folder, _ = store(TORCH, INT8)
    other = tmp_path / "other.pth"
    other.write_bytes(b"other weights")
    with refuses(InvalidFile, sha256(other)[:12], path=folder / "report.json", hint="--report"):
        judged_again(folder, other, GATES, ["ort-cpu"])
    with refuses(InvalidFile, "report.json", path=tmp_path):
        judged_again(tmp_path, checkpoint, GATES, ["ort-cpu"])
    values = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({**values, "schema": "pmm-bench-1"}))
    with refuses(InvalidFile, SCHEMA, path=folder / "report.json"):
        judged_again(folder, checkpoint, GATES, ["ort-cpu"])


def test_the_folder_of_the_bench_may_have_been_moved(stored, tmp_path):
    checkpoint, store = stored
    gone = tmp_path / "gone" / "artifacts" / "model.onnx"
    folder, _ = store(TORCH, dataclasses.replace(INT8, artifact=str(gone)))
    assert judged_again(folder, checkpoint, GATES, []).results[1].artifact == str(gone)
    (folder / "artifacts").mkdir()
    (folder / "artifacts" / "model.onnx").touch()
    moved = judged_again(folder, checkpoint, GATES, []).results[1]
    assert moved.artifact == str(folder / "artifacts" / "model.onnx")


def test_another_data_set_is_refused(people, trained, tmp_path):
    split = read_dataset("synthetic", str(people))
    report = report_of(TORCH)
    digest = crops_digest((*split.query, *split.gallery))
    report = dataclasses.replace(report, dataset=dataclasses.replace(report.dataset, name="synthetic", digest=digest))
    check_same_data(report, trained, "", "")
    check_same_data(report, trained, "synthetic", str(people))
    copy = shutil.copytree(people, tmp_path / "copy")
    check_same_data(report, trained, "", str(copy))
    crop = sorted((copy / "query").iterdir())[0]
    crop.chmod(0o644)
    crop.write_bytes(sorted((copy / "query").iterdir())[1].read_bytes())
    with refuses(InvalidFile, path=copy, hint="--report"):
        check_same_data(report, trained, "", str(copy))
    with refuses(InvalidValue, "market1501", "synthetic"):
        check_same_data(report, trained, "market1501", "")
