"""The README is kept true: its make targets exist, and its other commands and those of the pages that build on it run
as they stand."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.lab.pages.__main__ import with_results
from pmm.artifacts.artifact import manifest_path
from pmm.training.flags import parse
from tests.conftest import ROOT
from tests.forks import run_forked
from tests.readme import README, commands, is_too_large, on_fixtures, places, run_python

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


def test_it_is_one_page_and_has_the_newest_figures_of_the_demo():
    assert len(README.encode()) <= 8192
    assert with_results(README) == README


def test_the_snippets_run_as_they_stand(exported, people, tmp_path, monkeypatch):
    for file in (exported, manifest_path(exported)):
        shutil.copy(file, tmp_path / file.name.replace("model", "market-cpu"))
    for name, crop in zip("ab", (people / "query").iterdir(), strict=False):
        shutil.copy(crop, tmp_path / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    found = {}
    run_python(ROOT / "README.md", found)
    assert found["embeddings"].shape == (2, 384)


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
    for command, place in places().items():
        if command.startswith(("make ", "pip ")):
            continue
        if is_too_large(command):
            parse(shlex.split(re.split(r"pmm[. ]train", command, maxsplit=1)[1]))
            continue
        command = on_fixtures(command, people, tmp_path)
        if ran:
            program, *words = shlex.split(command)
            assert program in ("python", "pmm")
            words = words if program == "python" else ["-m", "pmm", *words]
            done = run_forked(words, copy, env, tmp_path / "log")
        else:
            done = subprocess.run(command, shell=True, cwd=copy, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{place}: {command}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 14
