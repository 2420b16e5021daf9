"""Image files -> the input of a network, as a Python model of Triton Inference Server.

`pmm export triton --input jpeg` copies this file as model.py into the folder NAME-preprocess, where it runs without
this package, with numpy and Pillow alone. How to prepare a crop stands in the folder's configuration. It reads and
resizes as `pmm.data.images` and `pmm.data.crops` do, to the last grey level with the same version of Pillow.
"""

from __future__ import annotations

import importlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MAX_THREADS = 8
"""Of one instance: Pillow decodes and resizes without Python's lock."""
Pixels = npt.NDArray[np.uint8]


class TritonPythonModel:
    """The server's interface: it makes one object per instance, and calls it with requests that wait together."""

    def initialize(self, args: dict[str, str]) -> None:
        """`args`: of the server; "model_config" is the configuration as JSON."""
        config = json.loads(args["model_config"])
        self._input, self._output = config["input"][0]["name"], config["output"][0]["name"]
        self._how = json.loads(config["parameters"]["pmm_preprocessing"]["string_value"])
        self._server: Any = importlib.import_module("triton_python_backend_utils")  # is there in the server alone
        # beside this file, which the server has put on the path
        self._opencv: Any = None if self._how["antialias"] else importlib.import_module("resize_opencv")
        self._pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response to each of `requests`, in their order. One with a bad image is an error that names all bad ones of
        that request, by their places from 0 on; the others have their images."""
        tensors = [self._server.get_input_tensor_by_name(request, self._input) for request in requests]
        files = [tensor.as_numpy().reshape(-1).tolist() for tensor in tensors]  # lists of bytes
        crops = iter(list(self._pool.map(self._crop, [file for each in files for file in each])))
        return [self._response([next(crops) for _ in each]) for each in files]

    def finalize(self) -> None:
        """The server unloads the model."""
        self._pool.shutdown(cancel_futures=True)

    def _response(self, crops: list[Pixels | str]) -> Any:
        bad = [f"{self._input}[{row}] {crop}" for row, crop in enumerate(crops) if isinstance(crop, str)]
        if bad:
            problem = f"{len(bad)} of {len(crops)} images cannot be read: {'; '.join(bad)}"
            error = self._server.TritonError(problem, self._server.TritonError.INVALID_ARG)
            return self._server.InferenceResponse(output_tensors=[], error=error)
        images = self._feed(np.stack([crop for crop in crops if not isinstance(crop, str)]))
        return self._server.InferenceResponse(output_tensors=[self._server.Tensor(self._output, images)])

    def _crop(self, content: bytes) -> Pixels | str:
        """uint8 RGB [height, width, 3], or why there is none."""
        try:
            return self._resized(read_rgb(content))
        except Exception as error:  # decoders and EXIF parsers raise anything on a file made to harm
            reason = " ".join(str(error).split()) or type(error).__name__
            return f"({reason[:200]})"

    def _resized(self, image: Image.Image) -> Pixels:
        how, (before_w, before_h) = self._how, image.size
        if how["padding"] is None:
            height, width = how["height"], how["width"]
        elif before_h * how["width"] > before_w * how["height"]:
            height, width = how["height"], max(1, round(before_w * how["height"] / before_h))
        else:
            height, width = max(1, round(before_h * how["width"] / before_w)), how["width"]
        if (before_w, before_h) == (width, height):
            content = np.asarray(image)
        elif self._opencv is not None:
            content = self._opencv.resize_as_opencv(np.asarray(image), height, width)
        else:
            content = np.asarray(image.resize((width, height), FILTERS[how["interpolation"]]))
        if how["padding"] is None:
            return content
        padded = np.empty((how["height"], how["width"], 3), np.uint8)
        padded[:] = how["padding"]
        top, left = (how["height"] - height) // 2, (how["width"] - width) // 2
        padded[top : top + height, left : left + width] = content
        return padded

    def _feed(self, crops: Pixels) -> npt.NDArray[Any]:
        """uint8 RGB [B, height, width, 3] -> what the network takes."""
        how, images = self._how, crops
        if how["scale"] is not None:
            images = (crops * np.array(how["scale"], np.float32) - np.array(how["offset"], np.float32)).astype(
                np.float32
            )
        if how["colour"] == "bgr":
            images = images[..., ::-1]
        if how["layout"] == "NCHW":
            images = images.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(images, how["type"])


def read_rgb(content: bytes) -> Image.Image:
    """The file as an 8-bit RGB image, upright as its EXIF orientation says, without alpha; 16-bit grey is scaled.

    Raises ValueError for an empty one, no image, and pixels of unknown range; and whatever a decoder raises.
    """
    if not content:
        raise ValueError("it is empty")
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise ValueError("cannot identify image file") from None
    image.load()  # first: a file may state its orientation after its pixels
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.rint(np.asarray(image, np.uint16) / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; convert it to 8 bits")
    return image if image.mode == "RGB" else image.convert("RGB")
