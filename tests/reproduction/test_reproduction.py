"""`pmm reproduce`: rows of the paper's tables beside its figures, on any number of GPUs, going on after anything.

Most runs are planted (`tests/ablation/planted_runs.py`), and in the process of the test; the last test trains.
"""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pmm.ablation import runs, study
from pmm.ablation.runs import AblationRun, RunOutcome, figures
from pmm.models.registry import METHODS
from pmm.presets import preset
from pmm.reproduction import study as reproduction
from pmm.reproduction.figures import PAPER_ROWS
from pmm.reproduction.report import make_report, markdown
from pmm.reproduction.study import NOT_YET, Reproduction, ReproductionOptions
from pmm.utils import hardware
from pmm.utils.errors import BackendUnavailable, ConflictingOptions, InvalidValue
from pmm.utils.hardware import Gpu
from tests.ablation.planted_runs import RunHere
from tests.conftest import ROOT, assert_one_line_error, run_here
from tests.refusals import refuses
from tests.utils.test_task_runner import alive

SCRIPT, PLANTED = "bench/reproduce.py", ROOT / "tests" / "ablation" / "planted_runs.py"
SOURCES = functools.cache(study._sources)  # they may be worked on meanwhile
config_of = functools.cache(study.config_of)
H200 = Gpu("NVIDIA H200", "9.0")


def options(**values):
    return ReproductionOptions(**{"root": "people", "preset": "tiny", "rows": "pmm", **values})


@pytest.fixture
def gpus(monkeypatch):
    """Plants so many GPUs."""

    def plant(count):
        for module in (hardware, reproduction):
            monkeypatch.setattr(module, "nvidia_gpus", lambda: (H200,) * count)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    plant(0)
    return plant


@pytest.fixture
def planted(people, tmp_path, monkeypatch, gpus):
    """Call it with words of the command line; what is planned is in `.plan`, the calls of the last one in `.calls`."""
    plan = tmp_path / "plan.json"
    for name in ("TRAIN", "EVALUATE"):
        monkeypatch.setattr(study, name, ("python", str(PLANTED), str(plan), name.lower()))
    monkeypatch.setattr(study, "usable_cores", lambda: 8)
    monkeypatch.setattr(study, "config_of", lambda row, shared: config_of(row, tuple(shared)))
    monkeypatch.setattr(study, "_sources", SOURCES)
    monkeypatch.setattr(runs, "POLL_S", 0.0)
    monkeypatch.setattr(runs, "start_group", RunHere)
    monkeypatch.setattr(runs, "end_group", lambda run: None)
    monkeypatch.setattr(study.Ablation, "check_models", lambda self: None)

    def command(*words):
        plan.write_text(json.dumps(command.plan))
        plan.with_suffix(".calls").write_text("")
        words = (*words, "--root", people, "--out", tmp_path / "out")
        done = run_here(SCRIPT, "--preset", "tiny", *words, PMM_FAST="0")
        command.calls = [json.loads(line) for line in plan.with_suffix(".calls").read_text().splitlines()]
        return done

    command.plan = {
        "bdb-0": {"mAP": 0.8, "rank1": 0.9},
        "bdb-1": {"mAP": 0.82, "rank1": 0.92},
        "baseline-0": {"mAP": 0.7},
        "baseline-1": {"mAP": 0.72},
        "aos-dropout=0.6-epochs=120-0": {"mAP": 0.7, "rank1": 0.86, "truncated": 0.01},
        "aos-dropout=0.6-epochs=120-1": {"mAP": 0.71, "rank1": 0.87, "truncated": 0.01},
    }
    command.out = tmp_path / "out"
    return command


def table(planted):
    return (planted.out / "table.md").read_text()


def report(planted):
    return json.loads((planted.out / "table.json").read_text())


# --- the figures


def test_the_rows_are_methods_and_the_figures_those_of_the_docs():
    assert set(PAPER_ROWS) <= set(METHODS)
    text = (ROOT / "docs/methods.md").read_text()
    for method, row in PAPER_ROWS.items():
        (line,) = re.findall(rf"^\| `--method {method}` .*$", text, re.M)
        shown = re.findall(r"(\d\d\.\d) / (\d\d\.\d)|(?<=\| )-(?= \|)", line)
        columns = [row.figures.get(name) for name in ("cuhk03-np-detected", "dukemtmc-reid", "market1501")]
        assert shown == [("", "") if column is None else tuple(map(str, column)) for column in columns]


