"""Files of ours that other tools changed: their metadata still says what they were."""

import json
import logging
import shutil
import tracemalloc

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pmm.artifacts import onnx_file
from pmm.artifacts.manifest import METADATA_KEY
from pmm.artifacts.onnx_content import graph_digest, product_types
from pmm.artifacts.onnx_file import read_onnx
from pmm.export.options import ExportOptions
from pmm.utils.errors import InvalidFile
from tests.refusals import refuses


def changed(source, target, change):
    proto = onnx.load(source)
    change(proto)
    onnx.save(proto, target)
    return target


def without_digest(proto):
    """Of the graph."""
    (entry,) = [entry for entry in proto.metadata_props if entry.key == METADATA_KEY]
    values = json.loads(entry.value)
    assert values.pop("graph")
    entry.value = json.dumps(values)


def pruned(proto):
    (largest,) = sorted(proto.graph.initializer, key=lambda tensor: -np.prod(tensor.dims))[:1]
    values = numpy_helper.to_array(largest).copy()
    values[np.abs(values) < np.median(np.abs(values))] = 0
    largest.CopyFrom(numpy_helper.from_array(values, largest.name))


def renamed(proto):
    for index, node in enumerate(proto.graph.node):
        node.name = f"n{index}"
    proto.doc_string = "mine"


class _Images:
    def __init__(self):
        self._left = [np.random.default_rng(0).integers(0, 256, (2, 128, 64, 3), np.uint8)]

    def get_next(self):
        return {"images": self._left.pop()} if self._left else None


def quantised(source, target, how):
    from onnxruntime import quantization

    if how == "dynamic":
        quantization.quantize_dynamic(source, target, op_types_to_quantize=["Gemm", "MatMul"])
    else:
        more = {"extra_options": {"AddQDQPairToWeight": True}} if how == "QDQ" else {}
        quantization.quantize_static(source, target, _Images(), quantization.QuantFormat[how], **more)
    return target


def optimised(source, target):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 4
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    return target


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("how", ["QDQ", "QOperator", "dynamic"])
def test_files_that_other_tools_quantised_are_refused(exported, tmp_path, how):
    path = quantised(exported, tmp_path / "x.onnx", how)
    facts = ("now", "in int8", "inside it says, 100.0% fp32", f"pmm adopt {path}")
    with refuses(InvalidFile, *facts, path=path):
        read_onnx(path)
    file = read_onnx(path, foreign=True)
    assert file.stored_manifest is None
    assert METADATA_KEY not in {entry.key for entry in file.proto.metadata_props}, "it would be adopted with it"


def test_other_weights_in_the_same_graph_are_refused(exported, tmp_path):
    path = changed(exported, tmp_path / "x.onnx", pruned)
    with refuses(InvalidFile, "its weights are not those", f"pmm adopt {path}", path=path):
        read_onnx(path)


def test_a_manifest_that_does_not_say_what_its_graph_was_is_refused(exported, tmp_path):
    path = changed(exported, tmp_path / "x.onnx", without_digest)
    with refuses(InvalidFile, "what its graph was", path=path, hint="export the file again"):
        read_onnx(path)


@pytest.mark.parametrize("change", [lambda proto: None, renamed], ids=["", "renamed"])
def test_copies_are_opened_without_a_word(exported, tmp_path, caplog, change):
    assert read_onnx(changed(exported, tmp_path / "x.onnx", change)).manifest.precision_found == "fp32"
    assert not warnings(caplog)


def bgr(proto):
    """The first convolution takes the channels in another order."""
    first = next(node.input[1] for node in proto.graph.node if node.op_type == "Conv")
    (weights,) = [tensor for tensor in proto.graph.initializer if tensor.name == first]
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights)[:, ::-1].copy(), first))


def of_fewer_images(proto):
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3


def of_another_bias(proto):
    bias = next(node.input[2] for node in proto.graph.node if node.op_type == "Conv" and len(node.input) > 2)
    (vector,) = [tensor for tensor in proto.graph.initializer if tensor.name == bias]
    vector.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(vector) + 1, bias))


@pytest.mark.parametrize("change", [bgr, of_fewer_images, of_another_bias, None])
def test_what_cannot_be_told_from_a_simplification_is_opened_with_a_warning(exported, tmp_path, caplog, change):
    path = tmp_path / "x.onnx"
    path = changed(exported, path, change) if change else optimised(exported, path)
    assert read_onnx(path).manifest.precision_found == "fp32"
    (warning,) = warnings(caplog)
    for fact in ("embeddings may be others", f"pmm selftest {path}", f"pmm adopt {path}"):
        assert fact in warning


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_int8_files_that_onnx_runtime_optimised_are_opened_with_a_warning(shared, tmp_path, caplog, target):
    path = optimised(shared.onnx(ExportOptions(precision="int8", target=target)), tmp_path / "x.onnx")
    assert read_onnx(path).manifest.precision_found == "int8"
    assert len(warnings(caplog)) == 1
    other = changed(path, tmp_path / "other.onnx", pruned)
    with refuses(InvalidFile, "its weights are not those", path=other):
        read_onnx(other)


def test_weights_in_another_file_are_not_vouched_for(exported, tmp_path, caplog):
    path = tmp_path / "x.onnx"
    onnx.save(onnx.load(exported), path, save_as_external_data=True, location="w.bin")
    assert read_onnx(path, external_data=True).manifest.precision_found == "fp32"
    (warning,) = warnings(caplog)
    assert "not its weights" in warning
    assert f"pmm selftest {path}" in warning


