"""`python bench/run.py`, which is `pmm bench`."""

from pmm.commands.bench import main
from pmm.utils import command_line

if __name__ == "__main__":
    command_line.run(main, prog="bench/run.py")
