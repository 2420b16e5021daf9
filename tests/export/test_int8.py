"""int8: what it is calibrated on, the recipes, and the layers that must stay in fp32."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

from pmm.artifacts import checkpoint
from pmm.artifacts.dataset_location import DatasetLocation
from pmm.artifacts.manifest import EmbeddingContract, InputContract
from pmm.artifacts.onnx_file import read_onnx
from pmm.data.crops import load_crops
from pmm.data.preprocessing import Preprocessing, preprocessing_of
from pmm.data.readers import read_dataset
from pmm.export import parity_check
from pmm.export.calibration import calibration_crops, calibration_files
from pmm.export.fallback import convert_with_fallback
from pmm.export.graph import to_onnx
from pmm.export.int8 import Quantizer
from pmm.export.int8_layers import main_inputs, quantisable
from pmm.export.onnx import describe_export, export_onnx
from pmm.export.options import ExportOptions, VerifyOptions
from pmm.export.parity_check import ParityFailed
from pmm.export.precision import onnx_precision
from pmm.models.registry import build_model
from pmm.presets import preset
from pmm.runtime.deployed_graph import deployed_graph
from pmm.utils.errors import ConflictingOptions, InvalidFile, InvalidValue
from tests.conftest import assert_one_line_error, run_here
from tests.data import trees
from tests.refusals import refuses

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture(scope="module")
def fp32(exported):
    return read_onnx(exported).proto


@pytest.fixture(scope="module")
def train_crops(people):
    return load_crops([s.path for s in read_dataset("synthetic", people).train[:64]], 128, 64)


def test_the_training_part_of_a_data_set_or_a_folder_of_crops(people, tmp_path):
    found = calibration_files(people, "synthetic", 40)
    assert len(found) == len(set(found)) == 40
    assert {path.parent.name for path in found} == {"bounding_box_train"}
    assert found == calibration_files(people, "synthetic", 40)
    train = sorted((people / "bounding_box_train").iterdir())
    assert calibration_files(people / "bounding_box_train", "synthetic", 10_000) == train


@pytest.mark.parametrize("name", ["query", "gallery", "test", "bounding_box_test", "Query", "query/below"])
def test_crops_that_a_model_is_judged_by_are_refused(people, tmp_path, name):
    folder = tmp_path / "data" / name
    shutil.copytree(people / "bounding_box_train", folder)
    with refuses(InvalidFile, f"'{name.partition('/')[0]}'", path=folder):
        calibration_files(folder, "synthetic", 64)
    link = tmp_path / "calibration"
    link.symlink_to(folder)
    with refuses(InvalidFile, "test crops", path=link):
        calibration_files(link, "synthetic", 64)
    links = tmp_path / "links"
    links.mkdir()
    for file in folder.iterdir():
        (links / file.name).symlink_to(file)
    with refuses(InvalidFile, "test crops", path=links):
        calibration_files(links, "synthetic", 64)


def test_a_stray_picture_does_not_hide_a_data_set(people, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(people, root)
    shutil.copy(next((people / "query").iterdir()), root / "cover.jpg")
    assert {path.parent.name for path in calibration_files(root, "synthetic", 64)} == {"bounding_box_train"}


def test_too_few_crops_or_none(people, trained, tmp_path):
    (tmp_path / "crops").mkdir()
    for path in sorted((people / "bounding_box_train").iterdir())[:3]:
        shutil.copy(path, tmp_path / "crops")
    command = ("export/to_onnx.py", trained, "-o", tmp_path / "m.onnx", "--precision", "int8")
    done = run_here(*command, "--calibration-root", tmp_path / "crops")
    assert_one_line_error(done, "3 crops", "at least 32", "--calibration-root")
    done = run_here(*command, "--calibration-root", tmp_path / "none")
    assert_one_line_error(done, str(tmp_path / "none"), "not a folder", "--calibration-root")
    assert_one_line_error(run_here(*command, "--calibration-root", tmp_path), "layout of")
    assert_one_line_error(run_here(*command, "--calibration-images", "3"), "--calibration-images is 3", "at least 32")
    command = ("export/to_onnx.py", trained, "-o", tmp_path / "m.onnx")
    for flag, value in (("--target", "cpu"), ("--calibration-root", people), ("--calibration-images", "64")):
        assert_one_line_error(run_here(*command, flag, value), flag, "--precision int8")
    assert {path.name for path in tmp_path.iterdir()} == {"crops"}


def test_without_the_data_that_was_trained_on_it_says_what_to_give(trained, people, tmp_path):
    state = checkpoint.load(trained)
    state["config"]["data"]["root"] = str(tmp_path / "gone")
    torch.save(state, tmp_path / "moved.pth")
    command = ("export/to_onnx.py", tmp_path / "moved.pth", "--precision", "int8", "--calibration-images", "48")
    done = run_here(*command, "--no-verify")
    assert_one_line_error(done, "to calibrate", "--calibration-root DIR")
    done = run_here(*command, "--verify-root", people, "--calibration-root", people / "bounding_box_train")
    assert done.returncode == 0, done.stderr


def test_crops_of_a_data_set_that_is_named_are_read_as_it_lays_them_out(people):
    size = Preprocessing(height=8, width=4, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    source = SimpleNamespace(preprocessing=size, data=DatasetLocation("msmt17", "elsewhere"))
    options = ExportOptions(precision="int8", calibration_images=32, calibration_root=str(people))
    with refuses(InvalidFile, hint="another --calibration-root DIR"):
        calibration_crops(source, options)
    named = dataclasses.replace(options, calibration_dataset="market1501")
    assert calibration_crops(source, named).shape == (32, 8, 4, 3)
    with refuses(ConflictingOptions, "--calibration-dataset", hint="--calibration-root DIR"):
        ExportOptions(precision="int8", calibration_dataset="market1501")


@pytest.mark.parametrize(
    ("target", "zero_point"), [("tensorrt", onnx.TensorProto.INT8), ("cpu", onnx.TensorProto.UINT8)]
)
def test_each_target_gets_its_own_file(fp32, train_crops, target, zero_point):
    proto = Quantizer(fp32, target, np.array_split(train_crops, 8), "images").build()
    assert (proto.ir_version, [o.version for o in proto.opset_import]) == (10, [20])
    nodes = proto.graph.node
    makers = {name: node for node in nodes for name in node.output}
    kinds = {t.name: t.data_type for t in proto.graph.initializer}
    for node in nodes:
        if node.op_type == "Conv" or (node.op_type == "Add" and target == "cpu"):
            assert all(makers[name].op_type == "DequantizeLinear" for name in node.input[:2]), node.name
    activations = {kinds[n.input[2]] for n in nodes if n.op_type == "QuantizeLinear"}
    assert activations == {zero_point}
    weights = [n for n in nodes if n.op_type == "DequantizeLinear" and n.input[0] in kinds]
    assert weights
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    largest = max(np.abs(stored[n.input[0]].astype(int)).max() for n in weights if stored[n.input[0]].dtype == np.int8)
    assert largest == {"tensorrt": 127, "cpu": 64}[target]
    symmetric = {n.name: onnx.numpy_helper.to_array(t) for n in nodes if n.op_type == "QuantizeLinear"
                 for t in proto.graph.initializer if t.name == n.input[2]}  # fmt: skip
    assert target == "cpu" or not any(point.any() for point in symmetric.values())
    biases = [kinds.get(n.input[2]) for n in nodes if n.op_type == "Conv" and n.input[2] in kinds]
    assert target == "cpu" or set(biases) == {onnx.TensorProto.FLOAT}


def test_of_a_residual_sum_the_shortcut_alone_is_in_8_bits(fp32, train_crops):
    """As NVIDIA asks for: so the sum can be part of the convolution before it."""
    quantizer = Quantizer(fp32, "tensorrt", np.array_split(train_crops, 8), "images")
    before = {node.name: list(node.input) for node in fp32.graph.node if node.op_type == "Add"}
    assert len(before) == 5

    def sums(proto):
        makers = {name: node for node in proto.graph.node for name in node.output}
        for add in [node for node in proto.graph.node if node.op_type == "Add"]:
            yield add.name, [makers[name] for name in add.input]

    for name, (main, shortcut) in sums(quantizer.build()):
        assert main.op_type == "Conv", name
        assert main.output[0] == before[name][0], name
        assert shortcut.op_type == "DequantizeLinear", name
        # a shortcut with a convolution of its own, and one without
        assert shortcut.input[0].startswith(before[name][1]), name
    proto = quantizer.build()
    read = {name for node in proto.graph.node for name in node.input}
    assert {tensor.name for tensor in proto.graph.initializer} <= read
    # where the convolution stays in fp32, its sum does too
    block = next(layer for layer in quantizer.layers if layer.endswith("layer2.conv2"))
    for name, inputs in sums(quantizer.build([block])):
        kinds = [maker.op_type for maker in inputs]
        if inputs[0].input[1] == f"{block}.weight":
            assert kinds == ["Conv", "Conv"]
        else:
            assert kinds == ["Conv", "DequantizeLinear"], name


@pytest.mark.parametrize(("pool", "product"), [("ReduceMean", "map gate"), ("GlobalAveragePool", "gate map")])
def test_squeeze_and_excitation_and_sums_with_constants_are_not_in_8_bits(pool, product):
    steps = [
        ("Conv", "x w", "first"), ("Clip", "first low high", "map"), (pool, "map", "mean"),
        ("Conv", "mean w", "squeeze"), ("Relu", "squeeze", "short"), ("Conv", "short w", "excite"),
        ("HardSigmoid", "excite", "gate"), ("Mul", product, "weighed"), ("Conv", "weighed w", "last"),
        ("Add", "last x", "sum"), ("Add", "sum w", "shifted"), ("Add", "map shifted", "of no convolution"),
    ]  # fmt: skip
    nodes = [onnx.helper.make_node(kind, ins.split(), [out], name=out) for kind, ins, out in steps]
    constants = [onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [1.0])]
    proto = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], constants))
    assert [node.name for node in quantisable(proto, ("Conv", "Add", "Clip"))] == ["first", "map", "last", "sum"]


def test_streams_that_are_weighed_and_summed_stay_in_8_bits():
    """As in OSNet; a weighed map that a convolution reads is weighed in floats."""
    steps = [
        ("Conv", "x w", "a"), ("GlobalAveragePool", "a", "mean_a"), ("Sigmoid", "mean_a", "gate_a"),
        ("Conv", "x w", "b"), ("GlobalAveragePool", "b", "mean_b"), ("Sigmoid", "mean_b", "gate_b"),
        ("Mul", "a gate_a", "weighed_a"), ("Mul", "gate_b b", "weighed_b"), ("Add", "weighed_a weighed_b", "sum"),
        ("Conv", "sum w", "c"), ("Mul", "c gate_a", "weighed_c"), ("Conv", "weighed_c w", "d"),
    ]  # fmt: skip
    nodes = [onnx.helper.make_node(kind, ins.split(), [out], name=out) for kind, ins, out in steps]
    constants = [onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [1.0])]
    proto = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], constants))
    products, streams = set("abcd"), {"weighed_a", "weighed_b", "sum"}
    assert {node.name for node in quantisable(proto, ("Conv", "Add", "Mul"))} == products | streams
    assert {node.name for node in quantisable(proto, ("Conv", "Add"))} == products


def test_the_manifest_says_how_it_was_calibrated(trained, tmp_path):
    options = ExportOptions(precision="int8", calibration_images=48)
    manifest = export_onnx(trained, tmp_path / "m.onnx", options).manifest
    quantization = manifest.quantization
    assert quantization["target"] == "tensorrt"
    assert quantization["kept_in_fp32"] == []
    assert [name.rsplit(".", 2)[-2] for name in quantization["only_weights_in_8_bits"]] == ["average_head", "max_head"]
    calibration = quantization["calibration"]
    assert (calibration["asked"], calibration["images"], calibration["method"]) == (48, 48, "minmax")
    assert calibration["of"] == "the training set of the checkpoint"
    fewer = ExportOptions(precision="int8", calibration_images=40)
    other = export_onnx(trained, tmp_path / "n.onnx", fewer, VerifyOptions(no_verify=True)).manifest
    assert other.quantization["calibration"]["pixels_sha256"] != calibration["pixels_sha256"]


def test_a_quantised_file_is_used_again_only_for_the_same_calibration(trained, people, tmp_path, monkeypatch):
    from pmm.export import onnx as module

    out, made = tmp_path / "m.onnx", []
    monkeypatch.setattr(parity_check, "VERIFY_CROPS", 16)
    original = module.export_onnx
    monkeypatch.setattr(module, "export_onnx", lambda *args: made.append(args[2]) or original(*args))
    mine = ExportOptions(precision="int8", calibration_images=40)
    given = ExportOptions(precision="int8", calibration_images=40, calibration_root=str(people))
    cpu = ExportOptions(precision="int8", calibration_images=40, target="cpu")
    fewer = ExportOptions(precision="int8", calibration_images=36)
    for options in (mine, mine, given, given, mine, cpu, fewer, ExportOptions(), ExportOptions()):  # in this order
        module.export_onnx_cached(trained, out, options)
    assert made == [mine, given, given, mine, cpu, fewer, ExportOptions()]


def test_a_checkpoint_that_changes_meanwhile_is_noticed(trained, tmp_path, monkeypatch):
    from pmm.export import onnx as module

    checkpoint_file = tmp_path / "best.pth"
    shutil.copyfile(trained, checkpoint_file)
    original = module._build

    def slowly(*args):
        checkpoint_file.write_bytes(checkpoint_file.read_bytes() + b"next epoch")
        return original(*args)

    monkeypatch.setattr(module, "_build", slowly)
    with refuses(InvalidFile, "changed", path=checkpoint_file):
        module.export_onnx(checkpoint_file, tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["best.pth"]


@pytest.mark.parametrize("target", ["cpu", pytest.param("tensorrt", marks=pytest.mark.slow)])
def test_the_layer_that_costs_most_is_kept_in_fp32_and_named(brittle, target, tmp_path):
    path, block = brittle
    options = ExportOptions(precision="int8", target=target, calibration_images=64)
    blind = export_onnx(path, tmp_path / "b.onnx", options, VerifyOptions(no_verify=True))
    assert blind.manifest.quantization["kept_in_fp32"] == []
    artifact = export_onnx(path, tmp_path / "m.onnx", options)
    kept = artifact.manifest.quantization["kept_in_fp32"]
    assert kept
    assert kept[0].endswith(f"{block}.conv2"), kept
    if target == "cpu":  # whose convolutions give 8 bits: the one before has to be kept too
        assert kept[1].endswith(f"{block}.conv1"), kept
    assert artifact.manifest.parity["min_cosine"] >= artifact.manifest.parity["least_allowed"]
    assert 0.5 < artifact.manifest.precision_share["int8"] < blind.manifest.precision_share["int8"]
    assert f"kept in fp32: {', '.join(kept)}" in describe_export(artifact)


@pytest.mark.parametrize("target", ["cpu", pytest.param("tensorrt", marks=pytest.mark.slow)])
def test_what_a_layer_costs_is_measured_with_it_alone_in_8_bits(fp32, train_crops, monkeypatch, target):
    quantizer, shares = Quantizer(fp32, target, np.array_split(train_crops[:16], 2), "images"), []
    built = quantizer._built

    def remember(excluded, float_outputs):
        proto = built(excluded, float_outputs)
        shares.append(onnx_precision(proto).share.get("int8", 0.0))
        return proto

    monkeypatch.setattr(quantizer, "_built", remember)
    assert sorted(quantizer.by_cost([train_crops[:2]])) == sorted(quantizer.layers)
    assert len(shares) == len(quantizer.layers)
    assert shares.count(0) == len(quantizer.only_weights()) == 2, "heads compute in floats"
    assert sum(shares) == pytest.approx(onnx_precision(quantizer.build()).share["int8"])


def test_a_graph_that_never_passes_is_refused(fp32, train_crops):
    quantizer = Quantizer(fp32, "tensorrt", np.array_split(train_crops, 8), "images")
    tried = []

    def never(proto, allowance):
        tried.append(proto)
        raise ParityFailed("it moved")

    with refuses(ParityFailed, "it moved", "of 17 layers"):
        convert_with_fallback(quantizer, never, [train_crops[:4]])
    assert len(tried) > 3


def test_queries_of_ones_own_are_no_data_set_to_calibrate_on(tmp_path):
    names = [
        f"{part}/{who}/{number}.jpg" for part in ("train", "query", "gallery") for who in "ab" for number in range(20)
    ]
    root = trees.folders(tmp_path, names)
    assert len(calibration_files(root, "folder", 64)) == 40
    assert len(calibration_files(root / "train", "folder", 64)) == 40
    for part in ("query", "gallery"):
        with refuses(InvalidFile, f"'{part}'", path=root / part):
            calibration_files(root / part, "folder", 64)


def test_it_does_not_matter_who_is_on_the_crops_and_the_flags_are_those_of_the_command(tmp_path):
    names = [f"cam{camera}/{number}.jpg" for camera in (1, 2) for number in range(20)]
    root = trees.folders(tmp_path / "cameras", names)
    assert len(calibration_files(root, "folder", 64)) == 40
    people = trees.folders(tmp_path / "people", ["ann/1.jpg", "bob/1.jpg"])
    with refuses(InvalidFile, hint="it looks like --calibration-dataset folder"):
        calibration_files(people, "market1501", 64)
    with refuses(InvalidValue, "--calibration-dataset"):
        calibration_files(people, "no-such", 64)
    size = Preprocessing(height=8, width=4, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    with refuses(InvalidFile, hint="it looks like --verify-dataset folder"):
        parity_check.verification_crops("market1501", str(people), size)


def test_folders_far_above_say_nothing_of_the_crops(tmp_path):
    names = [f"{who}/{number}.jpg" for who in "ab" for number in range(20)]
    root = trees.folders(tmp_path / "test" / "market" / "bounding_box_train", names)
    assert len(calibration_files(root, "folder", 64)) == 40
    with refuses(InvalidFile, "'test'", path=tmp_path / "mine" / "test" / "people"):
        calibration_files(trees.folders(tmp_path / "mine" / "test" / "people", names), "folder", 64)


@pytest.mark.slow
def test_every_sum_of_a_resnet_50_has_its_main_input():
    """Which the last of a block's three convolutions gives, with and without a convolution in the shortcut."""
    base = preset("paper")
    config = dataclasses.replace(base, model=dataclasses.replace(base.model, num_classes=2, weights="none"))
    model, size = build_model(config).eval(), dataclasses.replace(preprocessing_of(base), height=64, width=32)
    graph = deployed_graph(model, size, InputContract(), EmbeddingContract.of(model), "fp32")
    proto = to_onnx(graph, size, InputContract(), 20)
    found, makers = main_inputs(proto), {name: node for node in proto.graph.node for name in node.output}
    assert set(found) == {node.name for node in proto.graph.node if node.op_type == "Add"}
    assert len(found) == 17  # 3 + 4 + 6 + 3, and the part-based head's own block
    assert all(makers[name].input[1].endswith("conv3.weight") for name in found.values())
