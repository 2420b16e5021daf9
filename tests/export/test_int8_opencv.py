"""Int8 files for OpenCV: QLinearConv, and names that OpenCV 4.6 takes for 8 bits."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pmm.artifacts.onnx_file import read_onnx
from pmm.data.crops import load_crops
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.int8 import Quantizer
from pmm.export.int8_opencv import for_opencv
from pmm.export.options import MIN_COSINE, ExportOptions, check_flags
from pmm.export.precision import onnx_precision
from pmm.runtime.open import open_runner
from pmm.runtime.openvino import OpenVinoRunner
from pmm.runtime.ort_session import open_session
from pmm.selftest.run import run_selftest
from pmm.utils.errors import ConflictingOptions, InvalidFile
from tests.refusals import refuses

OPENCV = ExportOptions(precision="int8", target="opencv")
CPU = ExportOptions(precision="int8", target="cpu")


@pytest.fixture
def crops(people):
    return load_crops(sorted((people / "query").iterdir())[:6], 128, 64)


def run(proto, images):
    return open_session(proto.SerializeToString()).run(None, {proto.graph.input[0].name: images})


def kinds(proto):
    return [node.op_type for node in proto.graph.node]


def assert_opencv_reads(proto):
    """The rules of OpenCV 4.6: see the module."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    in_8_bits = set()
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "QLinearConv"):
            (name,) = node.output
            assert name.endswith("_quantized")
            assert {name.removesuffix("quantized") + role for role in ("scale", "zero_point")} <= constants
            in_8_bits.add(name)
        elif node.op_type == "DequantizeLinear":
            assert node.input[0] in in_8_bits, "a constant"
        else:
            assert not node.output[0].endswith("quantized")
            assert not {*node.input} <= constants, "an operator on constants"


def test_it_is_what_the_manifest_says_and_near_the_checkpoint(trained, shared, crops):
    path = shared.onnx(OPENCV)
    file = read_onnx(path)
    manifest = file.manifest
    assert (manifest.quantization["target"], manifest.precision_found) == ("opencv", "int8")
    assert manifest.quantization["only_weights_in_8_bits"] == []
    assert manifest.macs == read_onnx(shared.onnx(CPU)).manifest.macs
    assert manifest.precision_share["int8"] == onnx_precision(file.proto).share["int8"] > 0.98
    assert_opencv_reads(file.proto)
    assert "Conv" not in kinds(file.proto)
    assert kinds(file.proto).count("QLinearConv") == kinds(read_onnx(shared.onnx(CPU)).proto).count("Conv")
    with open_runner(trained, device="cpu") as reference, open_runner(path, device="auto") as runner:
        assert (runner.info.backend, runner.info.precision) == ("ort-cpu", "int8")
        assert numeric_parity(reference(crops), runner(crops)).min_cosine > MIN_COSINE["int8"]
    assert run_selftest(path, device="cpu").passed


def test_openvino_refuses_it(shared):
    pytest.importorskip("openvino", reason="OpenVINO is not installed (pip install openvino)")
    path = shared.onnx(OPENCV)
    with refuses(InvalidFile, "OpenCV", "QLinearConv", path=path, hint="--target cpu"):
        OpenVinoRunner(path)


def test_it_is_no_file_for_engines_and_its_name_says_so():
    assert OPENCV.suffix == "-int8-opencv"
    with refuses(ConflictingOptions, "--target opencv", "CPUs", options=("--target",)):
        check_flags(True, OPENCV, {"--target"}, profile_layers=False, no_manifest=False)
    with refuses(ConflictingOptions, "--target is opencv", options=("--int8-fallback", "--target")):
        ExportOptions(precision="int8", target="opencv", int8_fallback="fp16")


def small_network():
    """Two convolutions whose results are quantised, a pool, a residual sum, and a head; "second" is an output too if it
    is named as one."""
    random = np.random.default_rng(0)

    def weights(name, *shape):
        return numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["images", "w1", "b1"], ["first"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["first"], ["rectified"], "relu"),
        helper.make_node("MaxPool", ["rectified"], ["pooled"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["pooled", "w2", "b2"], ["second"], "second", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["second", "pooled"], ["sum"], "add"),
        helper.make_node("GlobalAveragePool", ["sum"], ["mean"], "mean"),
        helper.make_node("Flatten", ["mean"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "w3"], ["embeddings"], "head"),
    ]
    constants = [weights("w1", 8, 3, 3, 3), weights("b1", 8), weights("w2", 8, 8, 3, 3), weights("b2", 8)]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 12, 8])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", 600])],
        [*constants, weights("w3", 8, 600)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def images(count=4, seed=1):
    return np.random.default_rng(seed).normal(size=(count, 3, 12, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def quantized():
    return Quantizer(small_network(), "opencv", [images(8, seed=2)], "images").build()


def test_onnx_runtime_computes_the_same_bits(quantized):
    before = quantized.SerializeToString()
    made = for_opencv(quantized)
    assert quantized.SerializeToString() == before
    assert kinds(made).count("QLinearConv") == 2
    assert_opencv_reads(made)
    assert onnx_precision(made).macs == onnx_precision(quantized).macs
    for count in (1, 4):
        assert np.array_equal(*(run(proto, images(count))[0] for proto in (quantized, made)))
    assert for_opencv(made).SerializeToString() == made.SerializeToString()


def test_the_weights_of_layers_in_floats_are_floats(quantized):
    (head,) = [node for node in quantized.graph.node if node.op_type == "Gemm"]
    stored = {tensor.name: tensor for tensor in quantized.graph.initializer}
    assert stored[head.input[1]].data_type == TensorProto.FLOAT


def test_a_convolution_that_something_reads_in_floats_stays_in_floats(quantized):
    proto = onnx.ModelProto()
    proto.CopyFrom(quantized)
    second = next(node for node in proto.graph.node if node.name == "second")
    proto.graph.output.append(helper.make_tensor_value_info(second.output[0], TensorProto.FLOAT, ["batch", 8, 6, 4]))
    made = for_opencv(proto)
    assert [kinds(made).count(kind) for kind in ("QLinearConv", "Conv")] == [1, 1]
    assert_opencv_reads(made)
    assert onnx_precision(made).share["int8"] < onnx_precision(quantized).share["int8"]
    for ours, theirs in zip(run(proto, images()), run(made, images()), strict=True):
        assert numeric_parity(ours.reshape(4, -1), theirs.reshape(4, -1)).min_cosine > 0.999
