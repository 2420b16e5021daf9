"""The input and the output of a foreign ONNX graph: what the file tells of them, and what has to be asked for. Loads no
torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pmm.adoption.onnx_options import Layout
from pmm.adoption.onnx_reading import ForeignOnnx
from pmm.artifacts.describe import describe_tensor
from pmm.config import MAX_SIDE
from pmm.utils.errors import ConflictingOptions, InvalidFile, InvalidValue

if TYPE_CHECKING:
    import onnx

LAYOUTS: tuple[Layout, Layout] = ("NCHW", "NHWC")
EXPECTED = "float32, float16 or uint8 [N, 3, H, W] or [N, H, W, 3]"
CHANNELS = 3


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """The input that takes the images."""

    name: str
    dtype: Literal["uint8", "float32", "float16"]
    layout: Layout
    batch: int | None
    """None: any number."""
    height: int
    width: int
    """In pixels."""

    @property
    def normalised_by(self) -> Literal["graph", "caller"]:
        """Whole numbers of 0 to 255 cannot have been normalised."""
        return "graph" if self.dtype == "uint8" else "caller"


def find_image_input(
    foreign: ForeignOnnx, *, name: str = "", layout: str = "", height: int | None = None, width: int | None = None
) -> ImageInput:
    """The input of `foreign` that takes images; what is given has to be what the file says, where it says it.

    Raises:
        InvalidFile: no input takes images, or it does not say which does, in which layout or of which size.
        InvalidValue, ConflictingOptions: a name that no input has, or a layout or size that is another than the file's.
    """
    value = _value(foreign, name)
    dims = [dim.dim_value if dim.dim_value > 0 else None for dim in value.type.tensor_type.shape.dim] or [None] * 4
    found = _layout(foreign, dims, layout, describe_tensor(value))
    at = {letter: dims[found.index(letter)] for letter in found}
    sides = {"height": (height, at["H"]), "width": (width, at["W"])}
    for side, (given, says) in sides.items():
        if given is not None and says is not None and given != says:
            problem = f"--{side} is {given}, and the images of {foreign.path} have {side} {says}"
            hint = "leave it out: the file says what it takes"
            raise ConflictingOptions(problem, f"--{side}", expected=str(says), hint=hint)
    sizes = {side: given or says for side, (given, says) in sides.items()}
    unknown = [f"--{side} {side[0].upper()}" for side, size in sizes.items() if size is None]
    if unknown:
        problem = f"it does not say how large its images are ({describe_tensor(value)})"
        raise InvalidFile(problem, path=foreign.path, hint=f"give {' '.join(unknown)}")
    for side, size in sizes.items():
        if not 1 <= (size or 0) <= MAX_SIDE:
            raise InvalidFile(f"its images have {side} {size}", path=foreign.path, expected=f"1 to {MAX_SIDE}")
    return ImageInput(
        name=value.name,
        dtype=_TYPES[value.type.tensor_type.elem_type],  # type: ignore[arg-type]
        layout=found,
        batch=at["N"],
        height=sizes["height"] or 0,
        width=sizes["width"] or 0,
    )


def embedding_output(foreign: ForeignOnnx, name: str = "") -> onnx.ValueInfoProto:
    """The output that is the embeddings, of floats. Raises InvalidFile or InvalidValue unless there is one, or `name`
    is one of several."""
    outputs = {value.name: value for value in foreign.proto.graph.output}
    if name and name not in outputs:
        raise InvalidValue("--output", name, choices=outputs)
    if not name and len(outputs) != 1:
        several = ", ".join(describe_tensor(value) for value in outputs.values())
        problem = f"it has {len(outputs)} outputs: {several[:300]}"
        raise InvalidFile(problem, path=foreign.path, hint="choose the embeddings: --output NAME")
    value = outputs[name] if name else next(iter(outputs.values()))
    kind = _TYPES.get(value.type.tensor_type.elem_type, "")
    if not kind.startswith("float"):
        raise InvalidFile(
            f"its output is {describe_tensor(value)}", path=foreign.path, expected="embeddings of floats [N, D]"
        )
    return value


_TYPES = {1: "float32", 2: "uint8", 10: "float16"}
"""By onnx.TensorProto.DataType."""


def inputs_of(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """What a caller has to feed: old files list their weights among the inputs."""
    constants = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in constants]


def _value(foreign: ForeignOnnx, name: str) -> onnx.ValueInfoProto:
    inputs = inputs_of(foreign.proto.graph)
    if name:
        named = [value for value in inputs if value.name == name]
        if not named:
            raise InvalidValue("--input", name, choices=[value.name for value in inputs])
        inputs = named
    images = [value for value in inputs if _takes_images(value)]
    if len(images) == 1:
        return images[0]
    words = ", ".join(describe_tensor(value) for value in images or inputs)[:300] or "it has no input"
    if images:
        raise InvalidFile(f"several inputs take images: {words}", path=foreign.path, hint="choose one: --input NAME")
    problem = f"no input takes images: {words}"
    raise InvalidFile(problem, path=foreign.path, expected=EXPECTED)


def _takes_images(value: onnx.ValueInfoProto) -> bool:
    kind = value.type.tensor_type
    return kind.elem_type in _TYPES and (len(kind.shape.dim) == 4 or not kind.HasField("shape"))


def _layout(foreign: ForeignOnnx, dims: Sequence[int | None], given: str, words: str) -> Layout:
    """Where the 3 channels are. Raises InvalidFile, InvalidValue or ConflictingOptions."""
    if given and given not in LAYOUTS:
        raise InvalidValue("--layout", given, choices=LAYOUTS)
    possible = [layout for layout in LAYOUTS if dims[layout.index("C")] in (None, CHANNELS)]
    if not possible:
        raise InvalidFile(f"its input is {words}, no colour images", path=foreign.path, expected=EXPECTED)
    certain = [layout for layout in possible if dims[layout.index("C")] == CHANNELS]
    possible = certain or possible
    if given and given not in possible:
        problem = f"--layout is {given}, and {foreign.path} takes {words}"
        raise ConflictingOptions(problem, "--layout", expected=possible[0])
    if not given and len(possible) > 1:
        problem = f"it does not say where the colour channels of its input are ({words})"
        raise InvalidFile(problem, path=foreign.path, hint=f"give --layout {' or --layout '.join(LAYOUTS)}")
    return next(layout for layout in possible if not given or layout == given)
