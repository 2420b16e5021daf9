"""Build, inspect, compare, run: joined, as a machine with a GPU joins them, in four versions and every precision."""

import json
import sys

import pytest

from pmm.artifacts.onnx_file import read_onnx
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.engine_description import describe_engine
from pmm.export.engine_precision import inspected
from pmm.export.options import EngineOptions, ExportOptions
from pmm.export.trt import choose_flavor, engine_from_onnx
from pmm.runtime import trt_variant
from pmm.runtime.open import open_runner
from pmm.utils import extras
from pmm.utils.errors import BackendUnavailable, InvalidFile, UserError
from pmm.utils.hardware import Gpu
from tests.runtime.standin import LISTS

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
from tests.export.whole import NEWEST
from tests.refusals import refuses


@pytest.mark.parametrize(
    ("version", "precision"),
    [
        # each version and each precision; in test-full, each with each
        pytest.param(version, precision, marks=[] if version == NEWEST or precision == "fp16" else pytest.mark.full)
        for version in sorted(LISTS)
        for precision in ("fp32", "tf32", "fp16", "bf16", "int8")
    ],
)
def test_an_engine_is_built_inspected_judged_and_run(machine, shared, parity_check, tmp_path, version, precision):
    _, flavor = machine(version)
    file = read_onnx(shared.onnx(ExportOptions(precision="fp32" if precision == "tf32" else precision)))
    options = EngineOptions(flavor=flavor, batch=((1, 4, 8),), tf32=precision == "tf32")
    artifact = engine_from_onnx(file, tmp_path / "m.plan", options, parity_check=parity_check)
    assert artifact.manifest.engine.precision_read_from == "parsed network and engine inspector"
    assert artifact.manifest.engine.flavor == flavor
    assert artifact.manifest.parity["rows"] == len(parity_check.crops)
    with open_runner(artifact.path) as runner:
        assert runner.info.precision == precision
        found = runner(parity_check.crops)
    assert numeric_parity(parity_check.expected, found).min_cosine == pytest.approx(
        artifact.manifest.parity["min_cosine"]
    )


LIES = [("fp32", "fp16"), ("fp32", "tf32"), ("fp16", "fp32"), ("bf16", "fp16"), ("int8", "fp32"), ("int8", "fp16")]


@pytest.mark.parametrize(
    ("asked", "lies", "inspector"),
    [
        # each precision and each way to tell; in test-slow, each with each
        pytest.param(*lie, inspector, marks=[] if (at % 2 == 0) == (inspector == "whole") else pytest.mark.slow)
        for at, lie in enumerate(LIES)
        for inspector in ("whole", "kernels")
    ],
)
def test_an_engine_whose_inspector_says_another_precision_is_refused(
    machine, shared, parity_check, tmp_path, asked, lies, inspector
):
    machine(NEWEST, lies=lies, inspector=inspector)
    file = read_onnx(shared.onnx(ExportOptions(precision=asked)))
    with refuses(InvalidFile, "inspector", lies, path=tmp_path / "m.plan", expected=asked):
        engine_from_onnx(file, tmp_path / "m.plan", EngineOptions(batch=((1, 4, 8),)), parity_check=parity_check)
    assert [path.name for path in tmp_path.iterdir()] == ["m.plan.log"]  # why it was refused


@pytest.mark.parametrize("inspector", ["nothing", "names"])
def test_an_inspector_that_can_tell_nothing_leaves_an_engine_and_a_note(
    machine, shared, parity_check, tmp_path, inspector
):
    machine(NEWEST, inspector=inspector)
    file = read_onnx(shared.onnx(ExportOptions(precision="fp16")))
    artifact = engine_from_onnx(file, tmp_path / "m.plan", EngineOptions(batch=((1, 4, 8),)), parity_check=parity_check)
    assert artifact.manifest.engine.precision_read_from == "parsed network"
    assert "the engine inspector does not show it" in describe_engine(artifact)


