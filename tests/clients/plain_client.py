"""A service that has only our files: ONNX Runtime or OpenVINO, PIL and numpy, and the manifest's words.

python plain_client.py onnxruntime|openvino MODEL.onnx OUT.npy CROP...
"""

import importlib.util
import json
import sys

import numpy as np
from PIL import Image


def crops_of(paths, manifest):
    size, contract = manifest["preprocessing"], manifest["input"]
    assert (size["interpolation"], size["antialias"], size["padding"]) == ("bilinear", True, None)
    rows = []
    for path in paths:
        crop = Image.open(path).convert("RGB").resize((size["width"], size["height"]), Image.Resampling.BILINEAR)
        pixels = np.asarray(crop)
        if contract["normalised_by"] == "caller":
            mean, std = (np.array(size[name], np.float32) for name in ("mean", "std"))
            pixels = (pixels.astype(np.float32) / 255 - mean) / std
        if contract["colour"] == "bgr":
            pixels = pixels[..., ::-1]
        rows.append(pixels.transpose(2, 0, 1) if contract["layout"] == "NCHW" else pixels)
    return np.ascontiguousarray(np.stack(rows).astype(contract["dtype"]))


def run(library, model, name, images):
    if library == "onnxruntime":
        import onnxruntime

        return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {name: images})[0]
    import openvino

    # on CPUs that have bf16 OpenVINO would take it for fp32
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled({name: images})[0]


if __name__ == "__main__":
    for absent in ("pmm", "torch", "onnx"):
        assert importlib.util.find_spec(absent) is None, f"{absent} is installed: this proves nothing"
    library, model, out, *paths = sys.argv[1:]
    with open(model + ".json", encoding="utf-8") as file:
        manifest = json.load(file)
    np.save(out, run(library, model, manifest["input"]["name"], crops_of(paths, manifest)))
