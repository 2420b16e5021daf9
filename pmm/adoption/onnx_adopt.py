"""A foreign ONNX file becomes an artifact: the same operators, with a contract, and proved to give the same embeddings.

Its own fp32 run in ONNX Runtime on a CPU is what everything that is made from it is compared with. Loads no torch.
"""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from pmm.adoption.image_options import ImageOptions
from pmm.adoption.network_options import NetworkOptions
from pmm.adoption.onnx_assembly import contract_of, from_images_to, with_interface
from pmm.adoption.onnx_interface import ImageInput, embedding_output, find_image_input, inputs_of
from pmm.adoption.onnx_options import OnnxOptions
from pmm.adoption.onnx_reading import ForeignOnnx, read_foreign_onnx
from pmm.adoption.probes import (
    BATCHES,
    PROBES,
    ROUNDING,
    ROUNDING_IN_HALF,
    UNIT_NORM,
    alike,
    check_batches,
    check_numbers,
    probes,
)
from pmm.adoption.typed_flags import typed_flags
from pmm.artifacts.artifact import Artifact, new_artifact
from pmm.artifacts.manifest import PRECISIONS, EmbeddingContract, InputContract, Manifest, OnnxOrigin
from pmm.artifacts.onnx_content import graph_digest
from pmm.artifacts.onnx_file import embed_manifest, read_onnx
from pmm.data.measure_crops import dataset_statistics
from pmm.data.preprocessing import Crops, Preprocessing
from pmm.export.parity_check import ParityCheck
from pmm.export.precision import GraphPrecision, onnx_precision
from pmm.export.selftest import add_selftest, onnx_vectors
from pmm.runtime.base import Embeddings, run_in_batches
from pmm.runtime.ort import OrtRunner
from pmm.runtime.ort_session import open_session
from pmm.utils.build_info import __version__
from pmm.utils.errors import ConflictingOptions, InvalidFile, reason_of
from pmm.utils.files import output_file

if TYPE_CHECKING:
    import onnx

UNCHANGED = (1 / 255, 1 / 255, 1 / 255)
"""The std, with a mean of 0, with which pixels stay 0..255: of images that the caller does not normalise."""


def adopt_onnx(
    source: str | Path,
    out: Path,
    images: ImageOptions,
    options: OnnxOptions,
    *,
    output: str = "",
    metric: Literal["auto", "euclidean", "cosine"] = "auto",
    dataset: str = "",
    root: str = "",
) -> Artifact:
    """Write the network of the ONNX file `source` to `out`, with a manifest beside it and inside.

    The operators are those of the file; of several outputs the others are left out, with what only they need. Images of
    float16 become float32, cast in the graph, and an output [N, D, 1, 1] becomes [N, D].

    Args:
        images: what is said of its images; the size only where the file does not tell.
        output: name of the embeddings among several outputs.
        metric: how its embeddings are compared; auto is cosine if they have norm 1, else euclidean. With cosine they
            are given norm 1, in the graph.
        dataset, root: data set to judge it on.

    Raises:
        InvalidFile: nothing that can be adopted (see `read_foreign_onnx`, `find_image_input`); no embeddings [N, D],
            NaN among them, embeddings that depend on the other images of the batch, or that are the same for all.
        InvalidValue, ConflictingOptions: what is given is not what the file says, or is about images that it does not
            take.
    """
    out = output_file(out, Path(source), suffixes=(".onnx",))
    flags = typed_flags(images, options, NetworkOptions(output=output, metric=metric))
    foreign = read_foreign_onnx(source)
    found = find_image_input(
        foreign, name=options.input, layout=options.layout or "", height=images.height, width=images.width
    )
    size, colour = _preprocessing(foreign, found, images, options), images.colour or "rgb"
    value = embedding_output(foreign, output)
    proto = from_images_to(foreign, found, value)
    expected, fewer = _run(foreign, proto, found, value.name, size, colour)
    measured = _precision(proto, foreign)
    contract = contract_of(proto, found, colour, uint8=options.uint8)
    shape, expected = expected.shape[1:], expected.reshape(len(expected), -1)
    fp32 = set(measured.share) == {"fp32"} and found.dtype != "float16"
    check_batches(
        expected,
        [each.reshape(len(each), -1) for each in fewer],
        partial(InvalidFile, path=foreign.path),
        rounding=ROUNDING if fp32 else ROUNDING_IN_HALF,
    )
    if words := alike(expected):
        logging.getLogger("pmm").warning("%s: %s", foreign.path, words)
    norms = np.linalg.norm(expected, axis=1, keepdims=True)
    normalised = bool((np.abs(norms - 1) < UNIT_NORM).all())
    normalise = metric == "cosine" and not normalised
    if normalise:
        expected = expected / np.maximum(norms, 1e-12)
    name = with_interface(proto, found, contract, size, colour, shape, normalise=normalise)
    chosen: Literal["euclidean", "cosine"] = "cosine" if normalised else "euclidean"
    embedding = EmbeddingContract(
        dim=expected.shape[1],
        name=name,
        normalised=normalised or normalise,
        metric=chosen if metric == "auto" else metric,
    )
    manifest = _manifest(foreign, proto, measured, contract, embedding, size, OnnxOrigin(
        sha256=foreign.sha256, producer=foreign.producer, dataset=dataset, root=root, flags=flags
    ))  # fmt: skip
    with new_artifact(out, manifest) as draft:
        embed_manifest(proto, manifest)
        draft.path.write_bytes(proto.SerializeToString(deterministic=True))
        with draft.openable(), OrtRunner(draft.path, warn=False) as runner:
            check = ParityCheck(probes(size), expected, f"those of {foreign.path.name} in ONNX Runtime")
            # casts are merged, and rounding with them: a half-precision graph with one more is not the same to the bit
            strict = "fp16" if manifest.precision_share.keys() & {"fp16", "bf16"} else "fp32"
            parity = check.check(runner, strict, str(out), runner.info.provider)
            add_selftest(draft, onnx_vectors(read_onnx(draft.path)), runner)
        draft.manifest = dataclasses.replace(manifest, parity=parity)
    return Artifact(out, draft.manifest)


