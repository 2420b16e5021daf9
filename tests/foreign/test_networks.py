"""Networks of other toolkits: adopted to the bit, exported in fp32 and fp16 with the gates, and built into engines."""

import numpy as np
import pytest

from pmm.artifacts.onnx_file import read_onnx
from pmm.data.crops import load_crops
from pmm.data.readers import read_dataset
from pmm.export.aoti import export_aoti
from pmm.export.onnx import export_onnx
from pmm.export.options import MIN_COSINE, MIN_SHARE, MIN_SHARE_WITH_KEPT, EngineOptions, ExportOptions, VerifyOptions
from pmm.export.trt import engine_from_onnx
from pmm.runtime.open import open_runner
from tests.foreign.conftest import FOLDER, run_there
from tests.foreign.networks import NETWORKS

IN_SLOW = "mobilenetv4"
EACH = [pytest.param(name, marks=pytest.mark.slow if name == IN_SLOW else pytest.mark.full) for name in NETWORKS]


@pytest.mark.parametrize("name", EACH)
def test_it_is_adopted_to_the_bit_and_exported(name, adopted, people, tmp_path):
    network = NETWORKS[name]
    files = adopted(name, network)
    samples = read_dataset("market1501", people).query[:6]
    with open_runner(files.path, device="cpu") as runner:
        crops = load_crops([sample.path for sample in samples], runner.preprocessing)
        embeddings = runner(crops)
        np.save(tmp_path / "images.npy", runner.preprocessing.normalise(crops))
    code = FOLDER / "user_code.py"
    out = tmp_path / "theirs.npy"
    run_there(network, code, "embed", network.source, files.weights, tmp_path / "images.npy", out)
    np.testing.assert_array_equal(embeddings, np.load(out))

    verification, exports = VerifyOptions(verify_root=str(people), verify_dataset="market1501"), {}
    for precision in ("fp32", "fp16"):
        exports[precision] = tmp_path / f"{precision}.onnx"
        options = ExportOptions(precision=precision)
        manifest = export_onnx(files.path, exports[precision], options, verification).manifest
        assert manifest.precision_found == precision
        least = MIN_SHARE_WITH_KEPT if manifest.keeps_layers else MIN_SHARE[precision]
        assert manifest.precision_share[precision] >= least
        assert manifest.parity["min_cosine"] >= MIN_COSINE[precision]
    if name == IN_SLOW:
        package = export_aoti(files.path, tmp_path / "model.pt2", verification=verification)
        assert package.manifest.parity["min_cosine"] >= MIN_COSINE["fp32"]
        with open_runner(package.path, device="cpu") as runner:
            np.testing.assert_allclose(runner(crops), embeddings, rtol=1e-3, atol=1e-4)
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
    for precision, onnx in exports.items():
        engine = engine_from_onnx(read_onnx(onnx), tmp_path / f"{precision}.plan", EngineOptions(flavor="rtx"))
        assert engine.manifest.precision_found == precision
