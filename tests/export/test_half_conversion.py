"""Foreign graphs in half precision: what is in which type, and what it computes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.engine_precision import network_precision
from pmm.export.graph_folding import folded, opset_of, with_opset
from pmm.export.half_conversion import to_half
from pmm.export.half_precision import emulated, tensor_types
from pmm.export.int8 import Quantizer
from pmm.export.precision import onnx_precision
from pmm.runtime.ort_session import open_session
from pmm.utils.errors import InvalidFile
from tests.conftest import examples
from tests.export.test_int8_layers import images, model, normal, transformer
from tests.refusals import refuses

HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
NORM = {"scale": np.ones(4, np.float32), "shift": normal(4), "mean": normal(4), "variance": np.ones(4, np.float32) * 2}
CONV = ("Conv", "x w", "map", {})
POOL = ("GlobalAveragePool", "map", "pooled", {})
W = {"w": normal(4, 3, 1, 1)}


def halved(steps, weights, output, shape, precision="fp16", opset=20):
    """Names of the tensors by type, and the graph."""
    proto = to_half(model(steps, weights, output, shape, opset), precision)
    types = tensor_types(proto)
    made = {name for node in proto.graph.node for name in node.output}
    return {name for name in made if types[name] == HALF[precision]}, proto


def close(expected, proto, half, least=0.9999):
    """Judged with the rounding between operators that a GPU has."""
    rows = [
        open_session(p.SerializeToString(), optimise=False).run(None, {"x": images()})[0].reshape(4, -1)
        for p in (expected, emulated(half))
    ]
    assert numeric_parity(*rows).min_cosine > least


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_products_and_attention_are_in_half_and_norms_and_heads_are_not(precision):
    proto = transformer()
    half = to_half(proto, precision)
    types = tensor_types(half)
    narrow = {name for node in half.graph.node for name in node.output if types[name] == HALF[precision]}
    assert {"map", "stream", "q", "query", "key", "scores", "attention", "mixed", "mlp", "sum"} <= narrow
    assert {"norm", "y"}.isdisjoint(narrow)
    assert [types[value.name] for value in (*half.graph.input, *half.graph.output)] == [TensorProto.FLOAT] * 2
    assert onnx_precision(half).macs == {
        precision: onnx_precision(proto).total - 5 * 8,
        "fp32": 5 * 8,
    }
    close(proto, half, half, {"fp16": 0.99999, "bf16": 0.999}[precision])


def test_a_normalisation_in_single_steps_is_in_fp32():
    """As exporters before opset 17 write it."""
    steps = [
        CONV,
        ("ReduceMean", "map", "mean", {"axes": [1]}), ("Sub", "map mean", "centred", {}),
        ("Pow", "centred two", "square", {}), ("ReduceMean", "square", "variance", {"axes": [1]}),
        ("Add", "variance tiny", "above", {}), ("Sqrt", "above", "deviation", {}),
        ("Div", "centred deviation", "whole", {}), ("Mul", "whole two", "scaled", {}),
        ("Conv", "scaled v", "y", {}),
    ]  # fmt: skip
    weights = {**W, "two": np.float32(2), "tiny": np.float32(1e-6), "v": normal(2, 4, 1, 1)}
    narrow, half = halved(steps, weights, "y", [2, 4, 6], opset=14)
    assert {name for name in narrow if "/" not in name} == {"map"}
    assert onnx_precision(half).share == {"fp16": 1.0}


@pytest.mark.parametrize(("weigh", "inside"), [("Mul", True), ("Sub", False)])
def test_what_weighs_channels_is_in_half_and_what_normalises_is_not(weigh, inside):
    steps = [
        CONV, POOL, ("Conv", "pooled v", "squeeze", {}), ("Sigmoid", "squeeze", "gate", {}),
        (weigh, "map gate" if inside else "map pooled", "weighed", {}), ("Conv", "weighed v", "y", {}),
    ]  # fmt: skip
    if not inside:
        del steps[2:4]
    narrow, half = halved(steps, {**W, "v": normal(4, 4, 1, 1)}, "y", [4, 4, 6])
    assert ("pooled" in narrow) is ("weighed" in narrow) is inside
    assert not inside or {"squeeze", "gate"} <= narrow
    assert sum(node.op_type == "Cast" for node in half.graph.node) == (2 if inside else 4)


def test_the_head_is_in_fp32():
    steps = [CONV, ("Relu", "map", "on", {}), ("GlobalAveragePool", "on", "pooled", {}),
             ("Flatten", "pooled", "flat", {}), ("Gemm", "flat head", "y", {})]  # fmt: skip
    narrow, half = halved(steps, {**W, "head": normal(4, 5)}, "y", [5])
    assert narrow == {"x/fp16", "map", "on"}
    assert onnx_precision(half).macs == {"fp16": 4 * 3 * 24, "fp32": 4 * 5}


@pytest.mark.parametrize("operator", ["ReduceL2", "ReduceSum", "ReduceLogSumExp"])
def test_sums_over_a_map_are_in_fp32(operator):
    """Half precision overflows above 65504."""
    steps = [CONV, (operator, "map axes" if operator == "ReduceSum" else "map", "sum", {}),
             ("Mul", "map sum", "weighed", {}), ("Conv", "weighed v", "y", {})]  # fmt: skip
    if operator != "ReduceSum":
        steps[1][3]["axes"] = [2, 3]
    weights = {**W, "axes": np.int64([2, 3]), "v": normal(4, 4, 1, 1)}
    narrow, _ = halved(steps, weights, "y", [4, 4, 6], opset=17)
    assert {name for name in narrow if "/" not in name} == {"map"}


def test_a_division_by_what_is_computed_is_in_fp32():
    steps = [CONV, ("Conv", "map v", "sum", {}), ("Div", "map sum", "ratio", {}), ("Div", "sum two", "part", {}),
             ("Concat", "ratio part", "both", {"axis": 1}), ("Identity", "both", "y", {})]  # fmt: skip
    narrow, _ = halved(steps, {**W, "v": normal(4, 4, 1, 1), "two": np.float32(2)}, "y", [8, 4, 6])
    assert {"map", "sum", "part"} <= narrow
    assert "ratio" not in narrow


def test_a_batch_norm_is_folded_or_stays_in_fp32():
    norm = ("BatchNormalization", "map scale shift mean variance", "normed", {})
    steps = [CONV, norm, ("Conv", "normed v", "y", {})]
    weights = {**W, **NORM, "v": normal(2, 4, 1, 1)}
    proto = model(steps, weights, "y", [2, 4, 6])
    narrow, half = halved(steps, weights, "y", [2, 4, 6])
    assert [node.op_type for node in half.graph.node] == ["Cast", "Conv", "Conv", "Cast"]
    close(proto, half, half)
    late = [CONV, ("Relu", "map", "on", {}), ("BatchNormalization", "on scale shift mean variance", "normed", {}),
            ("Relu", "normed", "clipped", {}), ("Conv", "clipped v", "y", {})]  # fmt: skip
    narrow, half = halved(late, weights, "y", [2, 4, 6])
    assert {"map", "on"} <= narrow
    assert {"normed", "clipped"}.isdisjoint(narrow)


def test_folding_leaves_plain_onnx_of_the_same_opset():
    norm = ("BatchNormalization", "map scale shift mean variance", "normed", {})
    proto = model([CONV, norm, ("Identity", "normed", "y", {})], {**W, **NORM}, "y", [4, 4, 6], opset=12)
    listed = [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in proto.graph.initializer]
    proto.graph.input.extend(listed)  # as old exporters do: then nothing is constant for ONNX Runtime
    flat = folded(proto)
    assert [node.op_type for node in flat.graph.node] == ["Conv"]
    assert [(entry.domain, entry.version) for entry in flat.opset_import] == [("", 12)]
    assert [value.name for value in flat.graph.input] == ["x"]
    assert len(proto.graph.input) == 6, "the caller's graph is left alone"
    close(proto, flat, flat, 0.999999)


def test_constants_are_cast_once_for_each_type():
    """Also those of Constant nodes, and one that both types read."""
    steps = [
        ("Mul", "x factor", "scaled", {}), ("Conv", "scaled w", "map", {}), ("Mul", "map factor", "a", {}),
        ("Constant", "", "half", {"value": numpy_helper.from_array(np.array(0.5, np.float32))}),
        ("Mul", "a half", "b", {}), ("Mul", "b factor", "y", {}),
    ]  # fmt: skip
    _, half = halved(steps, {**W, "factor": np.float32([[[0.9]]])}, "y", [4, 4, 6])
    stored = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    assert {kind for name, kind in stored.items() if name.startswith("factor")} == {TensorProto.FLOAT, HALF["fp16"]}
    assert stored["w/fp16"] == HALF["fp16"]
    assert "w" not in stored
    assert not [node for node in half.graph.node if node.op_type == "Cast" and node.input[0] in stored]


def test_large_numbers_of_masks_stay_finite():
    steps = [CONV, ("Where", "on map mask", "masked", {}), ("Add", "masked endless", "y", {})]
    weights = {**W, "on": np.array([True]), "mask": np.float32(-1e9), "endless": np.float32([[[-np.inf]]])}
    _, half = halved(steps, weights, "y", [4, 4, 6])
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in half.graph.initializer}
    assert stored["mask/fp16"] == -65504
    assert np.isneginf(stored["endless/fp16"]).all()


def test_inputs_that_take_no_half_keep_their_type():
    steps = [CONV, ("Resize", "map none scales", "large", {}), ("Conv", "large v", "y", {})]
    weights = {**W, "scales": np.float32([1, 1, 2, 2]), "none": np.zeros(0, np.float32), "v": normal(2, 4, 1, 1)}
    narrow, half = halved(steps, weights, "y", [2, 8, 12])
    assert "large" in narrow
    assert {t.name: t.data_type for t in half.graph.initializer}["scales"] == TensorProto.FLOAT


def test_an_output_in_half_is_cast_back():
    narrow, half = halved([CONV, ("Relu", "map", "y", {})], W, "y", [4, 4, 6])
    assert half.graph.output[0].name == "y"
    assert narrow == {"x/fp16", "map", "y/fp16"}


@pytest.mark.parametrize(("precision", "opset"), [("fp16", 12), ("bf16", 22)])
def test_an_old_opset_is_converted_where_the_type_needs_it(precision, opset):
    _, half = halved([CONV, ("Relu", "map", "y", {})], W, "y", [4, 4, 6], precision, 12)
    assert opset_of(half) == opset
    assert half.ir_version >= helper.OP_SET_ID_VERSION_MAP["ai.onnx", opset]
    assert onnx_precision(half).share == {precision: 1.0}


def test_a_graph_that_cannot_be_converted_is_refused_with_what_to_do():
    proto = model([("Upsample", "x scales", "y", {})], {"scales": np.float32([1, 1, 2, 2])}, "y", [3, 8, 12], 8)
    with refuses(InvalidFile, "opset 8", hint="opset_version=22"):  # where scales are an attribute
        with_opset(proto, 22)


@pytest.mark.parametrize("opset", [17, 20])
def test_what_is_not_in_8_bits_is_in_half(opset):
    proto = Quantizer(transformer(opset), "tensorrt", [images(seed=k) for k in range(2)], "x").build()
    half = to_half(proto, "fp16")
    before, after = onnx_precision(proto).macs, onnx_precision(half).macs
    assert after == {"int8": before["int8"], "fp16": before["fp32"] - 5 * 8, "fp32": 5 * 8}
    types = tensor_types(half)
    given = {kind: {types[name] for node in half.graph.node if node.op_type == kind for name in node.output}
             for kind in ("Conv", "MatMul", "DequantizeLinear", "LayerNormalization", "Gemm")}  # fmt: skip
    assert [kinds == {HALF["fp16"]} for kinds in given.values()] == [True, True, True, False, False]
    stored = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    scales = {stored[n.input[1]] for n in half.graph.node if n.op_type == "DequantizeLinear"}
    assert scales == {HALF["fp16"]}
    close(proto, half, half)
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse(half.SerializeToString())
    assert network_precision(trt, network).macs == after


def branch():
    then = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["t"])], "t", [], [helper.make_tensor_value_info("t", 1, None)]
    )
    return model(
        [("If", "on", "y", {"then_branch": then, "else_branch": then})], {"on": np.array(True)}, "y", [3, 4, 6]
    )


def narrow_input():
    proto = model([CONV, ("Relu", "map", "y", {})], {"w": W["w"].astype(np.float16)}, "y", [4, 4, 6])
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return proto


@pytest.mark.parametrize(("make", "fact"), [(branch, "If"), (narrow_input, "fp16")])
def test_graphs_that_are_not_plain_fp32_are_refused(make, fact):
    with refuses(InvalidFile, fact):
        to_half(make(), "bf16")


STEPS = ("Relu", "Sigmoid", "Softmax", "Mul", "Add", "Conv", "LayerNormalization", "Exp", "Gate", "MaxPool", "Div")


@examples(40)
@given(st.lists(st.sampled_from(STEPS), max_size=6), st.sampled_from(["fp16", "bf16"]))
def test_any_chain_of_steps_computes_the_same(kinds, precision):
    """[N, 3, 4, 6] -> products, activations, norms, gates and residual sums in any order -> [N, 4]."""
    steps, last, first = [CONV], "map", "map"
    for index, kind in enumerate(kinds):
        out = f"t{index}"
        if kind == "Gate":
            steps += [("GlobalAveragePool", last, f"p{index}", {}), ("Sigmoid", f"p{index}", f"g{index}", {}),
                      ("Mul", f"{last} g{index}", out, {})]  # fmt: skip
        elif kind == "Exp":
            steps += [("Tanh", last, f"p{index}", {}), ("Exp", f"p{index}", out, {})]
        elif kind == "Div":
            steps += [("ReduceL2", last, f"p{index}", {"axes": [1]}), ("Add", f"p{index} one", f"s{index}", {}),
                      ("Div", f"{last} s{index}", out, {})]  # fmt: skip
        else:
            extra = {"Mul": first, "Add": first, "Conv": "v", "LayerNormalization": "ones"}.get(kind, "")
            options = {"MaxPool": {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, "Softmax": {"axis": 1}}
            steps.append((kind, f"{last} {extra}", out, options.get(kind, {})))
        last = out
    steps += [("Conv", f"{last} v", "end", {}), ("GlobalMaxPool", "end", "pooled", {}), ("Flatten", "pooled", "y", {})]
    weights = {**W, "v": normal(4, 4, 1, 1, seed=3), "ones": np.ones(6, np.float32), "one": np.float32(1)}
    proto = model(steps, weights, "y", [4], opset=17)
    half = to_half(proto, precision)
    types = tensor_types(half)
    assert [types[value.name] for value in (*half.graph.input, *half.graph.output)] == [TensorProto.FLOAT] * 2
    assert onnx_precision(half).share == {precision: 1.0}
    by_type = {node.op_type: {types[name] for name in node.output} for node in half.graph.node}
    for kind in ("LayerNormalization", "Exp", "ReduceL2", "Div", "GlobalMaxPool"):
        assert by_type.get(kind, {TensorProto.FLOAT}) == {TensorProto.FLOAT}, kind
    close(proto, half, half, {"fp16": 0.999, "bf16": 0.98}[precision])
