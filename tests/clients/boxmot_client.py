"""BoxMOT alone: its ReID model on crops, each by the backend that it chooses for the file.

python boxmot_client.py FILE.onnx|FOLDER_openvino_model OUT.npy CROP...

With BOXMOT_REID_BACKEND=opencv an ONNX file runs in OpenCV.
"""

import sys

import numpy as np
from boxmot.reid.core.runtime import ReID

model, out, *paths = sys.argv[1:]
np.save(out, ReID(model)(paths))