@pytest.mark.parametrize("method", PAPER_ROWS)
def test_each_row_has_its_own_recipe(method, gpus):
    gpus(1)
    found = Reproduction(options(rows=method, preset="paper"))
    (row,) = found.rows.values()
    (config,) = found.configs.values()
    assert row.method == config.model.method == method
    assert config.recipe == preset("paper", method).recipe
    assert config.model.dropout == (0.6 if method == "aos" else 0.5)
    assert config.data.dataset == "market1501"
    (duke,) = Reproduction(options(rows=method, preset="paper", dataset="dukemtmc-reid")).configs.values()
    assert duke.model.dropout == 0.5


def test_all_rows_are_the_default(gpus):
    found = Reproduction(options(rows=""))
    assert [row.method for row in found.rows.values()] == list(PAPER_ROWS)
    assert len({row.folder for row in found.rows.values()}) == len(PAPER_ROWS)


# --- the machine


def test_a_run_at_a_time_on_each_gpu(gpus, monkeypatch):
    monkeypatch.setattr(study, "usable_cores", lambda: 16)

    def visible(**values):
        return [slot["CUDA_VISIBLE_DEVICES"] for slot in Reproduction(options(preset="paper", **values)).slots()]

    gpus(3)
    assert visible() == ["0", "1", "2"]
    assert visible(devices="cuda:2,cuda:0") == ["2", "0"]
    assert visible(devices="cuda,cuda:0") == ["0"], "one GPU, named twice"
    assert visible(devices="cuda:1", jobs=2) == ["1", "1"]
    assert Reproduction(options(devices="cuda:1", jobs=2)).slots()[0]["OMP_NUM_THREADS"] == "8"
    assert Reproduction(options()).options.device == "cuda", "the same command line, whichever GPU it goes on with"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
    assert visible(devices="cuda:1") == ["GPU-b"]
    on_cpu = Reproduction(options(devices="cpu", jobs=2))
    assert on_cpu.slots() == [{"OMP_NUM_THREADS": "8"}] * 2
    assert on_cpu.options.device == "cpu"
    gpus(0)
    assert Reproduction(options()).devices == ["cpu"]


def test_batches_are_cut_to_what_fits_a_card(gpus):
    gpus(1)

    def parts(method, most):
        (config,) = Reproduction(options(rows=method, preset="paper", images_per_pass=most)).configs.values()
        return config.recipe.accumulate

    assert [parts("pmm", most) for most in (0, 128, 127, 64, 63, 40, 8)] == [1, 1, 2, 2, 4, 4, 16]
    assert [parts("pcb", most) for most in (64, 60, 32)] == [1, 2, 2], "batches of 64"
    assert [parts("aos", most) for most in (64, 31)] == [1, 2], "batches of 32"
    assert list(Reproduction(options(preset="paper", images_per_pass=64)).rows) == ["pmm:accumulate=2"]


@pytest.mark.parametrize(
    ("values", "kind", "facts"),
    [
        ({"rows": "pmm,mixup"}, InvalidValue, ["--rows is 'mixup'", "baseline, bdb"]),
        ({"rows": ","}, InvalidValue, ["--rows"]),
        ({"again": "bdb"}, InvalidValue, ["--again is 'bdb'", "expected pmm"]),
        ({"root": ""}, ConflictingOptions, ["--dataset market1501", "--root DIR"]),
        ({"preset": "huge"}, InvalidValue, ["'huge'", "paper"]),
        ({"preset": "paper"}, BackendUnavailable, ["days", "--devices cpu", "--preset tiny"]),
        ({"devices": "cuda:1"}, BackendUnavailable, ["no NVIDIA GPU"]),
        ({"devices": "gpu0"}, InvalidValue, ["--devices is 'gpu0'", "cuda:0,cuda:1"]),
        ({"devices": "cpu,cuda:0"}, InvalidValue, ["--devices is 'cpu,cuda:0'"]),
        ({"images_per_pass": 3}, InvalidValue, ["--images-per-pass is 3", "at least 8", "pmm"]),
        ({"seeds": 0}, InvalidValue, ["seeds is 0"]),
        ({"jobs": 0}, InvalidValue, ["jobs is 0"]),
        ({"images_per_pass": -1}, InvalidValue, ["images_per_pass is -1"]),
    ],
)
def test_a_mistake_is_refused_before_anything_is_done(values, kind, facts, gpus):
    with refuses(kind, *facts):
        Reproduction(options(**values))


