"""Embeds images in Python without the toolkit: numpy, Pillow and a library that runs the file.

python client.py onnxruntime|openvino|opencv MODEL.onnx OUT.csv IMAGE...

MODEL.onnx is one of `pmm export onnx`; MODEL.onnx.json must lie beside it.
"""

import json
import sys

import numpy as np
from PIL import Image, ImageOps


def read_crop(path, manifest):
    """One image as the file takes it: bytes [height, width, 3], or floats [3, height, width] normalised here."""
    size, contract = manifest["preprocessing"], manifest["input"]
    if (size["interpolation"], size["antialias"], size["padding"]) != ("bilinear", True, None):
        sys.exit("this example resizes by Pillow's bilinear alone, without padding")
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    pixels = np.asarray(image.resize((size["width"], size["height"]), Image.Resampling.BILINEAR))
    if contract["normalised_by"] == "caller":
        mean, std = (np.array(size[name], np.float32) for name in ("mean", "std"))
        pixels = (pixels.astype(np.float32) / 255 - mean) / std
    if contract["colour"] == "bgr":
        pixels = pixels[..., ::-1]
    return pixels.transpose(2, 0, 1) if contract["layout"] == "NCHW" else pixels


def run(library, model, name, images):
    """Embeddings [N, dim] of what `read_crop` made."""
    if library == "onnxruntime":
        import onnxruntime

        return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {name: images})[0]
    if library == "openvino":
        import openvino

        # on CPUs that have bf16 OpenVINO would take it for fp32
        compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return compiled({name: images})[0]
    import cv2

    net = cv2.dnn.readNetFromONNX(model)
    net.setInput(images, name)
    return net.forward()


if __name__ == "__main__":
    library, model, out, *paths = sys.argv[1:]
    with open(model + ".json", encoding="utf-8") as file:
        manifest = json.load(file)
    crops = np.stack([read_crop(path, manifest) for path in paths]).astype(manifest["input"]["dtype"])
    embeddings = run(library, model, manifest["input"]["name"], np.ascontiguousarray(crops))
    np.savetxt(out, embeddings, fmt="%.9g", delimiter=",")
