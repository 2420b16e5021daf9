"""ONNX files as users have them, of both exporters of torch: adopted, exported in fp16 and int8, built."""

import numpy as np
import onnxruntime
import pytest
import torch

from pmm.adoption.image_options import ImageOptions
from pmm.adoption.onnx_adopt import adopt_onnx
from pmm.adoption.onnx_options import OnnxOptions
from pmm.artifacts.onnx_file import read_onnx
from pmm.data.crops import load_crops
from pmm.export.onnx import export_onnx
from pmm.export.options import EngineOptions, ExportOptions
from pmm.export.trt import build_engine
from pmm.runtime.open import open_runner

pytestmark = pytest.mark.slow
SIZE = (64, 32)
NETWORKS = {"mobilenetv2_050": {}, "vit_tiny_patch16_224": {"img_size": SIZE, "depth": 2}}


@pytest.fixture(scope="module", params=[(name, dynamo) for name in NETWORKS for dynamo in (False, True)], ids=str)
def foreign(request, people, tmp_path_factory):
    timm = pytest.importorskip("timm")
    name, dynamo = request.param
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0, **NETWORKS[name]).eval()
    preprocessing = ImageOptions().preprocessing(*SIZE)
    crops = load_crops(sorted((people / "bounding_box_train").iterdir())[:64], preprocessing)
    with torch.no_grad():  # statistics as of a trained network: without them all crops have nearly one embedding
        for _ in range(30):
            network.train()(torch.from_numpy(preprocessing.normalise(crops)))
    network.eval()
    path = tmp_path_factory.mktemp("foreign") / f"{name}.onnx"
    batch = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)} if dynamo else {
        "dynamic_axes": {"input": {0: "batch"}, "output": {0: "batch"}}, "opset_version": 14,
    }  # fmt: skip
    torch.onnx.export(
        network, (torch.randn(2, 3, *SIZE),), path, dynamo=dynamo, external_data=dynamo, verbose=False,
        input_names=["input"], output_names=["output"], **batch,
    )  # fmt: skip
    return path


def test_a_file_of_torch_is_adopted_to_the_bit_exported_and_built(foreign, people, tmp_path):
    adopted = tmp_path / "adopted.onnx"
    adopt_onnx(foreign, adopted, ImageOptions(), OnnxOptions(), dataset="market1501", root=str(people))
    session = onnxruntime.InferenceSession(foreign, providers=["CPUExecutionProvider"])
    with open_runner(adopted) as runner:
        crops = load_crops(sorted((people / "query").iterdir())[:8], runner.preprocessing)
        expected = session.run(None, {"input": runner.preprocessing.normalise(crops)})[0]
        np.testing.assert_array_equal(runner(crops), expected)
    precisions = [ExportOptions(precision="fp16")]
    if foreign.stem.startswith("vit"):  # of an untrained MobileNet int8 leaves too little to pass a gate
        precisions += [
            ExportOptions(precision="int8", calibration_images=64, target=target) for target in ("cpu", "tensorrt")
        ]
    for options in precisions:
        manifest = export_onnx(adopted, tmp_path / f"made{options.suffix}.onnx", options).manifest
        assert manifest.precision_found == options.precision
        assert manifest.parity["rows"] == 64
    pytest.importorskip("tensorrt_rtx")
    for onnx in [adopted, *(tmp_path / f"made{o.suffix}.onnx" for o in precisions if o.target == "tensorrt")]:
        engine = build_engine(onnx, onnx.with_suffix(".plan"), EngineOptions(flavor="rtx"))
        assert engine.manifest.precision_found == read_onnx(onnx).manifest.precision_found
