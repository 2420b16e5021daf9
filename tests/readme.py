"""The commands of the README and of the pages that build on it, as tests run them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ("getting-started", "training", "export", "bench", "video")
"""In docs/, in an order in which their commands follow on each other."""


def commands() -> list[str]:
    """In the order of README and pages, without their comments, each once; but for those that take another toolkit's
    weights, which are only parsed (tests/test_docs.py)."""
    pages = [README, *((ROOT / f"docs/{name}.md").read_text() for name in PAGES)]
    blocks = [block for page in pages for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)]
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#") and "--init" not in line))


def is_too_large(command: str) -> bool:
    """It wants ImageNet weights and 32 identities, or a network of timm: its flags are tried."""
    return re.search("--preset (paper|strong)|timm:", command) is not None


def on_fixtures(command: str, people: Path) -> str:
    """With the synthetic `people` for a user's data, and the run of the commands before for the one on it."""
    command = re.sub(r"runs/market(?=[/ ]|$)", "runs/first", command.replace("/path/to/market1501", str(people)))
    return command.replace("/path/to/person.jpg", str(next((people / "query").iterdir())))
