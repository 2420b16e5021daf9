"""Adopt a network that other code made: then evaluate, embed, export, bench, ... take it as one of their own.

pmm adopt SOURCE -o OUT [--weights FILE] --height H --width W [--mean R G B --std R G B] ...

SOURCE is MODULE:FACTORY, a callable that returns an nn.Module for images [N, 3, H, W]; or MODULE:FACTORY(ARGUMENTS)
with literals, as "timm:create_model('resnet50', num_classes=0)"; or an ONNX file. Modules are found in the current
folder and on PYTHONPATH, and their code runs here and never again: OUT holds the network itself.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NoReturn

from pmm.adoption.factory import Factory
from pmm.adoption.image_options import ImageOptions
from pmm.adoption.network_options import NetworkOptions
from pmm.adoption.onnx_options import OnnxOptions
from pmm.artifacts.adopted_file import AS_IT_IS, is_adopted_network
from pmm.artifacts.checkpoint import is_checkpoint
from pmm.artifacts.kinds import KIND_NAMES, SUFFIXES, kind_of
from pmm.artifacts.known_checkpoints import describe_known, proposed_adoption
from pmm.artifacts.weights_file import read_weights_file
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import ConflictingOptions, InvalidFile
from pmm.utils.files import existing_file, output_file

EXPECTED = "a factory (MODULE:FACTORY) or an ONNX file"


@dataclass(frozen=True, kw_only=True)
class AdoptCommand:
    """`pmm adopt SOURCE -o OUT`"""

    source: Annotated[str, Arg("SOURCE", positional=True)]
    """MODULE:FACTORY, MODULE:FACTORY(ARGUMENTS), or an ONNX file."""
    out: Annotated[Path, Arg("OUT", short="-o")]
    """File to write (.pth, or .onnx for an ONNX file)."""
    weights: Annotated[Path | None, Arg("FILE")] = None
    """Weights to load into the network (default: those that the factory gave it)."""
    ignore: Annotated[tuple[str, ...], Arg("PATTERN ...")] = ()
    """Keys of --weights that the network may lack, as 'heads.*'; or of two sets of weights the one to leave out."""
    network: NetworkOptions = field(default_factory=NetworkOptions)
    images: ImageOptions = field(default_factory=ImageOptions)
    onnx: Annotated[OnnxOptions, Arg(group="ONNX file")] = field(default_factory=OnnxOptions)


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(AdoptCommand, prog=prog, description=__doc__ or "")
    kind = _kind_of_source(command.source)
    if kind == "factory":
        lines = _adopt_factory(command)
    elif kind == "onnx":
        lines = _adopt_onnx(command)
    else:
        _refuse_weights(Path(command.source), command.out)
    print("\n".join(lines))
    data, file = command.network, shlex.quote(str(command.out))
    flags = "" if data.root else f" --dataset {data.dataset or 'NAME'} --root DIR"
    print(f"next: pmm evaluate {file}{flags}, pmm bench {file}{flags}")


def _kind_of_source(source: str) -> Literal["factory", "onnx", "weights"]:
    """Raises InvalidFile for a file that is missing, or of another kind."""
    path = Path(source)
    suffix = path.suffix.lower()
    if not path.is_file() and (":" in source or suffix not in (*SUFFIXES, ".safetensors")):
        return "factory"
    if existing_file(path, EXPECTED) and suffix == ".safetensors":
        return "weights"
    kind = kind_of(path, "onnx")
    if kind == "onnx":
        return "onnx"
    if kind in ("checkpoint", "torch"):
        return "weights"
    hint = "adopt the nn.Module that it was made from, or an ONNX file of it"
    raise InvalidFile(f"it is {KIND_NAMES[kind]}", path=path, expected=EXPECTED, hint=hint)


def _adopt_factory(command: AdoptCommand) -> list[str]:
    factory = Factory.parse(command.source)
    for name, value in vars(command.onnx).items():
        if value != getattr(OnnxOptions(), name):
            raise ConflictingOptions(f"--{name} is for ONNX files, not for a factory", f"--{name}", hint="leave it out")
    for side in ("height", "width"):
        if getattr(command.images, side) is None:
            raise ConflictingOptions(f"a factory needs --{side}", f"--{side}", hint="give the size of its images")
    if command.ignore and not command.weights:
        raise ConflictingOptions("--ignore needs --weights", "--ignore", "--weights", hint="leave it out")
    weights = [existing_file(command.weights, "the weights of the network")] if command.weights else []
    output_file(command.out, *weights, suffixes=(".pth",))

    from pmm.adoption.adopt import prepared, write_adopted

    with factory.importable():
        module, source = prepared(factory(), factory.text), {"factory": factory.text}
        return write_adopted(
            module, command.out, command.images, command.network, source, command.weights, command.ignore
        )


def _adopt_onnx(command: AdoptCommand) -> list[str]:
    if command.weights or command.ignore:
        flag = "--weights" if command.weights else "--ignore"
        problem = f"{flag} is for a factory, and an ONNX file has its weights"
        raise ConflictingOptions(problem, flag, hint="leave it out")

    from pmm.adoption.onnx_adopt import adopt_onnx, describe_adopted

    network = command.network
    artifact = adopt_onnx(
        command.source,
        command.out,
        command.images,
        command.onnx,
        output=network.output,
        metric=network.metric,
        dataset=network.dataset,
        root=network.root,
    )
    normalises = artifact.manifest.input.dtype == "uint8" and not command.onnx.uint8
    assumed = [
        each for each in command.images.assumptions() if not (normalises and each.startswith(("--mean", "--sc")))
    ]
    return [*([f"assumed, as not given: {', '.join(assumed)}"] if assumed else []), describe_adopted(artifact)]


def _refuse_weights(path: Path, out: Path) -> NoReturn:
    content = read_weights_file(path, EXPECTED)
    if is_adopted_network(content):
        raise InvalidFile("it is adopted already", path=path, hint=AS_IT_IS)
    if is_checkpoint(content):
        raise InvalidFile("it is a PMM checkpoint", path=path, hint="every command takes it as it is")
    known = describe_known(content, path, out)
    hint = known or f"name what makes its network: {proposed_adoption(content, path, out)}"
    raise InvalidFile("it holds weights, and no network", path=path, expected=EXPECTED, hint=hint)
