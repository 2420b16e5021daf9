"""`python bench/ablation.py`, which is `pmm ablation`."""

from pmm.commands.ablation import main
from pmm.utils import command_line

if __name__ == "__main__":
    command_line.run(main, prog="bench/ablation.py")
