"""`python -m pmm.train`, which is `pmm train`."""

from pmm.commands.train import main
from pmm.utils import command_line

PROG = "pmm.train"

if __name__ == "__main__":
    command_line.run(main, prog=PROG)
