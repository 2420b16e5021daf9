"""Evaluations while a model trains: what is kept in memory, and what is read again."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pmm.training.validation
from pmm.data.preprocessing import preprocessing_of
from pmm.data.readers import read_dataset
from pmm.models.registry import build_model
from pmm.training.distributed import Processes
from pmm.training.validation import Evaluations, Validation
from pmm.utils.errors import InvalidFile, UserError
from tests.refusals import refuses

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(small_config):
    return dataclasses.replace(
        small_config,
        data=dataclasses.replace(small_config.data, height=64, width=32),
        model=dataclasses.replace(small_config.model, num_classes=12),
    )


@pytest.fixture(scope="module")
def split(people):
    whole = read_dataset("synthetic", people)
    return dataclasses.replace(whole, train=(), query=whole.query[:12], gallery=whole.gallery[::4])


def evaluated(config, split):
    torch.manual_seed(0)
    validation, model = Validation(split, preprocessing_of(config)), build_model(config)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    result = validation.evaluate(model, CPU)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    return validation, result


def test_crops_that_are_read_again_have_the_embeddings_of_those_in_memory(config, split, monkeypatch):
    kept, expected = evaluated(config, split)
    assert kept.crops.nbytes == (len(split.query) + len(split.gallery)) * 64 * 32 * 3
    monkeypatch.setattr(pmm.training.validation, "IN_MEMORY", kept.crops.nbytes - 1)
    streamed, found = evaluated(config, split)
    assert streamed.crops is None
    assert found.per_query_ap.tolist() == expected.per_query_ap.tolist()
    assert found.mAP == expected.mAP


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_a_crop_that_cannot_be_read_is_named_before_training(config, split, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(pmm.training.validation, "IN_MEMORY", limit)
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    bad = split.gallery[0]._replace(path=tmp_path / "bad.jpg")
    with refuses(InvalidFile, path=tmp_path / "bad.jpg"):
        Validation(dataclasses.replace(split, gallery=(*split.gallery, bad)), preprocessing_of(config))
    (tmp_path / "worse.jpg").touch()
    more = dataclasses.replace(split, gallery=(bad, *split.gallery, bad._replace(path=tmp_path / "worse.jpg")))
    with refuses(InvalidFile, "2 images", "bad.jpg", "worse.jpg", hint="--skip-bad-images"):
        Validation(more, preprocessing_of(config))


def test_embeddings_that_are_not_finite_are_named(config, split):
    model = build_model(config)
    with torch.no_grad():
        model.stages[0].reduction.bias.fill_(float("nan"))
    validation = Validation(split, preprocessing_of(config), name="test")
    with refuses(UserError, "test crops", "NaN", hint="--lr"):
        validation.evaluate(model, CPU)


def test_a_test_split_that_is_gone_is_met_by_all_processes_together(config, split, tmp_path, monkeypatch):
    """Each would print the error otherwise."""
    met = []

    def run_on_all(self, action):
        try:
            return action()
        except UserError as error:
            met.append(error.path)
            raise SystemExit(1) from error

    monkeypatch.setattr(Processes, "run_on_all", run_on_all)
    gone = dataclasses.replace(config.data, root=str(tmp_path / "gone"))
    recipe = dataclasses.replace(config.recipe, eval_every=1)
    with pytest.raises(SystemExit):
        Evaluations(dataclasses.replace(config, data=gone, recipe=recipe), split)
    assert met == [tmp_path / "gone"]


def test_what_is_evaluated_when(config, split, monkeypatch):
    monkeypatch.setattr(Validation, "evaluate", lambda self, model, device: SimpleNamespace(mAP=0.2, rank1=0.4))
    recipe = dataclasses.replace(config.recipe, epochs=5, val_every=2, eval_every=3)
    evaluations = Evaluations(dataclasses.replace(config, recipe=recipe), split)
    found = [evaluations.after(epoch, None, CPU) for epoch in range(1, 6)]
    held_out, test = ({f"{name}_mAP": 0.2, f"{name}_rank1": 0.4} for name in ("val", "test"))
    assert found == [{}, held_out, test, held_out, held_out | test]
    assert evaluations.chooses
    assert not Evaluations(config, dataclasses.replace(split, query=(), gallery=())).chooses
