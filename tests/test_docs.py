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
from tests.readme import README, run_python, shell_lines

PAGE = (ROOT / "docs/adopt.md").read_text()
IN_A_TABLE = [("docs/adopt.md", line) for line in re.findall(r"`(pmm adopt [^`]+)`", PAGE)]
LINES = [*IN_A_TABLE, *(line for page in sorted((ROOT / "docs").glob("*.md")) for line in shell_lines(page))]
WITH_PYTHON = [ROOT / f"docs/{name}.md" for name in ("getting-started", "kernels", "video")]
"""Pages whose Python needs nothing but a model and this package."""
IMAGES = re.findall(
    r"`(--(?:no-antialias|interpolation|padding|scale|mean)[^`]* [^`]*|--no-antialias)` \|$", PAGE, re.M
)


@pytest.mark.parametrize(("place", "line"), LINES)
def test_each_command_parses(place, line):
    """A failure is shown with its place: page and line."""
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
    run_python(page, names)
    assert names


def test_an_example_that_fails_names_its_page_and_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nx = 1\ny = x / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as raised:
        run_python(page, {})
    last = raised.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(page), 5)
    assert [place for place, _ in LINES if not re.fullmatch(r"docs/[\w-]+\.md(:\d+)?", place)] == []
    place, command = next(line for line in LINES if ":" in line[0])
    file, _, line = place.partition(":")
    assert command.split()[0] in (ROOT / file).read_text().splitlines()[int(line) - 1]


def test_the_search_of_the_video_page_finds_the_same_person(exported, tmp_path, monkeypatch):
    for file in (exported, manifest_path(exported)):
        shutil.copy(file, tmp_path / file.name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    run_python(ROOT / "docs/video.md", names)
    assert {names["names"][row].rpartition("-")[2] for row in names["nearest"]} == {"0.jpg"}


def test_examples_are_as_short_as_their_page_says():
    most = int(re.search(r"below (\d+) lines each", (ROOT / "docs/clients.md").read_text())[1])
    assert {len(path.read_text().splitlines()) < most for path in (ROOT / "docs/examples").iterdir()} == {True}


def test_the_page_was_found():
    assert len(LINES) >= 9
    assert len(IMAGES) >= 6
