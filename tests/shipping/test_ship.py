"""What goes into the folder that is handed over, and what it says of itself."""

import dataclasses
import json

import pytest

from pmm.artifacts.artifact import manifest_path, selftest_paths
from pmm.artifacts.bundle import SEAL, read_bundle
from pmm.artifacts.manifest import Manifest
from pmm.export.options import ExportOptions
from pmm.shipping import ship as module
from pmm.shipping.choice import NothingShips, backends_of, chosen
from pmm.shipping.ship import CARD, THRESHOLDS, check_place, write_shipment
from pmm.utils.errors import CannotWrite, InvalidFile, InvalidValue
from pmm.utils.files import sha256
from tests.bench.pages.sample_reports import GATES, REFERENCE, dropped, ran, report_of
from tests.conftest import assert_one_line_error, run_here
from tests.refusals import refuses

TORCH = ran(REFERENCE, 18.0)
FP32 = ran("ort-cpu fp32", 8.0)
INT8 = ran("ort-cpu int8", 3.0)
ENGINE = ran("tensorrt fp16", 1.0, device="cuda")


def test_the_fastest_or_the_smallest_that_keeps_the_gates_is_chosen():
    report = report_of(TORCH, FP32, INT8, ENGINE)
    assert chosen(report, ["ort-cpu"], "fastest") == INT8
    assert chosen(report, ["tensorrt"], "fastest") == ENGINE
    large = dataclasses.replace(INT8, artifact_bytes=99_000_000)
    assert chosen(report_of(TORCH, FP32, large), ["ort-cpu"], "smallest") == FP32
    failing = dataclasses.replace(GATES, failures=(dropped(INT8),))
    assert chosen(report_of(TORCH, FP32, INT8, gates=failing), ["ort-cpu"], "fastest") == FP32


def test_where_none_keeps_the_gates_it_says_which_and_how_near():
    failing = dataclasses.replace(GATES, failures=(dropped(INT8),))
    with refuses(NothingShips, hint="ort-cpu int8 fails --max-map-drop (mAP fell by"):
        chosen(report_of(TORCH, INT8, gates=failing), ["ort-cpu"], "fastest")
    with refuses(NothingShips, hint="of ort-cpu none was measured, but tensorrt, torch"):
        chosen(report_of(TORCH, ENGINE), ["ort-cpu"], "fastest")


def test_an_adopted_onnx_file_that_is_its_own_reference_counts():
    reference = dataclasses.replace(FP32, name="ort-cpu fp32")
    report = report_of(reference, reference="ort-cpu fp32")
    assert chosen(report, ["ort-cpu"], "fastest") == reference


def test_targets():
    assert backends_of("cpu")[0] == "ort-cpu"
    assert backends_of("ort-cpu") == ["ort-cpu"]
    with refuses(InvalidValue, "phone", "cpu", "gpu", "openvino"):
        backends_of("phone")


@pytest.fixture
def measured(shared, tmp_path):
    """A report whose int8 result is a file of ours."""
    artifact = shared.onnx(ExportOptions(precision="int8", target="cpu"))
    result = dataclasses.replace(
        INT8, artifact=str(artifact), artifact_sha256=sha256(artifact), artifact_bytes=artifact.stat().st_size
    )
    pages = tmp_path / "report"
    pages.mkdir()
    return report_of(TORCH, FP32, result), pages, result


def test_the_folder_holds_all_that_belongs_to_the_file(measured, tmp_path):
    report, pages, result = measured
    shipped = write_shipment(tmp_path / "new" / "out", report, pages, result)
    folder = shipped.folder
    assert shipped.verdict.passed
    artifact = folder / "model.onnx"
    beside = [path.name for path in (artifact, manifest_path(artifact), *selftest_paths(artifact))]
    names = {*beside, CARD, THRESHOLDS, SEAL, "report"}
    assert {path.name for path in folder.iterdir()} == names
    assert set(read_bundle(folder).files) == {
        *names - {SEAL, "report"}, "report/report.html", "report/report.json", "report/report.md"
    }  # fmt: skip
    assert json.loads((folder / "report" / "report.json").read_text())["results"][2]["artifact"] == artifact.name
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    manifest = Manifest.from_json(manifest_path(artifact).read_text(), artifact)
    (thresholds,) = manifest.thresholds
    stored = json.loads((folder / THRESHOLDS).read_text())
    assert stored["points"] == [dataclasses.asdict(point) for point in thresholds.points]
    card = (folder / CARD).read_text()
    bound = "mAP falls by at most 0.50 points"
    for fact in (
        f"{100 * result.mAP:.1f} %",
        "drawn by a program",
        f"{thresholds.points[0].distance:.4f}",
        "uint8",
        bound,
    ):
        assert fact in card


