"""A network that other code made becomes a file that every other command takes."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pmm.adoption.image_options import ImageOptions
from pmm.adoption.network_options import Metric, NetworkOptions
from pmm.adoption.program import trace
from pmm.adoption.typed_flags import typed_flags
from pmm.adoption.user_code import CannotAdopt, user_code
from pmm.adoption.weights import load_weights
from pmm.artifacts.adopted_file import Adopted, save_adopted
from pmm.artifacts.checkpoint import versions
from pmm.artifacts.trained_model import read_model
from pmm.data.measure_crops import dataset_statistics
from pmm.data.preprocessing import Colours, Interpolation
from pmm.models.output import EmbeddingModel
from pmm.utils.files import output_file


def adopt(
    module: nn.Module,
    out: str | Path,
    *,
    height: int,
    width: int,
    mean: Colours | None = None,
    std: Colours | None = None,
    colour: Literal["rgb", "bgr"] = "rgb",
    scale: Literal["1/255", "1"] = "1/255",
    interpolation: Interpolation = "bilinear",
    antialias: bool = True,
    padding: tuple[int, int, int] | None = None,
    output: str = "",
    metric: Metric = "auto",
    dataset: str = "",
    root: str = "",
) -> EmbeddingModel:
    """Write a network that other code made to `out` (.pth), so that every command and function takes it.

    The file holds the network itself; nothing later needs the code of `module`, which stays as it is.

    Args:
        module: float32 images [N, 3, H, W] -> embeddings [N, D]; used in eval mode, in fp32 on the CPU.
        out: file to write.
        height: of its images, in pixels.
        width: of its images, in pixels.
        mean: what is taken from its images, in its order of channels and after `scale`; None: ImageNet's.
        std: what they are then divided by; None: ImageNet's.
        colour: order of the channels that it takes.
        scale: what pixels are multiplied by before `mean` and `std`.
        interpolation: how crops are resized.
        antialias: as PIL does, or as OpenCV, without.
        padding: keep the ratio of a crop's sides and fill the rest with this colour; None: crops are stretched.
        output: name or index of the embeddings among several outputs.
        metric: how embeddings are compared; with cosine they are given norm 1, auto takes them as they are.
        dataset: data set to judge it on where a later command is not told one.
        root: folder of that data set.

    Returns:
        The network in the file, which gives the bits of `module`.

    Raises:
        CannotAdopt: it raises, makes no embeddings, behaves otherwise in batches, or cannot be exported.
        CannotWrite: the disk is full or `out` cannot be written.
        InvalidValue, ConflictingOptions: what no contract can have.

    Examples:
        >>> from torch import nn
        >>> network = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> pmm.adopt(network, "adopted.pth", height=64, width=32).embedding_dim
        16
        >>> pmm.load_model("adopted.pth").embedding_dim
        16
    """
    images = ImageOptions(
        height=height,
        width=width,
        mean=mean,
        std=std,
        colour=colour,
        scale=scale,
        interpolation=interpolation,
        antialias=antialias,
        padding=padding,
    )
    options = NetworkOptions(output=output, metric=metric, dataset=dataset, root=root)
    out = output_file(Path(out), suffixes=(".pth",))
    with user_code("the network cannot be copied:"):
        module = copy.deepcopy(module)
    write_adopted(prepared(module, type(module).__name__), out, images, options, {"module": type(module).__name__})
    return read_model(out).model


def write_adopted(
    module: nn.Module,
    out: Path,
    images: ImageOptions,
    options: NetworkOptions,
    source: Mapping[str, str],
    weights: Path | None = None,
    ignore: Sequence[str] = (),
) -> list[str]:
    """Write `module`, of `prepared`, with the weights of a file or with its own; what is to be said of it, a line each.

    Raises CannotAdopt and InvalidFile as `trace` and `load_weights`, CannotWrite if the disk is full.
    """
    size = images.preprocessing(images.height or 0, images.width or 0)
    loaded = load_weights(module, weights, ignore) if weights else None
    traced = trace(module, size, output=options.output, bgr=images.colour == "bgr", cosine=options.metric == "cosine")
    state, network = module.state_dict(), traced.network
    if loaded:
        lines = loaded.account(state, traced.read).splitlines()
        source = {**source, "weights": loaded.path.name, "weights sha256": loaded.sha256}
    else:
        lines = [f"weights: as the factory made them, checksum {checksum(state)} (no --weights)"]
    assumed = images.assumptions()
    source = {**source, "flags": typed_flags(images, options, ignore=ignore), "assumed": ", ".join(assumed)}
    save_adopted(
        out,
        Adopted(
            model=network,
            preprocessing=size,
            dataset=options.dataset,
            root=options.root,
            crop_statistics=dataset_statistics(options.dataset, options.root, size),
            source=dict(source),
        ),
        versions(),
    )
    metric = "cosine distances" if network.normalised else "euclidean distances (not of norm 1)"
    parameters = sum(each.numel() for each in network.parameters())
    macs = network.macs()
    return [
        *lines,
        *([f"assumed, as not given: {', '.join(assumed)}"] if assumed else []),
        *traced.notes,
        f"{out} is written: embeddings [{network.embedding_dim}] for {metric}, {parameters:,} parameters"
        + (f", {macs / 1e9:.2f} GMAC" if macs else "")
        + f", images {size.describe()}",
    ]


def prepared(value: Any, text: str) -> nn.Module:
    """The network that a factory returned, in eval mode and fp32 on the CPU. Raises CannotAdopt if it is none."""
    if not isinstance(value, nn.Module):
        hint = "name a function that makes the network and returns it alone"
        raise CannotAdopt(f"{text} returns a {type(value).__name__}", expected="an nn.Module", hint=hint)
    if isinstance(value, torch.jit.ScriptModule):
        hint = "give the nn.Module that it was made from, or export it to ONNX yourself, and adopt that file"
        raise CannotAdopt(f"{text} returns TorchScript", expected="an nn.Module", hint=hint)
    for wrapper, inner in ((nn.DataParallel, "module"), (nn.parallel.DistributedDataParallel, "module")):
        if isinstance(value, wrapper):
            value = getattr(value, inner)
    value = getattr(value, "_orig_mod", value)  # of torch.compile
    with user_code("the network cannot be moved to the CPU:"):
        return value.cpu().float().eval().requires_grad_(False)


def checksum(state: Mapping[str, Tensor]) -> str:
    """The first digits of the SHA-256 of all weights, by which random ones are noticed: they differ each time."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
