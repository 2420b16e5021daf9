"""int8 with the rest in fp16: what is in which type, and what it computes."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pmm.artifacts.onnx_file import read_onnx
from pmm.data.crops import load_crops
from pmm.data.readers import read_dataset
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.engine_precision import network_precision
from pmm.export.half_precision import emulated, fp16_between, half_type, tensor_types
from pmm.export.int8_graph import _hint
from pmm.export.onnx import describe_export, export_onnx
from pmm.export.options import EngineOptions, ExportOptions
from pmm.export.precision import onnx_precision
from pmm.export.reference import in_memory
from pmm.export.trt import engine_from_onnx
from pmm.runtime import ort
from pmm.runtime.open import open_runner
from pmm.runtime.ort_session import open_session
from pmm.utils.errors import ConflictingOptions
from tests.conftest import assert_one_line_error, run_here
from tests.refusals import refuses

HALF = ExportOptions(precision="int8", int8_fallback="fp16")


@pytest.fixture(scope="module")
def file(shared):
    return read_onnx(shared.onnx(HALF))


@pytest.fixture(scope="module")
def plain(shared):
    return read_onnx(shared.onnx(ExportOptions(precision="int8")))


@pytest.fixture(scope="module")
def crops(people):
    return load_crops([s.path for s in read_dataset("synthetic", people).query[:16]], 128, 64)


def test_the_trunk_is_in_fp16_and_8_bits_and_the_heads_in_fp32(file, plain):
    types = tensor_types(file.proto)
    given = {node.name or node.output[0]: (node.op_type, types[node.output[0]]) for node in file.proto.graph.node}
    of = lambda *operators: {kind for op, kind in given.values() if op in operators}  # noqa: E731
    assert of("Conv", "MaxPool", "Add") == {TensorProto.FLOAT16}
    of_heads = {name for node in file.proto.graph.node if node.op_type == "Gemm" for name in node.input}
    restored = [node.output[0] for node in file.proto.graph.node if node.op_type == "DequantizeLinear"]
    assert {types[name] for name in restored if name not in of_heads} == {TensorProto.FLOAT16}
    assert {types[name] for name in restored if name in of_heads} == {TensorProto.FLOAT}  # weights stored in 8 bits
    assert of("Gemm", "GlobalAveragePool", "GlobalMaxPool", "Flatten", "Mul", "Sub", "Concat") == {TensorProto.FLOAT}
    assert of("QuantizeLinear") == {TensorProto.INT8}
    operators = [node.op_type for node in plain.proto.graph.node]
    # from the trunk to the average and to the largest; the way in is through 8 bits
    assert [node.op_type for node in file.proto.graph.node].count("Cast") == operators.count("Cast") + 2
    assert len(file.proto.graph.node) == len(operators) + 2
    assert file.proto.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    stored = {t.data_type for t in file.proto.graph.initializer if "scale" in t.name and "fp16" in t.name}
    assert stored == {TensorProto.FLOAT16}
    read = {name for node in file.proto.graph.node for name in node.input}
    assert {tensor.name for tensor in file.proto.graph.initializer} <= read


def test_the_file_says_so(file, plain):
    manifest = file.manifest
    assert (manifest.precision, manifest.precision_found) == ("int8", "int8")
    assert manifest.precision_share == plain.manifest.precision_share
    assert manifest.quantization["fallback"] == "fp16"
    assert manifest.quantization["kept_in_fp16"] == []
    assert plain.manifest.quantization["fallback"] == "fp32"
    assert (half_type(manifest), half_type(plain.manifest)) == ("fp16", "")
    # judged with the rounding and the overflow of fp16 too, which ONNX Runtime's CPU does not have
    assert manifest.parity["ran_on"] == "fp32 arithmetic, every tensor rounded to fp16"


def test_it_computes_what_the_file_in_fp32_does(file, plain, crops, trained):
    with open_runner(file.path) as runner, open_runner(plain.path) as other, open_runner(trained) as torch:
        found, expected, exact = runner(crops), other(crops), torch(crops)
    error = 1 - numeric_parity(exact, expected).mean_cosine
    strict = in_memory(emulated(file.proto), file.manifest.input, file.manifest.preprocessing, optimise=False)(crops)
    for rows in (found, strict):  # what 8 bits cost, and hardly more
        assert 1 - numeric_parity(exact, rows).mean_cosine < 1.25 * error
        assert numeric_parity(expected, rows).mean_cosine > 1 - 2 * error


def test_large_biases_do_not_overflow_in_onnx_runtime(file, plain, crops, monkeypatch):
    """It writes biases as int32, divided by the scales of input and weights: of 20 in fp16 that is Inf."""
    proto, contract, size = onnx.ModelProto(), file.manifest.input, file.manifest.preprocessing
    proto.CopyFrom(file.proto)
    for tensor in proto.graph.initializer:
        if tensor.name.endswith(".bias/fp16"):
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.full_like(values, 20), tensor.name))
    expected = in_memory(proto, contract, size, optimise=False)(crops[:2])
    found = in_memory(proto, contract, size, float_biases=True)(crops[:2])
    np.testing.assert_allclose(found, expected, rtol=1e-2)
    opened = []

    def opens(*args, float_biases, **options):
        opened.append(float_biases)
        return open_session(*args, float_biases=float_biases, **options)

    monkeypatch.setattr(ort, "open_session", opens)
    for path in (file.path, plain.path):
        open_runner(path).close()
    assert opened == [True, False]


def test_tensorrt_parses_and_builds_it_in_those_types(file, tmp_path):
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
    engine = engine_from_onnx(file, tmp_path / "model.plan", EngineOptions(flavor="rtx")).manifest
    assert engine.precision_found == "int8"
    assert engine.precision_share == pytest.approx(file.manifest.precision_share)
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(file.content)
    layers = [network.get_layer(at) for at in range(network.num_layers)]
    wide = [layer for layer in layers if layer.type in (trt.LayerType.CONVOLUTION, trt.LayerType.POOLING)]
    assert {layer.get_output(0).dtype for layer in wide} == {trt.float16}
    assert network_precision(trt, network).share["fp32"] < 0.02  # the heads


def quantised(scale, keep):
    """x float32 -> Conv in 8 bits -> Relu -> another, in 8 bits or not -> mean."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["x/8"]),
        helper.make_node("DequantizeLinear", ["x/8", "s", "z"], ["x/d"]),
        helper.make_node("DequantizeLinear", ["w", "w/s", "z"], ["w/d"]),
        helper.make_node("Conv", ["x/d", "w/d", "b"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "v"] if keep else ["r/d", "v/d"], ["k"]),
        helper.make_node("Relu", ["k"], ["a"]),
        helper.make_node("GlobalAveragePool", ["a"], ["y"]),
    ]
    if not keep:
        nodes[5:5] = [
            helper.make_node("QuantizeLinear", ["r", "s", "z"], ["r/8"]),
            helper.make_node("DequantizeLinear", ["r/8", "s", "z"], ["r/d"]),
            helper.make_node("DequantizeLinear", ["v/8", "v/s", "z"], ["v/d"]),
        ]
    rng = np.random.default_rng(0)
    stored = {
        "s": np.float32(0.05), "z": np.int8(0), "w/s": np.float32(scale), "v/s": np.float32(0.01),
        "w": rng.integers(-127, 128, (4, 3, 1, 1)).astype(np.int8), "b": np.ones(4, np.float32),
        "v": rng.standard_normal((2, 4, 1, 1)).astype(np.float32),
        "v/8": rng.integers(-127, 128, (2, 4, 1, 1)).astype(np.int8),
    }  # fmt: skip
    read = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2, 1, 1])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items() if name in read],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_a_layer_that_is_not_in_8_bits_is_in_fp16():
    proto = quantised(0.01, keep=True)
    half = fp16_between(proto)
    assert onnx_precision(proto).macs == {"int8": 4 * 16 * 3, "fp32": 2 * 16 * 4}
    assert onnx_precision(half).macs == {"int8": 4 * 16 * 3, "fp16": 2 * 16 * 4}
    images = np.random.default_rng(1).standard_normal((2, 3, 4, 4)).astype(np.float32)
    rows = [onnx.reference.ReferenceEvaluator(p).run(None, {"x": images})[0] for p in (proto, half)]
    np.testing.assert_allclose(rows[1], rows[0], rtol=5e-3, atol=5e-3)


