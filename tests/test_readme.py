"""The README is kept true: its make targets exist, and its other commands run as they stand."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pmm.artifacts.artifact import manifest_path
from pmm.training.flags import parse
from tests.conftest import ROOT
from tests.forks import run_forked
from tests.readme import README, commands, is_too_large, on_fixtures

MAKEFILE = (ROOT / "Makefile").read_text()


def test_the_two_commands_come_first_and_their_targets_exist():
    shown = commands()
    assert shown[:2] == ["make demo", "make test"]
    for command in shown:
        if command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}:", MAKEFILE, re.MULTILINE), command


def test_the_three_user_commands_are_shown():
    for command in ("python -m pmm.train", "python export/to_trt.py", "python bench/run.py"):
        assert any(line.startswith(command) for line in commands())


def test_no_placeholder_is_left():
    assert not re.search(r"@[A-Z]+@|TODO|TBD", README)


def test_every_link_and_picture_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def bench_row(result):
    """A line of the demo's table, from a result of report.json."""
    cells = [result["name"], f"{100 * result['mAP']:.1f} %"]
    low, high = result["map_delta_interval"]
    reference = result["map_delta_interval"] == [0, 0] and result["min_cosine"] == 1
    change = f"{100 * result['map_delta']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})" if high > low else "0.00"
    cells.append("reference" if reference else change)
    cells.append("" if reference else f"{result['rank1_lost']} / {result['rank1_gained']}")
    flips = next(point["flips"] for point in result["thresholds"]["points"] if point["fpr"] == 0.001)
    cells.append("" if reference else str(flips))
    for timing in result["batches"]:
        cells.append(f"{timing['p50_ms']:.2f} / {timing['p95_ms']:.2f}")
        if timing["speedup"]:
            low, high = timing["speedup"]["interval"]
            cells.append(f"{timing['speedup']['value']:.1f}x ({low:.1f}-{high:.1f})")
        else:
            cells.append("1x")
    return f"| {' | '.join(cells)} |"


def test_the_figures_of_the_demo_are_those_of_the_result():
    report = json.loads((ROOT / "bench/results/2026-11-23-amd-epyc-2-cores-bench-demo.json").read_text())
    assert report["gates"]["failures"] == []
    ran = [result for result in report["results"] if result["status"] == "ok"]
    assert len(ran) == 7
    for result in ran:
        assert bench_row(result) in README
    assert f"commit {report['environment']['commit']} (" in README
    paper = json.loads((ROOT / "bench/results/2026-11-23-amd-epyc-2-cores-bench-paper.json").read_text())
    for result in paper["results"]:
        timing = next(timing for timing in result["batches"] if timing["batch"] == 8)
        assert timing["flags"] == []
        assert f"{timing['p50_ms']:.0f} ms" in README


def test_the_figures_of_the_mix_are_those_of_the_results():
    def result(name):
        return json.loads((ROOT / f"bench/results/2026-11-22-amd-epyc-2-cores-ops-{name}.json").read_text())

    mix, step = result("n32-fp32"), result("step")
    assert mix["equal"]
    assert step["equal"]
    names = {"authors": "the authors' procedure", "eager": "eager torch", "compiled": "`torch.compile` of it"}
    operations = [setting["ops"][op] for op in ("mix", "mix+pool") for setting in mix["settings"]]
    assert [setting["layout"] for setting in mix["settings"]] == ["nchw", "channels_last"]
    for name, words in {**names, "ours": "**ours**"}.items():
        cells = []
        for operation in operations:
            (ms,) = (row["both"]["p50_ms"] for row in operation["rows"] if row["name"] == name)
            ratios = [r["ratio"] for r in operation["ratios"] if (r["of"], r["phase"]) == (name, "both")]
            cells.append(f"{ms:.1f} ({ratios[0]:.1f}x)" if ratios else f"**{ms:.1f}**")
        assert f"| {words} | {' | '.join(cells)} |" in README
    shares = [
        f"{share['ratio']:.0%}".replace("%", " %")
        for operation in operations[:2]
        for share in operation["shares"]
        if share["name"] == "kernels"
    ]
    for share in shares:
        assert share in README
    for row in step["rows"]:
        assert f"{row['step']['p50_ms']:,.0f} ms" in README
    for ratio in step["ratios"]:
        if ratio["over"] == "no mixing":
            assert f"({ratio['ratio']:.2f}x)" in README
    for operation, words in zip(
        (setting["ops"][op] for op in ("mix", "mix+pool") for setting in result("n32-fp32-big-pages")["settings"]),
        ("{}x (mix, NCHW)", "{}x (mix, channels_last)", "{}x and", "and {}x (with the pool)"),
        strict=True,
    ):
        (ratio,) = (r["ratio"] for r in operation["ratios"] if (r["of"], r["phase"]) == ("eager", "both"))
        assert words.format(f"{ratio:.1f}") in README
    for report in (mix, step):
        assert report["environment"]["commit"] in README


