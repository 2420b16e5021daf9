"""`python bench/compare.py`, which is `pmm compare`."""

from pmm.commands.compare import main
from pmm.utils import command_line

if __name__ == "__main__":
    command_line.run(main, prog="bench/compare.py")
