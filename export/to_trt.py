"""`python export/to_trt.py`, which is `pmm export trt`."""

from pmm.commands.export_trt import main
from pmm.utils import command_line

if __name__ == "__main__":
    command_line.run(main, prog="to_trt.py")
