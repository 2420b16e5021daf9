"""The pages in docs are kept true: their commands parse as they stand, without the files that these name."""

import importlib
import re
import shlex
import shutil

import pytest

from bench.lab.pages.__main__ import pages
from pmm.__main__ import COMMANDS
from pmm.adoption.image_options import ImageOptions
from pmm.artifacts.artifact import manifest_path
from pmm.training.flags import TrainCommand
from pmm.utils.command_line import check_args, parse_args
from tests.conftest import ROOT
from tests.readme import README

PAGE = (ROOT / "docs/adopt.md").read_text()
PAGES = "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
BLOCKS = "".join(re.findall(r"```sh\n(.*?)```", PAGES, re.DOTALL)).replace("\\\n", " ")
LINES = [line for line in (*BLOCKS.splitlines(), *re.findall(r"`(pmm adopt [^`]+)`", PAGE)) if line]
WITH_PYTHON = [ROOT / f"docs/{name}.md" for name in ("getting-started", "kernels", "video")]
"""Pages whose Python needs nothing but a model and this package."""
IMAGES = re.findall(
    r"`(--(?:no-antialias|interpolation|padding|scale|mean)[^`]* [^`]*|--no-antialias)` \|$", PAGE, re.M
)


@pytest.mark.parametrize("line", LINES)
def test_each_command_parses(line):
    if line.startswith("python "):
        assert line in README  # where it is run
        return
    program, *words = shlex.split(line, comments=True)
    count = next(count for count in (2, 1) if " ".join(words[:count]) in COMMANDS)
    name = " ".join(words[:count])
    module = importlib.import_module(f"pmm.commands.{COMMANDS[name][0]}")
    (command,) = [value for key, value in vars(module).items() if re.fullmatch(r"\w+Command", key)] or [TrainCommand]
    assert program == "pmm"
    (check_args if name != "adopt" else build)(command, words[count:], prog=f"pmm {name}")


def build(command, words, prog):
    parse_args(command, words, prog=prog, description="")


@pytest.mark.parametrize("flags", IMAGES)
def test_flags_for_images_can_be_given(flags):
    parse_args(ImageOptions, flags.split(), prog="pmm adopt", description="")


def test_links_lead_to_files():
    files = sorted((ROOT / "docs").glob("*.md"))
    made = {ROOT / "docs/reference" / name for name in pages()}
    links = {page.parent / link for page in files for link in re.findall(r"\]\((?!\w+:)([^)#]+)", page.read_text())}
    assert len(links) >= 3
    assert [link for link in links - made if not link.exists()] == []


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    written = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert listed == written | {f"reference/{name}" for name in pages()}


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_its_python_runs_as_it_stands(page, exported, tmp_path, monkeypatch):
    for name in ("first", "model"):
        for file in (exported, manifest_path(exported)):
            shutil.copy(file, tmp_path / file.name.replace("model", name))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(block, names)
    assert names


def test_the_search_of_the_video_page_finds_the_same_person(exported, tmp_path, monkeypatch):
    for file in (exported, manifest_path(exported)):
        shutil.copy(file, tmp_path / file.name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(re.findall(r"```python\n(.*?)```", (ROOT / "docs/video.md").read_text(), re.DOTALL)[0], names)
    assert {names["names"][row].rpartition("-")[2] for row in names["nearest"]} == {"0.jpg"}


def test_examples_are_as_short_as_their_page_says():
    most = int(re.search(r"below (\d+) lines each", (ROOT / "docs/clients.md").read_text())[1])
    assert {len(path.read_text().splitlines()) < most for path in (ROOT / "docs/examples").iterdir()} == {True}


def test_the_page_was_found():
    assert len(LINES) >= 9
    assert len(IMAGES) >= 6
