"""The commands of the README and of the pages that build on it, as tests run them."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ("getting-started", "training", "export", "bench", "video")
"""In docs/, in an order in which their commands follow on each other."""


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Code of a page: the line number that each block begins at, and its text."""
    text = page.read_text()
    found = re.finditer(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return [(text.count("\n", 0, block.start(1)) + 1, block[1]) for block in found]


def shell_lines(page: Path) -> Iterator[tuple[str, str]]:
    """Place ("docs/data.md:7") and command, without its comment; one that goes on on the next line is one."""
    for first, block in blocks(page, "sh"):
        whole = re.sub(r"\\\n", lambda _: "\\\0", block)
        line = first
        for text in whole.splitlines():
            command = text.replace("\\\0", " ").split("  #")[0].strip()
            if command and not command.startswith("#"):
                yield f"{page.relative_to(ROOT)}:{line}", command
            line += 1 + text.count("\0")


def run_python(page: Path, names: dict[str, object]) -> None:
    """All Python of a page, in one namespace; an error's traceback names the page and the line."""
    for line, block in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + block, str(page), "exec"), names)


def places() -> dict[str, str]:
    """Each command of the README and of PAGES, in their order, and where it stands first; but for those that take
    another toolkit's weights, which are only parsed (tests/test_docs.py)."""
    found: dict[str, str] = {}
    for page in (ROOT / "README.md", *(ROOT / f"docs/{name}.md" for name in PAGES)):
        for place, command in shell_lines(page):
            if "--init" not in command:
                found.setdefault(command, place)
    return found


def commands() -> list[str]:
    """Those commands."""
    return list(places())


def is_too_large(command: str) -> bool:
    """It wants ImageNet weights and 32 identities, or a network of timm: its flags are tried."""
    return re.search("--preset (paper|strong)|timm:", command) is not None


def on_fixtures(command: str, people: Path, scratch: Path) -> str:
    """With the synthetic `people` for a user's data, and the run of the commands before for the one on it; what is made
    for that comes into the folder `scratch`."""
    if "/path/to/crops" in command:
        command = command.replace("/path/to/crops", str(_by_identity(people, scratch / "crops")))
    if command == "pmm bench runs/mine/best.pth":  # too few people for int8 to pass its gates
        command += " --precisions fp32"
    command = re.sub(r"runs/market(?=[/ ]|$)", "runs/first", command.replace("/path/to/market1501", str(people)))
    return command.replace("/path/to/person.jpg", str(next((people / "query").iterdir())))


def _by_identity(people: Path, out: Path) -> Path:
    """The same people as one folder per identity, in train and test, in the folder `out`."""
    for part, name in (("bounding_box_train", "train"), ("query", "test"), ("bounding_box_test", "test")):
        for crop in (people / part).glob("*.jpg"):
            pid, camera, *_ = crop.name.split("_")
            if int(pid) > 0:
                (out / name / pid).mkdir(parents=True, exist_ok=True)
                shutil.copy(crop, out / name / pid / f"{camera[:2]}_{part}_{crop.name}")
    return out
