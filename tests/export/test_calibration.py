"""What becomes of a channel that is louder than the others."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from pmm.export.int8 import Quantizer


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_a_loud_channel_costs_the_others_nothing(target):
    """The weights have a scale per channel: one of them is a thousand times the others."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
    weights[0] *= 1000
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], "conv")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 6, 6])],
        [numpy_helper.from_array(weights, "w")],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    images = rng.normal(size=(16, 3, 8, 8)).astype(np.float32)
    made = Quantizer(proto, target, np.split(images, 4), "x").build()
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    ((values, scales),) = [(stored[n.input[0]], stored[n.input[1]]) for n in made.graph.node if n.input[0] in stored]
    assert scales.shape == (4,)
    most = {"tensorrt": 127, "cpu": 64}[target]
    assert set(np.abs(values.astype(int)).max((1, 2, 3)).tolist()) <= {most - 1, most}  # all of its digits
    assert (np.abs(values * scales[:, None, None, None] - weights).max((1, 2, 3)) <= scales / 2 + 1e-6).all()
