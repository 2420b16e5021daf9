import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from pmm.adoption.image_options import ImageOptions
from pmm.adoption.onnx_adopt import adopt_onnx, describe_adopted
from pmm.adoption.onnx_options import OnnxOptions
from pmm.artifacts.artifact import manifest_path
from pmm.artifacts.onnx_file import read_onnx
from pmm.artifacts.origin import training_dataset
from pmm.data.crops import load_crops
from pmm.data.measure_crops import dataset_statistics
from pmm.runtime.open import open_runner
from pmm.utils.errors import ConflictingOptions, InvalidFile, InvalidValue
from pmm.utils.files import sha256
from tests.adoption.onnx_graphs import DIM, SIZE, TYPES, foreign
from tests.conftest import assert_one_line_error, examples, run_here, run_without_torch
from tests.refusals import refuses

STATISTICS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
KINDS = {
    "dtype": st.sampled_from(("float32", "float16", "uint8")),
    "layout": st.sampled_from(("NCHW", "NHWC")),
    "batch": st.sampled_from(("N", 1, 3)),
    "names": st.sampled_from((("input", "output"), ("images", "embeddings"), ("input:0", "fc/out"))),
    "colour": st.sampled_from(("rgb", "bgr")),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder that every example may overwrite."""
    return tmp_path_factory.mktemp("adopted")


@pytest.fixture(scope="module")
def crops(people):
    return sorted((people / "query").iterdir())[:5]


def adopt(path, *, images=None, onnx=None, **given):
    return adopt_onnx(
        path, path.with_name("adopted.onnx"), images or ImageOptions(), OnnxOptions(**(onnx or {})), **given
    )


def by_hand(path, files, *, dtype, layout, colour, names, batch):
    """What bare ONNX Runtime makes of the crops, prepared without the package."""
    pixels = [Image.open(file).convert("RGB").resize(SIZE[::-1], Image.Resampling.BILINEAR) for file in files]
    images = np.stack([np.asarray(each) for each in pixels])
    if dtype != "uint8":
        mean, std = (np.array(STATISTICS[name]) for name in ("mean", "std"))
        images = (images * np.float32(1 / (255 * std)) - np.float32(mean / std)).astype(dtype)
    images = images if colour == "rgb" else images[..., ::-1]
    images = images if layout == "NHWC" else images.transpose(0, 3, 1, 2)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    step = len(images) if batch == "N" else batch
    rows = []
    for start in range(0, len(images), step):
        part = images[start : start + step]
        part = np.concatenate([part, np.zeros((step - len(part), *part.shape[1:]), part.dtype)])
        rows.append(session.run([names[1]], {names[0]: np.ascontiguousarray(part)})[0])
    return np.concatenate(rows)[: len(images)]


@examples(40)
@given(**KINDS)
def test_the_embeddings_are_those_of_bare_onnx_runtime_to_the_bit(home, crops, colour, **kind):
    path = foreign(home / "foreign.onnx", **kind)
    images = ImageOptions(colour=colour, **({} if kind["dtype"] == "uint8" else STATISTICS))
    # statistics are given in the network's order of channels, and the contract has them in that of RGB
    if colour == "bgr" and kind["dtype"] != "uint8":
        images = dataclasses.replace(images, mean=STATISTICS["mean"][::-1], std=STATISTICS["std"][::-1])
    artifact = adopt(path, images=images)
    expected = by_hand(path, crops, colour=colour, **kind)
    with open_runner(artifact.path, backend="ort-cpu") as runner:
        found = runner(load_crops(crops, runner.preprocessing))
    if kind["dtype"] == "float16":  # ONNX Runtime merges the casts, and rounds elsewhere
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-3)
    else:
        np.testing.assert_array_equal(found, expected)
    before, after = (onnx.load(file).graph for file in (path, artifact.path))
    assert [node for node in after.node if not node.name.startswith("pmm_")] == list(before.node)
    assert list(after.initializer) == list(before.initializer)
    contract = artifact.manifest.input
    assert contract.batch == (None if kind["batch"] == "N" else kind["batch"])
    if kind["dtype"] != "float16":
        assert len(after.node) == len(before.node)
        assert (contract.name, artifact.manifest.embedding.name) == kind["names"]
        assert (contract.dtype, contract.layout) == (kind["dtype"], kind["layout"])


@examples(30)
@given(**{**KINDS, "dtype": st.sampled_from(("float32", "float16"))})
def test_the_normalisation_can_go_into_the_graph(home, crops, colour, **kind):
    path = foreign(home / "foreign.onnx", **kind)
    images = ImageOptions(colour=colour, **STATISTICS)
    plain = adopt(path, images=images)
    with open_runner(plain.path, backend="ort-cpu") as runner:
        expected = runner(load_crops(crops, runner.preprocessing))
    moved = adopt(path, images=images, onnx={"uint8": True}).manifest
    contract = moved.input
    assert (contract.dtype, contract.layout, contract.colour, contract.normalised_by) == (
        "uint8", "NHWC", "rgb", "graph",
    )  # fmt: skip
    assert moved.preprocessing == plain.manifest.preprocessing
    assert moved.adopted.flags == plain.manifest.adopted.flags + " --uint8"
    pixels = load_crops(crops, moved.preprocessing)
    session = onnxruntime.InferenceSession(plain.path.read_bytes(), providers=["CPUExecutionProvider"])
    step = contract.batch or len(pixels)
    found = [
        session.run(None, {contract.name: pixels[k : k + step]})[0] for k in range(0, len(pixels) - step + 1, step)
    ]
    rows = np.concatenate(found)
    np.testing.assert_allclose(
        rows, expected[: len(rows)], rtol=2e-3 if kind["dtype"] == "float16" else 1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("dtype", "layout", "batch"),  # each pair once
    [("float32", "NCHW", "N"), ("float32", "NHWC", 3), ("uint8", "NHWC", "N"), ("uint8", "NCHW", 3)],
)
def test_openvino_runs_any_layout_type_and_batch(tmp_path, crops, dtype, layout, batch):
    pytest.importorskip("openvino")
    path = adopt(foreign(tmp_path / "foreign.onnx", dtype=dtype, layout=layout, batch=batch)).path
    embeddings = []
    for backend in ("ort-cpu", "openvino"):
        with open_runner(path, backend=backend) as runner:
            images = load_crops(crops, runner.preprocessing)
            embeddings.append(runner(images))
            runner.bind(images[:3])()
    np.testing.assert_allclose(*embeddings, rtol=1e-5, atol=1e-5)


def test_the_manifest_says_what_it_is_and_where_from(tmp_path, people):
    path = foreign(tmp_path / "foreign.onnx", opset=11)
    artifact = adopt(path, dataset="market1501", root=str(people))
    manifest, file = artifact.manifest, read_onnx(artifact.path)
    assert (manifest.method, manifest.precision_found, manifest.opset) == ("adopted", "fp32", 11)
    assert manifest.is_adopted_itself
    assert manifest.checkpoint_sha256 == manifest.adopted.sha256 == sha256(path)
    assert manifest.adopted.producer == "by hand"
    assert manifest.macs == 4 * 2 * DIM * 3 * 4 * 4
    assert (manifest.embedding.dim, manifest.embedding.normalised, manifest.embedding.metric) == (
        DIM,
        False,
        "euclidean",
    )
    assert file.manifest == manifest
    assert manifest.crop_statistics == dataset_statistics("market1501", str(people), manifest.preprocessing)
    assert "foreign.onnx" in manifest.parity["against"]
    assert training_dataset(artifact.path) == ("market1501", str(people))
    assert all(
        fact in describe_adopted(artifact) for fact in ("float32 input", "[batch, 3, 16, 8]", "output [6]", "opset 11")
    )
    manifest_path(artifact.path).unlink()
    assert read_onnx(artifact.path).manifest.adopted == manifest.adopted


def test_the_metric_is_what_the_norms_or_the_user_say(tmp_path):
    unit = [helper.make_node("LpNormalization", ["output"], ["unit"], p=2)]
    value = helper.make_tensor_value_info("unit", TensorProto.FLOAT, ["N", DIM])
    path = foreign(tmp_path / "foreign.onnx", more=unit, more_outputs=[value])
    norm = adopt(path, output="unit").manifest.embedding
    assert (norm.normalised, norm.metric) == (True, "cosine")


@pytest.mark.parametrize(
    ("kind", "opset", "ir"),
    [({}, 17, 8), ({}, 18, 8), ({"end": "", "weights_are_inputs": True}, 7, 3), ({"dtype": "float16"}, 17, 8)],
    ids=["17", "18", "pooled", "half"],
)
def test_with_cosine_embeddings_have_norm_1_as_bare_onnx_runtime_and_numpy_make_them(tmp_path, crops, kind, opset, ir):
    path = foreign(tmp_path / "foreign.onnx", opset=opset, ir=ir, **kind)
    artifact = adopt(path, images=ImageOptions(**STATISTICS), metric="cosine")
    told = artifact.manifest.embedding
    assert (told.normalised, told.metric, told.dim) == (True, "cosine", DIM)
    known = {"layout": "NCHW", "colour": "rgb", "batch": "N", "names": ("input", "output")}
    rows = by_hand(path, crops, dtype=kind.get("dtype", "float32"), **known).reshape(len(crops), DIM)
    rows = rows.astype(np.float32)
    with open_runner(artifact.path, backend="ort-cpu") as runner:
        found = runner(load_crops(crops, runner.preprocessing))
    tolerance = 2e-3 if "dtype" in kind else 1e-6
    np.testing.assert_allclose(found, rows / np.linalg.norm(rows, axis=1, keepdims=True), atol=tolerance)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_of_several_outputs_one_is_kept_with_what_it_needs(tmp_path, crops):
    other = helper.make_node("Neg", ["relu"], ["other"], name="other")
    value = helper.make_tensor_value_info("other", TensorProto.FLOAT, ["N", DIM, 4, 2])
    path = foreign(tmp_path / "foreign.onnx", more=[other], more_outputs=[value])
    with refuses(InvalidFile, "2 outputs", "output", "other", path=path, hint="--output NAME"):
        adopt(path)
    with refuses(InvalidValue, "--output", "outputs", "did you mean output?", name="--output"):
        adopt(path, output="outputs")
    with refuses(InvalidFile, "[8, 6, 4, 2]", path=path, expected="[N, D]"):
        adopt(path, output="other")
    artifact = adopt(path, images=ImageOptions(**STATISTICS), output="output")
    graph = onnx.load(artifact.path).graph
    assert [node.op_type for node in graph.node][-2:] == ["GlobalAveragePool", "Flatten"]
    assert [each.name for each in graph.output] == ["output"]
    names = ("input", "output")
    expected = by_hand(path, crops, dtype="float32", layout="NCHW", colour="rgb", names=names, batch="N")
    with open_runner(artifact.path, backend="ort-cpu") as runner:
        np.testing.assert_array_equal(runner(load_crops(crops, runner.preprocessing)), expected)


def test_maps_of_one_value_become_vectors(tmp_path):
    artifact = adopt(foreign(tmp_path / "foreign.onnx", end="", names=("input", "embeddings")))
    assert artifact.manifest.embedding.dim == DIM
    assert artifact.manifest.embedding.name == "pmm_embeddings"  # the other name is taken


@pytest.mark.parametrize(("opset", "ir"), [(7, 3), (9, 4), (13, 7)])
def test_old_files_that_list_their_weights_as_inputs(tmp_path, opset, ir):
    path = foreign(tmp_path / "foreign.onnx", opset=opset, ir=ir, weights_are_inputs=True)
    for uint8 in (False, True):
        manifest = adopt(path, onnx={"uint8": uint8}).manifest
        assert (manifest.opset, manifest.input.name) == (opset, "images" if uint8 else "input")


def test_an_opset_that_nothing_runs_is_refused(tmp_path):
    path = foreign(tmp_path / "foreign.onnx", opset=6)
    with refuses(InvalidFile, "opset is 6", path=path, expected="7 or newer"):
        adopt(path)


def test_weights_beside_the_file_are_taken_in(tmp_path, crops):
    inside = adopt(foreign(tmp_path / "foreign.onnx")).path.read_bytes()
    proto = onnx.load(tmp_path / "foreign.onnx")
    onnx.save(proto, tmp_path / "foreign.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert (tmp_path / "w.bin").stat().st_size
    artifact = adopt(tmp_path / "foreign.onnx")
    assert not read_onnx(artifact.path).external
    assert onnx.load_from_string(inside).graph.node == onnx.load(artifact.path).graph.node
    (tmp_path / "w.bin").write_bytes(b"short")
    with refuses(InvalidFile, "'w.bin'", path=tmp_path / "foreign.onnx"):
        adopt(tmp_path / "foreign.onnx")
    (tmp_path / "w.bin").unlink()
    with refuses(InvalidFile, "does not exist", path=tmp_path / "w.bin", expected="foreign.onnx"):
        adopt(tmp_path / "foreign.onnx")


def test_weights_of_more_than_a_file_can_hold_are_refused(tmp_path, monkeypatch):
    proto = onnx.load(foreign(tmp_path / "foreign.onnx"))
    onnx.save(proto, tmp_path / "foreign.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    adopt(tmp_path / "foreign.onnx")
    monkeypatch.setattr("pmm.artifacts.onnx_file.MAX_BYTES", 1000)
    with refuses(InvalidFile, "more than", path=tmp_path / "foreign.onnx", expected="one file"):
        adopt(tmp_path / "foreign.onnx")


@pytest.mark.parametrize("length", [None, "0", "-1", str(100 * 2**20)])
def test_what_tensors_load_is_added_up_where_all_name_one_file(tmp_path, monkeypatch, length):
    proto = onnx.load(foreign(tmp_path / "foreign.onnx"))
    for tensor in proto.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "w.bin"), *([("length", length)] if length else [])):
            tensor.external_data.add(key=key, value=value)
    (tmp_path / "foreign.onnx").write_bytes(proto.SerializeToString())
    with (tmp_path / "w.bin").open("wb") as sparse:
        sparse.truncate(100 * 2**20)
    read = []
    monkeypatch.setattr(onnx.external_data_helper, "load_external_data_for_tensor", lambda *args: read.append(args))
    monkeypatch.setattr("pmm.artifacts.onnx_file.MAX_BYTES", 300 * 2**20)
    with refuses(InvalidFile, "more than", path=tmp_path / "foreign.onnx", expected="one file"):
        adopt(tmp_path / "foreign.onnx")
    assert len(read) == 2


def test_operators_of_others_are_refused_by_name(tmp_path):
    value = helper.make_tensor_value_info("odd", TensorProto.FLOAT, ["N", DIM])
    custom = helper.make_node("MyPool", ["output"], ["odd"], domain="my.company")
    path = foreign(tmp_path / "foreign.onnx", more=[custom], more_outputs=[value])
    with refuses(InvalidFile, "my.company::MyPool", path=path, expected="ONNX standard"):
        adopt(path, output="output")
    unknown = helper.make_node("Magic", ["output"], ["odd"])
    path = foreign(tmp_path / "foreign.onnx", more=[unknown], more_outputs=[value])
    with refuses(InvalidFile, "Magic", path=path):
        adopt(path, output="output")


def test_products_of_integers_are_refused_by_name(tmp_path):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    images = iter([{"input": np.random.default_rng(0).random((1, 3, 16, 8), np.float32)}])

    class Reader(CalibrationDataReader):
        def get_next(self):
            return next(images, None)

    quantize_static(
        foreign(tmp_path / "fp32.onnx"), tmp_path / "int8.onnx", Reader(), quant_format=QuantFormat.QOperator
    )
    with refuses(InvalidFile, path=tmp_path / "int8.onnx"):
        adopt(tmp_path / "int8.onnx")
    value = helper.make_tensor_value_info("counts", TensorProto.INT32, ["N", DIM])
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["output"], ["q", "scale", "zero"]),
        helper.make_node("Transpose", ["q"], ["t"]),
        helper.make_node("MatMulInteger", ["q", "t"], ["counts"]),
    ]
    path = foreign(tmp_path / "foreign.onnx", more=nodes, more_outputs=[value])
    with refuses(InvalidFile, "MatMulInteger", path=path, expected="Q/DQ"):
        adopt(path)


def test_a_damaged_file_is_refused(tmp_path):
    path = foreign(tmp_path / "foreign.onnx")
    path.write_bytes(path.read_bytes()[:500])
    with refuses(InvalidFile, "truncated", path=path, hint="export the network again"):
        adopt(path)


def test_functions_of_the_file_are_resolved(tmp_path):
    proto = onnx.load(foreign(tmp_path / "foreign.onnx"))
    body = [helper.make_node("Neg", ["x"], ["y"])]
    proto.functions.append(helper.make_function("own", "Turn", ["x"], ["y"], body, [helper.make_opsetid("", 17)]))
    proto.opset_import.append(helper.make_opsetid("own", 1))
    proto.graph.node[-1].output[0] = "before"
    proto.graph.node.append(helper.make_node("Turn", ["before"], ["output"], domain="own"))
    (tmp_path / "foreign.onnx").write_bytes(proto.SerializeToString())
    artifact = adopt(tmp_path / "foreign.onnx")
    assert [node.op_type for node in onnx.load(artifact.path).graph.node][-1] == "Neg"


@pytest.mark.parametrize(
    ("shape", "kind", "facts"),
    [
        (["N", 77], TensorProto.INT64, ("int64 input [N, 77]",)),
        (["N", 1, 16, 8], TensorProto.FLOAT, ("float32 input [N, 1, 16, 8]", "colour")),
        (["N", 3, 16, 8], TensorProto.DOUBLE, ("float64 input",)),
        (["N", 3, 16], TensorProto.FLOAT, ("[N, 3, 16]",)),
    ],
)
def test_an_input_that_is_no_image_is_refused(tmp_path, shape, kind, facts):
    nodes = [helper.make_node("Identity", ["input"], ["output"])]
    values = [helper.make_tensor_value_info(name, kind, shape) for name in ("input", "output")]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:]), opset_imports=[helper.make_opsetid("", 17)]
    )
    path = tmp_path / "foreign.onnx"
    path.write_bytes(proto.SerializeToString())
    with refuses(InvalidFile, *facts, path=path, expected="[N, 3, H, W]"):
        adopt(path)


def test_other_inputs_are_chosen_or_refused(tmp_path):
    camera = helper.make_tensor_value_info("camera", TensorProto.FLOAT, ["N", DIM])
    second = helper.make_tensor_value_info("second", TensorProto.FLOAT, ["N", 3, 16, 8])
    moved = helper.make_node("Add", ["output", "camera"], ["moved"])
    value = helper.make_tensor_value_info("moved", TensorProto.FLOAT, ["N", DIM])
    path = foreign(tmp_path / "foreign.onnx", more=[moved], more_inputs=[camera, second], more_outputs=[value])
    with refuses(InvalidFile, "input", "second", path=path, hint="--input NAME"):
        adopt(path, output="output")
    with refuses(InvalidValue, "--input", "inptu", "did you mean input?", name="--input"):
        adopt(path, onnx={"input": "inptu"})
    with refuses(InvalidFile, "no input takes images", "camera", path=path):
        adopt(path, output="output", onnx={"input": "camera"})
    with refuses(InvalidFile, "camera", path=path):
        adopt(path, output="moved", onnx={"input": "input"})
    with refuses(InvalidFile, "does not depend on second", path=path):
        adopt(path, output="output", onnx={"input": "second"})
    graph = onnx.load(adopt(path, output="output", onnx={"input": "input"}).path).graph
    assert [each.name for each in graph.input] == ["input"]


def test_the_size_is_what_the_file_says_or_is_asked_for(tmp_path):
    path = foreign(tmp_path / "foreign.onnx", sides=("h", 8))
    with refuses(InvalidFile, path=path, hint="--height H"):
        adopt(path)
    with refuses(ConflictingOptions, "--width is 16", expected="8", options=("--width",)):
        adopt(path, images=ImageOptions(height=16, width=16))
    artifact = adopt(path, images=ImageOptions(height=32))
    assert (artifact.manifest.preprocessing.height, artifact.manifest.preprocessing.width) == (32, 8)
    shape = onnx.load(artifact.path).graph.input[0].type.tensor_type.shape.dim
    assert [each.dim_value for each in shape[1:]] == [3, 32, 8]


def test_a_layout_that_the_file_does_not_tell_is_asked_for(tmp_path):
    path = foreign(tmp_path / "foreign.onnx", layout="NHWC", sides=("h", "w"), channels="c")
    size = ImageOptions(height=16, width=8)
    with refuses(InvalidFile, path=path, hint="--layout NCHW or --layout NHWC"):
        adopt(path, images=size)
    assert adopt(path, images=size, onnx={"layout": "NHWC"}).manifest.input.layout == "NHWC"
    path = foreign(tmp_path / "foreign.onnx", layout="NHWC")
    with refuses(ConflictingOptions, "--layout is NCHW", expected="NHWC", options=("--layout",)):
        adopt(path, onnx={"layout": "NCHW"})


@pytest.mark.parametrize("said", [{"images": ImageOptions(**STATISTICS)}, {"onnx": {"uint8": True}},
                                  {"images": ImageOptions(scale="1/255")}])  # fmt: skip
def test_uint8_images_are_not_normalised(tmp_path, said):
    path = foreign(tmp_path / "foreign.onnx", dtype="uint8")
    with refuses(ConflictingOptions, path, "uint8"):
        adopt(path, **said)
    assert not path.with_name("adopted.onnx").exists()


@pytest.mark.parametrize(
    ("nodes", "facts"),
    [
        (  # a batch-norm in training mode
            [("ReduceMean", ["output"], "mean", {"axes": [0]}), ("Sub", ["output", "mean"], "last", {})],
            ("depend on the batch", "0.01%"),
        ),
        (  # the same, drowned out
            [
                ("ReduceMean", ["output"], "mean", {"axes": [0]}),
                ("Sub", ["output", "mean"], "centred", {}),
                ("Constant", [], "much", {"value_float": 3000.0}),
                ("Add", ["centred", "much"], "last", {}),
            ],
            ("depend on the batch", "0.01%"),
        ),
        ([("Log", ["output"], "log", {}), ("Neg", ["log"], "last", {})], ("NaN or Inf", "last")),
        ([("Sub", ["output", "output"], "last", {})], ("same for all images",)),
        ([("ReduceMean", ["output"], "last", {"axes": [0]})], ("[1, 6] for 8 images",)),
        ([("ArgMax", ["output"], "last", {"axis": 1})], ("int64 last",)),
    ],
)
def test_what_gives_no_embeddings_is_refused(tmp_path, nodes, facts):
    more = [helper.make_node(operator, inputs, [output], **named) for operator, inputs, output, named in nodes]
    kind = TensorProto.INT64 if nodes[0][0] == "ArgMax" else TensorProto.FLOAT
    value = helper.make_tensor_value_info("last", kind, None)
    path = foreign(tmp_path / "foreign.onnx", more=more, more_outputs=[value])
    with refuses(InvalidFile, *facts, path=path), np.errstate(all="ignore"):
        adopt(path, output="last")
    assert {each.name for each in tmp_path.iterdir()} == {"foreign.onnx"}


def test_embeddings_that_tell_nothing_apart_are_noticed(tmp_path, caplog):
    nodes = [
        helper.make_node("Constant", [], ["much"], value_float=3e4),
        helper.make_node("Add", ["output", "much"], ["last"]),
    ]
    value = helper.make_tensor_value_info("last", TensorProto.FLOAT, None)
    path = foreign(tmp_path / "foreign.onnx", more=nodes, more_outputs=[value])
    adopt(path, output="output")
    assert not caplog.messages
    adopt(path, output="last")
    assert ["0.00%" in message and str(path) in message for message in caplog.messages] == [True]


def test_a_batch_that_only_pretends_to_be_dynamic_is_refused(tmp_path):
    shape = numpy_helper.from_array(np.array([1, DIM]), "shape")
    proto = onnx.load(foreign(tmp_path / "foreign.onnx"))
    proto.graph.initializer.append(shape)
    proto.graph.node[-1].op_type = "Reshape"
    proto.graph.node[-1].input.append("shape")
    (tmp_path / "foreign.onnx").write_bytes(proto.SerializeToString())
    with refuses(InvalidFile, "[8, 3, 16, 8]", path=tmp_path / "foreign.onnx", hint="batch"):
        adopt(tmp_path / "foreign.onnx")


def test_the_command_needs_no_torch_and_says_what_it_assumes(tmp_path, people):
    path, out = foreign(tmp_path / "foreign.onnx", sides=("h", "w")), tmp_path / "adopted.onnx"
    words = ("-m", "pmm", "adopt", path, "-o", out, "--height", "16", "--width", "8")
    done = run_without_torch(*words, "--interpolation", "bicubic", "--dataset", "market1501", "--root", people)
    assert done.returncode == 0, done.stderr
    assumed, described, hint = done.stdout.splitlines()
    assert all(flag in assumed for flag in ("--colour rgb", "--scale 1/255", "--mean and --std ImageNet's"))
    assert "bicubic" not in assumed
    assert str(out) in described
    assert f"pmm evaluate {out}" in hint
    assert read_onnx(out).manifest.preprocessing.interpolation == "bicubic"
    assert_one_line_error(run_here(*words[:6]), "--height H --width W")
    assert_one_line_error(run_here(*words, "--weights", path), "--weights")
    assert_one_line_error(run_here(*words[:5], tmp_path / "adopted.pth"), ".onnx")


def test_files_of_ours_need_no_adoption(tmp_path):
    artifact = adopt(foreign(tmp_path / "foreign.onnx"))
    with refuses(InvalidFile, "manifest", path=artifact.path):
        adopt_onnx(artifact.path, tmp_path / "again.onnx", ImageOptions(), OnnxOptions())


def test_half_precision_is_read_back(tmp_path):
    manifest = adopt(foreign(tmp_path / "foreign.onnx", dtype="float16")).manifest
    assert (manifest.precision, manifest.precision_found, manifest.input.dtype) == ("fp16", "fp16", "float32")
    assert TYPES["float16"] == TensorProto.FLOAT16