def test_a_gpu_that_is_not_there_is_told(gpus):
    gpus(2)
    with refuses(BackendUnavailable, "no GPU 2", "2 visible"):
        Reproduction(options(devices="cuda:0,cuda:2"))


def test_data_sets_that_are_not_there_are_told_in_a_line(tmp_path):
    words = ("--preset", "tiny", "--devices", "cpu", "--out", tmp_path / "out")
    done = run_here(SCRIPT, *words, "--dataset", "market", "--root", tmp_path)
    assert_one_line_error(done, "market1501", "cuhk03-np-labeled")
    done = run_here(SCRIPT, *words, "--dataset", "dukemtmc-reid", "--root", tmp_path / "nothing")
    assert_one_line_error(done, str(tmp_path / "nothing"))
    done = run_here(SCRIPT, *words, "--root", tmp_path)
    assert_one_line_error(done, str(tmp_path), "bounding_box_train")
    assert not (tmp_path / "out").exists()


# --- the report


def test_from_runs_to_a_table(planted):
    done = planted("--rows", "baseline,bdb,aos", "--seeds", "2")
    assert (done.returncode, done.stderr) == (0, "")
    calls = [(name, action, "--ap" in words) for name, action, _, _, words in planted.calls]
    assert [action for _, action, _ in calls] == ["train", "evaluate", "evaluate"] * 6
    rows = {row["name"]: row for row in report(planted)["rows"]}
    assert list(rows) == ["baseline", "bdb", "aos"]
    bdb = rows["bdb"]["metrics"]
    assert bdb["rank1"]["reported"] == 0.94
    assert bdb["rank1"]["spread"]["mean"] == pytest.approx(0.91)
    # 90 and 92 less 94: mean -3, sd sqrt(2), reach 12.7062 * sqrt(2) / sqrt(2)
    assert bdb["rank1"]["difference"]["per_seed"] == pytest.approx([-0.04, -0.02])
    assert bdb["rank1"]["difference"]["interval"] == pytest.approx([-0.157062, 0.097062])
    assert bdb["mAP"]["spread"]["mean"] == pytest.approx(0.81)
    assert bdb["truncated50"]["spread"]["mean"] == pytest.approx(0.76)
    assert bdb["truncated50"]["difference"]["mean"] == pytest.approx(0.76 - 0.849)
    assert rows["baseline"]["paper"] is rows["baseline"]["metrics"]["mAP"]["difference"] is None
    assert report(planted)["schema"] == "pmm-reproduction-1"
    assert {run["status"] for run in report(planted)["runs"]} == {"finished"}

    text = table(planted)
    assert text in done.stdout
    assert (
        "| bdb | BDB, Table 1 | 2 | 91.0 | 1.41 | 94.0 | -3.00 (-15.71 to +9.71) | no significant difference |" in text
    )
    assert "| bdb | BDB, Table 1 | 2 | 81.0 | 1.41 | 84.9 | -3.90 (-16.61 to +8.81) |" in text
    assert "| bdb | BDB, Table 1 | 2 | 76.0 | 1.41 | 84.9 | -8.90 (-21.61 to +3.81) |" in text
    assert "| baseline | - | 2 | 71.0 | 1.41 | - |  | not in the paper's tables |" in text
    assert "aos: the paper's row mixes protocols" in text
    assert "aos: 86.5 / 70.4 elsewhere (single query" in text
    assert "ours minus these: 0.00 (-6.35 to +6.35) / +0.10 (-6.25 to +6.45)." in text
    assert "--ap truncated50" in text
    assert "these people are synthetic**, drawn with seed 7" in text
    assert "preset tiny** is not the paper's recipe" in text
    assert "One seed" not in text
    assert f"{ROOT}/" not in (planted.out / "table.json").read_text()


def test_one_seed_has_no_interval_and_says_so(planted):
    planted("--rows", "bdb")
    assert "| -4.00 | one seed: no interval |" in table(planted)
    assert "**One seed: no interval.**" in table(planted)


def test_columns_without_a_figure_of_the_paper(planted):
    planted("--rows", "bdb", "--dataset", "cuhk03-np-labeled")
    assert "| bdb | BDB, Table 1 | 1 | 90.0 |  | - |  | no figure in the paper |" in table(planted)
    assert "Without a figure of the paper on cuhk03-np-labeled: bdb." in table(planted)


