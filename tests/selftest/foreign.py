"""Clients that know nothing of us: PIL, OpenCV and numpy prepare the crops, a bare ONNX Runtime runs the file. Each
makes one mistake, by its name; the code under test prepares nothing here."""

from __future__ import annotations

import cv2
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)

CLIP_MEAN, CLIP_STD = np.array([0.4815, 0.4578, 0.4082]), np.array([0.2686, 0.2613, 0.2758])
"""As clients shorten them."""


def pil(path, width, height):
    return np.asarray(Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BILINEAR))


def unrounded(path, width, height):
    """The same in floats, and not brought back to whole grey levels."""
    channels = np.moveaxis(np.asarray(Image.open(path).convert("RGB"), np.float32), 2, 0)
    images = [Image.fromarray(np.ascontiguousarray(channel)) for channel in channels]
    return np.stack([np.asarray(each.resize((width, height), Image.Resampling.BILINEAR)) for each in images], 2)


def cut(path, width, height):
    return np.floor(unrounded(path, width, height))


def padded(path, width, height):
    return np.asarray(ImageOps.pad(Image.open(path).convert("RGB"), (width, height), Image.Resampling.BILINEAR))


def opencv(interpolation):
    def resize(path, width, height):
        pixels = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        return cv2.resize(pixels, (width, height), interpolation=interpolation)

    return resize


def bgr(path, width, height):
    return np.asarray(Image.fromarray(cv2.imread(str(path))).resize((width, height), Image.Resampling.BILINEAR))


def in_order(*channels):
    """Of OpenCV's, which are blue, green and red."""

    def merge(path, width, height):
        split = cv2.split(cv2.cvtColor(pil(path, width, height), cv2.COLOR_RGB2BGR))
        return cv2.merge([split["bgr".index(channel)] for channel in channels])

    return merge


def mirrored(path, width, height):
    return cv2.flip(pil(path, width, height), 1)


def sides(path, width, height):
    """cv2.resize and torch name width and height in different orders; the bytes are handed over without a shape."""
    return pil(path, height, width).reshape(height, width, 3)


def sides_nchw(path, width, height):
    return pil(path, height, width).transpose(2, 0, 1).reshape(3, height, width).transpose(1, 2, 0)


def bgr_with(interpolation):
    return lambda path, *size: opencv(interpolation)(path, *size)[..., ::-1]


RESIZES = {
    "": pil,
    "bgr": bgr,
    "resize": opencv(cv2.INTER_LINEAR),
    "nearest": opencv(cv2.INTER_NEAREST),
    "area": opencv(cv2.INTER_AREA),
    "padded": padded,
    "bgr_resize": bgr_with(cv2.INTER_LINEAR),
    "bgr_nearest": bgr_with(cv2.INTER_NEAREST),
    "bgr_area": bgr_with(cv2.INTER_AREA),
    "rbg": in_order("r", "b", "g"),
    "grb": in_order("g", "r", "b"),
    "gbr": in_order("g", "b", "r"),
    "brg": in_order("b", "r", "g"),
    "mirrored": mirrored,
}
"""What both kinds of file can be fed; uint8 [height, width, 3]."""
FLOATS = {
    "unnormalised": lambda x: x / np.float32(255),
    "raw": lambda x: x,
    "undivided": lambda x: (x - MEAN) / STD,
    "divided_twice": lambda x: (x / 255 / 255 - MEAN) / STD,
    "normalised_twice": lambda x: ((x / 255 - MEAN) / STD - MEAN) / STD,
    "minus_one_to_one": lambda x: (x - 127.5) / 127.5,
    "by_256": lambda x: (x / 256 - MEAN) / STD,
    "mean_only": lambda x: x / 255 - MEAN,
    "statistics_bgr": lambda x: (x / 255 - MEAN[::-1]) / STD[::-1],
    "clip": lambda x: (x / 255 - CLIP_MEAN) / CLIP_STD,
    "caffe": lambda x: x - np.array([123, 117, 104]),
    "bgr_caffe": lambda x: x[..., ::-1] - np.array([104, 117, 123]),
}
"""Of pixels float32 of 0 to 255, what a file that takes floats is fed."""


def normalised(x):
    return (x / np.float32(255) - MEAN) / STD


def float_client(session, paths, mistake=""):
    """float32 NCHW, normalised by the client."""
    _, _, height, width = session.get_inputs()[0].shape
    resize = sides_nchw if mistake == "sides" else (RESIZES | ROUNDED).get(mistake, pil)
    pixels = np.stack([resize(path, width, height) for path in paths]).astype(np.float32)
    images = FLOATS.get(mistake, normalised)(pixels)
    if mistake == "nhwc":
        images = np.ascontiguousarray(images).reshape(len(paths), 3, height, width)
    else:
        images = images.transpose(0, 3, 1, 2)
    return session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(images, np.float32)})[0]


BYTES = {
    "normalised": lambda x: cv2.convertScaleAbs(np.maximum(normalised(x), 0).reshape(len(x), -1)).reshape(x.shape),
    "wrapped": lambda x: normalised(x).astype(np.int8).view(np.uint8),
    "unnormalised": lambda x: np.round(x / 255).astype(np.uint8),
}
"""Of pixels float32 of 0 to 255, what a file that takes bytes is fed."""


def bytes_client(session, paths, mistake=""):
    """uint8 NHWC."""
    _, height, width, _ = session.get_inputs()[0].shape
    resize = sides if mistake == "sides" else RESIZES.get(mistake, pil)
    images = np.stack([resize(path, width, height) for path in paths])
    if mistake in BYTES:
        images = BYTES[mistake](images.astype(np.float32))
    if mistake == "nchw":
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(images.shape)
    return session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(images)})[0]


ROUNDED = {"unrounded": unrounded, "cut": cut}
"""Resizes that are right but for what becomes of fractions of a grey level."""
CLIENTS = {
    "float": (float_client, [*(name for name in RESIZES if name), "sides", "nhwc", *FLOATS]),
    "uint8": (bytes_client, [*(name for name in RESIZES if name), "sides", "nchw", *BYTES]),
}
"""Kind of the input -> a client, and the mistakes that it can make."""


def open_bare(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
