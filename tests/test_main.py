"""`pmm` itself: it lists its commands, hands the rest of the line to one, and refuses what is none."""

import importlib
import subprocess
import sys

import pytest

import pmm
from pmm.__main__ import COMMANDS, GROUPS
from tests.conftest import ROOT, run_here, run_python


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_it_lists_every_command(words):
    done = run_here("-m", "pmm", *words)
    assert done.returncode == 0
    parts = [part.splitlines() for part in done.stdout.split("\n\n")[1:-1]]
    assert {heading: [line[6:].split("  ")[0] for line in lines] for heading, *lines in parts} == {
        heading: list(commands) for heading, commands in GROUPS.items()
    }
    assert set(COMMANDS) == {name for commands in GROUPS.values() for name in commands}
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_help_of_a_group_lists_that_alone():
    shown = run_here("-m", "pmm", "export", "--help").stdout
    listed = [name for name in COMMANDS if f"pmm {name} " in shown]
    assert listed == [name for name in COMMANDS if name.startswith("export ")]


def test_help_may_come_first():
    assert run_here("-m", "pmm", "help", "export", "onnx").stdout.startswith("usage: pmm export onnx ")


def test_a_reader_that_has_gone_and_a_full_disk_are_no_bugs():
    for sink, said in ((">/dev/full", "pmm: error: "), ("| head -c 1", "")):
        done = subprocess.run(["sh", "-c", f"{sys.executable} -m pmm {sink}"], capture_output=True, text=True)
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith(said)


def test_its_version():
    assert run_here("-m", "pmm", "--version").stdout == f"{pmm.__version__}\n"


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (("evalute", "x.pth"), ("'evalute'", "pmm evaluate?")),
        (("nothing",), ("'nothing'", "train, evaluate")),
        (("export",), ("export needs a subcommand", "onnx, trt, aoti, triton")),
        (("export", "onxn", "x.pth"), ("'export onxn'", "pmm export onnx?")),
        (("export", "engine"), ("'export engine'", "export onnx, export trt, export aoti, export triton")),
        (("BENCH",), ("pmm bench?",)),
        (("--jobs", "3"), ("'--jobs'",)),
    ],
)
def test_what_is_no_command_is_one_line(words, facts):
    done = run_here("-m", "pmm", *words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("pmm: error: ")
    assert all(fact in line for fact in facts), line


def test_a_script_of_a_clone_runs_the_package_of_the_clone(tmp_path):
    (tmp_path / "pmm").mkdir()
    (tmp_path / "pmm" / "__init__.py").write_text("raise ImportError('another pmm')")
    done = run_python(ROOT / "export" / "to_onnx.py", "--help", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.stdout.startswith("usage: to_onnx.py CKPT"), done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_each_is_there_and_says_who_it_is(name):
    module, _ = COMMANDS[name]
    assert f"\npmm {name} " in importlib.import_module(f"pmm.commands.{module}").__doc__
    done = run_here("-m", "pmm", *name.split(), "--no-such-flag")
    assert done.returncode == 2
    assert done.stderr.startswith(f"pmm {name}: error: unknown flag --no-such-flag")
