"""`python bench/reproduce.py`, which is `pmm reproduce`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this package, not an installed one

from pmm.commands.reproduce import main
from pmm.utils import command_line

if __name__ == "__main__":
    command_line.run(main, prog="bench/reproduce.py")
