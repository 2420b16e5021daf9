"""Every opset from 17 to 22: the file is valid, holds the same function, and TensorRT-RTX builds it."""

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pmm.artifacts.onnx_file import read_onnx
from pmm.data.crops import load_crops
from pmm.data.readers import read_dataset
from pmm.export.graph import IR_VERSION, _to_opset_17
from pmm.export.half_precision import emulated, half_type
from pmm.export.options import MIN_OPSET, OPSETS, EngineOptions, ExportOptions
from pmm.export.reference import in_memory
from pmm.export.trt import engine_from_onnx
from pmm.runtime.ort_session import open_session
from pmm.utils.errors import ConflictingOptions, InvalidValue
from tests.conftest import assert_one_line_error, run_here
from tests.refusals import refuses

KINDS = {
    "fp32": ExportOptions(),
    "fp16": ExportOptions(precision="fp16"),
    "bf16": ExportOptions(precision="bf16"),
    "int8": ExportOptions(precision="int8"),
    "int8-fp16": ExportOptions(precision="int8", int8_fallback="fp16"),
}
EVERY = [(kind, opset) for kind in KINDS for opset in range(MIN_OPSET[kind], OPSETS[1] + 1)]


@pytest.fixture(scope="module")
def crops(people):
    return load_crops([s.path for s in read_dataset("synthetic", people).query[:5]], 128, 64)


def embedded(file, crops):
    half = half_type(file.manifest)
    proto = emulated(file.proto) if half else file.proto
    return in_memory(proto, file.manifest.input, file.manifest.preprocessing, optimise=not half)(crops)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "opset"), EVERY)
def test_a_file_of_every_opset_is_the_same_function(shared, crops, kind, opset, tmp_path):
    default = read_onnx(shared.onnx(KINDS[kind]))
    file = read_onnx(shared.onnx(dataclasses.replace(KINDS[kind], opset=opset)))
    onnx.checker.check_model(file.proto, full_check=True)
    assert [(entry.domain, entry.version) for entry in file.proto.opset_import] == [("", opset)]
    assert file.manifest.opset == opset
    known = onnx.helper.find_min_ir_version_for(file.proto.opset_import)
    assert file.proto.ir_version == IR_VERSION[opset] >= known
    assert opset == 20 or file.proto.ir_version == known
    expected, found = embedded(default, crops), embedded(file, crops)
    # the same operators on the same weights
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert file.manifest.precision_share == default.manifest.precision_share
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
    engine = engine_from_onnx(file, tmp_path / "model.plan", EngineOptions(flavor="rtx")).manifest
    assert engine.precision_share == pytest.approx(file.manifest.precision_share)


@pytest.mark.full
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("kind", "opset"), EVERY)
def test_so_is_one_of_a_static_batch(shared, crops, kind, opset, batch):
    default = read_onnx(shared.onnx(KINDS[kind]))
    options = dataclasses.replace(KINDS[kind], opset=opset, static_batch=batch)
    file = read_onnx(shared.onnx(options))
    assert (file.manifest.opset, file.manifest.input.batch) == (opset, batch)
    # kernels differ per batch size, and rounding to half then by more than a trifle
    expected = np.concatenate([embedded(default, crops[k : k + batch]) for k in range(0, 3, batch)])
    np.testing.assert_allclose(embedded(file, crops[:3]), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("operator", "types", "least"),
    [
        ("Conv", "tensor(bfloat16)", MIN_OPSET["bf16"]),
        ("MaxPool", "tensor(bfloat16)", MIN_OPSET["bf16"]),
        ("QuantizeLinear", "tensor(float16)", MIN_OPSET["int8-fp16"]),
        ("DequantizeLinear", "tensor(float16)", MIN_OPSET["int8-fp16"]),
    ],
)
def test_the_least_opsets_are_those_of_onnx(operator, types, least):
    def takes(opset):
        return any(types in c.allowed_type_strs for c in onnx.defs.get_schema(operator, opset).type_constraints)

    assert [opset for opset in range(OPSETS[0], OPSETS[1] + 1) if takes(opset)] == list(range(least, OPSETS[1] + 1))


@pytest.mark.parametrize(
    ("options", "kind", "facts"),
    [
        ({"opset": 16}, InvalidValue, ("opset is 16", "17 to 22")),
        ({"opset": 23}, InvalidValue, ("opset is 23", "17 to 22")),
        ({"precision": "bf16", "opset": 21}, ConflictingOptions, ("--opset is 21", "--precision bf16", "22")),
        (
            {"precision": "int8", "int8_fallback": "fp16", "opset": 18},
            ConflictingOptions,
            ("--opset is 18", "--int8-fallback fp16", "19"),
        ),
    ],
)
def test_what_an_opset_cannot_hold_is_one_line_with_the_least_that_can(options, kind, facts):
    with refuses(kind, *facts):
        ExportOptions(**options)


