"""What a manifest says to programs in any language: from an image file to a distance, as a table of plain values.

It is derived from the other fields when a manifest is written, and never read back. docs/contract.md explains it. Loads
no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pmm.artifacts.resize_calls import DEFINITIONS, RESIZE_CALLS
from pmm.data.preprocessing import Preprocessing

if TYPE_CHECKING:
    from pmm.artifacts.manifest import EmbeddingContract, InputContract, Manifest

VERSION = 1
"""Of the table; another one has other keys."""
ORIENTATION = "turned upright as the EXIF orientation says, before anything else"
PIXELS = "8-bit RGB as it is stored, no colour profile applied; grey is repeated, alpha is dropped"
FORMULA = "(pixel / 255 - mean) / std"
AS_THEY_ARE = "none: the file normalises"
ANTIALIASED = (
    "of output pixel i along a side, input pixel x has the weight f((x + 0.5 - c) / s), with c = (i + 0.5) * before / "
    "after and s = max(1, before / after); weights are divided by their sum; first along the rows, rounded and clipped "
    "to 0..255, then along the columns, rounded and clipped again (Pillow from 13 on begins with the columns where "
    "that costs less: other roundings, and with bicubic and Lanczos other clippings)"
)
FOUR_NEAREST = (
    "the four input pixels around y = (i + 0.5) * before / after - 0.5 of either side, clipped to the image, "
    "weighted by 1 - the distance"
)
DISTANCES = {
    "euclidean": "sqrt(sum((a - b)^2))",
    "cosine": "1 - sum(a * b) / (sqrt(sum(a^2)) * sqrt(sum(b^2)))",
    "cosine of norm 1": "1 - sum(a * b)",
}


def client_contract(manifest: Manifest) -> dict[str, Any]:
    """The table; see docs/contract.md for its keys."""
    size, contract, embedding = manifest.preprocessing, manifest.input, manifest.embedding
    table = {
        "version": VERSION,
        "image": {"orientation": ORIENTATION, "pixels": PIXELS},
        "fit": _fit(size),
        "resize": _resize(size),
        "input": _input(manifest),
        "output": {
            "name": embedding.name,
            "type": embedding.dtype,
            "shape": [_batch(contract), embedding.dim],
            "norm_is_1": embedding.normalised,
            "mirrored_in_the_file": embedding.flip_tta,
        },
        "compare": _compare(manifest),
    }
    if statistics := manifest.crop_statistics:
        table["training_crops"] = {
            "mean_rgb": list(statistics.mean),
            "std_rgb": list(statistics.std),
            "crops": statistics.crops,
            "of": "pixels 0 to 255 of resized crops, before they are normalised",
        }
    return {**table, "steps": client_steps(size, contract, embedding)}


def _fit(size: Preprocessing) -> dict[str, Any]:
    if size.padding is None:
        return {"mode": "stretch"}
    return {
        "mode": "letterbox",
        "padding_rgb": list(size.padding),
        "content": "of an image h x w: if h * width > w * height, then height x max(1, round(w * height / h)), else "
        "max(1, round(h * width / w)) x width; a half is rounded to the even number",
        "place": "top = floor((height - content height) / 2), left = floor((width - content width) / 2)",
    }


def _resize(size: Preprocessing) -> dict[str, Any]:
    name = size.filter_name
    return {
        "height": size.height,
        "width": size.width,
        "interpolation": size.interpolation,
        "antialias": size.antialias,
        "as": name,
        "definition": f"{ANTIALIASED}; {DEFINITIONS[name]}" if size.antialias else FOUR_NEAREST,
        "calls": [call.facts() for call in RESIZE_CALLS[name]],
    }


def _input(manifest: Manifest) -> dict[str, Any]:
    size, contract, engine = manifest.preprocessing, manifest.input, manifest.engine
    least, most = contract.batch or 1, contract.batch
    if engine:
        least, most = engine.batch.least, engine.batch.most
    return {
        "name": contract.name,
        "type": contract.dtype,
        "layout": contract.layout,
        "shape": [_batch(contract), *contract.shape(size)],
        "images_per_run": {"least": least, "most": most},
        "colour": contract.colour,
        **_normalisation(size, contract),
    }


def _normalisation(size: Preprocessing, contract: InputContract) -> dict[str, Any]:
    """Per channel, in the order of the file's channels."""
    if contract.normalised_by == "graph" or contract.dtype == "uint8":
        return {"formula": AS_THEY_ARE}
    order = -1 if contract.colour == "bgr" else 1
    mean, std = size.mean[::order], size.std[::order]
    return {
        "formula": FORMULA,
        "mean": list(mean),
        "std": list(std),
        "or": "pixel * multiply + add",
        "multiply": [1 / (255 * each) for each in std],
        "add": [-m / s for m, s in zip(mean, std, strict=True)],
    }


def _batch(contract: InputContract) -> str | int:
    return contract.batch or "batch"


def _compare(manifest: Manifest) -> dict[str, Any]:
    measured = [
        {
            "precision": each.precision,
            "metric": each.metric,
            "data": each.data,
            "false_match_rate": point.fmr,
            "distance_at_most": point.distance,
            "true_positive_rate": point.tpr,
        }
        for each in manifest.thresholds
        for point in each.points
    ]
    return {
        "metric": manifest.embedding.metric,
        "distance": _distance(manifest.embedding),
        "nearer": "the lower distance",
        **({"one_person_where": measured} if measured else {}),
    }


def _distance(embedding: EmbeddingContract) -> str:
    cosine_of_one = embedding.metric == "cosine" and embedding.normalised
    return DISTANCES["cosine of norm 1" if cosine_of_one else embedding.metric]


def client_steps(size: Preprocessing, contract: InputContract, embedding: EmbeddingContract) -> list[str]:
    """The same contract in words: four steps from an image to the input, and two from the output."""
    fit = "stretch it"
    if size.padding is not None:
        fit = f"keep its ratio of sides, in the middle of RGB {' '.join(map(str, size.padding))}, and resize it"
    values = f"{contract.dtype}, pixels 0 to 255, not normalised: the file does that"
    if contract.dtype == "uint8":
        values = "uint8, as they are: the file normalises"
    elif contract.normalised_by == "caller":
        its = _normalisation(size, contract)
        values = f"float32, {FORMULA} per channel, mean {its['mean']}, std {its['std']}"
    shape = ", ".join(map(str, (_batch(contract), *contract.shape(size))))
    norm = "of norm 1" if embedding.normalised else "of any norm"
    return [
        f"read the image as 8-bit RGB, {ORIENTATION}",
        f"{fit} to {size.height} x {size.width} (height x width) as {size.filter_name} does",
        f"order the channels {contract.colour.upper()}, {values}",
        f"feed {contract.name} [{shape}], {contract.layout}",
        f"read {embedding.name} [{_batch(contract)}, {embedding.dim}], {embedding.dtype} {norm}",
        f"compare two by {_distance(embedding)}: the lower, the more alike",
    ]
