"""The list of planted faults fits the tree, and the runner calls dead what is dead, on a project of three lines."""

import json
import subprocess

import pytest

from tests.conftest import ROOT
from tests.mutants.__main__ import ListError, main, verdict
from tests.mutants.copies import Copy, Outcome, state_of
from tests.mutants.planted import AREAS, mistakes, nearest, read_faults
from tests.mutants.results import HANG, KILLED, OPEN

FAULTS = read_faults()


def test_every_fault_can_be_planted_and_names_killers_that_exist():
    assert list(mistakes(FAULTS, ROOT)) == []


def test_the_list_is_long_and_in_every_area():
    assert len(FAULTS) >= 80
    assert {fault.area for fault in FAULTS} == set(AREAS)
    assert len({fault.id for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        assert fault.id.startswith(f"{fault.area}-")
        assert fault.why.endswith(".")
        assert "\n" not in fault.why


@pytest.mark.parametrize(
    ("code", "expected"), [(0, OPEN), (1, KILLED), (2, KILLED), (-11, KILLED), (None, HANG), (3, ""), (4, ""), (5, "")]
)
def test_what_an_exit_code_says(code, expected):
    outcome = Outcome(code, 1.0, "", "no tests ran")
    if expected:
        assert verdict(FAULTS[0], outcome) == expected
    else:
        with pytest.raises(ListError, match=f"{FAULTS[0].id}: pytest ended with {code}: no tests ran"):
            verdict(FAULTS[0], outcome)


SOURCE = (
    "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\ndef both():\n    return 1 + 1, 1 + 1\n"
)
TESTS = {
    "test_add.py": "import calc\n\n\ndef test_add():\n    assert calc.add(2, 3) == 5\n",
    "test_sub.py": "import calc\n\n\ndef test_sub():\n    assert calc.sub(2, 3) == -1\n",
}
ENTRIES = {
    "calc-dead": ("return a + b", "return a * b", "test_add.py::test_add"),
    "calc-not-even-imported": ("def add(a, b):", "def add(a, b)", "test_add.py"),
    "calc-hangs": ("return a + b", "while True:\n        pass", "test_add.py"),
    "calc-dies-in-the-tier": ("return a - b", "return b - a", "test_add.py"),
    "calc-lives": ("return 1 + 1, 1 + 1", "return 2, 2", "test_sub.py::test_sub"),
}


@pytest.fixture
def project(tmp_path):
    """A repository of one module and its tests, and lists for it."""
    tree = tmp_path / "tree"
    for name, text in {
        "calc.py": SOURCE,
        "tests/__init__.py": "",
        **{f"tests/{n}": t for n, t in TESTS.items()},
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    subprocess.run(["git", "-C", str(tree), "init", "-q"], check=True)
    subprocess.run(["git", "-C", str(tree), "add", "."], check=True)
    (tree / "untracked.py").write_text("")

    def lists(**entries):
        folder = tmp_path / "lists"
        folder.mkdir(exist_ok=True)
        text = [
            f'[[fault]]\nid = {json.dumps(name)}\nfile = "calc.py"\nfind = {json.dumps(find)}\n'
            f'replace = {json.dumps(replace)}\nkillers = ["tests/{killer}"]\nwhy = "It is wrong."\n'
            for name, (find, replace, killer) in entries.items()
        ]
        (folder / "calc.toml").write_text("".join(text))
        return folder

    return tree, lists


def run(tree, folder, *more):
    results = folder.parent / "results.jsonl"
    code = main(["--tree", str(tree), "--list", str(folder), "--results", str(results), *more])
    lines = results.read_text().splitlines() if results.exists() else []
    return code, {line["key"].split()[0]: line["verdict"] for line in map(json.loads, lines)}


def test_a_copy_has_what_git_knows_and_is_whole_again_afterwards(project, tmp_path):
    tree, lists = project
    before = state_of(tree)
    (fault,) = read_faults(lists(**{"calc-dead": ENTRIES["calc-dead"]}))
    copy = Copy(tree, tmp_path / "copy")
    assert sorted(path.name for path in copy.home.iterdir()) == ["calc.py", "tests"]
    with copy.planted(fault):
        assert "return a * b" in (copy.home / "calc.py").read_text()
    assert (copy.home / "calc.py").read_text() == (tree / "calc.py").read_text() == SOURCE
    assert state_of(tree) == before
    (tree / "calc.py").write_text(SOURCE + "\n")
    assert state_of(tree) != before
    assert nearest("tests/test_add.py::test_add[1]", tree) == "tests/test_add.py::test_add[1]"
    assert nearest("tests/test_add.py::test_gone", tree) == "tests/test_add.py"
    assert nearest("tests/test_gone.py::test_add", tree) == ""


def test_a_list_that_is_wrong_is_told_before_anything_runs(project, capsys):
    tree, lists = project
    folder = lists(
        **{"calc-twice": ("1 + 1", "2", "test_add.py"), "calc-nowhere": ("a / b", "a", "test_add.py"),
           "calc-same": ("a - b", "a - b", "test_add.py"), "calc-dead": ENTRIES["calc-dead"]}
    )  # fmt: skip
    assert run(tree, folder) == (2, {})
    assert capsys.readouterr().err.splitlines() == [
        "error: calc-twice: its text is 2 times in calc.py; expected once",
        "error: calc-nowhere: its text is 0 times in calc.py; expected once",
        "error: calc-same: it changes nothing",
    ]
    assert run(tree, folder, "--only", "calc-none") == (2, {})
    with (folder / "calc.toml").open("a") as file:
        file.write('more = "x"\n')
    with pytest.raises(TypeError, match="more"):
        read_faults(folder)


@pytest.mark.slow
def test_the_dead_and_the_living(project, capsys):
    tree, lists = project
    folder = lists(**ENTRIES)
    expected = dict(zip(ENTRIES, ("killed", "killed", "hang", "killed by the tier", "survived"), strict=True))
    some = ("--only", "calc-dead", "calc-dies-in-the-tier", "--no-tier")
    assert run(tree, folder, *some) == (1, {"calc-dead": "killed", "calc-dies-in-the-tier": "passed its killers"})
    assert run(tree, folder, "--only", "calc-hangs", "--limit", "2")[0] == 0
    assert run(tree, folder) == (1, expected)
    said = capsys.readouterr().out
    assert said.count("  calc-dead  tests/test_add.py::test_add\n") == 1  # it was not judged again
    assert "killed by the tier: calc-dies-in-the-tier: tests/test_sub.py::test_sub" in said
    assert "survived: calc-lives: It is wrong." in said
    assert run(tree, folder)[0] == 1
    assert " s  calc-" not in capsys.readouterr().out
    assert run(tree, lists(**{"calc-dead": ENTRIES["calc-dead"]}))[0] == 0
    (tree / "tests" / "test_add.py").write_text(TESTS["test_add.py"].replace("== 5", "== 6"))
    assert run(tree, folder)[0] == 2
    assert "without any fault killers are not green: tests/test_add.py::test_add" in capsys.readouterr().err
