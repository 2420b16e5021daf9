"""OpenVINO alone, with an IR that resizes and normalises inside: `python openvino_client.py MODEL.xml OUT.npy IMAGE...`

Images may have any size, each its own.
"""

import importlib.util
import sys

import numpy as np
import openvino
from PIL import Image

for absent in ("pmm", "torch", "onnx"):
    assert importlib.util.find_spec(absent) is None, f"{absent} is installed: this proves nothing"
model, out, *paths = sys.argv[1:]
# on CPUs with bf16 instructions OpenVINO would compute in bf16
compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
images = [np.asarray(Image.open(path).convert("RGB"))[None] for path in paths]
np.save(out, np.concatenate([compiled({"images": image})[0].copy() for image in images]))
