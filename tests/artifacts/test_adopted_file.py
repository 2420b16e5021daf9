"""The file of an adopted network: what it keeps, and that one of unknown origin is read without running its code."""

import contextlib
import os
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pmm.adoption.adopt import adopt
from pmm.artifacts.checkpoint import load
from pmm.artifacts.trained_model import dataset_of, load_model, read_model
from pmm.data.measure_crops import dataset_statistics
from pmm.utils.errors import InvalidFile
from tests.conftest import examples
from tests.refusals import refuses


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("adopted") / "model.pth"
    module = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    adopt(module, path, height=32, width=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1), colour="bgr")
    return path


@pytest.fixture(scope="module")
def content(file):
    return torch.load(file, weights_only=True)


def test_what_deployment_needs_comes_back(file):
    trained = read_model(file)
    assert (trained.path, trained.method, trained.epoch) == (file, "adopted", None)
    assert (trained.preprocessing.mean, trained.preprocessing.std) == ((0.3, 0.4, 0.5), (0.1, 0.2, 0.2))
    assert trained.source["module"] == "Sequential"
    assert trained.data == dataset_of(file) == ("", "")
    assert load_model(file).embedding_dim == 8
    assert trained.crop_statistics is None  # nobody said which crops
    with refuses(InvalidFile, "adopted", path=file):
        load(file)  # as training does


def test_it_keeps_the_statistics_of_the_data_set_that_was_named(people, tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    adopt(module, tmp_path / "model.pth", height=32, width=16, dataset="market1501", root=str(people))
    trained = read_model(tmp_path / "model.pth")
    assert trained.crop_statistics == dataset_statistics("market1501", str(people), trained.preprocessing)
    assert trained.crop_statistics.crops > 1


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"graph": 3}, "graph"),
        ({"crop_statistics": {"mean": [1, 2, 3]}}, "std"),
        ({"crop_statistics": 3}, "table"),
        ({"graph": "{}"}, "not a network"),
        ({"weights": {"0.weight": 3}}, "weights"),
        ({"weights": {}}, "get_attr"),
        ({"preprocessing": {}}, "height"),
        ({"preprocessing": {"height": 1 << 40}}, "elements"),
        ({"normalised": 1}, "normalised"),
        ({"data": {}}, "root"),
        ({"data": {"dataset": 3, "root": ""}}, "data"),
        ({"source": {"factory": [1]}}, "source"),
        ({"versions": None}, "versions"),
        ({"format": "pmm-checkpoint-adopted-2"}, "pmm-checkpoint-adopted-2"),
    ],
)
def test_a_changed_file_is_refused_by_what_is_wrong(content, change, fact, tmp_path):
    changed = {**content, **change}
    if isinstance(change.get("preprocessing"), dict) and change["preprocessing"]:
        changed["preprocessing"] = {**content["preprocessing"], **change["preprocessing"]}
    torch.save(changed, tmp_path / "changed.pth")
    with refuses(InvalidFile, fact, path=tmp_path / "changed.pth"):
        read_model(tmp_path / "changed.pth")


@examples(60)
@given(st.data())
def test_no_content_crashes_a_reader(content, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "drawn.pth"
    key = data.draw(st.sampled_from([key for key in content if key != "format"]))
    plain = st.none() | st.integers() | st.text(max_size=5)
    value = data.draw(
        plain
        | st.binary(max_size=5)
        | st.dictionaries(st.text(max_size=5) | st.integers(), plain, max_size=3)
        | st.sampled_from([{k: torch.zeros(2) for k in content["weights"]}, content["weights"], content])
    )
    torch.save({**content, key: value}, path)
    for read in (read_model, dataset_of):
        with contextlib.suppress(InvalidFile):
            read(path)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("never",)


def test_code_in_the_file_is_not_run(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "harmful.pth"
    torch.save({**content, "source": Harmful()}, path)
    with refuses(InvalidFile, path=path):
        read_model(path)
    path.write_bytes(pickle.dumps(Harmful()))
    with refuses(InvalidFile, path=path):
        read_model(path)
    assert not (tmp_path / "never").exists()