def test_other_epochs_than_the_recipe_has_are_told(people, gpus):
    found = Reproduction(options(preset="paper", devices="cpu", epochs=3, root=str(people)))
    text = markdown(make_report(found, found.outcomes({}), "pmm reproduce"))
    assert "pmm had 3 epochs**, and its recipe has 400" in text


def test_cut_batches_are_told(planted):
    planted.plan["bdb-accumulate=2-0"] = {"mAP": 0.8}
    planted("--rows", "bdb", "--images-per-pass", "16")
    assert "bdb: each batch of 32 in 2 parts of 16" in table(planted)


def test_a_table_of_runs_that_are_not_all_there(people, gpus, tmp_path):
    found = Reproduction(options(rows="bdb,baseline", root=str(people), out=tmp_path))
    run = found.all_runs[0]
    ended = {run.name: RunOutcome(run=run, figures=None, note="exit code 1: it was planned")}
    values = make_report(found, found.outcomes(ended), "pmm reproduce")
    assert [run["status"] for run in values["runs"]] == ["failed", "waiting"]
    text = markdown(values)
    assert "- bdb, seed 0: failed: exit code 1: it was planned" in text
    assert f"- baseline, seed 0: {NOT_YET}" in text
    assert f"| bdb | BDB, Table 1 | 0 |  |  | 94.0 |  | {NOT_YET} |" in text


# --- going on


def test_a_failure_stops_no_other_row_and_the_next_call_does_the_rest(planted, monkeypatch):
    planted.plan["bdb-0"]["fail"] = "evaluate"
    done = planted("--rows", "bdb,baseline")
    assert_one_line_error(done, "1 of 2 runs failed: bdb, seed 0", "the same command")
    assert [run["status"] for run in report(planted)["runs"]] == ["failed", "finished"]
    planted.plan["bdb-0"]["fail"] = ""
    assert planted("--rows", "bdb,baseline").returncode == 0
    assert next(call[:3] for call in planted.calls) == ["bdb-0", "train", True]
    assert {call[0] for call in planted.calls} == {"bdb-0"}
    (planted.out / "tiny" / "bdb-0" / "evaluation-truncated50.json").write_text("{")  # as if killed while it wrote
    assert planted("--rows", "bdb,baseline").returncode == 0
    assert {call[0] for call in planted.calls} == {"bdb-0"}
    monkeypatch.setattr(study, "usable_cores", lambda: 2)
    planted("--rows", "bdb,baseline", "--jobs", "2", "--seeds", "2")
    assert {call[0] for call in planted.calls} == {"bdb-1", "baseline-1"}, "on another machine"


def test_a_table_is_written_after_each_run(planted, monkeypatch):
    seen = []
    ended = runs._Job.advance

    def advance(job):
        seen.append((planted.out / "table.md").exists() and table(planted).count(NOT_YET))
        return ended(job)

    monkeypatch.setattr(runs._Job, "advance", advance)
    planted("--rows", "bdb,baseline", "--seeds", "2")
    assert seen[0] is False
    assert seen[-1] == 1, "the last run"


def test_a_folder_of_another_configuration_is_refused(planted, people, tmp_path):
    planted("--rows", "bdb")
    before = (planted.out / "table.json").read_bytes()
    done = planted("--rows", "bdb,baseline", "--epochs", "7")
    assert_one_line_error(done, "config.recipe.epochs was 60, is 7", "--again all", "--out")
    done = planted("--rows", "bdb", "--dataset", "dukemtmc-reid")
    assert_one_line_error(done, "config.data.dataset was market1501, is dukemtmc-reid")
    assert (planted.calls, (planted.out / "table.json").read_bytes()) == ([], before)
    assert planted("--rows", "bdb", "--epochs", "7", "--again", "bdb").returncode == 0
    assert next(call[:3] for call in planted.calls) == ["bdb-0", "train", False]


