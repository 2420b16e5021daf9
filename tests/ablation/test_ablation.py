"""The ablation: rows, pairing, going on after an interruption or a failure, and what the report says of it.

Most runs are planted (`planted_runs.py`), and in the process of the test; the last test trains.
"""

import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from pmm.ablation import plot, runs, study
from pmm.ablation import report as reporting
from pmm.ablation.rows import Row, parse_row, resolve_against, rows_by_name, rows_of
from pmm.ablation.runs import AblationRun, figures, run_all
from pmm.ablation.study import Ablation, AblationOptions
from pmm.data.synthetic.dataset import draw_dataset
from pmm.models.registry import METHODS, build_model, phases_of
from pmm.presets import preset
from pmm.training.flags import parse
from pmm.utils import hardware
from pmm.utils.errors import BackendUnavailable, ConflictingOptions, InvalidValue, UsageError
from pmm.utils.files import claimed, make_folder
from pmm.utils.hardware import Gpu
from tests.ablation.planted_runs import RunHere
from tests.conftest import ROOT, assert_one_line_error, run_here
from tests.refusals import refuses
from tests.utils.test_task_runner import alive

SCRIPT, PLANTED = "bench/ablation.py", ROOT / "tests" / "ablation" / "planted_runs.py"
SOURCES = functools.cache(study._sources)  # they may be worked on meanwhile
config_of = functools.cache(study.config_of)
PLANTED_MAP = {  # of five seeds each
    "bdb": (0.6, 0.63, 0.66, 0.69, 0.72),
    "pmm": (0.7, 0.731, 0.762, 0.79, 0.82),
    "pmm-k=0": (0.65, 0.68, 0.63, 0.74, 0.77),
}


# --- rows


def test_rows_are_written_as_they_are_read():
    assert parse_row("pmm", "tiny") == Row("tiny", "pmm")
    assert parse_row("paper/a-cutmix", "tiny") == Row("paper", "a-cutmix")
    row = parse_row("pmm:k=0:block=2x1:batch_size=16", "tiny")
    assert row.settings == (("k", "0"), ("block", "2x1"), ("batch-size", "16"))
    assert (row.short, row.full) == ("pmm:k=0:block=2x1:batch-size=16", "tiny/pmm:k=0:block=2x1:batch-size=16")
    assert row.folder == "tiny/pmm-k=0-block=2x1-batch-size=16"
    config = parse(row.words()).config
    assert (config.model.k, config.model.block, config.recipe.batch_size, config.preset) == (0, (2, 1), 16, "tiny")


@pytest.mark.parametrize("text", ["", "pmm:", "pmm:k", "pmm:k=", "a/b/c", "/pmm", "tiny/", "pmm k=0", "pmm:k=0:"])
def test_what_is_no_row_is_refused(text):
    with refuses(InvalidValue, "[PRESET/]METHOD", name="--methods", value=text):
        parse_row(text, "tiny")


def test_rows_of_several_presets_carry_them_in_their_names():
    assert list(rows_by_name(rows_of(["pmm", "pmm:k=0"], ["tiny"]))) == ["pmm", "pmm:k=0"]
    names = rows_by_name(rows_of(["pmm", "bdb"], ["tiny", "paper"]))
    assert list(names) == ["tiny/pmm", "paper/pmm", "tiny/bdb", "paper/bdb"]
    assert list(rows_by_name(rows_of(["pmm", "paper/pmm"], ["tiny"]))) == ["tiny/pmm", "paper/pmm"]
    assert resolve_against("", names) == "tiny/pmm"
    assert resolve_against("paper/bdb", names) == "paper/bdb"
    assert resolve_against("", rows_by_name(rows_of(["pmm", "baseline"], ["tiny"]))) == "baseline"
    assert resolve_against("tiny/pmm", rows_by_name(rows_of(["bdb", "pmm"], ["tiny"]))) == "pmm"


