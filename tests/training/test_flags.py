"""Where the defaults of a run come from, and what a run may go on with."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from pmm.commands.train import main
from pmm.presets import preset
from pmm.training.flags import TrainCommand, TrainOptions, parse, saved_config
from pmm.utils.arguments import arguments
from pmm.utils.errors import ConflictingOptions, InvalidFile, InvalidValue, UsageError
from pmm.utils.help_text import by_group
from tests.refusals import refuses


@pytest.fixture
def run(tmp_path):
    """Call it with fields of the sections: the config.json of a run in tmp_path."""

    def write(**sections):
        base = preset("tiny")
        changed = {name: dataclasses.replace(getattr(base, name), **fields) for name, fields in sections.items()}
        (tmp_path / "config.json").write_text(json.dumps(dataclasses.replace(base, **changed).to_dict()))
        return tmp_path / "config.json"

    return write


def from_file(path, *flags):
    return parse(["--config", str(path), *flags]).config


def test_a_file_has_the_defaults_and_flags_win(run, tmp_path, monkeypatch):
    monkeypatch.delenv("PMM_FAST", raising=False)
    (tmp_path / "people").mkdir()
    data = {"dataset": "synthetic", "root": str(tmp_path / "people")}
    path = run(data=data, model={"k": 2, "num_classes": 99}, recipe={"epochs": 300, "lr": 0.5, "compile": True})
    config = from_file(path, "--lr", "0.25", "--seed", "3")
    assert (config.recipe.epochs, config.recipe.lr, config.recipe.compile, config.seed) == (300, 0.25, True, 3)
    assert not from_file(path, "--no-compile").recipe.compile
    assert (config.model.k, config.data.root, config.preset) == (2, str(tmp_path / "people"), "tiny")
    assert config.model.num_classes == 0  # the data say how many
    assert from_file(path, "--epochs", "7").recipe.epochs == 7


def test_fewer_epochs_than_those_of_a_frozen_backbone(run, monkeypatch):
    """PMM_FAST=1 shortens both; who gives --epochs is told of it."""
    monkeypatch.delenv("PMM_FAST", raising=False)
    for frozen, fast in ((10, 2), (1, 1), (30, 3)):
        path = run(recipe={"epochs": 30, "freeze_backbone": frozen})
        with monkeypatch.context() as patch:
            patch.setenv("PMM_FAST", "1")
            recipe = from_file(path).recipe
            assert (recipe.epochs, recipe.freeze_backbone) == (3, fast)
    with refuses(UsageError, "--freeze-backbone 30", "--epochs 5"):
        from_file(path, "--epochs", "5")
    with refuses(InvalidValue, "30 epochs", name="--epochs", value=5):
        parse(["--resume", "--out", str(path.parent), "--epochs", "5"])


def test_the_precision_of_a_file_is_not_taken(run, monkeypatch, capsys):
    """It is what "auto" meant on the machine of that run."""
    path = run(recipe={"amp": "bf16"})
    assert from_file(path).recipe.amp == "auto"
    assert from_file(path, "--amp", "fp16").recipe.amp == "fp16"
    monkeypatch.setattr("pmm.commands.train.train", lambda *args: None)
    for flags in ((), ("--amp", "off")):
        monkeypatch.setattr("sys.argv", ["pmm train", "--config", str(path), *flags])
        main("pmm train")
        assert ("--amp" in capsys.readouterr().err) is not bool(flags)


def test_of_what_a_run_starts_from_the_given_flag_wins(run, tmp_path):
    weights = tmp_path / "w.pth"
    weights.touch()

    def found(path, *flags):
        model = from_file(path, *flags).model
        return model.weights, model.init

    imagenet = run(data={"dataset": "market1501"}, model={"weights": "imagenet"})
    assert found(imagenet) == ("imagenet", "")
    assert found(imagenet, "--init", str(weights)) == ("auto", str(weights))
    assert found(imagenet, "--init", str(weights), "--weights", "none") == ("none", str(weights))
    assert found(imagenet, "--backbone", "resnet50-ibn-a") == ("auto", "")  # which has none
    assert found(imagenet, "--backbone", "resnet10") == ("imagenet", "")
    from_weights = run(data={"dataset": "market1501"}, model={"weights": "none", "init": str(weights)})
    assert found(from_weights) == ("none", str(weights))
    assert found(from_weights, "--weights", "imagenet") == ("imagenet", "")
    assert found(from_weights, "--init=") == ("auto", "")


def test_the_data_of_a_file_are_found_or_drawn_again(run, tmp_path):
    (tmp_path / "runs" / "people").mkdir(parents=True)
    path = run(data={"dataset": "market1501", "root": "runs/people"}, model={"weights": "none"})
    assert from_file(path).data.root == str(tmp_path / "runs" / "people")  # relative to where the run was trained
    other = from_file(path, "--dataset", "dukemtmc-reid")
    assert (other.data.root, other.model.weights) == ("", "auto")  # not those of other people
    assert from_file(path, "--dataset", "market1501").model.weights == "none"
    gone = run(data={"dataset": "synthetic", "root": str(tmp_path / "gone"), "synthetic_ids": 30})
    assert (from_file(gone).data.root, from_file(gone).data.synthetic_ids) == ("", 30)
    assert from_file(gone, "--root", "elsewhere").data.root == "elsewhere"


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (None, "does not exist"),
        ("{", "Expecting"),
        ("[]", "table of fields"),
        (json.dumps({"recipe": {"epoks": 1}}), "config.recipe.epoks"),
        (json.dumps({"recipe": {"ema": 1.0}}), "config.recipe.ema is 1.0"),
        (json.dumps({"preset": "tinny"}), "did you mean tiny?"),
        ('{\n"recipe": {"ema', "line 2"),
        ("\udcff", "utf-8"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, fact):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content, errors="surrogateescape")
    with refuses(InvalidFile, fact, path=path, expected="the configuration of a run"):
        from_file(path)


def test_without_its_file_the_configuration_of_a_run_is_that_in_its_last_checkpoint(trained, tmp_path):
    shutil.copyfile(trained.parent / "last.pth", tmp_path / "last.pth")
    assert saved_config(tmp_path) == saved_config(trained.parent)
    (tmp_path / "last.pth").unlink()
    with refuses(InvalidFile, "config.json", "last.pth", path=tmp_path, hint="--out"):
        saved_config(tmp_path)


def test_a_file_goes_with_no_other_defaults(run):
    for flags in (("--preset", "paper"), ("--resume",)):
        with refuses(UsageError, "--config", flags[0], hint="see pmm train --help"):
            from_file(run(), *flags)


def test_weights_to_start_from_that_are_gone_are_refused_at_once(run, tmp_path):
    path = run(model={"init": str(tmp_path / "gone.pth")})
    with refuses(InvalidFile, path=tmp_path / "gone.pth", hint="--init"):
        from_file(path)
    (tmp_path / "here.pth").touch()
    assert from_file(path, "--init", str(tmp_path / "here.pth")).model.init == str(tmp_path / "here.pth")
    parse(["--resume", "--out", str(tmp_path)])  # a run that has begun needs them no more


def test_more_epochs_are_an_extension(run, tmp_path):
    run(recipe={"epochs": 10})
    resume = ["--resume", "--out", str(tmp_path)]
    longer = parse([*resume, "--extend", "--epochs", "15"])
    assert (longer.config.recipe.epochs, longer.options.extend) == (15, True)
    with refuses(ConflictingOptions, "recipe.epochs: 10 -> 15", options=("--resume",), hint="--extend"):
        parse([*resume, "--epochs", "15"])
    for flags in ((), ("--epochs", "10")):  # as when the command that extended it is repeated
        assert parse([*resume, "--extend", *flags]).config.recipe.epochs == 10
    for flags in ((), ("--extend",)):
        with refuses(InvalidValue, "at least the 10 epochs", name="--epochs", value=9):
            parse([*resume, *flags, "--epochs", "9"])
    with refuses(ConflictingOptions, "recipe.lr", options=("--resume",), hint="without these changes"):
        parse([*resume, "--extend", "--epochs", "15", "--lr", "9"])
    with refuses(UsageError, "--extend", "--resume"):
        parse(["--extend", "--epochs", "15"])
    with refuses(ConflictingOptions):
        TrainOptions(extend=True)


def test_a_backbone_that_was_frozen_in_all_epochs_stays_so_or_thaws_where_asked(run, tmp_path):
    def frozen(*flags):
        return parse(["--resume", "--extend", "--epochs", "20", "--out", str(tmp_path), *flags]).config.recipe

    run(recipe={"epochs": 10, "freeze_backbone": 10})
    assert frozen().freeze_backbone == frozen("--freeze-backbone", "20").freeze_backbone == 20
    assert frozen("--freeze-backbone", "10").freeze_backbone == 10
    with refuses(ConflictingOptions, "recipe.freeze_backbone: 10 -> 5"):  # in which it was frozen already
        frozen("--freeze-backbone", "5")
    run(recipe={"epochs": 20, "freeze_backbone": 20})
    assert frozen().freeze_backbone == 20
    run(recipe={"epochs": 10, "freeze_backbone": 3})
    assert frozen().freeze_backbone == 3
    with refuses(ConflictingOptions, "recipe.freeze_backbone: 3 -> 5"):
        frozen("--freeze-backbone", "5")


def test_what_the_weights_do_not_depend_on_may_change(run, tmp_path):
    run(recipe={"amp": "bf16"})
    resumed = parse(["--resume", "--out", str(tmp_path), "--amp", "auto", "--workers", "7", "--eval-every", "2"]).config
    assert (resumed.recipe.amp, resumed.data.workers, resumed.recipe.eval_every) == ("auto", 7, 2)
    with refuses(ConflictingOptions, "recipe.ema: 0.0 -> 0.9"):
        parse(["--resume", "--out", str(tmp_path), "--ema", "0.9"])


def test_a_preset_that_is_shortened_for_synthetic_people_says_so(run, monkeypatch, capsys):
    monkeypatch.delenv("PMM_FAST", raising=False)
    monkeypatch.setattr("pmm.commands.train.train", lambda *args: None)
    monkeypatch.setattr("pmm.training.flags._default_preset", lambda device: "paper")
    file = str(run(recipe={"epochs": 9}))

    def noted(*flags):
        monkeypatch.setattr("sys.argv", ["pmm train", *flags])
        main("pmm train")
        return capsys.readouterr().err

    assert all(fact in noted() for fact in ("note: 60 epochs", "paper has 400", "--epochs 400"))
    assert "strong has 120" in noted("--preset", "strong", "--dataset", "synthetic")
    assert "paper has 120" in noted("--preset", "paper", "--method", "aos")
    for flags in (
        ("--epochs", "400"),
        ("--epochs=50",),
        ("--preset", "tiny"),
        ("--method", "pcb-rpp"),  # 50 epochs
        ("--dataset", "market1501", "--root", "people"),
        ("--config", file, "--amp", "off"),
        ("--resume", "--out", str(Path(file).parent)),
    ):
        assert not noted(*flags), flags
    monkeypatch.setenv("PMM_FAST", "1")
    assert not noted()


def test_the_help_begins_with_what_is_chosen_first():
    flags = [argument.flag for argument in by_group(arguments(TrainCommand))["options"]]
    assert flags[:5] == ["--preset", "--dataset", "--root", "--method", "--out"]


def test_flags_that_cannot_be_or_change_nothing_are_refused():
    def refused(*flags, facts):
        with refuses(UsageError, *facts, hint="see pmm train --help"):
            parse(["--preset", "tiny", *flags])

    for ema in ("1", "1.5", "-0.1"):
        refused("--ema", ema, facts=("--ema is ", "between 0 and 1"))
    refused("--epochs", "9", "--freeze-backbone", "10", facts=("--freeze-backbone 10", "--epochs 9"))
    refused("--freeze-backbone", "-1", facts=("--freeze-backbone is -1",))
    refused("--backbone-lr", "0", facts=("--backbone-lr is 0.0", "positive"))
    frozen = ("--epochs", "9", "--freeze-backbone", "9")
    refused(*frozen, "--backbone-lr", "0.1", facts=("--backbone-lr would change nothing", "--freeze-backbone 9"))
    assert parse(["--preset", "tiny", *frozen]).config.recipe.freeze_backbone == 9
    refused("--eval-every", "-1", facts=("--eval-every is -1",))
