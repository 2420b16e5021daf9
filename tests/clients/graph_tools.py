"""What others do to an ONNX file before they run it: ONNX Runtime's shape inference and preparation for quantising.

python graph_tools.py MODEL.onnx INFERRED.onnx PREPARED.onnx
"""

import sys

import onnx
from onnxruntime.quantization import quant_pre_process
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

if __name__ == "__main__":
    model, inferred, prepared = sys.argv[1:]
    found = SymbolicShapeInference.infer_shapes(onnx.load(model), auto_merge=False, guess_output_rank=False)
    onnx.save(found, inferred)
    quant_pre_process(model, prepared)