@pytest.mark.parametrize(
    ("options", "kind", "facts"),
    [
        ({"methods": "pmm:kk=0"}, UsageError, ["row 'tiny/pmm:kk=0'", "--kk"]),
        ({"methods": "pmm:k=many"}, UsageError, ["row 'tiny/pmm:k=many'", "many"]),
        ({"methods": "pmm:lr=-1"}, UsageError, ["row 'tiny/pmm:lr=-1'", "--lr is -1.0"]),
        ({"methods": "pmm:seed=1"}, InvalidValue, ["--methods is 'pmm:seed=1'", "without seed"]),
        ({"methods": "huge/pmm"}, InvalidValue, ["'huge'", "paper, tiny"]),
        ({"compare_presets": "tiny,huge"}, InvalidValue, ["'huge'", "paper, tiny"]),
        (
            {"compare_presets": "tiny,paper", "methods": "tiny/pmm"},
            ConflictingOptions,
            ["row 'tiny/pmm'", "--methods", "--compare-presets"],
        ),
        ({"compare_presets": "tiny,paper", "preset": "paper"}, ConflictingOptions, ["--preset", "--compare-presets"]),
        ({"methods": ""}, InvalidValue, ["--methods is ''"]),
        ({"methods": "pmm,tiny/pmm"}, InvalidValue, ["--methods is 'pmm,tiny/pmm'", "tiny/pmm is in it twice"]),
        ({"against": "bdb"}, InvalidValue, ["--against is 'bdb'; expected pmm"]),
        ({"again": "bdb"}, InvalidValue, ["--again is 'bdb'; expected pmm"]),
        ({"seeds": 0}, InvalidValue, ["seeds is 0"]),
        ({"jobs": 0}, InvalidValue, ["jobs is 0"]),
        ({"epochs": -1}, InvalidValue, ["epochs is -1"]),
        ({"first_seed": -1}, InvalidValue, ["first_seed is -1"]),
    ],
)
def test_a_mistake_is_refused_before_anything_is_done(options, kind, facts):
    with refuses(kind, *facts):
        Ablation(AblationOptions(**{"methods": "pmm", **options}))


def test_a_method_that_is_not_there_is_told_before_people_are_drawn(tmp_path):
    words = ("--root", tmp_path / "people", "--runs", tmp_path / "runs", "--out", tmp_path / "a.json")
    done = run_here(SCRIPT, "--methods", "pmm,mixup", *words)
    assert_one_line_error(done, "row 'tiny/mixup'", "--method is 'mixup'", "pmm, ")
    done = run_here(SCRIPT, "--methods", "pmm:k=33", *words)
    assert_one_line_error(done, "row 'tiny/pmm:k=33'", "--k is 33")
    assert not (tmp_path / "people").exists()
    assert not (tmp_path / "a.json").exists()


def test_one_seed_starts_every_method_with_the_same_trunk():
    trunks = []
    for method in METHODS:
        torch.manual_seed(3)
        config = parse(["--preset", "tiny", "--method", method]).config
        config = replace(config, model=replace(config.model, num_classes=5))
        trunks.append(build_model(config).backbone.state_dict())
    for trunk in trunks[1:]:  # of cama it has more layers
        assert all(torch.equal(value, trunk[key]) for key, value in trunks[0].items())


def test_a_method_that_trains_twice_has_the_epochs_of_the_others_for_each(monkeypatch):
    monkeypatch.delenv("PMM_FAST", raising=False)

    def epochs(*rows, **options):
        found = Ablation(AblationOptions(methods=",".join(rows), **options))
        assert [row.method for row in found.rows.values()] == [row.split(":")[0] for row in rows]
        return [config.recipe.epochs for config in found.configs.values()]

    assert epochs("pmm", "pcb-rpp", "aos") == [60, 60, 120]
    assert epochs("pmm", "aos", epochs=7) == [7, 14]
    assert epochs("pmm", "aos:epochs=50", epochs=7) == [7, 50]
    found = Ablation(AblationOptions(methods="aos", again="aos"))
    assert found.rows["aos"].words()[-2:] == ["--epochs", "120"]
    assert [phase.recipe.epochs for phase in phases_of(found.configs["aos"])] == [60, 60]
    assert epochs("pmm", "aos", preset="paper", dataset="market1501", root="people") == [400, 120], "its own recipe"
    assert epochs("pmm", "aos", preset="paper", epochs=7) == [7, 14]
    monkeypatch.setenv("PMM_FAST", "1")
    assert epochs("pmm", "aos") == [3, 6]


# --- planted runs


