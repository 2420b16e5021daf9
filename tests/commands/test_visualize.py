"""pmm visualize, as a user runs it."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from pmm.artifacts import checkpoint
from pmm.config import Config
from pmm.data.readers import read_dataset
from pmm.models.registry import build_model
from pmm.visualize import cam
from pmm.visualize.pictures import PictureOptions, Pictures
from tests.conftest import assert_one_line_error, run_here
from tests.without_torch import run_all_without_torch

COMMAND = ("-m", "pmm", "visualize")
NAMES = ("cam", "mix", "lists", "curves")


def draw(*args, **options):
    return run_here(*COMMAND, *args, "--height", "64", "--device", "cpu", **options)


def pixels(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


@pytest.fixture(scope="module")
def bdb(trained, tmp_path_factory):
    """A checkpoint of another method, untrained, with no metrics beside it."""
    state = checkpoint.load(trained)
    config = Config.from_dict(state["config"])
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, method="bdb"))
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bdb") / "other" / "best.pth"
    checkpoint.save(path, {**state, "config": config.to_dict(), "model": build_model(config).state_dict()})
    return path


@pytest.fixture
def run(trained, tmp_path):
    """The trained run, in a folder that may be written to."""
    return shutil.copytree(trained.parent, tmp_path / "first", copy_function=shutil.copyfile) / "best.pth"


def test_a_checkpoint_alone_gives_the_whole_set_beside_it(run):
    done = draw(run, "--crops", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line, name in zip(lines, NAMES, strict=True):
        path, size, *_ = line.split()
        assert path == str(run.parent / "pictures" / f"{name}.png")
        assert "x".join(map(str, pixels(path).shape[1::-1])) == size
    assert sorted(path.name for path in (run.parent / "pictures").iterdir()) == sorted(f"{n}.png" for n in NAMES)
    before = {name: (run.parent / "pictures" / f"{name}.png").read_bytes() for name in NAMES}
    assert draw(run, "--crops", "2").returncode == 0
    assert before == {name: (run.parent / "pictures" / f"{name}.png").read_bytes() for name in NAMES}
    draw(run, "--crops", "2", "--seed", "1", "--what", "cam,mix")
    for name in ("cam", "mix"):
        assert (run.parent / "pictures" / f"{name}.png").read_bytes() != before[name]


def test_another_checkpoint_stands_beside(run, bdb):
    done = draw(run, "--crops", "2", "--against", bdb)
    assert done.returncode == 0, done.stderr
    folder = run.parent / "pictures-against-other"
    alone = draw(run, "--crops", "2", "--what", "cam,mix,lists")
    assert alone.returncode == 0
    for name in ("cam", "lists"):
        assert pixels(folder / f"{name}.png").shape[1] > pixels(run.parent / "pictures" / f"{name}.png").shape[1]
    assert np.array_equal(pixels(folder / "mix.png"), pixels(run.parent / "pictures" / "mix.png"))


def test_two_checkpoints_of_one_method_are_told_apart(run):
    last = run.with_name("last.pth")
    pictures = Pictures(run, last, PictureOptions(device="cpu"))
    assert pictures.titles == ["pmm (last.pth)", "pmm (best.pth)"]
    elsewhere = shutil.copytree(run.parent, run.parent.with_name("second")) / "best.pth"
    assert Pictures(run, elsewhere, PictureOptions(device="cpu")).titles == ["pmm (second)", "pmm (first)"]


def test_training_crops_explain_the_true_identity_and_test_crops_the_answer(run, bdb, monkeypatch):
    shown = []
    draw_cam = cam.cam_picture
    monkeypatch.setattr(cam, "cam_picture", lambda *args, **how: shown.append((args, how)) or draw_cam(*args, **how))
    for split in ("train", "test"):
        Pictures(run, bdb, PictureOptions(device="cpu", crops=3, split=split)).draw("cam")
    ((names, views), how), ((test_names, test_views), test_how) = shown
    assert how["true"]
    assert not test_how["true"]
    assert [view.title for view in views] == [view.title for view in test_views] == ["bdb", "pmm"]
    assert [len(view.stages) for view in views] == [2, 3]
    for view in views:
        for stage in view.stages:
            # a label's person is the one that the crop's name says
            called = [name.split(",")[0] for name in names]
            assert [view.names[label] for label in stage.classes.tolist()] == called
        assert view.faces == {}
    pids = {sample.pid for sample in read_dataset("synthetic", checkpoint.load(run)["config"]["data"]["root"]).query}
    assert {int(name.split(",")[0].removeprefix("person ")) for name in test_names} <= pids
    for view in test_views:
        answers = {label for stage in view.stages for label in stage.classes.tolist()}
        assert set(view.faces) == answers


def test_what_a_checkpoint_has_not_is_a_note_unless_it_is_asked_for(bdb, tmp_path):
    done = draw(bdb, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cam.png", "lists.png"]
    notes = done.stderr.strip().splitlines()
    assert all(fact in notes[0] for fact in ("note: no mix.png: ", str(bdb), "bdb has no Hard-Mix"))
    assert all(fact in notes[1] for fact in ("note: no curves.png: ", str(bdb), "metrics.jsonl"))
    assert_one_line_error(draw(bdb, "--what", "mix", "--out", tmp_path / "mix"), str(bdb), "bdb has no Hard-Mix")
    assert_one_line_error(draw(bdb, "--what", "curves", "--out", tmp_path / "c"), "metrics.jsonl", "--runs DIR")


def test_curves_need_neither_data_nor_model(run, trained, tmp_path):
    state = checkpoint.load(trained)
    state["config"]["data"]["root"] = "/nowhere"
    checkpoint.save(run, state)
    assert_one_line_error(draw(run), "best.pth: ", "/nowhere", "--root DIR")
    curves = ("-m", "pmm", "visualize", run, "--what", "curves")
    one, two = tmp_path / "one", tmp_path / "two"
    done = run_all_without_torch(
        (*curves, "--out", one), (*curves, "--runs", trained.parent, "--out", two), (*curves, "--bogus")
    )
    assert [each.returncode for each in done[:2]] == [0, 0], done
    assert (pixels(one / "curves.png") != pixels(two / "curves.png")).any()
    assert_one_line_error(done[2], "unknown flag --bogus")


def test_mistakes_are_one_line(run, tmp_path):
    garbage = tmp_path / "garbage.pth"
    garbage.write_bytes(b"no checkpoint")
    for args, *expected in (
        ([run, "--what", "cam,heat,mix"], "--what is 'heat'", "cam, mix, parts, occlusions, lists or curves"),
        ([run, "--what", ","], "--what"),
        ([run, "--crops", "0"], "--crops is 0", "1 to 100"),
        ([run, "--seed", "-1"], "--seed is -1"),
        ([run, "--batch-size", "0"], "--batch-size is 0"),
        ([run, "--crops", "99", "--what", "cam"], "--crops is 99", "72 at most", "test crops"),
        ([run, "--crops", "99", "--what", "lists"], "--crops is 99", "72 at most", "queries"),
        ([run, "--runs", tmp_path / "none"], "none: no such run"),
        ([run, "--runs", run.parent, "--what", "cam"], "--runs needs curves in --what"),
        ([run, "--against", run], "--against", run, "another checkpoint"),
        ([run, "--against", tmp_path / "other.pth"], "other.pth: it does not exist"),
        ([run, "--out", garbage], "it is a file"),
        ([run, "--root", tmp_path / "gone"], tmp_path / "gone", "no such folder"),
        ([tmp_path / "no.pth"], "no.pth: it does not exist; expected a checkpoint"),
        ([tmp_path], "is a folder; expected a checkpoint"),
        ([garbage, "--what", "cam"], "garbage.pth: truncated, or not a checkpoint"),
    ):
        assert_one_line_error(draw(*args), *map(str, expected))
    assert not (run.parent / "pictures").exists() or not list((run.parent / "pictures").iterdir())
    assert_one_line_error(run_here(*COMMAND, run, "--height", "9"), "--height is 9", "64 to 1024")


@pytest.mark.parametrize("what", ["lists", "cam"])
def test_all_bad_images_of_the_data_set_are_named(run, people, tmp_path, what):
    root = shutil.copytree(people, tmp_path / "people")
    files = sorted((root / "query").iterdir())
    for path in files:
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:400])
    done = draw(run, "--root", root, "--what", what)
    assert_one_line_error(done, str(root), f"{len(files)} images cannot be read")


def test_without_a_checkpoint_the_newest_run_is_drawn(run, tmp_path):
    assert_one_line_error(draw("--what", "curves", cwd=tmp_path), "runs: it holds no run with best.pth")
    shutil.copytree(run.parent, tmp_path / "runs" / "newest")
    done = draw("--what", "curves", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("runs/newest/pictures/curves.png ")


def test_help_names_every_picture():
    done = run_here(*COMMAND, "--help")
    assert done.returncode == 0
    for name in NAMES:
        assert f"{name}: " in done.stdout
