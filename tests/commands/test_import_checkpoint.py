"""`pmm import`: what it says, and the files that it refuses without running what is in them."""

import dataclasses
import os
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from pmm.artifacts.adopted_file import ADOPTED
from pmm.artifacts.checkpoint import load, statistics_of
from pmm.artifacts.checkpoint_import import import_checkpoint
from pmm.data.readers import read_dataset
from pmm.data.samples import class_indices
from pmm.presets import preset
from pmm.utils.errors import InvalidFile
from tests.artifacts.test_manifest import STATISTICS
from tests.authors import Authors, hollow
from tests.conftest import assert_one_line_error, run_here
from tests.refusals import refuses
from tests.without_torch import run_all_without_torch

HOLLOW = {method: hollow(method) for method in ("pmm", "bdb")}


def command(*args, **kwargs):
    return run_here("-m", "pmm", "import", *args, **kwargs)


@pytest.fixture
def file(tmp_path):
    torch.save({"state_dict": HOLLOW["pmm"], "epoch": 400}, tmp_path / "checkpoint_ep400.pth.tar")
    return tmp_path / "checkpoint_ep400.pth.tar"


def test_the_command_says_what_was_read_and_what_is_next(file, people, tmp_path):
    out = tmp_path / "new folder" / "ckpt.pth"
    done = command(file, "-o", out, "--height", "256", "--width", "96")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"{file}: pmm of the PMM authors' code, 5 identities, epoch 400, {len(HOLLOW['pmm'])} tensors"
    assert second == f"'{out}' is written; next: pmm evaluate '{out}' --dataset market1501 --root DIR"
    data = load(out)["config"]["data"]
    assert (data["height"], data["width"], data["dataset"], data["root"]) == (256, 96, "market1501", "")
    done = command(file, "-o", out, "--dataset", "synthetic", "--root", people)
    assert f"--dataset synthetic --root {people}" in done.stdout
    has = len(class_indices(read_dataset("synthetic", people).train))
    assert f"; the data set has {has} identities for training: it was trained on another\n" in done.stdout
    data = load(out)["config"]["data"]
    assert (data["height"], data["width"], data["dataset"], data["root"]) == (384, 128, "synthetic", str(people))


@pytest.mark.parametrize(("identities", "kept"), [(5, True), (6, False)])
def test_statistics_are_those_of_the_data_set_that_it_was_trained_on(file, tmp_path, identities, kept):
    data = dataclasses.replace(preset("paper").data, dataset="market1501")
    import_checkpoint(file, tmp_path / "ours.pth", data, identities=identities, statistics=STATISTICS)
    assert statistics_of(load(tmp_path / "ours.pth")) == (STATISTICS if kept else None)


def test_later_commands_point_here(file, tmp_path):
    bare = tmp_path / "theirs.pth"
    torch.save(HOLLOW["bdb"], bare)
    done = run_here("export/to_onnx.py", bare, "-o", tmp_path / "x.onnx")
    assert_one_line_error(done, f"pmm import {bare} -o CKPT.pth")
    with refuses(InvalidFile, path=file, hint=f"pmm import {file} -o CKPT"):
        load(file)


def test_a_wrong_command_line_needs_no_torch(file, tmp_path):
    out = tmp_path / "ckpt.pth"
    wrong = (
        ([tmp_path / "no.pth", "-o", out], "does not exist; expected a checkpoint to import"),
        ([file, "-o", file], "is the file to read; give another name to write to"),
        ([file, "-o", tmp_path / "x.pth.tar"], "x.pth.tar: its name ends in .tar; expected a name that ends in .pth"),
        ([file], "--out"),
        ([file, "-o", out, "--heigth", "3"], "unknown flag --heigth"),
        ([file, "-o", out, "--height", "0"], "--height is 0; expected 1 to 4096"),
        ([file, "-o", out, "--height", "100000000"], "--height is 100000000; expected 1 to 4096"),
        ([file, "-o", out, "--dataset", "mars"], "--dataset is 'mars'"),
        ([file, "-o", out, "--root", tmp_path / "no"], "no such folder"),
    )
    answers = run_all_without_torch(*(("-m", "pmm", "import", *args) for args, _ in wrong))
    for done, (_, text) in zip(answers, wrong, strict=True):
        assert_one_line_error(done, "pmm import: error: ", text)
    assert not out.exists()


def test_the_source_is_never_overwritten(file, tmp_path):
    source = tmp_path / "theirs.pth"
    shutil.copy(file, source)
    (tmp_path / "link.pth").symlink_to(source)
    for out in (source, tmp_path / "link.pth"):
        assert_one_line_error(command(source, "-o", out), "is the file to read; give another name to write to")
    assert source.read_bytes() == file.read_bytes()