@pytest.fixture
def planted(people, tmp_path, monkeypatch):
    """Call it with words of the command line; what is planned is in `.plan`, the calls of the last one in `.calls`.

    Unless `processes` or `plots` are asked for, runs are done in this process, without a try to build their models, and
    no plot is drawn.
    """
    plan = tmp_path / "plan.json"
    for name in ("TRAIN", "EVALUATE"):
        monkeypatch.setattr(study, name, ("python", str(PLANTED), str(plan), name.lower()))
    monkeypatch.setattr(study, "usable_cores", lambda: 8)
    monkeypatch.setattr(study, "config_of", lambda row, shared: config_of(row, tuple(shared)))

    monkeypatch.setattr(study, "_sources", SOURCES)

    def command(*words, processes=False, plots=False):
        plan.write_text(json.dumps(command.plan))
        plan.with_suffix(".calls").write_text("")
        shared = ("--root", people, "--runs", tmp_path / "runs", "--out", command.out)
        with monkeypatch.context() as patch:
            patch.setattr(runs, "POLL_S", 0.01 if processes else 0.0)
            if not processes:
                patch.setattr(runs, "start_group", RunHere)
                patch.setattr(runs, "end_group", lambda run: None)
                patch.setattr(Ablation, "check_models", lambda self: None)
            if not plots:
                patch.setattr(plot, "plot", lambda *args: None)
            done = run_here(SCRIPT, *shared, *(words or ("--methods", "bdb,pmm,pmm:k=0", "--seeds", "3")), PMM_FAST="0")
        command.calls = [json.loads(line) for line in plan.with_suffix(".calls").read_text().splitlines()]
        return done

    command.plan = {f"{name}-{s}": {"mAP": mAP} for name, row in PLANTED_MAP.items() for s, mAP in enumerate(row)}
    command.out = tmp_path / "out" / "found.json"
    command.runs = tmp_path / "runs" / "tiny"
    return command


def report(planted):
    return json.loads(planted.out.read_text())


def test_from_runs_to_a_report(planted, people):
    done = planted(processes=True)
    assert (done.returncode, done.stderr) == (0, "")
    found = report(planted)
    assert found["schema"] == "pmm-ablation-1"
    order = [(call[0], call[1]) for call in planted.calls]
    names = [f"{name}-{seed}" for seed in range(3) for name in ("bdb", "pmm", "pmm-k=0")]
    assert order == [(name, action) for name in names for action in ("train", "evaluate")], "seed by seed"
    assert {call[3] for call in planted.calls} == {"8"}

    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["bdb", "pmm", "pmm:k=0"]
    assert found["against"] == "bdb"
    assert rows["bdb"]["metrics"]["mAP"]["difference"] is None
    expected = [planted.plan[f"pmm-{seed}"]["mAP"] - planted.plan[f"bdb-{seed}"]["mAP"] for seed in range(3)]
    difference = rows["pmm"]["metrics"]["mAP"]["difference"]
    assert difference["per_seed"] == pytest.approx(expected)
    assert difference["reading"] == "higher"
    assert rows["pmm:k=0"]["settings"] == {"k": "0"}
    assert (rows["pmm:k=0"]["config"]["model"]["k"], rows["pmm"]["config"]["model"]["k"]) == (0, 3)
    assert rows["pmm"]["metrics"]["rank1"]["difference"]["reading"] == "no significant difference"
    assert rows["pmm"]["costs"]["train_s"]["mean"] == 3
    assert rows["pmm"]["costs"]["images_per_s"]["mean"] == pytest.approx(200), "not the mean of 100 and 400"

    for run in found["runs"]:
        name = run["row"].replace(":", "-")
        assert run["mAP"] == planted.plan[f"{name}-{run['seed']}"]["mAP"]
        train, evaluate = map(shlex.split, run["commands"])
        assert train[train.index("--seed") + 1] == str(run["seed"])
        assert evaluate[evaluate.index("--threads") + 1] == "8"
    assert found["data"]["drawn"]["seed"] == 7
    assert (found["data"]["train_identities"], found["data"]["queries"]) == (12, 72)
    assert found["environment"]["commit"]
    assert found["environment"]["threads"] == 8
    assert found["command"].startswith("pmm ablation --root")
    assert f"{ROOT}/" not in planted.out.read_text()

    assert "drawn with seed 7" in done.stdout
    assert "pmm:k=0, seed 2  mAP" in done.stdout
    assert "the last" in done.stdout
    said = "bdb, seed 0  mAP 60.0 %  rank-1 50.0 %  mINP 10.0 %  trained 3 s at 200 images/s  8 left, 0:0"
    assert said in done.stdout


