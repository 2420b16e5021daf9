"""What a file is, is told by its content: under any name, and of files as their own libraries write them."""

import logging
import shutil
import zipfile

import numpy as np
import onnx
import pytest
import torch

from pmm.artifacts import checkpoint
from pmm.artifacts.kinds import FORMAT_MARK, KNOWN_KINDS, SUFFIXES, kind_of, kind_of_content, require_kind
from pmm.utils.errors import InvalidFile
from tests.gallery.old_index import index_members, write_index
from tests.refusals import refuses

AOTI = ("m.wrapper.cpp", "m.wrapper_metadata.json", "m.wrapper.so")
ENGINES = (b"ptrt\0\0\0\0", b"ftrt\0\0\0\0", b"vtrt\0\0\0\0\2\0\0\0")


def archive(path, *names):
    with zipfile.ZipFile(path, "w") as made:
        for name in names:
            made.writestr(name, b"content")
    return path


def index(path):
    return write_index(path, index_members(np.ones((1, 2), np.float32)))


@pytest.fixture
def files(trained, exported, tmp_path):
    """(kind, file) as each library writes it, without a suffix."""
    folder = tmp_path / "files"
    folder.mkdir()
    state, weights = torch.load(trained, weights_only=True), torch.nn.Linear(2, 2).state_dict()
    torch.save(state, folder / "legacy", _use_new_zipfile_serialization=False)
    torch.save(weights, folder / "weights")
    torch.save(weights, folder / "old weights", _use_new_zipfile_serialization=False)
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(folder / "script"))
    for number, head in enumerate(ENGINES):
        (folder / f"engine{number}").write_bytes(head + bytes(64))
    return [
        ("checkpoint", shutil.copy(trained, folder / "checkpoint")),
        ("checkpoint", folder / "legacy"),
        ("torch", folder / "weights"),
        ("torch", folder / "old weights"),
        ("program", folder / "script"),
        ("program", archive(folder / "exported", "m/data/weights/weight_0", "m/models/model.json", "m/archive_format")),
        ("onnx", shutil.copy(exported, folder / "onnx")),
        *(("engine", folder / f"engine{number}") for number in range(len(ENGINES))),
        ("package", archive(folder / "package", *(f"model/data/aotinductor/model/{name}" for name in AOTI))),
        ("index", index(folder / "index")),
    ]


def test_every_kind_under_any_name(files, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "pmm"):
        for kind, file in files:
            assert (kind_of_content(file), kind_of(file)) == (kind, kind), file
            shutil.copy(file, tmp_path / "renamed.bin")
            assert kind_of(tmp_path / "renamed.bin") == kind
        assert not caplog.records, "a name that declares nothing is no contradiction"
        of_torch = ("checkpoint", "torch", "program")
        for kind, file in files:
            for suffix, declared in SUFFIXES.items():
                renamed = shutil.copy(file, tmp_path / f"{file.name}{suffix}")
                caplog.clear()
                assert kind_of(renamed) == kind, renamed
                assert kind_of(renamed) == kind
                same = kind == declared or (kind in of_torch and declared in of_torch)
                assert [str(renamed) in line for line in caplog.messages] == [True] * (not same), "said once"


def test_where_the_content_tells_nothing_the_name_does(files, tmp_path):
    for suffix, declared in SUFFIXES.items():
        for content in (b"", b"text", b"PK\x03\x04cut", b"\x08", b"\x80\x02junk", b"\x08\x04\x12\xff\xff"):
            (tmp_path / f"file{suffix}").write_bytes(content)
            found = kind_of(tmp_path / f"file{suffix}")
            assert found == ("onnx" if content.endswith(b"\xff") else declared)
    (tmp_path / "file.xyz").write_bytes(b"text")
    with refuses(InvalidFile, "neither", path=tmp_path / "file.xyz", expected=KNOWN_KINDS):
        kind_of(tmp_path / "file.xyz")
    with refuses(InvalidFile, "does not exist", path=tmp_path / "none.pth", expected=KNOWN_KINDS):
        kind_of(tmp_path / "none.pth")
    (tmp_path / "file.plan").write_bytes(ENGINES[0])
    with refuses(InvalidFile, "TensorRT engine", path=tmp_path / "file.plan", expected="a checkpoint or an ONNX file"):
        require_kind(tmp_path / "file.plan", "checkpoint", "onnx")
    assert all(suffix in KNOWN_KINDS for suffix in SUFFIXES if suffix != ".tar")
    cut = dict(files)["onnx"].read_bytes()[:5000]
    (tmp_path / "cut").write_bytes(cut)
    assert kind_of(tmp_path / "cut") == "onnx", "truncated"


def test_foreign_files_are_not_taken_for_ours(tmp_path):
    np.savez(tmp_path / "other", a=np.zeros(2))
    # fields of other messages: CoreML's description and network, a SavedModel's graph
    for number, head in enumerate(
        (b"\x08\x04\x12\x02ab\xa2\x1f\x00", b"\x08\x01\x12\x02ab", b"\x08\x96\x01", b"P2 3a")
    ):
        (tmp_path / f"{number}").write_bytes(head)
        assert kind_of_content(tmp_path / f"{number}") is None
    assert kind_of_content(tmp_path / "other.npz") is None


def test_a_file_made_to_harm_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a/data.pkl", bytes(8 << 20) + FORMAT_MARK)
    assert kind_of_content(tmp_path / "bomb") == "torch", "only the beginning is looked at"


def test_a_graph_beyond_short_fields(tmp_path):
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []), producer_name="p", doc_string="d" * 300)
    model.domain, model.model_version = "com.example", 1 << 40
    (tmp_path / "model").write_bytes(model.SerializeToString())
    assert kind_of_content(tmp_path / "model") == "onnx"


def test_the_mark_is_in_the_format_of_checkpoints():
    assert checkpoint.FORMAT.encode().startswith(FORMAT_MARK)


@pytest.mark.slow
def test_files_as_their_compilers_write_them(shared, tmp_path):
    assert kind_of_content(shared.package()) == "package"
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "program.pt2")
    assert kind_of_content(tmp_path / "program.pt2") == "program"
    pytest.importorskip("tensorrt_rtx")
    assert kind_of_content(shared.engine()) == "engine"