def describe_adopted(artifact: Artifact) -> str:
    """One line: what the file takes and gives, and what it is compared with."""
    manifest = artifact.manifest
    images, embedding = manifest.input, manifest.embedding
    shape = ", ".join(map(str, images.shape(manifest.preprocessing)))
    normalised = "" if images.dtype == "float32" else " as they are"
    return (
        f"{artifact.path}: {manifest.precision_found} (opset {manifest.opset}, {manifest.macs / 1e9:.2f} GMAC), takes "
        f"{images.dtype} {images.name} [{images.batch or 'batch'}, {shape}] {images.colour.upper()}{normalised}, gives "
        f"{embedding.name} [{embedding.dim}] for {embedding.metric} distances; its own run in ONNX Runtime is the "
        "reference"
    )


def _preprocessing(
    foreign: ForeignOnnx, found: ImageInput, images: ImageOptions, options: OnnxOptions
) -> Preprocessing:
    """How crops are resized and normalised. Raises ConflictingOptions for what cannot be said of uint8 images."""
    size = images.preprocessing(found.height, found.width)
    if found.normalised_by == "caller":
        return size
    said = {"--mean": images.mean, "--std": images.std, "--scale": images.scale, "--uint8": options.uint8}
    if flags := [flag for flag, value in said.items() if value]:
        problem = f"{', '.join(flags)} would change nothing: {foreign.path} takes uint8 images, and normalises them"
        raise ConflictingOptions(problem, *flags, hint="leave it out")
    return dataclasses.replace(size, mean=(0.0, 0.0, 0.0), std=UNCHANGED)


def _run(
    foreign: ForeignOnnx,
    part: onnx.ModelProto,
    images: ImageInput,
    output: str,
    size: Preprocessing,
    colour: Literal["rgb", "bgr"],
) -> tuple[Embeddings, list[Embeddings]]:
    """What the foreign file itself makes of the probes, [N, D] or [N, D, 1, 1], of all together and of the first of
    them in the `BATCHES`; if it has other inputs that the output does not need, what the `part` between images and
    output makes of them."""
    whole = foreign.proto if len(inputs_of(foreign.proto.graph)) == 1 else part
    session = open_session(whole.SerializeToString(), str(foreign.path))
    contract = contract_of(foreign.proto, images, colour, uint8=False)

    def run(crops: Crops) -> npt.NDArray[Any]:
        feed = contract.feed(crops, size).astype(images.dtype)
        return np.asarray(session.run([output], {images.name: feed})[0])

    crops = probes(size)
    try:
        embeddings = run_in_batches(run, crops, images.batch)
        fewer = [run_in_batches(run, crops[:count], images.batch).astype(np.float32) for count in BATCHES]
    except Exception as error:  # ORT raises its own exception types
        raise InvalidFile(
            f"ONNX Runtime cannot run it on images {[images.batch or PROBES, *contract.shape(size)]} "
            f"({reason_of(error)})",
            path=foreign.path,
            hint="export the network with a batch, and sizes, that it really takes",
        ) from error
    shape = list(embeddings.shape)
    if len(shape) not in (2, 4) or shape[0] != PROBES or shape[2:] not in ([], [1, 1]):
        problem = f"its output {output} is {shape} for {PROBES} images"
        hint = "choose another --output, or export the network up to its embeddings"
        raise InvalidFile(problem, path=foreign.path, expected="embeddings [N, D] or [N, D, 1, 1]", hint=hint)
    check_numbers(embeddings, f"its output {output}", partial(InvalidFile, path=foreign.path))
    if (embeddings == embeddings[0]).all():
        raise InvalidFile(f"its output {output} is the same for all images", path=foreign.path)
    return embeddings.astype(np.float32), fewer


def _precision(proto: onnx.ModelProto, foreign: ForeignOnnx) -> GraphPrecision:
    measured = onnx_precision(proto, foreign.path)
    if measured.precision not in PRECISIONS:
        expected = f"one of {', '.join(PRECISIONS)}"
        raise InvalidFile(f"it computes in {measured.precision}", path=foreign.path, expected=expected)
    return measured


def _manifest(
    foreign: ForeignOnnx,
    proto: onnx.ModelProto,
    measured: GraphPrecision,
    contract: InputContract,
    embedding: EmbeddingContract,
    size: Preprocessing,
    origin: OnnxOrigin,
) -> Manifest:
    import onnx
    import onnxruntime

    return Manifest(
        checkpoint_sha256=foreign.sha256,
        method="adopted",
        preprocessing=size,
        input=contract,
        embedding=embedding,
        precision=measured.precision,
        precision_found=measured.precision,
        precision_share=measured.share,
        macs=measured.total,
        opset=foreign.opset,
        graph=graph_digest(proto),
        versions={"pmm": __version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
        adopted=origin,
        crop_statistics=dataset_statistics(origin.dataset, origin.root, size),
    )
