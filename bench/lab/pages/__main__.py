"""Write the pages that are made from the code and the results, and what the README shows of them.

python -m bench.lab.pages [--out docs/reference]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from bench.lab.pages.benchmarks import benchmarks_page, demo_in_short
from bench.lab.pages.cli import cli_page
from bench.lab.pages.errors import errors_page
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.files import make_folder, write_file

ROOT = Path(__file__).parents[3]
README = ROOT / "README.md"
BEGIN, END = "<!-- backends: begin -->", "<!-- backends: end -->"


@dataclass(frozen=True, kw_only=True)
class PagesCommand:
    """The command line."""

    out: Annotated[Path, Arg("DIR", short="-o")] = ROOT / "docs/reference"
    """Folder for the pages."""


def pages() -> dict[str, str]:
    """File name -> Markdown."""
    return {
        "cli.md": cli_page(),
        "errors.md": errors_page(),
        "benchmarks.md": benchmarks_page(ROOT / "bench/results"),
        "changelog.md": _moved((ROOT / "CHANGELOG.md").read_text()),
        "contributing.md": _moved((ROOT / "CONTRIBUTING.md").read_text()),
    }


def with_results(readme: str) -> str:
    """The README with the newest figures of the demo between its marks."""
    head, mark, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    return f"{head}{mark}\n{demo_in_short(ROOT / 'bench/results')}\n{end}{tail}"


def _moved(text: str) -> str:
    """A page of the top folder, with links that lead from docs/reference to the same pages."""
    return text.replace("](CHANGELOG.md)", "](changelog.md)").replace("](docs/", "](../")


def main(prog: str) -> int:
    """Write them."""
    command = command_line.parse(PagesCommand, prog=prog, description=__doc__ or "")
    make_folder(command.out)
    write_file(README, with_results(README.read_text()))
    for name, text in pages().items():
        write_file(command.out / name, text)
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run(main, prog="python -m bench.lab.pages"))
