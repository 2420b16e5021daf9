"""`python export/to_onnx.py`, which is `pmm export onnx`."""

from pmm.commands.export_onnx import main
from pmm.utils import command_line

if __name__ == "__main__":
    command_line.run(main, prog="to_onnx.py")
