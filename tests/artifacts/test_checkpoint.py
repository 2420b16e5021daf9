import contextlib
import io
import pickle
from pathlib import Path

import pytest
import torch

from pmm.artifacts.checkpoint import FORMAT, KEYS, checked, load, restore_model, save, statistics_of, versions
from pmm.artifacts.init_file import _from_checkpoint
from pmm.artifacts.trained_model import load_model
from pmm.artifacts.weights_file import leaves_of
from pmm.config import Config
from pmm.data.measure_crops import crop_statistics
from pmm.data.preprocessing import preprocessing_of
from pmm.training.data_setup import training_data
from pmm.utils.build_info import build_version
from pmm.utils.errors import InvalidFile
from tests.refusals import refuses


def test_a_trained_checkpoint_holds_everything_and_rebuilds_itself(trained):
    state = load(trained)
    assert tuple(state) == KEYS
    assert state["epoch"] > 0
    assert state["config"]["model"]["num_classes"] == 9
    assert state["optimizer"] is None  # best.pth is for evaluation
    assert load(trained.with_name("last.pth"))["optimizer"]["state"]
    config, split = training_data(Config.from_dict(state["config"]))
    paths = [sample.path for sample in split.train]
    assert statistics_of(state) == crop_statistics(paths, preprocessing_of(config))
    model = load_model(trained)
    assert not model.training
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, 128, 64)).shape == (2, 384)


def test_what_ends_a_write_is_told_and_the_old_file_stays(trained, tmp_path, monkeypatch):
    """torch ends a file that could not be written with an error of its own, which says nothing."""

    class Interrupted(io.FileIO):
        def write(self, data):
            raise KeyboardInterrupt

    state, path = load(trained), tmp_path / "last.pth"
    path.write_bytes(b"old")
    monkeypatch.setattr(Path, "open", lambda path, mode: Interrupted(path, mode))
    with pytest.raises(KeyboardInterrupt):
        save(path, state)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("last.pth", b"old")]


def test_it_names_the_kernels_it_was_trained_with(trained, tmp_path, built_with):
    assert load(trained)["versions"]["pmm kernels"] == build_version()
    built_with(compiler="g++ 12.2.0", cuda="13.0", architectures=["9.0"], sources="0123456789ab")
    assert versions()["pmm kernels"] == "0123456789ab, g++ 12.2.0, CUDA 13.0"
    # one that was written before it was recorded
    state = load(trained)
    del state["versions"]["pmm kernels"]
    save(tmp_path / "old.pth", state)
    assert load(tmp_path / "old.pth")["versions"]["torch"]


class Evil:
    def __reduce__(self):
        return (print, ("this code was executed",))


def test_code_in_a_file_is_refused_and_never_run(tmp_path, capsys, trained):
    state = torch.load(trained, weights_only=True)
    torch.save({**state, "best": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "pickle.pth"):
        with refuses(InvalidFile, "could run code", path=tmp_path / name):
            load(tmp_path / name)
    assert "executed" not in capsys.readouterr().out


def test_other_files_are_told_apart(tmp_path, trained):
    content = trained.read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("weights")
    for name in ("cut.pth", "empty.pth", "text.pth"):
        with refuses(InvalidFile, path=tmp_path / name, expected="pmm train") as refusal:
            load(tmp_path / name)
        assert refusal.value.problem.startswith(("truncated", "refused"))
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "other.pth")
    with refuses(InvalidFile, "state_dict, epoch", path=tmp_path / "other.pth", expected="pmm train"):
        load(tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with refuses(InvalidFile, "holds: list", path=tmp_path / "list.pth"):
        load(tmp_path / "list.pth")
    torch.save({"format": "pmm-checkpoint-9"}, tmp_path / "new.pth")
    with refuses(InvalidFile, "pmm-checkpoint-9", path=tmp_path / "new.pth", expected=FORMAT, hint="train again"):
        load(tmp_path / "new.pth")
    torch.save({"format": FORMAT, "model": {}}, tmp_path / "part.pth")
    with refuses(InvalidFile, "incomplete", "ema, config, epoch", path=tmp_path / "part.pth", hint="train again"):
        load(tmp_path / "part.pth")
    with refuses(InvalidFile, "does not exist", path=tmp_path / "missing.pth", expected="pmm train"):
        load(tmp_path / "missing.pth")


def test_weights_must_fit_key_for_key(trained):
    state = load(trained)
    del state["model"]["stages.0.bn.weight"]
    with refuses(InvalidFile, "do not fit", "stages.0.bn.weight", path="ckpt.pth"):
        restore_model(state, "ckpt.pth")
    state = load(trained)
    state["config"]["model"]["colour"] = "red"
    with refuses(InvalidFile, "config.model.colour", "method, ", path="ckpt.pth"):
        restore_model(state, "ckpt.pth")


@pytest.fixture(scope="module")
def sound(trained):
    return load(trained)


VALUES = (None, True, 3, 0.5, "text", torch.zeros(2), [1], {}, {"x": None}, {"x": torch.zeros(2)}, {3: torch.zeros(2)})
PLACES = [
    *((key,) for key in KEYS), ("model", "stages.0.bn.weight"), ("model", "x"), ("model", 3), ("ema", "steps"),
    ("ema", "model"), ("ema", "model", "stages.0.bn.weight"), ("ema", "model", 3), ("config", "data"), ("config", 3),
    ("versions", "pmm"), ("versions", 3), ("crop_statistics", "mean"), ("crop_statistics", "crops"),
]  # fmt: skip


def replaced(content, value, key, *rest):
    return {**content, key: replaced(content[key], value, *rest) if rest else value}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_of_another_type_is_one_line_for_every_reader(sound, trained, place):
    """Or does no harm."""
    content = {**sound, "ema": {"steps": 1, "model": sound["model"]}} if place[0] == "ema" else sound
    for value in VALUES:
        with contextlib.suppress(InvalidFile):
            state = checked(replaced(content, value, *place), trained)
            init = _from_checkpoint(state, leaves_of(state), trained, "resnet10")
            assert init.config == restore_model(state, trained)[1]
            assert {type(version) for version in state["versions"].values()} <= {str}
            assert all(isinstance(state[key], kind) for key, kind in (("epoch", int), ("best", float)))
            statistics = statistics_of(state)
            assert statistics is None or statistics.crops > 0
            assert state["ema"] is None or type(state["ema"]["steps"] + 1) is int


def test_save_insists_on_every_key(tmp_path):
    with pytest.raises(ValueError, match="missing or unknown"):
        save(tmp_path / "x.pth", {"format": FORMAT})
    assert not (tmp_path / "x.pth").exists()
