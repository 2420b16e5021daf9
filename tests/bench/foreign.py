"""Networks that this project did not make, small enough to be judged in a test."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from pmm.adoption.adopt import adopt
from pmm.adoption.image_options import ImageOptions
from pmm.adoption.onnx_adopt import adopt_onnx
from pmm.adoption.onnx_options import OnnxOptions
from pmm.artifacts.artifact import new_artifact
from pmm.artifacts.onnx_file import embed_manifest, read_onnx

HEIGHT, WIDTH, DIM = 64, 32, 48


class PlainCnn(nn.Module):
    """Convolutions; where on the crop a colour is stays in the embedding, so that random weights tell people apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 5, 2, 2), nn.BatchNorm2d(24), nn.Hardswish())
        self.body = nn.Sequential(nn.Conv2d(24, 24, 3, 2, 1, groups=24), nn.Conv2d(24, 32, 1), nn.ReLU())
        self.head = nn.Linear(32 * 8, DIM, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        maps = nn.functional.adaptive_avg_pool2d(self.body(self.stem(images)), (4, 2)).flatten(1)
        return self.head(maps - maps.mean(1, keepdim=True))


class PlainAttention(nn.Module):
    """Patches, one block of attention, embeddings of norm 1."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.place = nn.Parameter(0.1 * torch.randn(1, 32, 32))
        self.norm, self.project = nn.LayerNorm(32), nn.Linear(32, 96)
        self.head = nn.Linear(32 * 8, DIM, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.place
        heads = self.project(self.norm(tokens)).unflatten(2, (2, 48)).transpose(1, 2)
        attended = nn.functional.scaled_dot_product_attention(*heads.chunk(3, -1))
        tokens = tokens + attended.transpose(1, 2).flatten(2)
        maps = tokens.unflatten(1, (8, 4)).mean(2).flatten(1)
        return nn.functional.normalize(self.head(maps - maps.mean(1, keepdim=True)))


NETWORKS = {"cnn": PlainCnn, "attention": PlainAttention}


def foreign_network(name: str) -> nn.Module:
    """One of `NETWORKS`, with the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = NETWORKS[name]().eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.normal_(module.running_mean, 0, 0.2)
        return network


def adopted_checkpoint(name: str, out: Path) -> Path:
    """One of `NETWORKS`, adopted without a data set."""
    adopt(foreign_network(name), out, height=HEIGHT, width=WIDTH, antialias=False)
    return out


def adopted_onnx(name: str, out: Path, *, uint8: bool = False) -> Path:
    """One of `NETWORKS` as its own ONNX file, adopted without a data set."""
    foreign, free = out.with_name("foreign.onnx"), {"pixels": {0: "n"}, "features": {0: "n"}}
    torch.onnx.export(
        foreign_network(name), (torch.zeros(2, 3, HEIGHT, WIDTH),), str(foreign), input_names=["pixels"],
        output_names=["features"], dynamic_axes=free, dynamo=False, opset_version=17,
    )  # fmt: skip
    return adopt_onnx(foreign, out, ImageOptions(antialias=False), OnnxOptions(uint8=uint8)).path


def as_export(adopted: Path, out: Path) -> Path:
    """An adopted ONNX file as an fp32 export of itself."""
    file = read_onnx(adopted)
    manifest = dataclasses.replace(file.manifest, checkpoint_sha256=file.sha256)
    del file.proto.metadata_props[:]
    with new_artifact(out, manifest) as draft:
        embed_manifest(file.proto, dataclasses.replace(manifest, sha256="", parity=None))
        draft.path.write_bytes(file.proto.SerializeToString())
    return out