def test_the_table_and_the_plot(planted):
    done = planted(plots=True)
    table = planted.out.with_suffix(".md").read_text()
    assert table in done.stdout
    assert "| mAP, % | runs | mean | sd | min to max | minus bdb, points (95 % interval) | verdict |" in table
    assert "| bdb | 3 | 63.0 | 3.00 | 60.0 to 66.0 |  | the reference |" in table
    # differences 10, 10.1 and 10.2 points: mean 10.1, sd 0.1, reach 4.3027 * 0.1 / sqrt(3)
    assert "| pmm | 3 | 73.1 | 3.10 | 70.0 to 76.2 | +10.10 (+9.85 to +10.35) | higher |" in table
    # differences 5, 5 and -3 points: sd 4.6188
    assert "| +2.33 (-9.14 to +13.81) | no significant difference |" in table
    assert "| pmm | 3 | 50.0 | 0.00 | 50.0 to 50.0 | 0.00 | no significant difference |" in table
    assert "| pmm:k=0 | 3.00 | 0 | 200 | 0 |" in table
    assert '"no significant difference", which does not mean' in table
    assert "drawn with seed 7: 72 queries, 180 gallery crops of 12 identities" in table
    with Image.open(planted.out.with_suffix(".png")) as image:
        assert image.format == "PNG"
        assert image.width > 1000
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert (0x17, 0xA0, 0x77) in colours, "higher"
    assert (0xCF, 0x4A, 0x3C) not in colours, "nothing is lower"


def test_another_row_to_compare_with_needs_no_run_again(planted):
    planted()
    done = planted("--methods", "bdb,pmm,pmm:k=0", "--seeds", "3", "--against", "pmm")
    assert (done.returncode, planted.calls) == (0, [])
    assert "9 of 9 are finished" in done.stdout
    rows = {row["name"]: row["metrics"]["mAP"] for row in report(planted)["rows"]}
    assert rows["pmm"]["difference"] is None
    assert rows["bdb"]["difference"]["reading"] == "lower"


def test_more_seeds_and_rows_run_only_what_is_new(planted):
    planted("--methods", "bdb,pmm", "--seeds", "1")
    assert report(planted)["rows"][1]["metrics"]["mAP"]["difference"]["reading"] == "one seed: no interval"
    assert "| one seed: no interval |" in planted.out.with_suffix(".md").read_text()
    planted("--methods", "bdb,pmm,pmm:k=0", "--seeds", "2")
    assert {call[0] for call in planted.calls} == {"pmm-k=0-0", "bdb-1", "pmm-1", "pmm-k=0-1"}
    planted("--methods", "pmm", "--first-seed", "1", "--seeds", "2")
    assert {call[0] for call in planted.calls} == {"pmm-2"}
    assert report(planted)["seeds"] == [1, 2]


def test_after_a_failure_the_others_go_on_and_the_next_call_tries_again(planted):
    planted.plan["pmm-1"]["fail"] = "evaluate"
    planted.plan["bdb-0"]["fail"] = "train"
    done = planted()
    assert_one_line_error(done, "2 of 9 runs failed: bdb, seed 0; pmm, seed 1; ", "the same command")
    assert done.returncode == 1
    line = next(line for line in done.stdout.splitlines() if line.startswith("pmm, seed 1"))
    assert "failed: exit code 1: planted.evaluate: error: it was planned; " in line
    assert "pmm-1/log.txt" in line
    found = report(planted)
    assert [(run["row"], run["seed"]) for run in found["runs"] if run["status"] == "failed"] == [("bdb", 0), ("pmm", 1)]
    rows = {row["name"]: row["metrics"]["mAP"] for row in found["rows"]}
    assert rows["pmm"]["difference"]["seeds"] == [2]
    assert rows["pmm:k=0"]["difference"]["seeds"] == [1, 2]
    assert rows["pmm"]["spread"]["n"] == 2
    table = planted.out.with_suffix(".md").read_text()
    assert "(2 of 3 pairs)" in table
    assert "one seed: no interval (1 of 3 pairs)" in table
    assert "- Failed: bdb, seed 0: exit code 1: planted.train: error: it was planned" in table

    planted.plan["pmm-1"]["fail"] = planted.plan["bdb-0"]["fail"] = ""
    assert planted().returncode == 0
    assert [call[:3] for call in planted.calls] == [
        ["bdb-0", "train", False],
        ["bdb-0", "evaluate", False],
        ["pmm-1", "train", True],
        ["pmm-1", "evaluate", False],
    ]
    assert all(run["status"] == "finished" for run in report(planted)["runs"])


