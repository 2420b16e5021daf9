"""Layers that compute in floats, their weights stored in 8 bits: heads on pooled vectors."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.engine_precision import network_precision
from pmm.export.fallback import convert_with_fallback
from pmm.export.half_precision import fp16_between
from pmm.export.int8 import Quantizer
from pmm.export.int8_weights import LEAST, float_layers, store_in_8_bits
from pmm.export.parity_check import ParityFailed
from pmm.export.precision import onnx_precision
from pmm.runtime.ort_session import open_session

WIDTH = 64


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / 8


def model(loud=1.0):
    """A convolution, pooling, and two heads: a convolution of one position, then a linear layer. Of what the latter
    reads channel 3 is 1 / `loud`, of its weights these are times `loud`."""
    weights = {
        "trunk.weight": normal(WIDTH, 3, 3, 3, seed=1),
        "squeeze.weight": normal(WIDTH, WIDTH, 1, 1, seed=2),
        "head.weight": normal(WIDTH, WIDTH, seed=3),
        "head.bias": normal(WIDTH, seed=4),
        "small.weight": normal(WIDTH, 5, seed=5),
    }
    weights["squeeze.weight"][3] /= loud
    weights["head.weight"][:, 3] *= loud
    nodes = [
        helper.make_node("Conv", ["x", "trunk.weight"], ["map"], "trunk"),
        helper.make_node("GlobalAveragePool", ["map"], ["mean"], "pool"),
        helper.make_node("Conv", ["mean", "squeeze.weight"], ["vector"], "squeeze"),
        helper.make_node("Flatten", ["vector"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "head.weight", "head.bias"], ["wide"], "head", transB=1),
        helper.make_node("MatMul", ["wide", "small.weight"], ["y"], "small"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 12, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def images(seed=0):
    return np.random.default_rng(seed).standard_normal((4, 3, 12, 8)).astype(np.float32)


def run(proto, batch):
    return open_session(proto.SerializeToString()).run(None, {"x": batch})[0]


def quantizer(target, proto=None):
    return Quantizer(proto or model(), target, [images(seed) for seed in range(3)], "x")


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_heads_have_weights_in_8_bits_and_compute_in_floats(target):
    made = quantizer(target)
    assert made.layers == ["trunk", "squeeze", "head"]
    assert made.only_weights() == ["squeeze", "head"]
    proto = made.build()
    kinds = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    assert not {"squeeze.weight", "head.weight"} & kinds.keys(), "the floats are gone"
    assert sum(kind == TensorProto.INT8 and name.startswith("head.weight_8") for name, kind in kinds.items()) == 1
    assert onnx_precision(proto).macs == {"int8": 10 * 6 * WIDTH * 27, "fp32": WIDTH * (WIDTH + WIDTH + 5)}
    assert numeric_parity(run(made.build(made.only_weights()), images(9)), run(proto, images(9))).min_cosine > 0.9999
    assert made.only_weights(["head"]) == ["squeeze"]
    assert made.with_dependencies(["head"]) == ["head"], "what goes into it is left alone"
    assert {"head.weight"} < {tensor.name for tensor in made.build(["head"]).graph.initializer}


def test_on_a_cpu_onnx_runtime_restores_them_once(tmp_path):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(quantizer("cpu").build().SerializeToString(), options, ["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimised.onnx").graph
    heads = [node for node in graph.node if node.name in ("squeeze", "head") or node.op_type == "Gemm"]
    stored = {tensor.name for tensor in graph.initializer}
    assert heads
    assert all(node.input[1] in stored for node in heads)
    assert "Cast" not in {node.op_type for node in graph.node}


@pytest.mark.parametrize("fallback", ["fp32", "fp16"])
def test_tensorrt_builds_them_and_says_float(fallback):
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
    made = quantizer("tensorrt").build()
    made = fp16_between(made) if fallback == "fp16" else made
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(made.SerializeToString())
    found = network_precision(trt, network)
    assert found.macs == onnx_precision(made).macs
    assert found.macs["int8"] == 10 * 6 * WIDTH * 27, "the heads are in floats"
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("x", (1, 3, 12, 8), (4, 3, 12, 8), (4, 3, 12, 8))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config)


def test_a_head_whose_weights_lose_too_much_is_kept_in_floats():
    proto = model(loud=1000.0)
    made = quantizer("cpu", proto)
    expected = run(proto, images(9))

    def cosine(candidate):
        return numeric_parity(expected, run(candidate, images(9))).min_cosine

    least = (cosine(made.build()) + cosine(made.build(["head"]))) / 2
    assert least < 0.999

    def passes(candidate, allowance):
        if cosine(candidate) < least:
            raise ParityFailed("it moved")

    found, kept = convert_with_fallback(made, passes, [images(8)])
    assert kept == ["head"]
    assert "head.weight" in {tensor.name for tensor in found.graph.initializer}


def one_layer(weights, operator, **attributes):
    node = helper.make_node(operator, ["x", "w"], ["y"], "layer", **attributes)
    return helper.make_graph([node], "g", [], [], [numpy_helper.from_array(weights, "w")])


@pytest.mark.parametrize("dequantize", [False, True])
@settings(max_examples=50)
@given(
    axis=st.sampled_from([0, 1]),
    scales=st.lists(st.sampled_from([0.0, 1e-42, 1e-30, 1.0, 1e30]), min_size=3, max_size=3),
    seed=st.integers(0, 9),
)
def test_each_weight_is_within_half_a_step_of_its_channel(dequantize, axis, scales, seed):
    weights = np.random.default_rng(seed).uniform(-1, 1, (3, 4)).astype(np.float32)
    weights = (weights * np.float32(scales)[:, None]).astype(np.float32)
    graph = one_layer(weights if axis == 0 else weights.T.copy(), "Gemm", transB=1 - axis)
    store_in_8_bits(graph, {"layer"}, dequantize=dequantize)
    restored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node[:-1]:
        ins = [restored[name] for name in node.input]
        if node.op_type == "DequantizeLinear":
            assert ins[2].shape == ins[1].shape == (3,)
            ins = [ins[0], np.expand_dims(ins[1], 1 - axis)]
        restored[node.output[0]] = ins[0].astype(np.float32) if node.op_type == "Cast" else ins[0] * ins[1]
    found = restored[graph.node[-1].input[1]]
    found = found if axis == 0 else found.T
    step = np.maximum(np.abs(weights).max(1, keepdims=True) / 127, np.finfo(np.float32).tiny)
    assert (np.abs(found - weights) <= step * 0.5001).all()


def test_layers_that_share_weights_share_the_integers_too():
    nodes = [helper.make_node("MatMul", [data, "w"], [data + "y"], data) for data in "ab"]
    weights = numpy_helper.from_array(normal(WIDTH, WIDTH), "w")
    graph = helper.make_graph(nodes, "g", [], [], [weights])
    assert [node.name for node in float_layers(helper.make_model(graph), ())] == ["a", "b"]
    store_in_8_bits(graph, {"a", "b"}, dequantize=False)
    assert [node.op_type for node in graph.node] == ["Cast", "Mul", "MatMul", "MatMul"]
    assert graph.node[2].input[1] == graph.node[3].input[1] == graph.node[1].output[0]


@pytest.mark.parametrize(
    ("shape", "operator", "found"),
    [
        ((WIDTH, WIDTH), "MatMul", True),
        ((WIDTH, WIDTH, 1, 1), "Conv", True),
        ((WIDTH, LEAST // WIDTH - 1), "MatMul", False),
        ((2, WIDTH, WIDTH), "MatMul", False),
        ((WIDTH, WIDTH), "Add", False),
    ],
)
def test_layers_with_enough_weights_in_two_dimensions(shape, operator, found):
    proto = helper.make_model(one_layer(normal(*shape), operator))
    assert bool(float_layers(proto, ())) == found
    assert not float_layers(proto, {"layer"})
