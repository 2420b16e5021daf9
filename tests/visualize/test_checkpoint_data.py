"""The data of a checkpoint's pictures: what it was trained on, the right face for a label, data that are missing."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.artifacts.checkpoint import load
from pmm.config import Config
from pmm.data.crops import load_crop
from pmm.data.preprocessing import Resize
from pmm.data.readers import read_dataset
from pmm.data.samples import Sample
from pmm.utils.errors import InvalidFile
from pmm.visualize.checkpoint_data import checkpoint_data, name_of, pick
from tests.refusals import refuses


@given(pids=st.lists(st.integers(0, 5), min_size=1, max_size=30), seed=st.integers(0, 99), data=st.data())
def test_no_identity_comes_again_before_each_has_come(pids, seed, data):
    samples = [Sample(Path(f"{i}.jpg"), pid, 0) for i, pid in enumerate(pids)]
    count = data.draw(st.integers(1, len(samples)))
    chosen = pick(samples, count, seed)
    assert len(chosen) == len(set(chosen)) == count
    different = len({sample.pid for sample in chosen})
    assert different == min(count, len(set(pids)))
    assert pick(samples, count, seed) == chosen
    assert pick(samples, len(samples), seed)[:count] == chosen


def test_another_seed_gives_other_crops():
    samples = [Sample(Path(f"{i}.jpg"), i, 0) for i in range(50)]
    assert pick(samples, 5, 0) != pick(samples, 5, 1)


@pytest.fixture(scope="module")
def config(trained):
    return Config.from_dict(load(trained)["config"])


def test_labels_are_those_of_training(config, trained, people):
    """The held-out identities have no label; label k is the k-th of the others in sorted order."""
    found = checkpoint_data(config, trained)
    assert found.dataset.query == read_dataset("synthetic", people).query
    assert len(found.labels) == config.model.num_classes == 9
    every = {sample.pid for sample in read_dataset("synthetic", people).train}
    assert len(every) == 12
    assert list(found.labels) == sorted(found.labels) == [pid for pid in sorted(every) if pid in found.labels]
    faces = found.faces(Resize(height=64, width=32), [8, 2, 2, 77])
    assert sorted(faces) == [2, 8]
    for label, face in faces.items():
        (pid,) = (pid for pid, number in found.labels.items() if number == label)
        assert found.names()[label] == f"person {pid}"
        of_person = [load_crop(sample.path, 64, 32) for sample in found.trained if sample.pid == pid]
        assert any(np.array_equal(face, crop) for crop in of_person)


def test_other_people_than_those_of_training_have_no_labels(config, trained):
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=8))
    found = checkpoint_data(other, trained)
    assert found.trained == ()
    assert "has 9 training identities, the checkpoint 8" in found.unknown
    all_held_out = dataclasses.replace(config, data=dataclasses.replace(config.data, val_identities=0.01))
    assert checkpoint_data(all_held_out, trained).trained == (), "other identities than in training were held out"


def moved(config, root):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, root=root))


def test_data_that_are_gone(config, trained, people, tmp_path):
    with refuses(InvalidFile, path=trained, problem="/nowhere/at/all", hint="--root DIR") as missing:
        checkpoint_data(moved(config, "/nowhere/at/all"), trained)
    assert "synthetic" in missing.value.hint
    assert "above the checkpoint" not in missing.value.problem
    with refuses(InvalidFile, "runs/none", path=trained, problem="above the checkpoint", hint="--root DIR"):
        checkpoint_data(moved(config, "runs/none"), trained)
    with refuses(InvalidFile, path=trained, problem="has no root", hint="--root DIR"):
        checkpoint_data(moved(config, ""), trained)
    with refuses(InvalidFile, path=tmp_path / "no", problem="folder"):
        checkpoint_data(config, trained, tmp_path / "no")
    with refuses(InvalidFile, path=tmp_path, problem="layout of synthetic"):
        checkpoint_data(config, trained, tmp_path)
    assert checkpoint_data(moved(config, "/nowhere"), trained, people).trained
    # as it was named in training, seen from the checkpoint
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "data").symlink_to(people)
    assert checkpoint_data(moved(config, "runs/data"), tmp_path / "runs" / "x" / "best.pth").trained


def test_a_crop_is_called_by_person_and_camera():
    assert name_of(Sample(Path("a"), 7, 0)) == "person 7, camera 1"
    assert name_of(Sample(Path("a"), 7, -1)) == "person 7"
