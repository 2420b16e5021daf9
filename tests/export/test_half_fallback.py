"""Which layers stay in fp32 for fp16 and bf16 to pass, and what the file says of them."""

import dataclasses

import numpy as np
import onnx
import pytest

from pmm.adoption.image_options import ImageOptions
from pmm.adoption.onnx_adopt import adopt_onnx
from pmm.adoption.onnx_options import OnnxOptions
from pmm.artifacts.manifest import InputContract
from pmm.artifacts.onnx_file import read_onnx
from pmm.data.preprocessing import Preprocessing
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.fallback import convert_with_fallback
from pmm.export.half_conversion import to_half
from pmm.export.half_fallback import HalfConverter, half_with_fallback
from pmm.export.half_precision import emulated, half_type, tensor_types
from pmm.export.onnx import describe_export, export_onnx
from pmm.export.options import MAX_NORM_ERROR, EngineOptions, ExportOptions, VerifyOptions
from pmm.export.parity_check import ParityCheck, ParityFailed
from pmm.export.precision import onnx_precision
from pmm.export.reference import in_memory
from pmm.export.trt import engine_from_onnx
from pmm.utils.errors import InvalidFile
from tests.export.test_int8_layers import images, model, normal, transformer
from tests.refusals import refuses

FLOATS = InputContract(name="x", dtype="float32", layout="NCHW", normalised_by="caller")
SIZE = Preprocessing(height=4, width=6, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def convolutions(kinds):
    """3 channels through convolutions to 4, with Relus in between, to their means: what cancels has weights near 100
    for two equal channels, with opposite signs, and the first loud one is undone by the second; mild is a little of
    what cancels."""
    steps, weights, last = [("Conv", "x first.weight bias", "map", {})], {"first.weight": normal(4, 3, 1, 1) * 5}, "map"
    weights["first.weight"][1] = weights["first.weight"][0]
    weights["bias"] = np.float32([20, 20, 20, 20])
    factors = {"plain": 1, "cancels": 1, "mild": 1, "loud": 5e4, "quiet": 2e-5}
    for index, kind in enumerate(kinds):
        name = f"{kind}{index}.weight"
        weights[name] = abs(normal(4, 4, 1, 1, seed=index + 1)) * np.float32(factors[kind])
        if kind in ("cancels", "mild"):
            weights[name][:, :2] += {"cancels": 100, "mild": 10}[kind] * np.float32([1, -1])[:, None, None]
        weights[name][1] = weights[name][0]
        steps += [("Conv", f"{last} {name}", f"map{index}", {}), ("Relu", f"map{index}", f"on{index}", {})]
        last = f"on{index}"
    steps += [("GlobalAveragePool", last, "pooled", {}), ("Flatten", "pooled", "y", {})]
    return model(steps, weights, "y", [4])


def parity_check(proto):
    crops = np.random.default_rng(0).integers(0, 256, (32, 4, 6, 3), np.uint8)
    return ParityCheck(crops, in_memory(proto, FLOATS, SIZE)(crops))


def converted(proto, precision):
    return half_with_fallback(proto, precision, parity_check(proto), FLOATS, SIZE, "made.onnx")


def weight_types(proto):
    return {tensor.name.split(".")[0]: tensor.data_type for tensor in proto.graph.initializer}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_layer_whose_weights_lose_all_by_rounding_is_kept_and_named(precision):
    proto = convolutions(["plain", "cancels", "plain"])
    half, kept = converted(proto, precision)
    assert kept == ["cancels1"]
    other = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    types = weight_types(half)
    assert types.pop("cancels1") == onnx.TensorProto.FLOAT
    assert set(types.values()) == {other}
    assert set(onnx_precision(half).macs) == {precision, "fp32"}
    with pytest.raises(InvalidFile):
        onnx_precision(half).check(precision, "made.onnx")
    onnx_precision(half).check(precision, "made.onnx", kept=True)
    with pytest.raises(InvalidFile):
        onnx_precision(proto).check(precision, "made.onnx", kept=True)


def test_layers_between_which_numbers_are_beyond_half_are_kept_together():
    """The weights that fp16 has, and what is between them, which it has not."""
    proto = convolutions(["plain", "plain", "loud", "quiet", "plain", "plain"])
    half, kept = converted(proto, "fp16")
    assert set(kept) == {"loud2", "quiet3"}
    assert tensor_types(half)["on2"] == onnx.TensorProto.FLOAT, "it would be Inf"
    assert converted(proto, "bf16")[1] == []


def test_with_layers_kept_it_stays_away_from_the_limit_where_that_is_possible(monkeypatch):
    proto = convolutions(["plain", "cancels", "mild", "plain"])
    enough = HalfConverter(proto, "fp16").build(["cancels1"])
    assert 0.5 < norm_error(proto, enough) / MAX_NORM_ERROR["fp16"] < 1
    half, kept = converted(proto, "fp16")
    assert kept == ["cancels1", "mild2"]
    monkeypatch.setitem(MAX_NORM_ERROR, "fp16", 1.2 * norm_error(proto, half))
    assert converted(proto, "fp16") == (half, kept), "half of that error is out of reach"


def norm_error(proto, half):
    check = parity_check(proto)
    found = in_memory(emulated(half), FLOATS, SIZE, optimise=False)(check.crops)
    return numeric_parity(check.expected, found).max_norm_error


def test_nothing_is_kept_where_all_can_be_in_half():
    proto = convolutions(["plain"])
    half, kept = converted(proto, "fp16")
    assert kept == []
    assert half == to_half(proto, "fp16")


def test_a_large_head_is_in_half_too():
    proto = transformer()
    assert onnx_precision(to_half(proto, "fp16")).share["fp16"] < 0.99
    half, kept = converted(proto, "fp16")
    assert kept == []
    assert onnx_precision(half).share == {"fp16": 1.0}


@pytest.mark.parametrize(("precision", "others"), [("fp16", "fp32"), ("bf16", "fp16")])
def test_what_most_layers_would_be_kept_for_is_refused_with_what_to_do(precision, others):
    with refuses(ParityFailed, "2 of 4 layers", path="made.onnx", hint=others):
        converted(convolutions(["cancels", "cancels", "cancels"]), precision)


def test_unverified_exports_keep_nothing():
    proto = convolutions(["cancels", "plain"])
    assert half_with_fallback(proto, "fp16", None, FLOATS, SIZE, "made.onnx")[1] == []


@pytest.mark.parametrize(("fewest", "count"), [(False, 6), (True, 5)])
def test_none_is_kept_that_it_passes_without(fewest, count):
    converter, attempts = HalfConverter(convolutions(["plain"] * 14), "fp16"), []

    def passes(proto, allowance):
        in_fp32 = sum(kind == onnx.TensorProto.FLOAT for kind in weight_types(proto).values())
        attempts.append(in_fp32)
        if in_fp32 < 5:
            raise ParityFailed("it moved")

    _, kept = convert_with_fallback(converter, passes, [images()], fewest=fewest)
    assert len(kept) == count
    assert attempts == [0, 1, 2, 3, 4, 6, *([5] if fewest else [])]
    assert kept == converter.by_cost([images()])[:count]


def test_the_bias_of_a_kept_layer_and_what_is_between_kept_ones_are_in_fp32():
    proto = transformer()
    half = to_half(proto, "bf16", ["attn.q", "turned"])
    types = tensor_types(half)
    in_fp32 = {name for name in ("q", "query", "scores", "attention", "key", "mlp") if types[name] == 1}
    assert in_fp32 == {"q", "query", "scores", "attention"}
    assert types["attn.q.bias"] == onnx.TensorProto.FLOAT


def test_a_residual_sum_of_a_kept_layer_and_a_map_in_half_is_in_half():
    steps = [("Conv", "x a.weight", "a", {}), ("Conv", "a b.weight", "b", {}), ("Add", "a b", "sum", {}),
             ("Conv", "sum c.weight", "y", {})]  # fmt: skip
    weights = {"a.weight": normal(4, 3, 1, 1), "b.weight": normal(4, 4, 1, 1), "c.weight": normal(4, 4, 1, 1)}
    types = tensor_types(to_half(model(steps, weights, "y", [4, 4, 6]), "fp16", ["b"]))
    assert (types["b"], types["sum"]) == (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


def test_a_file_and_its_engine_say_which_layers_were_kept(people, tmp_path):
    onnx.save(convolutions(["plain", "cancels", "plain", "plain"]), tmp_path / "foreign.onnx")
    adopted = adopt_onnx(
        tmp_path / "foreign.onnx", tmp_path / "adopted.onnx", ImageOptions(), OnnxOptions(),
        dataset="market1501", root=str(people),
    )  # fmt: skip
    artifact = export_onnx(adopted.path, tmp_path / "fp16.onnx", ExportOptions(precision="fp16"))
    manifest = artifact.manifest
    assert manifest.quantization == {"kept_in_fp32": ["cancels1"]}
    assert half_type(manifest) == "fp16"
    assert 0.5 < manifest.precision_share["fp16"] < 0.99
    assert "kept in fp32: cancels1" in describe_export(artifact)
    blind = export_onnx(
        adopted.path, tmp_path / "b.onnx", ExportOptions(precision="fp16"), VerifyOptions(no_verify=True)
    )
    assert blind.manifest.quantization is None

    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
    file = read_onnx(artifact.path)
    engine = engine_from_onnx(file, tmp_path / "fp16.plan", EngineOptions(flavor="rtx")).manifest
    assert (engine.precision_share, engine.quantization) == (manifest.precision_share, manifest.quantization)
    forgotten = dataclasses.replace(file, stored_manifest=dataclasses.replace(manifest, quantization=None))
    with refuses(InvalidFile, "fp32"):
        engine_from_onnx(forgotten, tmp_path / "x.plan", EngineOptions(flavor="rtx"))
