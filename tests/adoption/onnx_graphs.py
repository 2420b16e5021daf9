"""Foreign ONNX graphs of a convolution, a batch-norm and a pooling, made in milliseconds."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

SIZE = (16, 8)
DIM = 6
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}


def foreign(
    path,
    *,
    layout="NCHW",
    dtype="float32",
    batch="N",
    names=("input", "output"),
    sides=SIZE,
    channels=3,
    end="Flatten",
    opset=17,
    ir=8,
    weights_are_inputs=False,
    more=(),
    more_inputs=(),
    more_outputs=(),
):
    """Write such a graph to `path`.

    Args:
        batch: a name for any number; or the number.
        sides: height and width, as numbers or as names.
        end: the last operator: Flatten gives [N, 6], none [N, 6, 1, 1].
        more: nodes behind the pooled maps `maps` [N, 6, 1, 1].
    """
    generator = np.random.default_rng(0)
    images, embeddings = names
    kind = np.float16 if dtype == "float16" else np.float32
    weights = {
        "conv.weight": generator.normal(0, 0.05, (DIM, 3, 4, 4)),
        "bn.scale": generator.uniform(0.5, 1.5, DIM),
        "bn.bias": generator.normal(0, 1, DIM),
        "bn.mean": generator.normal(0, 0.1, DIM),
        "bn.var": generator.uniform(0.5, 1.5, DIM),
    }
    stored = [numpy_helper.from_array(value.astype(kind), name) for name, value in weights.items()]
    nodes, at = [], images

    def add(operator, *others, output="", **attributes):
        nonlocal at
        before, at = at, output or f"{operator}_out"
        nodes.append(helper.make_node(operator, [before, *others], [at], **attributes))

    if dtype == "uint8":
        add("Cast", to=TensorProto.FLOAT)
        stored.append(numpy_helper.from_array(np.float32(1 / 255), "scale"))
        add("Mul", "scale")
    if layout == "NHWC":
        add("Transpose", perm=[0, 3, 1, 2])
    add("Conv", "conv.weight", strides=[4, 4])
    add("BatchNormalization", *list(weights)[1:])
    add("Relu", output="relu")
    add("GlobalAveragePool", output="maps" if end else embeddings)
    if end:
        add(end, output=embeddings)
    given = [batch, channels, *sides] if layout == "NCHW" else [batch, *sides, channels]
    inputs = [helper.make_tensor_value_info(images, TYPES[dtype], given), *more_inputs]
    if weights_are_inputs:
        inputs += [helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in stored]
    kind = TYPES["float16" if dtype == "float16" else "float32"]
    shape = [batch, DIM] if end else [batch, DIM, 1, 1]
    outputs = [helper.make_tensor_value_info(embeddings, kind, shape), *more_outputs]
    graph = helper.make_graph([*nodes, *more], "foreign", inputs, outputs, stored)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], producer_name="by hand")
    proto.ir_version = ir
    path.write_bytes(proto.SerializeToString())
    return path