def test_the_figures_of_evaluation_are_those_of_the_result():
    report = json.loads((ROOT / "bench/results/2026-11-28-amd-epyc-2-cores-ranking.json").read_text())
    assert f"commit {report['environment']['commit']} ([raw result]" in README
    trained, random = report["market"]["settings"]
    assert trained["off_by"] <= 1e-9 >= random["off_by"]
    product, evaluation = trained["rows"]
    low, high = evaluation["interval"]
    assert f"| `query @ gallery.T` alone | {product['ms']:,.0f} ms | |" in README
    assert f"| {evaluation['ms']:,.0f} ms, {evaluation['ratio']:.2f}x ({low:.2f}-{high:.2f}) | |" in README
    assert f"takes {random['rows'][1]['ratio']:.1f} times the product" in README
    for row in report["msmt17"]["rows"]:
        assert f"| {row['seconds']:.0f} s | {row['bytes_above'] / 1e9:.2f} GB |" in README


def test_the_figures_of_loading_are_those_of_the_result():
    report = json.loads((ROOT / "bench/results/2026-11-28-amd-epyc-2-cores-loading.json").read_text())
    assert f"commit {report['environment']['commit']} ([raw result](bench/results/2026-11-28-" in README
    for setting in report["settings"]:
        assert not setting["wrong"]
        rows = {row["name"]: row for row in setting["rows"]}
        cells = [f"{setting['height']}x{setting['width']} | {rows['bare PIL']['us_per_crop']:.0f} us"]
        for name in ("training loader", "iter_crops"):
            low, high = rows[name]["interval"]
            cells.append(f"{rows[name]['ratio']:.2f}x ({low:.2f}-{high:.2f})")
        kind = setting["files"].replace(" ", " of ", 1)
        assert re.search(rf"\| {kind} \([^|]+\) \| {re.escape(' | '.join(cells))} \|", README), cells


def test_the_snippets_run_as_they_stand(exported, people, tmp_path, monkeypatch):
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 2
    for file in (exported, manifest_path(exported)):
        shutil.copy(file, tmp_path / file.name.replace("model", "market-cpu"))
    for name, crop in zip("ab", (people / "query").iterdir(), strict=False):
        shutil.copy(crop, tmp_path / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    found = {}
    for snippet in snippets:
        exec(snippet, found)
    assert found["embeddings"].shape == (2, 384)
    assert torch.equal(found["pooled"], found["mixed"].amax((2, 3)))


@pytest.mark.slow
def test_every_other_command_runs_as_it_stands(tmp_path, people):
    """In a copy of the tracked files, one after another, as a newcomer would; a few people and epochs.

    The first in a shell; the others, each in a process of its own, need not load torch again.
    """
    copy = tmp_path / "copy"
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines():
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    if not (copy / "Makefile").exists():
        pytest.fail("the README's commands are run in a copy of a git checkout, and this is none")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PMM_FAST": "1", "PYTHONPATH": str(copy), "PATH": path}
    ran = 0
    for command in commands():
        if command.startswith(("make ", "pip ")):
            continue
        if is_too_large(command):
            parse(shlex.split(command.split("pmm.train", 1)[1]))
            continue
        command = on_fixtures(command, people)
        if ran:
            program, *words = shlex.split(command)
            assert program in ("python", "pmm")
            words = words if program == "python" else ["-m", "pmm", *words]
            done = run_forked(words, copy, env, tmp_path / "log")
        else:
            done = subprocess.run(command, shell=True, cwd=copy, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 14