def test_where_a_manifest_lies_beside_the_file_nothing_is_compared(exported, tmp_path, monkeypatch):
    for file in (exported, exported.with_name(exported.name + ".json")):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(onnx_file, "check_content", lambda *given: pytest.fail("compared"))
    assert read_onnx(tmp_path / exported.name).manifest.graph


def one_weight(values, *nodes, **more):
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in {"w": values, **more}.items()]
    images = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])
    return helper.make_model(helper.make_graph(nodes, "g", [images], [], stored))


@settings(max_examples=20)
@given(st.data(), st.sampled_from([np.float32, np.float16, np.int8]))
def test_weights_may_be_turned_and_padded_and_no_number_changes_unseen(data, kind):
    values = np.random.default_rng(data.draw(st.integers(0, 99))).integers(-99, 99, (16, 8)).astype(kind)
    digest = graph_digest(one_weight(values)).weights
    assert graph_digest(one_weight(np.pad(values.T, ((0, 1), (0, 0))))).weights == digest
    other = values.copy()
    other.flat[data.draw(st.integers(0, values.size - 1))] += 1
    assert graph_digest(one_weight(other)).weights != digest


def test_weights_that_a_tool_restores_from_8_bits_are_the_same():
    narrow = np.random.default_rng(0).integers(-127, 128, (64, 8)).astype(np.int8)
    scale = np.random.default_rng(1).uniform(0.1, 1, (64, 1)).astype(np.float32)
    product = helper.make_node("Gemm", ["x", "wide"], ["y"], transB=1)
    steps = [
        helper.make_node("Cast", ["w"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["wide"]),
    ]
    stored = graph_digest(one_weight(narrow, *steps, product, scale=scale))
    restored = graph_digest(one_weight(np.zeros(0, np.float32), product, wide=narrow * scale))
    assert stored.weights == restored.weights
    assert stored.exact != restored.exact
    other = graph_digest(one_weight(narrow, *steps, product, scale=scale * 2))
    assert other.weights != stored.weights


def test_no_array_is_made_that_is_larger_than_the_integers_that_it_restores():
    steps = [
        helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wide", "scale"], ["product"]),
    ]
    proto = one_weight(np.ones((60_000, 1), np.int8), *steps, scale=np.ones((1, 60_000), np.float32))
    tracemalloc.start()
    graph_digest(proto)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def without_inputs(operator):
    def change(proto):
        proto.graph.node.append(helper.make_node(operator, [], ["nothing"]))

    return change


def of_one_input(proto):
    proto.graph.node.append(helper.make_node("Mul", [proto.graph.node[0].output[0]], ["nothing"]))


def without_outputs(proto):
    proto.graph.node.append(helper.make_node("Cast", [proto.graph.node[0].output[0]], []))


def of_words(proto):
    """Weights in 8 bits times texts."""
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((64, 2), np.int8), "narrow"))
    proto.graph.initializer.append(helper.make_tensor("words", TensorProto.STRING, [1], [b"x"]))
    proto.graph.node.append(helper.make_node("Cast", ["narrow"], ["cast"], to=TensorProto.FLOAT))
    proto.graph.node.append(helper.make_node("Mul", ["cast", "words"], ["nothing"]))


def test_texts_are_no_scales(exported, tmp_path):
    path = changed(exported, tmp_path / "x.onnx", of_words)
    with refuses(InvalidFile, "its weights are not those", path=path):
        read_onnx(path)


@pytest.mark.parametrize(
    "change",
    [of_one_input, without_outputs, *(without_inputs(kind) for kind in ("Cast", "Mul", "Conv", "DequantizeLinear"))],
)
def test_nodes_that_read_or_give_nothing_are_left_to_who_reads_the_graph(exported, tmp_path, caplog, change):
    assert read_onnx(changed(exported, tmp_path / "x.onnx", change)).manifest.graph
    assert len(warnings(caplog)) == 1


def test_a_product_of_what_a_node_without_inputs_gives_is_of_no_type():
    nodes = [
        helper.make_node("DequantizeLinear", [], ["d"]),
        helper.make_node("MatMul", ["d", "d"], ["y"]),
        helper.make_node("Conv", [], ["z"]),
    ]
    assert not product_types(one_weight(np.ones((8, 8), np.int8), *nodes))


@pytest.mark.parametrize("raw", [True, False])
def test_too_few_numbers_for_the_dimensions_are_refused(exported, tmp_path, raw):
    def shorten(proto):
        (largest,) = sorted(proto.graph.initializer, key=lambda tensor: -np.prod(tensor.dims))[:1]
        content = largest.raw_data
        largest.ClearField("raw_data")
        if raw:
            largest.raw_data = content[:-4]
        else:
            largest.float_data.append(1.0)

    path = changed(exported, tmp_path / "x.onnx", shorten)
    with refuses(InvalidFile, path=path):
        read_onnx(path)


def test_operators_of_onnx_runtime_are_known():
    nodes = [
        helper.make_node("FusedGemm", ["x", "w"], ["a"], domain="com.microsoft"),
        helper.make_node("MatMulNBits", ["a", "w"], ["b"], domain="com.microsoft", bits=4),
        helper.make_node("DynamicQuantizeMatMul", ["b", "w"], ["c"], domain="com.microsoft"),
        helper.make_node("MatMulInteger", ["c", "w"], ["d"]),
        helper.make_node("Relu", ["d"], ["e"]),
    ]
    found = product_types(one_weight(np.ones((64, 64), np.float16), *nodes))
    assert found == {"fp16": 1, "4 bits": 1, "int8": 2}
