"""Plain JPEG files by libjpeg-turbo itself: several times as fast as by way of PIL, with the same bits.

PIL states what an image is, and reads all else: other formats and colours, files that state an orientation, whatever is
damaged or huge. tests/data/test_jpeg.py holds the two equal.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import simplejpeg

START = b"\xff\xd8\xff"
ORIENTED = (b"Exif", b"http://ns.adobe.com/xap/")
"""Begin the only places of a JPEG file where PIL looks for its orientation."""
SUBSAMPLINGS = ("444", "422", "420", "Gray")
MOST_PIXELS = 1 << 24
"""What is larger is no crop: PIL has limits for it."""


def decoded(content: bytes) -> npt.NDArray[np.uint8] | None:
    """The pixels uint8 RGB [H, W, 3] of a plain JPEG file, or None: then PIL is to read it, or to say what is wrong."""
    if not content.startswith(START) or any(mark in content for mark in ORIENTED):
        return None
    try:
        height, width, colours, subsampling = simplejpeg.decode_jpeg_header(content, strict=True)
        if colours not in ("YCbCr", "Gray") or subsampling not in SUBSAMPLINGS or height * width > MOST_PIXELS:
            return None
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(content, "RGB", strict=True)
    except ValueError:  # what libjpeg-turbo warns of is an error here
        return None
    return pixels