def test_a_file_that_changed_since_the_bench_is_refused_and_nothing_is_left(measured, tmp_path):
    report, pages, result = measured
    changed = dataclasses.replace(result, artifact_sha256="0" * 64)
    out = tmp_path / "new" / "out"
    with refuses(InvalidFile, "changed since", path=result.artifact):
        write_shipment(out, report, pages, changed)
    assert not list(out.parent.iterdir())


def test_only_a_folder_of_ours_is_replaced(measured, tmp_path):
    report, pages, result = measured
    out = tmp_path / "out"
    check_place(out)
    write_shipment(out, report, pages, result)
    with refuses(CannotWrite, hint="--overwrite", path=out):
        check_place(out)
    check_place(out, overwrite=True)
    write_shipment(out, report, pages, result)
    (out / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with refuses(CannotWrite, "did not write", path=out):
            check_place(out, overwrite=overwrite)


def test_what_fails_its_own_selftest_replaces_nothing(measured, tmp_path, monkeypatch):
    report, pages, result = measured
    out = tmp_path / "out"
    write_shipment(out, report, pages, result)
    passing = module.run_selftest
    monkeypatch.setattr(
        module, "run_selftest", lambda *args, **kwargs: dataclasses.replace(passing(*args, **kwargs), passed=False)
    )
    with refuses(NothingShips, "its own selftest", path=result.artifact):
        write_shipment(out, report, pages, result)
    assert read_bundle(out).artifact == "model.onnx"


@pytest.mark.parametrize("flag", ["--max-fmr-factor", "--max-tpr-drop"])
def test_gates_of_a_gallery_are_no_part_of_it(trained, flag):
    assert_one_line_error(run_here("-m", "pmm", "ship", trained, "--target", "cpu", flag, "2"), flag)


@pytest.mark.slow
def test_from_the_checkpoint_to_an_accepted_folder(trained, people, tmp_path):
    out = tmp_path / "out"
    words = ("--target", "ort-cpu", "--precisions", "fp32", "--root", people, "-o", out)
    done = run_here("-m", "pmm", "ship", trained, *words, PMM_FAST="1")
    assert done.returncode == 0, done.stderr
    assert "ort-cpu fp32, passed" in done.stdout
    assert run_here("-m", "pmm", "selftest", out).returncode == 0
    other = read_bundle(out).artifact
    (out / other).write_bytes((out / other).read_bytes() + b" ")
    done = run_here("-m", "pmm", "selftest", out)
    assert_one_line_error(done, "model.onnx", "SHA-256")
    again = ("--target", "cpu", "-o", out, "--overwrite", "--report", f"{out}-bench")
    done = run_here("-m", "pmm", "ship", trained, *again, "--min-cosine", "1", PMM_FAST="1")
    assert_one_line_error(done, "no candidate may ship", "ort-cpu fp32 fails --min-cosine", f"--report {out}-bench")
    assert (out / other).read_bytes().endswith(b" ")  # as it was
    done = run_here("-m", "pmm", "ship", trained, *again, "--no-pictures", "--root", people)
    assert done.returncode == 0, done.stderr
    assert read_bundle(out).artifact == other
    assert not [path for path in out.rglob("*") if path.is_file() and str(tmp_path).encode() in path.read_bytes()]
    done = run_here("-m", "pmm", "ship", trained, *words, "--overwrite", "--resume", PMM_FAST="1")
    assert_one_line_error(done, "the bench is finished", f"--report {out}-bench")


@pytest.mark.parametrize("flag", ["--batches", "--samples", "--seconds", "--precisions", "--device"])
def test_a_report_measures_nothing(trained, tmp_path, flag):
    words = ("ship", trained, "--target", "cpu", "--report", tmp_path, flag, "cpu" if flag == "--device" else "7")
    assert_one_line_error(run_here("-m", "pmm", *words), "--report", flag)
