"""The lowest versions that the package's metadata allows, in the oldest Python: all that the product does works."""

import os
import re

import pytest

from tests.conftest import ROOT
from tests.slow.test_wheel import MIX
from tests.wheel import Environment, built_wheel

pytestmark = pytest.mark.full
COMMANDS = """
python -m pmm.train --out run --root people
pmm info run/best.pth
python -m pmm.train --out small --root people --backbone timm:mobilenetv4_conv_small
pmm export onnx small/best.pth -o small.onnx
pmm evaluate run/best.pth --dataset market1501 --root people
pmm export onnx run/best.pth -o fp32.onnx
pmm export onnx run/best.pth -o fp16.onnx --precision fp16
pmm export onnx run/best.pth -o int8.onnx --precision int8
pmm export onnx run/best.pth -o cpu.onnx --precision int8 --target cpu
pmm export trt fp32.onnx -o fp32.plan
pmm export trt fp16.onnx -o fp16.plan
pmm export trt int8.onnx -o int8.plan
pmm export aoti run/best.pth -o model.pt2
pmm export triton fp32.onnx --repo models
pmm embed cpu.onnx people/bounding_box_test -o gallery --names market1501
pmm search gallery --query people/query/QUERY --not-same-camera --names market1501 --picture found.png
pmm gallery upgrade gallery --to fp32.onnx
pmm evaluate model.pt2 --dataset market1501 --root people
pmm evaluate fp32.onnx --backend openvino --dataset market1501 --root people
pmm visualize run/best.pth
pmm bench run/best.pth --backends torch-compile,ort-cpu,openvino --precisions fp32 --out report
pmm compare report/report.json report/report.json
pmm ablation --methods pmm,baseline --against pmm --root people --out ablation.json
"""


def test_all_commands_work_with_the_lowest_versions(store, people, tmp_path):
    clients = ROOT / os.environ.get("PMM_CLIENTS", ".venv-clients") / "lowest"
    assert (clients / ".installed").exists(), f"{clients} is missing: make clients"
    environment = Environment.with_wheel(tmp_path / "env", built_wheel(store), clients / "bin/python")
    environment.add_all(clients)
    (tmp_path / "people").symlink_to(people)
    torch = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    command = f"import torch; assert torch.__version__.startswith({torch + '.'!r}), torch.__version__"
    query = next((people / "query").iterdir()).name
    commands = [line.split() for line in COMMANDS.replace("QUERY", query).strip().splitlines()]
    commands = [["python", "-c", command], ["python", "-c", MIX], *commands]
    environment.run_all(commands, tmp_path, "torch, torchvision, onnxscript", PMM_FAST="1", PMM_REQUIRE_EXT="1")