def test_a_process_that_a_killed_call_left_behind_is_ended_before_its_run_goes_on(tmp_path):
    code = (
        "import pathlib, signal, sys, time; home = pathlib.Path(sys.argv[1]); saved = home / 'last.pth'\n"
        "signal.signal(signal.SIGTERM, lambda *_: (saved.write_text('saved'), sys.exit()))\n"
        "print('trains', flush=True); time.sleep(60)"
    )
    folder = tmp_path / "r-0"
    folder.mkdir()
    command = [sys.executable, "-c", code, str(folder)]
    orphan = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert orphan.stdout.readline() == "trains\n"
    (folder / "stamp.json").write_text("{}")
    (folder / "pid").write_text(f"{orphan.pid}\n")
    goes_on = ("python", "-c", "import sys; print(sys.argv[1:])")
    run = AblationRun(row="r", seed=0, folder=folder, train=goes_on, evaluate=("python", "-c", ""), facts={})
    runs.run_all([run], root=ROOT)
    assert orphan.wait() == 0, "not killed"
    assert (folder / "last.pth").read_text() == "saved"
    assert "['--resume']" in (folder / "log.txt").read_text()


def test_another_process_of_that_number_is_left_alone(tmp_path):
    folder = tmp_path / "r-0"
    folder.mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    with subprocess.Popen(["cat"], start_new_session=True, **pipes) as other:
        other.stdin.write(b"here\n")
        assert other.stdout.readline() == b"here\n"  # until it runs, its command line may be empty
        (folder / "pid").write_text(f"{other.pid}\n")
        run = AblationRun(row="r", seed=0, folder=folder, train=("false",), evaluate=(), facts={})
        runs.run_all([run], root=ROOT)
        assert alive(other.pid)
        other.kill()


def is_pending(process, number):
    """Whether a process that is stopped has been sent that signal."""
    status = Path(f"/proc/{process}/status").read_text()
    return bool(int(re.search(r"^ShdPnd:\s*(\w+)", status, re.MULTILINE)[1], 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize("compared", [False, pytest.param(True, marks=pytest.mark.full)])
def test_killed_in_the_middle_it_goes_on_and_gives_the_same_table(people, tmp_path, compared):
    """Two rows, trained: the call is killed while it trains the second, whose process goes on alone until the next.
    `compared`: with a call that was not killed."""
    words = ["--preset", "tiny", "--devices", "cpu", "--rows", "baseline,pmm", "--epochs", "40", "--root", str(people)]
    env = {**os.environ, "PMM_FAST": "0", "OMP_NUM_THREADS": "1"}
    out = tmp_path / "killed"
    driver = (
        f"import runpy, sys; from pmm.ablation import study; study._sources = lambda: {SOURCES()!r}\n"
        f"sys.argv = sys.argv[1:]; runpy.run_path({SCRIPT!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", driver, SCRIPT, *words, "--out", str(out)]
    call = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    metrics, deadline = out / "tiny" / "pmm-0" / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert call.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    call.send_signal(signal.SIGKILL)
    call.communicate()
    orphan = int((metrics.parent / "pid").read_text())
    os.kill(orphan, signal.SIGSTOP)  # or it might end before the next call finds it
    assert alive(orphan)
    text = (out / "table.md").read_text()
    assert text.count(NOT_YET) == 4, "pmm, in three tables and a note"

    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as call:
        while not is_pending(orphan, signal.SIGTERM):
            assert call.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(orphan, signal.SIGCONT)
        printed, _ = call.communicate()
    assert call.returncode == 0, printed
    assert not alive(orphan)
    assert "1 of 2 are finished" in printed
    assert "stopped by SIGTERM" in (metrics.parent / "log.txt").read_text()

    def found(folder):
        values = json.loads((folder / "table.json").read_text())
        assert all(run["status"] == "finished" for run in values["runs"])
        return {row["name"]: row["metrics"] for row in values["rows"]}

    assert list(found(out)) == ["baseline", "pmm"]
    pmm = found(out)["pmm"]
    assert pmm["mAP"]["reported"] == pmm["truncated50"]["reported"] == 0.852
    assert 0 < pmm["truncated50"]["spread"]["mean"] < pmm["mAP"]["spread"]["mean"] < 1
    assert (out / "table.md").read_text() in printed
    assert figures_of(out / "tiny" / "pmm-0").epochs == 40
    if compared:
        whole = run_here(SCRIPT, *words, "--rows", "pmm", "--out", tmp_path / "whole", PMM_FAST="0")
        assert whole.returncode == 0, whole.stderr
        assert found(tmp_path / "whole")["pmm"] == pmm


def figures_of(folder):
    return figures(AblationRun(row="", seed=0, folder=folder, train=(), evaluate=(), facts={}))