def test_what_weighs_the_channels_is_part_of_the_trunk():
    """A reduction within it makes no vector for the heads: a convolution reads what it leads to."""
    proto = quantised(0.01, keep=True)
    gate = [helper.make_node("GlobalAveragePool", ["r"], ["m"]), helper.make_node("Sigmoid", ["m"], ["g"]),
            helper.make_node("Mul", ["r", "g"], ["r/g"])]  # fmt: skip
    nodes = [*proto.graph.node[:5], *gate, *proto.graph.node[5:]]
    nodes[8].input[0] = "r/g"
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    half = fp16_between(proto)
    types = tensor_types(half)
    assert {types[name] for name in ("c", "m", "g", "r/g", "k", "a")} == {TensorProto.FLOAT16}
    assert types["y"] == TensorProto.FLOAT
    assert sum(node.op_type == "Cast" for node in half.graph.node) == 1


def test_a_scale_below_what_fp16_holds_does_not_become_0():
    """TensorRT refuses a scale that is not above 0."""
    half = fp16_between(quantised(1e-9, keep=False))
    scales = [numpy_helper.to_array(t) for t in half.graph.initializer if t.name.endswith("s/fp16")]
    assert len(scales) == 3
    assert all((scale > 0).all() for scale in scales)


def test_it_is_for_int8_on_tensorrt(trained, tmp_path):
    with refuses(ConflictingOptions, "fp16", options=("--int8-fallback", "--precision")):
        ExportOptions(precision="fp16", int8_fallback="fp16")
    with refuses(ConflictingOptions, "fp16", "cpu", options=("--int8-fallback", "--target")):
        ExportOptions(precision="int8", target="cpu", int8_fallback="fp16")
    assert (HALF.suffix, ExportOptions(precision="int8").suffix) == ("-int8-fp16", "-int8")
    done = run_here("export/to_onnx.py", trained, "--precision", "int8", "--target", "cpu", "--int8-fallback", "fp16")
    assert_one_line_error(done, "--int8-fallback fp16", "--target is cpu")


@pytest.mark.parametrize(("version", "named"), [("1.29.0", True), ("1.30.0", False), ("2.0.1", False)])
def test_an_onnx_runtime_that_computes_it_wrongly_is_named(monkeypatch, version, named):
    monkeypatch.setattr("onnxruntime.__version__", version)
    assert (">=1.30" in _hint(HALF)) is (version in _hint(HALF)) is named
    assert not _hint(ExportOptions(precision="int8"))


@pytest.mark.slow
def test_the_layers_that_were_kept_are_named_in_fp16(brittle, tmp_path):
    path, block = brittle
    artifact = export_onnx(path, tmp_path / "m.onnx", HALF)
    kept = artifact.manifest.quantization["kept_in_fp16"]
    assert kept[0].endswith(f"{block}.conv2")
    assert f"kept in fp16: {', '.join(kept)}" in describe_export(artifact)
    share = artifact.manifest.precision_share
    assert share["fp16"] > 0.01
    assert share["int8"] > 0.5
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
    engine = engine_from_onnx(read_onnx(artifact.path), tmp_path / "m.plan", EngineOptions(flavor="rtx")).manifest
    assert engine.precision_share == pytest.approx(share)