def test_a_refused_file_leaves_what_was_there(tmp_path):
    out = tmp_path / "ours.pth"
    out.write_bytes(b"before")
    torch.save(
        {"state_dict": {**HOLLOW["pmm"], "softmax1.bias": torch.full((5,), torch.nan)}}, tmp_path / "bad.pth.tar"
    )
    assert_one_line_error(command(tmp_path / "bad.pth.tar", "-o", out), "softmax1.bias holds NaN or Inf")
    assert out.read_bytes() == b"before"
    assert {path.name for path in tmp_path.iterdir()} == {"ours.pth", "bad.pth.tar"}


def test_a_checkpoint_of_ours_has_nothing_to_import(trained, tmp_path):
    done = command(trained, "-o", tmp_path / "x.pth")
    assert_one_line_error(done, "already a PMM checkpoint", "every command takes it as it is")
    torch.save({"format": ADOPTED}, tmp_path / "adopted.pth")
    done = command(tmp_path / "adopted.pth", "-o", tmp_path / "x.pth")
    assert_one_line_error(done, "adopted network", "pmm evaluate", "as it is")
    assert not (tmp_path / "x.pth").exists()


def test_crops_that_the_network_does_not_take_are_refused_at_once(file, tmp_path):
    done = command(file, "-o", tmp_path / "x.pth", "--height", "96", "--width", "32")
    assert_one_line_error(done, "--k is 3", "2 at most", "3x2 blocks", "96x32 crops")
    assert not (tmp_path / "x.pth").exists()


class Evil:
    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return (self.function, ("echo executed",))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("value", "name"),
    [(Evil(print), "print"), (Evil(os.system), "posix.system"), (np.zeros(3), "_reconstruct"), (Evil(eval), "eval")],
)
def test_code_is_refused_by_name_and_never_run(value, name, zipped, tmp_path, capfd):
    content = {"state_dict": HOLLOW["pmm"], "rank1": value}
    torch.save(content, tmp_path / "evil.pth.tar", _use_new_zipfile_serialization=zipped)
    done = command(tmp_path / "evil.pth.tar", "-o", tmp_path / "x.pth")
    assert_one_line_error(
        done, "refused, the file holds more than plain tensors and could run code (it asks for ", name
    )
    assert "executed" not in capfd.readouterr().out + done.stdout
    assert not (tmp_path / "x.pth").exists()


def test_a_whole_pickled_network_is_refused_by_its_class(tmp_path):
    with torch.device("meta"):
        torch.save(Authors(2, []), tmp_path / "f.pth.tar")
    assert_one_line_error(command(tmp_path / "f.pth.tar", "-o", tmp_path / "x.pth"), "asks for tests.authors.Authors)")


def test_numpy_scalars_are_the_only_thing_let_through(tmp_path):
    """The way they are allowed lets no other types through, and is closed again afterwards."""
    before = set(torch.serialization.get_safe_globals())
    for value in (np.datetime64("2020-01-01"), np.dtype("O"), np.dtype([("a", "f4")])):
        torch.save({"state_dict": HOLLOW["pmm"], "x": value}, tmp_path / "f.pth.tar")
        done = command(tmp_path / "f.pth.tar", "-o", tmp_path / "x.pth")
        assert_one_line_error(done, "refused, the file holds more than plain tensors and could run code")
    assert set(torch.serialization.get_safe_globals()) == before


def test_other_files_are_named(file, tmp_path):
    content = file.read_bytes()

    def written(name, data):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    packed, zipped = tmp_path / "packed.pth.tar", tmp_path / "zipped.pth"
    with tarfile.open(packed, "w") as tar:
        tar.add(file, "inner.pth")
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("readme.txt", "hello")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pth"))
    for path, text in (
        (packed, "a packed archive (.tar or .gz), not a checkpoint: unpack it and give the file inside"),
        (written("f.pth.tar.gz", b"\x1f\x8b\x08\x00"), "a packed archive"),
        (zipped, "truncated, or not a checkpoint (a zip archive, but "),
        (tmp_path / "script.pth", "a program of torch (TorchScript"),
        (written("model.onnx", b"\x08\x0a\x12\x07pytorch"), "an ONNX file"),
        (written("onnx.pth", b"\x08\x0a\x12\x07pytorch"), "an ONNX file"),
        (written("model.plan", b"ftrt1234"), "a TensorRT engine"),
        (written("engine.pth", b"ftrt1234"), "a TensorRT engine"),
        (written("cut.pth.tar", content[: len(content) // 2]), "truncated, or not a checkpoint"),
        (written("empty.pth.tar", b""), "truncated, or not a checkpoint"),
        (written("text.pth.tar", b"weights"), "truncated, or not a checkpoint"),
    ):
        done = command(path, "-o", tmp_path / "x.pth")
        assert_one_line_error(done, f"{path}: ", text, "expected a checkpoint of the PMM authors' code or of BDB's")
    assert not (tmp_path / "x.pth").exists()
