"""Exported graphs in operators that every reader knows compute what they did."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from pmm.artifacts.onnx_file import read_onnx
from pmm.data.crops import load_crops
from pmm.data.readers import read_dataset
from pmm.export.options import ExportOptions
from pmm.export.portable_graph import make_portable
from pmm.runtime.ort import OrtRunner
from tests.conftest import examples

AXES = numpy_helper.from_array(np.array([1]), "axes")


def model(nodes, image, output, constants=(), recorded=(), kind=TensorProto.FLOAT):
    """Of opset 18, with a symbolic batch; `recorded` are (name, shape) as torch writes them."""
    value = helper.make_tensor_value_info
    inputs = [value("x", kind, ["batch", *image])]
    graph = helper.make_graph(nodes, "g", inputs, [value("y", kind, output)], list(constants))
    graph.value_info.extend(value(name, kind, shape) for name, shape in [("x", ["batch", *image]), *recorded])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def portable(proto):
    """`proto` rewritten, and what it gave before and gives now, as a function of images."""
    before = ReferenceEvaluator(proto.SerializeToString())
    make_portable(proto)
    onnx.checker.check_model(proto, full_check=True)
    after = ReferenceEvaluator(proto)
    return lambda images: (before.run(None, {"x": images})[0], after.run(None, {"x": images})[0])


def operators(proto):
    return [node.op_type for node in proto.graph.node]


@given(
    operator=st.sampled_from([("ReduceMean", "GlobalAveragePool"), ("ReduceMax", "GlobalMaxPool")]),
    axes=st.sampled_from([[2, 3], [3, 2], [-1, -2], [2, -1]]),
    keepdims=st.sampled_from([None, 0, 1]),
    shape=st.tuples(*[st.integers(1, 5)] * 4),
    seed=st.integers(0, 9),
)
@examples(40)
def test_the_mean_and_the_maximum_of_a_map_are_pooled(operator, axes, keepdims, shape, seed):
    attributes = {} if keepdims is None else {"keepdims": keepdims}
    node = helper.make_node(operator[0], ["x", "axes"], ["y"], "n", **attributes)
    output = ["batch", shape[1], *([] if keepdims == 0 else [1, 1])]
    proto = model([node], shape[1:], output, [numpy_helper.from_array(np.array(axes), "axes")])
    run = portable(proto)
    assert operators(proto) == [operator[1], *(["Flatten"] if keepdims == 0 else [])]
    assert not proto.graph.initializer
    expected, found = run(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert found.shape == expected.shape


@pytest.mark.parametrize(
    ("image", "axes", "kind"),
    [
        ([3, 4, 5], [1], TensorProto.FLOAT),
        ([3, 4, 5], [1, 2, 3], TensorProto.FLOAT),
        ([3, 4, 5], [3], TensorProto.FLOAT),
        ([3, 4, 5, 6], [2, 3], TensorProto.FLOAT),
        ([3, 4, 5], [2, 3], TensorProto.INT32),
    ],
)
def test_no_other_reduction_is(image, axes, kind):
    left = [size for axis, size in enumerate(image, 1) if axis not in axes]
    node = helper.make_node("ReduceMax", ["x", "axes"], ["y"], "n", keepdims=0)
    constants = [numpy_helper.from_array(np.array(axes), "axes")]
    proto = model([node], image, ["batch", *left], constants, kind=kind)
    make_portable(proto)
    assert operators(proto) == ["ReduceMax"]


def normalised(dim, *, expand, axis=1, least=1e-12):
    """x / max(|x|, least), as torch exports it."""
    nodes = [
        helper.make_node("ReduceL2", ["x", "axes"], ["norm"], keepdims=1),
        helper.make_node("Clip", ["norm", "least"], ["clamped"]),
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("Expand", ["clamped", "sizes"], ["wide"]),
        helper.make_node("Div", ["x", "wide" if expand else "clamped"], ["y"]),
    ]
    one = ["batch", 1] if axis == 1 else [1, dim]
    recorded = [("norm", one), ("clamped", one), ("wide", ["batch", dim])]
    constants = [numpy_helper.from_array(np.array([axis]), "axes")]
    constants.append(numpy_helper.from_array(np.array(least, np.float32), "least"))
    return model(nodes, [dim], ["batch", dim], constants, recorded)


@given(
    expand=st.booleans(), shape=st.tuples(st.integers(1, 4), st.integers(1, 40)), scale=st.sampled_from([1e-6, 1, 1e6])
)
@examples(30)
def test_division_by_a_norm_needs_no_reduction_and_leaves_zeros(expand, shape, scale):
    proto = normalised(shape[1], expand=expand)
    run = portable(proto)
    assert not {"ReduceL2", "Clip", "Shape", "Expand"} & {*operators(proto)}
    vectors = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * np.float32(scale)
    vectors[-1] = 0
    expected, found = run(vectors)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    assert not found[-1].any()


def test_a_norm_over_the_batch_stays():
    proto = normalised(3, expand=False, axis=0)
    make_portable(proto)
    assert operators(proto) == ["ReduceL2", "Clip", "Div"]


@pytest.mark.parametrize("least", [1.0, 0.01, 1e-20, 0.0, -1.0])
def test_so_does_one_that_is_no_guard_against_zeros(least):
    proto = normalised(3, expand=False, least=least)
    make_portable(proto)
    assert operators(proto) == ["ReduceL2", "Clip", "Div"]


@pytest.mark.parametrize("recorded", [None, [None, 6]])
def test_what_is_repeated_to_an_unknown_shape_stays(recorded):
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("Expand", ["x", "sizes"], ["wide"]),
        helper.make_node("Relu", ["wide"], ["y"]),
    ]
    proto = model(nodes, [6], ["batch", 6], recorded=[("wide", recorded)] if recorded else [])
    proto.graph.input[0].type.tensor_type.shape.dim[0].ClearField("value")
    del proto.graph.value_info[0]
    make_portable(proto)
    assert operators(proto) == ["Shape", "Expand", "Relu"]


@pytest.mark.parametrize(("recorded", "constant"), [(["batch", 1], [1, 6]), (["other", 1], None)])
def test_what_is_repeated_has_constants_for_its_sizes_where_the_batch_is_its_own(recorded, constant):
    nodes = [
        helper.make_node("ReduceMin", ["x", "axes"], ["least_of_all"], keepdims=1),
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("Expand", ["least_of_all", "sizes"], ["y"]),
    ]
    proto = model(nodes, [6], ["batch", 6], [AXES], [("least_of_all", ["batch", 1])])
    proto.graph.value_info[-1].type.tensor_type.shape.dim[0].dim_param = recorded[0]
    before = proto.SerializeToString()
    run = portable(onnx.ModelProto.FromString(before))
    make_portable(proto)
    expand = proto.graph.node[-1]
    stored = {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in proto.graph.initializer}
    assert stored.get(expand.input[1]) == constant
    assert ("Shape" in operators(proto)) == (constant is None)
    for batch in (1, 4):
        expected, found = run(np.random.default_rng(batch).standard_normal((batch, 6)).astype(np.float32))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("gated", ["other", "x"])
def test_a_gate_is_told_from_a_hard_swish(gated):
    """OpenCV takes every product with a hard sigmoid for one."""
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed (pip install opencv-python-headless)")
    nodes = [
        helper.make_node("Abs", ["x"], ["other"]),
        helper.make_node("HardSigmoid", ["x"], ["gate"], alpha=1 / 6),
        helper.make_node("Mul", [gated, "gate"], ["y"]),
    ]
    proto = model(nodes, [2, 3, 4], ["batch", 2, 3, 4])
    run = portable(proto)
    assert ("Relu" in operators(proto)) == (gated == "other")
    images = 3 * np.random.default_rng(0).standard_normal((2, 2, 3, 4)).astype(np.float32)
    expected, found = run(images)
    np.testing.assert_array_equal(found, expected)
    network = cv2.dnn.readNetFromONNX(np.frombuffer(proto.SerializeToString(), np.uint8))
    network.setInput(images)
    np.testing.assert_allclose(network.forward(), expected, atol=1e-5)


def test_an_exported_file_has_no_reduction(exported):
    file = read_onnx(exported)
    assert {*operators(file.proto)} == {
        *("Cast", "Transpose", "Mul", "Sub", "Conv", "Relu", "MaxPool", "Add", "Concat", "Gemm", "Flatten"),
        *("GlobalAveragePool", "GlobalMaxPool"),
    }


@pytest.mark.slow
def test_mirrored_and_normalised_files_run_in_opencv_with_any_batch(shared, people):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed (pip install opencv-python-headless)")
    path = shared.onnx(ExportOptions(normalize=True, flip_tta=True), verify=False)
    crops = load_crops([s.path for s in read_dataset("synthetic", people).query[:5]], 128, 64)
    with OrtRunner(path, warn=False) as runner:
        expected = runner(crops)
    assert not [operator for operator in operators(read_onnx(path).proto) if operator.startswith("Reduce")]
    network = cv2.dnn.readNetFromONNX(str(path))
    for batch in (1, 3, 5, 2):
        network.setInput(crops[:batch])
        np.testing.assert_allclose(network.forward(), expected[:batch], atol=1e-5)
