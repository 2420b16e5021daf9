"""`python export/to_triton.py`, which is `pmm export triton`."""

from pmm.commands.export_triton import main
from pmm.utils import command_line

if __name__ == "__main__":
    command_line.run(main, prog="to_triton.py")