@pytest.mark.parametrize(
    ("options", "name", "expected"),
    [
        (lambda: ExportOptions(precision="fp8"), "precision", "fp32, fp16, bf16 or int8"),
        (lambda: ExportOptions(precision="int8", target="gpu"), "target", "tensorrt, cpu or opencv"),
        (lambda: EngineOptions(flavor="trt"), "flavor", "auto, tensorrt or rtx"),
        (lambda: EngineOptions(batch=(1, 8, 64)), "batch", "((1, 8, 64),)"),
        (lambda: EngineOptions(batch=((1, 8),)), "batch", "((1, 8, 64),)"),
        (lambda: EngineOptions(batch=8), "batch", "((1, 8, 64),)"),
    ],
)
def test_a_word_or_a_shape_that_is_none_is_refused_with_those_that_are(options, name, expected):
    with refuses(InvalidValue, name=name, expected=expected):
        options()


def test_the_commands_say_so(trained, tmp_path):
    for script in ("export/to_onnx.py", "export/to_trt.py"):
        done = run_here(script, trained, "-o", tmp_path / "model.onnx", "--opset", "17", "--precision", "bf16")
        assert_one_line_error(done, "--opset is 17", "at least 22")
    assert not list(tmp_path.iterdir())


def test_a_reduction_over_several_axes_becomes_that_of_opset_17():
    axes = onnx.numpy_helper.from_array(np.array([2, 3]), "axes")
    nodes = [
        onnx.helper.make_node("ReduceMean", ["x", "axes"], ["m"], keepdims=0, noop_with_empty_axes=0),
        onnx.helper.make_node("Relu", ["m"], ["y"]),
    ]
    given, returned = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", [2, 3, 4, 5]), ("y", [2, 3]))
    )
    graph = onnx.helper.make_graph(nodes, "g", [given], [returned], [axes])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    _to_opset_17(proto)
    onnx.checker.check_model(proto, full_check=True)
    assert not proto.graph.initializer
    images = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    found = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": images})[0]
    np.testing.assert_allclose(found, np.maximum(images.mean((2, 3)), 0), rtol=1e-5)


def of_opset_18(*nodes, shape=(2, 4, 8, 8), recorded=()):
    value = helper.make_tensor_value_info
    constants = {"axes": np.array([1]), "pads": np.array([0, 0]), "sizes": np.array([2, 4, 16, 16])}
    graph = helper.make_graph(
        [helper.make_node(kind, ins, outs, **attributes) for kind, ins, outs, attributes in nodes],
        "g",
        [value("x", TensorProto.FLOAT, shape)],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    graph.value_info.extend(value(name, TensorProto.FLOAT, its) for name, its in recorded)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


PARTS = [("Split", ["x"], ["a", "b"], {"axis": 1, "num_outputs": 2}), ("Concat", ["b", "a"], ["y"], {"axis": 1})]


@pytest.mark.parametrize(
    ("nodes", "recorded"),
    [
        (
            [("Resize", ["x", "", "", "sizes"], ["y"], {"keep_aspect_ratio_policy": "stretch", "antialias": 0})],
            [],
        ),
        (PARTS, [("a", [2, 2, 8, 8]), ("b", [2, 2, 8, 8])]),
        ([("ReduceMean", ["x"], ["y"], {"noop_with_empty_axes": 0})], []),
        ([("ReduceMax", ["x", "axes"], ["y"], {"noop_with_empty_axes": 1})], []),
    ],
)
def test_what_opset_17_can_say_otherwise_is_said_so(nodes, recorded):
    proto = of_opset_18(*nodes, recorded=recorded)
    images = {"x": np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)}
    expected = open_session(proto.SerializeToString()).run(None, images)[0]
    _to_opset_17(proto)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(proto, strict_mode=True))
    np.testing.assert_array_equal(open_session(proto.SerializeToString()).run(None, images)[0], expected)


@pytest.mark.parametrize(
    ("nodes", "recorded", "what"),
    [
        ([("Resize", ["x", "", "", "sizes"], ["y"], {"antialias": 1, "mode": "linear"})], [], "antialias"),
        ([("Pad", ["x", "pads", "", "axes"], ["y"], {})], [], "axes"),
        (PARTS, [("a", [2, 2, 8, 8]), ("b", [2, 1, 8, 8])], "num_outputs"),
        (PARTS, [], "num_outputs"),
        ([("ReduceMean", ["x"], ["y"], {"noop_with_empty_axes": 1})], [], "noop_with_empty_axes"),
        ([("Shape", ["x"], ["s"], {}), ("ReduceMean", ["x", "s"], ["y"], {})], [], "computed"),
        ([("Mish", ["x"], ["y"], {})], [], "Mish"),
    ],
)
def test_what_it_cannot_is_refused_with_what_to_give(nodes, recorded, what):
    with refuses(ConflictingOptions, "--opset is 17", what, expected="--opset 18 or newer"):
        _to_opset_17(of_opset_18(*nodes, recorded=recorded))
