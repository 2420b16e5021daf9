import json
import shutil

import onnx
import pytest
from onnx import TensorProto, helper

from pmm.artifacts.onnx_file import read_onnx
from pmm.utils.errors import InvalidFile
from pmm.utils.files import sha256
from tests.refusals import refuses


def external(path, location, *, where="initializer"):
    """An ONNX file whose weights are in the file `location`."""
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    if location is not None:
        tensor.external_data.add(key="location", value=location)
    node = helper.make_node("Add", ["x", "w"], ["y"])
    initializers = [tensor] if where == "initializer" else []
    if where == "sparse attribute":
        indices = helper.make_tensor("i", TensorProto.INT64, [2], [0, 1])
        node = helper.make_node("Constant", [], ["y"], sparse_value=helper.make_sparse_tensor(tensor, indices, [2]))
    if where == "sparse subgraph":
        indices = helper.make_tensor("i", TensorProto.INT64, [2], [0, 1])
        inner = helper.make_graph([], "inner", [], [])
        inner.sparse_initializer.append(helper.make_sparse_tensor(tensor, indices, [2]))
        node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    if where == "attribute":
        node = helper.make_node("Constant", [], ["y"], value=tensor)
    if where == "subgraph":
        inner = helper.make_graph([helper.make_node("Constant", [], ["z"], value=tensor)], "inner", [], [])
        node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    graph = helper.make_graph([node], "g", [], [], initializers)
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


@pytest.mark.parametrize("where", ["initializer", "attribute", "subgraph", "sparse attribute", "sparse subgraph"])
@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("/etc/passwd", "an absolute path"),
        ("C:\\secrets", "an absolute path"),
        ("\\\\server\\share", "an absolute path"),
        (None, "an absolute path"),
        ("../w.bin", "a path with '..'"),
        ("a/../../w.bin", "a path with '..'"),
        ("a\\..\\w.bin", "a path with '..'"),
        ("link.bin", "a symbolic link"),
        ("folder/w.bin", "a symbolic link"),
        ("a\\w.bin", "a path with a backslash"),
    ],
)
def test_weights_outside_the_folder_are_refused(tmp_path, where, location, reason):
    (tmp_path / "link.bin").symlink_to("/etc/passwd")
    (tmp_path / "folder").symlink_to("/etc")
    path = external(tmp_path / "x.onnx", location, where=where)
    with refuses(InvalidFile, repr(location or ""), reason, path=path, expected="a file beside it"):
        read_onnx(path, external_data=True)


def test_a_place_that_is_named_twice_is_refused(tmp_path):
    """One library takes the first, another the last."""
    (tmp_path / "w.bin").write_bytes(bytes(8))
    path = external(tmp_path / "x.onnx", "w.bin")
    proto = onnx.load_model_from_string(path.read_bytes())
    proto.graph.initializer[0].external_data.add(key="location", value="/etc/passwd")
    path.write_bytes(proto.SerializeToString())
    with refuses(InvalidFile, "'w.bin'", "more than once", path=path):
        read_onnx(path, external_data=True)


def test_weights_beside_the_file_only_where_they_are_expected(tmp_path):
    path = external(tmp_path / "x.onnx", "w.bin")
    with refuses(InvalidFile, "another file ('w.bin')", path=path, expected="inside"):
        read_onnx(path)
    assert read_onnx(path, external_data=True).external


def test_our_files_are_whole_and_known(exported, tmp_path):
    file = read_onnx(exported)
    assert file.sha256 == file.manifest.sha256 == sha256(exported)
    assert not file.external
    # a copied file keeps its contract
    shutil.copy(exported, tmp_path / "copy.onnx")
    copied = read_onnx(tmp_path / "copy.onnx").manifest
    assert copied.sha256 == ""
    assert copied.checkpoint_sha256 == file.manifest.checkpoint_sha256
    assert copied.input == file.manifest.input


def test_files_that_are_damaged_or_not_ours(exported, tmp_path):
    for content in (b"", b"no model", exported.read_bytes()[:1000], b"\x08\x0a"):
        (tmp_path / "x.onnx").write_bytes(content)
        with refuses(InvalidFile, "truncated, or not an ONNX file", path=tmp_path / "x.onnx"):
            read_onnx(tmp_path / "x.onnx")
    with refuses(InvalidFile, "does not exist", path=tmp_path / "none.onnx", expected="pmm export onnx"):
        read_onnx(tmp_path / "none.onnx")
    proto = onnx.load(exported)
    proto.metadata_props[0].value = json.dumps({"format": "pmm-manifest-1"})
    onnx.save(proto, tmp_path / "old.onnx")
    with refuses(InvalidFile, "'pmm-manifest-1'", path=tmp_path / "old.onnx", expected="'pmm-manifest-3'"):
        read_onnx(tmp_path / "old.onnx")
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    with refuses(InvalidFile, "without a manifest", path=tmp_path / "foreign.onnx", hint="pmm export onnx"):
        _ = read_onnx(tmp_path / "foreign.onnx").manifest
    assert read_onnx(tmp_path / "foreign.onnx").stored_manifest is None
