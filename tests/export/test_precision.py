"""The precision that is read back from a file, on graphs of one product each."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from pmm.export.precision import GraphPrecision, onnx_precision
from pmm.utils.errors import InvalidFile
from tests.refusals import refuses


def graph(nodes, weights):
    """images float32 [batch, 3, 8, 6] through `nodes`, of which the last gives c."""
    made = helper.make_graph(
        [*nodes, helper.make_node("Identity", ["c"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def convolution(x, w, **options):
    return helper.make_node("Conv", [x, w], ["c"], **options)


def test_multiplications_of_one_image_are_counted_and_named_by_the_weights():
    weights = np.ones((4, 3, 3, 2), np.float32)
    found = onnx_precision(graph([convolution("x", "w", strides=[2, 1])], {"w": weights}))
    assert found.macs == {"fp32": 4 * 3 * 5 * 3 * 3 * 2}  # channels, positions, and the sum behind each
    assert (found.precision, found.share) == ("fp32", {"fp32": 1.0})
    narrow = [helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16), convolution("h", "w")]
    assert onnx_precision(graph(narrow, {"w": weights.astype(np.float16)})).precision == "fp16"


@pytest.mark.parametrize(
    ("node", "weights", "macs"),
    [
        # each of 3 * 8 * 6 inputs reaches 4 outputs through 2 * 2 weights, of one group
        (helper.make_node("ConvTranspose", ["x", "w"], ["c"]), (3, 4, 2, 2), 3 * 8 * 6 * 4 * 2 * 2),
        (helper.make_node("Einsum", ["x", "w"], ["c"], equation="nchw,kc->nkhw"), (5, 3), 8 * 6 * 3 * 5),
        (helper.make_node("Einsum", ["x", "w"], ["c"], equation="...hw, wk -> ...hk"), (6, 5), 3 * 8 * 6 * 5),
        (helper.make_node("Einsum", ["x"], ["c"], equation="nchw->nhwc"), None, 0),
        (helper.make_node("MatMul", ["x", "w"], ["c"]), (6, 5), 3 * 8 * 6 * 5),
        (helper.make_node("MatMul", ["x", "t"], ["c"]), None, 3 * 8 * 8 * 6),  # of two computed maps
        (helper.make_node("FusedMatMul", ["x", "w"], ["c"], domain="com.microsoft"), (6, 5), 0),
    ],
    ids=lambda value: value.op_type if hasattr(value, "op_type") else "",
)
def test_every_product_of_a_foreign_graph_is_counted(node, weights, macs):
    turned = helper.make_node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2])
    known = helper.make_node("Conv", ["x", "one"], ["other"])  # a graph needs one product that counts
    stored = {"one": np.ones((1, 3, 1, 1), np.float32)}
    if weights:
        stored["w"] = np.ones(weights, np.float32)
    proto = graph([turned, known, node], stored)
    if node.domain:
        proto.opset_import.append(helper.make_opsetid(node.domain, 1))
    assert onnx_precision(proto).total == 3 * 8 * 6 + macs


def test_a_gemm_may_be_transposed():
    nodes = [
        helper.make_node("Reshape", ["x", "size"], ["rows"]),
        helper.make_node("Gemm", ["w", "rows"], ["c"], transA=1, transB=1),
    ]
    proto = graph(nodes, {"size": np.int64([-1, 6]), "w": np.ones((6, 5), np.float32)})
    assert onnx_precision(proto).total == 5 * 6 * 24


@pytest.mark.parametrize("shape", [["batch", 8, 6, 3], [2, 8, 6, 3]], ids=["any batch", "static batch"])
@pytest.mark.parametrize("listed", [False, True], ids=["", "weights among the inputs"])
def test_nhwc_static_batches_and_weights_listed_as_inputs(shape, listed):
    nodes = [helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]), convolution("t", "w")]
    proto = graph(nodes, {"w": np.ones((4, 3, 1, 1), np.float32)})
    weights = helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3, 1, 1])
    del proto.graph.input[:]
    proto.graph.input.extend([weights] * listed + [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)])
    assert onnx_precision(proto).macs == {"fp32": 4 * 3 * 8 * 6}


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.BFLOAT16])
def test_sizes_that_only_a_run_knows_are_computed(kind):
    """Old exporters compute the padding of windows so; onnx does not follow a remainder."""
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=kind),
        helper.make_node("Cast", ["w"], ["v"], to=kind),
        helper.make_node("Shape", ["h"], ["s"]),
        helper.make_node("Gather", ["s", "at"], ["height"]),
        helper.make_node("Mod", ["height", "seven"], ["over"]),  # 1
        helper.make_node("Mul", ["over", "three"], ["channels"]),
        helper.make_node("Concat", ["first", "channels", "all"], ["shape"], axis=0),
        helper.make_node("Reshape", ["h", "shape"], ["rows"]),
        helper.make_node("MatMul", ["rows", "v"], ["c"]),
    ]
    stored = {"at": np.int64([2]), "seven": np.int64([7]), "three": np.int64([3]), "first": np.int64([0]),
              "all": np.int64([-1]), "w": np.ones((48, 5), np.float32)}  # fmt: skip
    name = {TensorProto.FLOAT: "fp32", TensorProto.BFLOAT16: "bf16"}[kind]
    assert onnx_precision(graph(nodes, stored)).macs == {name: 3 * 48 * 5}


@pytest.mark.parametrize(("both", "expected"), [(True, "int8"), (False, "fp32")])
def test_only_where_both_factors_are_in_8_bits_is_a_product_int8(both, expected):
    """Weights alone are stored in 8 bits, to be read faster, and multiplied in fp32."""
    steps = {"scale": np.float32(0.1), "zero": np.int8(0)}
    images = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["x/8"]),
        helper.make_node("DequantizeLinear", ["x/8", "scale", "zero"], ["x/wide"]),
    ]
    weights = helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["w/wide"])
    product = convolution("x/wide" if both else "x", "w/wide")
    proto = graph([*images, weights, product], {"w": np.ones((4, 3, 1, 1), np.int8), **steps})
    assert onnx_precision(proto).precision == expected


@pytest.mark.parametrize(
    ("asked", "macs", "facts"),
    [
        ("fp32", {"fp32": 99, "fp16": 1}, ("99.0% fp32, 1.0% fp16", "100% or more in fp32")),
        ("fp16", {"fp32": 2, "fp16": 98}, ("98.0% fp16, 2.0% fp32", "99% or more in fp16")),
        ("int8", {"fp32": 51, "int8": 49}, ("51.0% fp32, 49.0% int8", "50% or more in int8")),
    ],
)
def test_most_is_not_enough(asked, macs, facts):
    with refuses(InvalidFile, *facts, path="model.onnx"):
        GraphPrecision(macs).check(asked, "model.onnx")


@pytest.mark.parametrize(
    ("asked", "macs"),
    [("fp32", {"fp32": 7}), ("fp16", {"fp32": 1, "fp16": 99}), ("int8", {"fp32": 50, "int8": 50})],
)
def test_heads_and_some_layers_may_stay_in_fp32(asked, macs):
    GraphPrecision(macs).check(asked, "model.onnx")


def test_a_graph_without_products_has_no_precision():
    with refuses(InvalidFile, "no convolution or matrix product", path="a.onnx"):
        onnx_precision(graph([helper.make_node("Relu", ["x"], ["c"])], {}), "a.onnx")
