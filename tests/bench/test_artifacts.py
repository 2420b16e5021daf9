import pytest

from pmm.artifacts.dataset_location import DatasetLocation
from pmm.bench import artifacts
from pmm.export.options import VerifyOptions


@pytest.mark.parametrize(("trained_on", "given"), [("", True), ("gone", True), (".", False)])
def test_it_calibrates_on_the_data_set_of_the_bench_where_the_own_one_is_unknown(
    monkeypatch, tmp_path, trained_on, given
):
    root = str(tmp_path / trained_on) if trained_on else ""
    monkeypatch.setattr(artifacts, "training_dataset", lambda path: DatasetLocation("market1501", root))
    monkeypatch.setattr(artifacts, "export_onnx_cached", lambda *args: args)
    verification = VerifyOptions(verify_root="data", verify_dataset="msmt17")
    source = tmp_path / "best.pth"
    source.write_bytes(b"")
    _, _, recipe, _ = artifacts._onnx(source, tmp_path / "stem", "int8", "cpu", verification)
    assert (recipe.calibration_root, recipe.calibration_dataset) == (("data", "msmt17") if given else ("", ""))
