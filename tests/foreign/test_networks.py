"""Networks of other toolkits: adopted to the bit, exported in fp32 and fp16 with the gates, and built into engines."""

import numpy as np
import pytest

from pmm.artifacts.onnx_file import read_onnx
from pmm.data.crops import load_crops
from pmm.data.readers import read_dataset
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

    verification = VerifyOptions(verify_root=str(people), verify_dataset="market1501")
    for precision in ("fp32", "fp16"):
        onnx = tmp_path / f"{precision}.onnx"
        manifest = export_onnx(files.path, onnx, ExportOptions(precision=precision), verification).manifest
        assert manifest.precision_found == precision
        least = MIN_SHARE_WITH_KEPT if manifest.keeps_layers else MIN_SHARE[precision]
        assert manifest.precision_share[precision] >= least
        assert manifest.parity["min_cosine"] >= MIN_COSINE[precision]
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
        engine = engine_from_onnx(read_onnx(onnx), tmp_path / f"{precision}.plan", EngineOptions(flavor="rtx"))
        assert engine.manifest.precision_found == precision