def test_if_every_run_fails_there_is_still_a_report(planted):
    planted.plan = {"": {"fail": "train"}}
    assert_one_line_error(planted(plots=True), "9 of 9 runs failed")
    assert "no common seed" in planted.out.with_suffix(".md").read_text()
    assert not planted.out.with_suffix(".png").exists()


def test_a_picture_of_an_earlier_report_does_not_stay(planted):
    planted(plots=True)
    assert planted.out.with_suffix(".png").exists()
    planted("--methods", "pmm", "--seeds", "2", plots=True)
    assert not planted.out.with_suffix(".png").exists()


def test_a_run_that_ends_well_and_writes_nothing_has_failed(planted):
    planted.plan["pmm-0"] = {"mAP": float("nan")}
    assert_one_line_error(planted(), "1 of 9 runs failed: pmm, seed 0")
    assert "without an error or figures" in planted.out.with_suffix(".md").read_text()


@pytest.mark.parametrize("lost", ["evaluation.json", "metrics.jsonl", "stamp"])
def test_a_damaged_run_is_not_taken_for_finished(planted, lost):
    planted()
    if lost == "stamp":
        (planted.runs / "pmm-1" / "stamp.json").write_text("{")
        assert_one_line_error(planted(), "pmm-1: ", "no settings", "--again all", "--runs")
        assert planted.calls == []
        return
    (planted.runs / "pmm-1" / lost).write_text("[")
    assert planted().returncode == 0
    assert [call[:3] for call in planted.calls] == [["pmm-1", "train", True], ["pmm-1", "evaluate", False]]


def test_a_gpu_is_named_by_its_number(monkeypatch):
    with refuses(BackendUnavailable, "no NVIDIA GPU", "CUDA_VISIBLE_DEVICES"):
        Ablation(AblationOptions(device="cuda:1"))
    with refuses(InvalidValue, "'gpu'", "cuda:N"):
        Ablation(AblationOptions(device="gpu"))
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: (Gpu("A", "8.9"), Gpu("B", "8.9")))
    shared = Ablation(AblationOptions(device="cuda:1"))._shared("")
    assert shared[shared.index("--device") + 1] == "cuda:1"
    two = {"gpus": ["A", "B"]}
    assert [reporting._gpus(two, device) for device in ("cuda:1", "cuda", "auto")] == [["B"], ["A"], ["A", "B"]]


def test_a_run_that_was_made_otherwise_is_refused_and_kept(planted, monkeypatch, tmp_path):
    planted()
    before = (planted.runs / "pmm-0" / "stamp.json").read_bytes()
    others = ("--methods", "bdb,pmm,pmm:k=0", "--seeds", "3")
    assert_one_line_error(
        planted(*others, "--epochs", "7"),
        "bdb-0: ",
        "(and 8 more runs)",
        "config.recipe.epochs was 60, is 7",
        "--again all",
    )
    assert_one_line_error(planted(*others, "--jobs", "4"), "threads was 8, is 2")
    assert_one_line_error(planted(*others, "--device", "cpu"), "device was auto, is cpu")
    with monkeypatch.context() as patch:
        patch.setattr(study, "_sources", lambda: "f" * 64)
        assert_one_line_error(planted(), "sources was ", "is ffffffffffff")
    with monkeypatch.context() as patch:
        versions = {**study.describe_environment(), "threads": 8}
        patch.setattr(
            study, "describe_environment", lambda threads: {**versions, "versions": {"torch": "1.0", "onnx": "1"}}
        )
        assert_one_line_error(planted(), "versions.torch was ")
    draw_dataset(tmp_path / "others", ids=2, seed=8, workers=1)
    done = planted(*others, "--root", tmp_path / "others")
    assert_one_line_error(done, "crops was ", "config.data.synthetic_seed was 7, is 8")
    assert planted.calls == []
    assert (planted.runs / "pmm-0" / "stamp.json").read_bytes() == before

    done = planted(*others, "--epochs", "7", "--again", "pmm,bdb")
    assert_one_line_error(done, "pmm-k=0-0: ", "(and 2 more runs)", "--again all")
    assert (planted.runs / "pmm-0" / "stamp.json").read_bytes() == before, "refused, so nothing is lost"
    assert planted(*others, "--epochs", "7", "--again", "all").returncode == 0
    assert len(planted.calls) == 18
    assert not any(resumed for _, _, resumed, *_ in planted.calls)


