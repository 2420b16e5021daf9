import dataclasses

import pytest

import pmm.training.data_setup
from pmm.presets import preset
from pmm.training.data_setup import check_unchanged, has_imagenet_weights, resolve_config, training_data
from pmm.utils.errors import ConflictingOptions
from tests.refusals import refuses


def test_a_run_goes_on_where_its_data_were_moved_but_not_with_others(tmp_path, monkeypatch):
    def config(root):
        return dataclasses.replace(preset("tiny"), data=dataclasses.replace(preset("tiny").data, root=str(root)))

    run = tmp_path / "runs" / "first"
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    check_unchanged(run, config("data"), config(tmp_path / "data"))  # the same folder
    with refuses(ConflictingOptions, run, "data.root: data -> ", tmp_path / "other", options=("--resume",)):
        check_unchanged(run, config("data"), config(tmp_path / "other"))
    (tmp_path / "data").rename(tmp_path / "other")
    check_unchanged(run, config("data"), config(tmp_path / "other"))
    longer = dataclasses.replace(config("other"), recipe=dataclasses.replace(preset("tiny").recipe, epochs=9))
    with refuses(ConflictingOptions, run, "recipe.epochs: ", " -> 9", options=("--resume",)) as changed:
        check_unchanged(run, config("data"), longer)
    assert "data.root" not in str(changed.value)


def test_a_test_split_without_a_match_cannot_be_evaluated(small_config, monkeypatch):
    read = pmm.training.data_setup.read_dataset
    wanted = dataclasses.replace(small_config, recipe=dataclasses.replace(small_config.recipe, eval_every=1))
    training_data(wanted)
    for query in ((), None):  # none at all, and those of the gallery's own camera

        def other(name, root, query=query):
            whole = read(name, root)
            return dataclasses.replace(
                whole, query=whole.gallery[:1] if query is None else query, gallery=whole.gallery[:1]
            )

        monkeypatch.setattr(pmm.training.data_setup, "read_dataset", other)
        facts = ("--eval-every 1", small_config.data.root, "no test split")
        with refuses(ConflictingOptions, *facts, options=("--eval-every",)):
            training_data(wanted)
        training_data(small_config)


@pytest.mark.parametrize(
    ("dataset", "backbone", "init", "weights"),
    [
        ("market1501", "resnet50", "", "imagenet"),
        ("market1501", "resnet50", "mine.pth", "none"),
        ("synthetic", "resnet50", "", "none"),
        ("market1501", "resnet50-ibn-a", "", "none"),
        ("market1501", "resnet10", "", "none"),
    ],
)
def test_auto_is_imagenet_where_a_backbone_has_it(dataset, backbone, init, weights):
    base = preset("paper")
    config = dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, dataset=dataset, root="data"),
        model=dataclasses.replace(base.model, backbone=backbone, init=init),
    )
    assert resolve_config(config).model.weights == weights


def test_timm_says_whether_it_has_weights(monkeypatch):
    asked = []
    monkeypatch.setattr("pmm.models.timm_network.has_imagenet_weights", lambda name: asked.append(name) or True)
    assert has_imagenet_weights("timm:resnet18")
    assert asked == ["resnet18"]