def test_a_builder_that_cannot_start_is_one_line_with_its_reason(machine, shared, tmp_path, monkeypatch):
    world, _ = machine(NEWEST)
    world.failing.add("Builder")
    monkeypatch.setattr(trt_variant, "driver_version", lambda: "12.2")
    with refuses(UserError, "tensorrt 11.4.0", "driver version is insufficient", "CUDA 12.2", hint="update the driver"):
        engine_from_onnx(read_onnx(shared.onnx()), tmp_path / "m.plan")
    assert "[ERROR] CUDA initialization failure" in (tmp_path / "m.plan.log").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["m.plan.log"]  # why it was refused


@pytest.mark.parametrize(("driver", "package"), [("13.0", "tensorrt-cu13"), ("12.8", "tensorrt-cu12")])
def test_a_gpu_that_runs_no_rtx_engine_gets_none_unasked(monkeypatch, tmp_path, driver, package):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(trt_variant, "nvidia_gpus", lambda: (Gpu("NVIDIA H100", "9.0"),))
    monkeypatch.setattr(extras, "driver_version", lambda: driver)
    with refuses(BackendUnavailable, "NVIDIA H100", f"pip install {package}", "--flavor rtx", tmp_path / "model.onnx"):
        choose_flavor("auto", tmp_path / "model.onnx")
    assert choose_flavor("rtx", tmp_path / "model.onnx")[0] == "rtx"


def layers(*told):
    return json.dumps({"Layers": list(told), "Bindings": []})


@pytest.mark.parametrize(
    ("layer", "types"),
    [
        ({"Inputs": [{"Format/Datatype": "Row major linear FP32"}]}, {"fp32"}),
        ({"Outputs": [{"Format/Datatype": "Half(64,1:8,16)"}]}, {"fp16"}),
        ({"Inputs": [{"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}]}, {"fp16"}),
        ({"Outputs": [{"Format": "Row major linear", "Datatype": "BFloat16"}]}, {"bf16"}),
        ({"Outputs": [{"Format": "Row major linear", "DataType": "Int8"}]}, {"int8"}),
        ({"Inputs": [{"Format/Datatype": "N/A due to dynamic shapes"}], "Weights": {"Type": "Half", "Count": 9}},
         {"fp16"}),
        ({"Weights": {"Type": "Float", "Count": 0}}, set()),
        ({"TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs"}, {"int8"}),
        ({"TacticName": "sm80_xmma_fprop_implicit_gemm_i8f32_i8i32_f32_n"}, {"int8"}),
        ({"TacticName": "sm80_xmma_fprop_implicit_gemm_tf32f32_tf32f32_f32_nhwckrsc_nchw"}, {"tf32"}),
        ({"TacticName": "sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n"}, {"bf16"}),
        ({"TacticName": "ampere_scudnn_128x64_relu_medium_nn_v1"}, set()),
        ({"Name": "{ForeignNode[a...b]}", "LayerType": "Myelin", "Outputs": [{"Format/Datatype": "Float"}]}, set()),
        ("conv1 + relu", set()),
    ],
)  # fmt: skip
def test_the_types_of_a_layer_are_read_wherever_they_are_told(layer, types):
    found = inspected(layers(layer))
    assert found.types == types
    assert found.silent == (not types)


def test_what_is_told_decides_and_what_is_not_told_does_not():
    def of(*types, silent=0):
        told = [{"Weights": {"Type": word, "Count": 1}} for word in types]
        return inspected(layers(*told, *["silent"] * silent))

    assert of("Half", "Float").confirms("fp16", "x")
    assert of("Float").confirms("fp32", "x")
    assert not of("Float", silent=1).confirms("fp16", "x")
    assert not of(silent=2).confirms("int8", "x")
    for found, asked in ((of("Float"), "int8"), (of("Float", "Half", silent=3), "fp32"), (of("Int8"), "bf16")):
        with refuses(InvalidFile, path="x", expected=asked):
            found.confirms(asked, "x")
    tf32 = inspected(layers({"TacticName": "gemm_tf32f32_tf32f32_f32", "Weights": {"Type": "Float", "Count": 1}}))
    assert tf32.confirms("fp32", "x", tf32=True)
    with refuses(InvalidFile, "tf32", path="x", expected="fp32"):
        tf32.confirms("fp32", "x")
    for text in ("[]", "{", "{}", '{"Layers": 1}', '{"Layers": [{"Inputs": ["x"]}]}'):
        with refuses(UserError, "inspector"):
            inspected(text)
