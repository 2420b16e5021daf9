"""int8 for linear layers: which products are in 8 bits, what the layers are called, and what is left in floats."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.engine_precision import network_precision
from pmm.export.fallback import convert_with_fallback
from pmm.export.int8 import Quantizer
from pmm.export.int8_layers import layer_names, main_inputs, quantisable, with_unique_names
from pmm.export.parity_check import ParityFailed
from pmm.export.precision import onnx_precision
from pmm.runtime.ort_session import open_session

TOKENS, WIDTH = 6, 8


def model(steps, weights, output, shape, opset=20, names=True):
    """images float32 [batch, 3, 4, 6] through `steps` of (operator, inputs, output, attributes)."""
    nodes = [
        helper.make_node(kind, ins.split(), [out], f"node_{out}" if names else "", **attributes)
        for kind, ins, out, attributes in steps
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 4, 6])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", *shape])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / 3


def transformer(opset=20):
    """Patches [batch, 6, 8], one block of attention and a linear layer, the first token, a head."""
    rng = iter(range(100))
    weights = {
        "embed.weight": normal(WIDTH, 3, 2, 2, seed=next(rng)),
        "size": np.int64([0, WIDTH, TOKENS]),
        "scale": np.ones(WIDTH, np.float32),
        "val_3": normal(WIDTH, WIDTH, seed=next(rng)),
        "attn.q.bias": normal(WIDTH, seed=next(rng)),
        "onnx::MatMul_7": normal(WIDTH, WIDTH, seed=next(rng)),
        "mlp.weight": normal(TOKENS, WIDTH, WIDTH, seed=next(rng))[0],
        "first": np.int64(0),
        "head.weight": normal(5, WIDTH, seed=next(rng)),
    }
    steps = [
        ("Conv", "x embed.weight", "map", {"strides": [2, 2]}),
        ("Reshape", "map size", "rows", {}),
        ("Transpose", "rows", "stream", {"perm": [0, 2, 1]}),
        ("LayerNormalization", "stream scale", "norm", {}),
        ("MatMul", "norm val_3", "q", {}),
        ("Add", "q attn.q.bias", "query", {}),
        ("MatMul", "norm onnx::MatMul_7", "key", {}),
        ("Transpose", "key", "turned", {"perm": [0, 2, 1]}),
        ("MatMul", "query turned", "scores", {}),
        ("Softmax", "scores", "attention", {}),
        ("MatMul", "attention norm", "mixed", {}),
        ("MatMul", "mixed mlp.weight", "mlp", {}),
        ("Add", "stream mlp", "sum", {}),
        ("Gather", "sum first", "token", {"axis": 1}),
        ("Gemm", "token head.weight", "y", {"transB": 1}),
    ]
    return model(steps, weights, "y", [5], opset)


def images(batch=4, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, 3, 4, 6)).astype(np.float32)


def run(proto, batch):
    return open_session(proto.SerializeToString()).run(None, {proto.graph.input[0].name: batch})[0]


def quantizer(proto, target="cpu"):
    return Quantizer(proto, target, [images(seed=k) for k in range(2)], "x")


def test_products_with_constant_weights_are_in_8_bits_and_attention_and_heads_are_not():
    found = quantisable(transformer(), ("Conv", "MatMul", "Gemm"))
    assert [node.output[0] for node in found] == ["map", "q", "key", "mlp"]


@pytest.mark.parametrize(
    ("product", "weights", "quantised"),
    [
        ("Gemm", {"w": normal(24, 5)}, True),
        ("Gemm", {"w": normal(5, 24)}, True),
        ("MatMul", {"w": normal(24, 5)}, True),
        ("MatMul", {"w": normal(2, 3, 24, 5)[0, 0][None]}, False),  # one product for each of a stack
    ],
    ids=str,
)
def test_gemm_and_matmul_over_many_positions(product, weights, quantised):
    attributes = {"transB": 1} if weights["w"].shape[0] == 5 else {}
    steps = [("Reshape", "x size", "rows", {}), (product, "rows w", "y", attributes)]
    shape = np.int64([-1, 24])
    proto = model(steps, {"size": shape, **weights}, "y", [None] * (len(weights["w"].shape) - 1))
    assert onnx.shape_inference.infer_shapes(proto).graph.node
    found = quantisable(proto, ("MatMul", "Gemm"))
    assert [node.op_type for node in found] == [product] * quantised


def test_one_position_of_an_image_is_a_head():
    steps = [("Reshape", "x size", "row", {}), ("Gemm", "row w", "y", {})]
    assert not quantisable(model(steps, {"size": np.int64([-1, 72]), "w": normal(72, 5)}, "y", [5]), ("Gemm",))


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_linear_layers_are_in_8_bits_per_output_channel(target):
    proto = transformer()
    made = quantizer(proto, target).build()
    share = onnx_precision(made).share
    assert share["int8"] == pytest.approx(sum((12 * 8 * 6, 3 * 64 * 6)) / onnx_precision(proto).total)
    makers = {name: node for node in made.graph.node for name in node.output}
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    for node in made.graph.node:
        if node.output[0] in ("q", "key", "mlp"):
            weights = makers[node.input[1]]
            values, scales = stored[weights.input[0]], stored[weights.input[1]]
            assert (values.dtype, scales.shape) == (np.int8, (WIDTH,))
            assert np.abs(values.astype(int)).max() == {"cpu": 64, "tensorrt": 127}[target]
            assert [a.i for a in weights.attribute if a.name == "axis"] == [1]
    kinds = {
        node.output[0]: [makers[name].op_type for name in node.input if name in makers] for node in made.graph.node
    }
    assert kinds["sum"] == ["Transpose", "MatMul"], "the residual stream is not rounded"
    assert kinds["mixed"] == ["Softmax", "LayerNormalization"], "nor what linear layers and attention read"
    assert kinds["scores"] == ["Add", "Transpose"]
    parity = numeric_parity(run(proto, images(seed=9)), run(made, images(seed=9)))
    assert parity.min_cosine > 0.995


def test_on_a_cpu_the_products_are_integers_and_nothing_else_is_rounded(tmp_path):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(quantizer(transformer()).build().SerializeToString(), options, ["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 3
    assert kinds.count("QLinearConv") == 1


def test_tensorrt_reads_the_same_layers_in_8_bits():
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
    proto = transformer()
    # windows of an image are part of the batch, as in Swin transformers
    sizes = next(tensor for tensor in proto.graph.initializer if tensor.name == "size")
    sizes.CopyFrom(numpy_helper.from_array(np.int64([-1, WIDTH, 2]), "size"))
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "windows"
    made = quantizer(proto, "tensorrt").build()
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(made.SerializeToString())
    assert network_precision(trt, network).macs == onnx_precision(made).macs
    assert network.get_input(0).shape[0] == -1


def test_layers_have_readable_names():
    assert quantizer(transformer()).layers == ["embed", "attn.q", "node_key", "mlp"]


def test_names_are_unique_and_of_the_users_network():
    weights = {name: normal(24, 24, seed=k) for k, name in enumerate(("onnx::MatMul_1", "onnx::MatMul_2", "12"))}
    steps = [
        ("Reshape", "x size", "rows", {}),
        ("MatMul", "rows onnx::MatMul_1", "a", {}),
        ("Add", "a shared.bias", "b", {}),
        ("MatMul", "b onnx::MatMul_2", "c", {}),
        ("Add", "c shared.bias", "d", {}),
        ("MatMul", "d 12", "e", {}),
        ("Add", "e last.bias", "y", {}),
    ]
    biases = {"shared.bias": normal(24), "last.bias": normal(24)}
    proto = model(steps, {"size": np.int64([-1, 24]), **weights, **biases}, "y", [24])
    for node, name in zip([n for n in proto.graph.node if n.op_type == "MatMul"], ("fc1", "fc2", "fc3"), strict=True):
        node.name = f"/blocks/blocks.0/{name}/MatMul"
    # torch stores equal biases once, under the name of one of their layers
    assert list(layer_names(proto).values()) == ["blocks.0.fc1", "blocks.0.fc2", "last"]


def test_layers_that_share_weights_are_one():
    steps = [
        ("Reshape", "x size", "rows", {}),
        ("MatMul", "rows fc.weight", "a", {}),
        ("MatMul", "a fc.weight", "b", {}),
        ("MatMul", "b other.weight", "y", {}),
    ]
    weights = {"size": np.int64([-1, 24]), "fc.weight": normal(24, 24), "other.weight": normal(24, 24, seed=1)}
    made = quantizer(model(steps, weights, "y", [24]))
    assert made.layers == made.with_dependencies(made.layers) == ["fc", "other"]
    one = 24 * 24 * 3
    assert onnx_precision(made.build(["fc"])).macs == {"fp32": 2 * one, "int8": one}
    assert onnx_precision(made.build(["other"])).macs == {"fp32": one, "int8": 2 * one}


def test_a_convolution_that_runs_twice_is_one_layer_and_its_file_is_read_by_onnx_runtime():
    """Its sharing of weights is undone in the file: ONNX Runtime converts them under their name, once."""
    steps = [
        ("Conv", "x conv.weight conv.bias", "a", {"pads": [1] * 4}),
        ("Relu", "a", "b", {}),
        ("Conv", "b conv.weight conv.bias", "y", {"pads": [1] * 4}),
    ]
    weights = {"conv.weight": normal(3, 3, 3, 3), "conv.bias": normal(3)}
    made = quantizer(model(steps, weights, "y", [3, 4, 6]), "tensorrt")
    assert made.layers == ["conv"]
    proto = made.build()
    assert onnx_precision(proto).share == {"int8": 1.0}
    assert run(proto, images()).shape == (len(images()), 3, 4, 6)


@pytest.mark.parametrize("end", ["", "_weight", "_weight_folded"])
def test_layers_of_an_adopted_network_of_torch_have_the_names_of_its_graph(end):
    name = f"trunk.network.graph.features_2_conv_0{end}"
    made = layer_names(model([("Conv", f"x {name}", "y", {})], {name: normal(4, 3, 1, 1)}, "y", [4, 4, 6]))
    assert made == {name: "features_2_conv_0"}


def test_nodes_without_names_are_told_apart():
    proto = transformer()
    for node in proto.graph.node:
        node.name = "same" if node.op_type == "MatMul" else ""
    named = with_unique_names(proto)
    names = [node.name for node in named.graph.node]
    assert len(set(names)) == len(names)
    assert all(names)
    assert {node.name for node in proto.graph.node} == {"same", ""}, "the caller's graph is left alone"
    assert with_unique_names(named) is named
    assert onnx_precision(quantizer(proto).build()).share["int8"] > 0.5


@pytest.mark.parametrize("target", ["cpu", pytest.param("tensorrt", marks=pytest.mark.slow)])
def test_a_linear_layer_that_costs_most_is_kept_in_fp32(target):
    """One channel of what goes in is a thousand times the others: in 8 bits those are lost."""
    proto = transformer()
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    loud = np.ones(WIDTH, np.float32)
    loud[3] = 1000
    weights["scale"].CopyFrom(numpy_helper.from_array(loud, "scale"))
    quiet = numpy_helper.to_array(weights["val_3"]).copy()
    quiet[3] /= 1000
    weights["val_3"].CopyFrom(numpy_helper.from_array(quiet, "val_3"))
    made = quantizer(proto, target)
    expected = run(proto, images(seed=9))

    def cosine(candidate):
        return numeric_parity(expected, run(candidate, images(seed=9))).min_cosine

    least = (cosine(made.build()) + cosine(made.build(["attn.q"]))) / 2

    def passes(candidate, allowance):
        if cosine(candidate) < least:
            raise ParityFailed("it moved")

    _, kept = convert_with_fallback(made, passes, [images(seed=8)])
    assert kept
    assert set(kept) <= {"attn.q", "node_key"}


def test_a_position_embedding_is_no_shortcut():
    """The other input of its sum is a constant, which the quantizer leaves."""
    weights = {"w": normal(WIDTH, 3, 2, 2), "positions": normal(1, WIDTH, 2, 3), "v": normal(4, WIDTH, 1, 1)}
    steps = [
        ("Conv", "x w", "map", {"strides": [2, 2]}),
        ("Add", "map positions", "placed", {}),
        ("Conv", "placed v", "y", {}),
    ]
    proto = model(steps, weights, "y", [4, 2, 3])
    assert not main_inputs(proto)
    quantised = Quantizer(proto, "tensorrt", [images()], "x").build()
    np.testing.assert_allclose(run(quantised, images()), run(proto, images()), atol=0.2)
