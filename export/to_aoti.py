"""`python export/to_aoti.py`, which is `pmm export aoti`."""

from pmm.commands.export_aoti import main
from pmm.utils import command_line

if __name__ == "__main__":
    command_line.run(main, prog="to_aoti.py")