def test_a_row_can_be_run_again(planted):
    planted()
    planted("--methods", "bdb,pmm,pmm:k=0", "--seeds", "3", "--again", "pmm:k=0")
    assert [call[:2] for call in planted.calls if call[1] == "train"] == [[f"pmm-k=0-{s}", "train"] for s in range(3)]


def test_the_sources_that_count(tmp_path, monkeypatch):
    for name in ("__init__.py", "train.py", "models/pmm.py", "ablation/study.py", "export/onnx.py"):
        (tmp_path / "pmm" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pmm" / name).write_text("1")
    monkeypatch.setattr(study, "__file__", str(tmp_path / "pmm" / "ablation" / "study.py"))
    first = study._sources()
    for name in ("ablation/study.py", "export/onnx.py"):
        (tmp_path / "pmm" / name).write_text("2")
        assert study._sources() == first
    for name in ("train.py", "models/pmm.py"):
        before = study._sources()
        (tmp_path / "pmm" / name).write_text("2")
        assert study._sources() != before


def test_presets_are_compared_over_seeds(planted):
    planted.plan = {f"pmm-{seed}": {"mAP": 0.5 + 0.01 * seed} for seed in range(2)}
    done = planted("--compare-presets", "tiny,paper", "--seeds", "2")
    assert done.returncode == 0, done.stderr
    found = report(planted)
    assert [row["name"] for row in found["rows"]] == ["tiny/pmm", "paper/pmm"]
    assert found["against"] == "tiny/pmm"
    assert [row["config"]["model"]["backbone"] for row in found["rows"]] == ["resnet10", "resnet50"]
    assert (planted.runs.parent / "paper" / "pmm-1" / "stamp.json").exists()
    assert "Presets tiny, paper, 60 epochs" in done.stdout


def test_runs_at_once_share_the_cores_and_say_the_same(planted):
    planted()
    one = report(planted)
    for run in planted.runs.iterdir():
        (run / "stamp.json").unlink()
    assert planted("--methods", "bdb,pmm,pmm:k=0", "--seeds", "3", "--jobs", "3", "--again", "all").returncode == 0
    assert {call[3] for call in planted.calls} == {"2"}
    three = report(planted)
    assert (three["jobs"], three["environment"]["threads"]) == (3, 2)
    for key in ("mAP", "row", "seed"):
        assert [run[key] for run in three["runs"]] == [run[key] for run in one["runs"]]


def test_as_many_at_once_as_asked_for_and_no_more(tmp_path, monkeypatch):
    code = (
        "import json, os, time; open(f'{os.getpid()}.on', 'w'); time.sleep(0.4)\n"
        "print(len([f for f in os.listdir() if f.endswith('.on')]), file=open('most', 'a'))\n"
        "os.remove(f'{os.getpid()}.on')"
    )
    words = {"train": ("python", "-c", code), "evaluate": ("python", "-c", "")}
    runs = [AblationRun(row="r", seed=seed, folder=tmp_path / str(seed), facts={}, **words) for seed in range(4)]
    monkeypatch.chdir(tmp_path)
    outcomes = run_all(runs, root=ROOT, slots=[{}, {}])
    assert all(outcome.figures is None for outcome in outcomes)
    assert max(map(int, (tmp_path / "most").read_text().split())) == 2


def test_a_process_that_is_killed_is_told(tmp_path):
    kill = ("python", "-c", "import os; print('so far', flush=True); os.kill(os.getpid(), 9)")
    run = AblationRun(row="r", seed=0, folder=tmp_path / "r-0", train=kill, evaluate=(), facts={"a": 1})
    (outcome,) = run_all([run], root=ROOT)
    assert outcome.note.startswith("ended by signal 9: so far; ")
    assert figures(run) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_children_and_the_same_command_goes_on(planted, people, tmp_path, number):
    planted.plan["pmm-0"]["hang"] = True
    (tmp_path / "plan.json").write_text(json.dumps(planted.plan))
    driver = (
        f"import sys; from pmm.ablation import study; plan = {str(tmp_path / 'plan.json')!r}\n"
        f"study.TRAIN = ('python', {str(PLANTED)!r}, plan, 'train')\n"
        f"study.EVALUATE = ('python', {str(PLANTED)!r}, plan, 'evaluate')\n"
        "study.usable_cores = lambda: 8; study.Ablation.check_models = lambda self: None\n"
        f"study._sources = lambda: {SOURCES()!r}\n"
        f"import runpy; sys.argv = sys.argv[1:]; runpy.run_path({SCRIPT!r}, run_name='__main__')"
    )
    words = ("--methods", "bdb,pmm,pmm:k=0", "--seeds", "1", "--jobs", "2")
    places = ("--root", people, "--runs", tmp_path / "runs", "--out", planted.out)
    process = subprocess.Popen(
        [sys.executable, "-c", driver, SCRIPT, *map(str, places), *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PMM_FAST": "0"},
        # a shell's job in the background, which these tests may be, ignores Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    pids = planted.runs / "pmm-0" / "pids"
    deadline = time.monotonic() + 100
    while not (pids.exists() and pids.read_text().count(" ") and figures_of(planted.runs / "pmm-k=0-0")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == "bench/ablation.py: interrupted; 2 of 3 are finished; the same command continues"
    for pid in map(int, pids.read_text().split()):
        for _ in range(100):
            if not alive(pid):
                break
            time.sleep(0.05)
        assert not alive(pid)
    assert not planted.out.exists()
    planted.plan["pmm-0"]["hang"] = False
    assert planted(*words).returncode == 0
    assert [call[:3] for call in planted.calls] == [["pmm-0", "train", True], ["pmm-0", "evaluate", False]]


def figures_of(folder):
    return figures(AblationRun(row="", seed=0, folder=folder, train=(), evaluate=(), facts={}))


def test_two_ablations_do_not_write_into_one_folder(planted, tmp_path):
    with claimed(tmp_path / "runs"):
        assert_one_line_error(planted(), str(tmp_path / "runs"), "another process")


def test_the_default_file_is_named_after_day_machine_and_what_is_compared(monkeypatch, tmp_path):
    machine = {"gpus": [], "cpu": "AMD EPYC", "cores": 2}
    monkeypatch.setattr(reporting, "describe_environment", lambda: machine)
    monkeypatch.delenv("PMM_FAST", raising=False)
    clone, elsewhere = make_folder(tmp_path / "clone"), make_folder(tmp_path / "elsewhere")
    make_folder(clone / "bench" / "results")
    monkeypatch.chdir(clone)

    def name(**options):
        found = reporting.default_out(Ablation(AblationOptions(**{"methods": "pmm,bdb", **options})))
        assert found.parent == Path("bench", "results")
        return re.sub(r"^\d{4}-\d\d-\d\d-", "", found.name)

    assert name() == "amd-epyc-2-cores-ablation.json"
    assert name(against="bdb") == "amd-epyc-2-cores-ablation-against-bdb.json"
    assert name(compare_presets="tiny,paper") == "amd-epyc-2-cores-ablation-tiny-paper.json"
    machine["gpus"] = ["NVIDIA H200"]
    assert name(preset="paper") == "nvidia-h200-ablation-paper.json"
    assert name(dataset="market1501", root="/data") == "nvidia-h200-ablation-market1501.json"
    first = reporting.default_out(Ablation(AblationOptions(methods="pmm,bdb", seeds=2)))
    first.write_text(json.dumps({"rows": [{"name": "pmm"}, {"name": "bdb"}], "seeds": [0, 1]}))
    more = reporting.default_out(Ablation(AblationOptions(methods="pmm,bdb,baseline", seeds=3)))
    assert more == first  # which goes on from it
    for other in ({"methods": "pmm,cutmix", "seeds": 2}, {"methods": "pmm,bdb", "seeds": 1}):
        assert reporting.default_out(Ablation(AblationOptions(**other))).name == f"{first.stem}-2.json"
    monkeypatch.chdir(elsewhere)
    assert reporting.default_out(Ablation(AblationOptions(runs=Path("runs")))).parent == Path("runs")
    monkeypatch.setenv("PMM_FAST", "1")
    fast = Ablation(AblationOptions(methods="pmm", runs=tmp_path))
    assert reporting.default_out(fast) == tmp_path / "ablation.json"
    assert (list(fast.seeds), fast.configs["pmm"].recipe.epochs) == ([0, 1], 3)


def test_the_default_rows_are_those_of_the_tables_and_no_mixing():
    found = Ablation(AblationOptions())
    tables = [
        "baseline",
        "bdb",
        "cutout-batch",
        "cutmix",
        "a-cutmix",
        "pmm:k=0",
        "pmm",
        "pcb",
        "pcb-rpp",
        "aos",
        "cama",
    ]
    assert list(found.rows) == tables
    assert found.against == "baseline"
    assert list(found.seeds) == [0, 1, 2, 3, 4]
    tested = {phases_of(config)[-1].epochs.stop - 1 for config in found.configs.values()}
    assert tested == {preset("tiny").recipe.epochs, 2 * preset("tiny").recipe.epochs}
    assert {config.recipe.sampler for config in found.configs.values()} == {"pk"}, "an epoch is as long for all"


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [[1], pytest.param([1, 2], marks=pytest.mark.full)])
def test_true_runs(tmp_path, seeds):
    """Two rows, trained; the people are drawn once; then nothing is left to do."""
    words = ["--methods", "pmm:k=0,pmm", "--against", "pmm:k=0", "--jobs", "2", "--synthetic-ids", "12"]
    words += ["--first-seed", "1", "--seeds", str(len(seeds))]
    places = ("--root", tmp_path / "people", "--runs", tmp_path / "runs", "--out", tmp_path / "found.json")
    done = run_here(SCRIPT, *words, *places, PMM_FAST="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("synthetic identities, seed 0") == 1
    found = json.loads((tmp_path / "found.json").read_text())
    rows = [(run["row"], run["seed"]) for run in found["runs"]]
    assert rows == [(row, seed) for seed in seeds for row in ("pmm:k=0", "pmm")]
    for run in found["runs"]:
        assert 0 < run["mAP"] < 1
        assert run["epochs"] == 3
        assert run["images_per_s"] > 0
        name = f"{run['row'].replace(':', '-')}-{run['seed']}"
        config = json.loads((tmp_path / "runs" / "tiny" / name / "config.json").read_text())
        assert config["seed"] == run["seed"]
        assert config["model"]["k"] == (0 if run["row"] == "pmm:k=0" else 3)
        assert config["data"]["root"] == str(tmp_path / "people")
    again = run_here(SCRIPT, *words, *places, PMM_FAST="1")
    assert again.returncode == 0, again.stderr
    assert f"{len(rows)} of {len(rows)} are finished" in again.stdout
    assert json.loads((tmp_path / "found.json").read_text())["runs"] == found["runs"]
    (tmp_path / "runs" / "tiny" / "pmm-1" / "evaluation.json").unlink()  # as if interrupted after the training
    assert run_here(SCRIPT, *words, *places, PMM_FAST="1").returncode == 0
    assert json.loads((tmp_path / "found.json").read_text())["runs"] == found["runs"]


def test_what_is_our_reading_of_a_paper_is_said_below_its_figures():
    def notes(*methods):
        rows = [{"name": method, "method": method} for method in methods]
        return list(reporting._notes({"rows": rows, "seeds": [0], "runs": []}))

    (note,) = notes("baseline", "cama", "cama")
    assert METHODS["cama"].note in note
    assert notes("baseline", "pcb", "a method of an older version") == []
