"""The embeddings of a selftest, right and wrong ones, as the fp32 reference computes them. Loads torch only for a
checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pmm.artifacts.manifest import EmbeddingContract, InputContract, Manifest
from pmm.data.preprocessing import Crops, Preprocessing
from pmm.runtime.base import Embeddings, run_in_batches
from pmm.runtime.ort_session import open_session
from pmm.selftest.crops import selftest_crops
from pmm.selftest.judge import cosines, norm_errors
from pmm.selftest.mistakes import Client, ClientMistake, Fed
from pmm.selftest.vectors import KnownMistake, SelftestCrop, SelftestVectors, Tolerance

if TYPE_CHECKING:
    from torch import Tensor, nn

EmbedFed = Callable[[Fed], Embeddings]
"""What a file is fed [N, ...] -> its embeddings [N, D], by the reference."""
BATCH = 16
"""Images that the reference sees at once: memory, not speed, is short on large networks."""
KEPT = 4
"""Networks and contracts whose vectors a process keeps, for what is exported of them next."""
LEAST_ROUNDED, MOST_ROUNDED = 0.999, 0.02
"""What rounding may do to the cosine with the expected row, and to its norm; more is another resize."""
ROOM_FOR_ROUNDING = 2.0
"""Others round in other pixels."""
_made: dict[tuple[Any, ...], SelftestVectors] = {}


def selftest_vectors(
    embed: EmbedFed,
    reference: str,
    source_sha256: str,
    size: Preprocessing,
    input: InputContract,
    embedding: EmbeddingContract,
) -> SelftestVectors:
    """The crops, what `embed` makes of them where the contract is kept, and where a client makes each mistake; of the
    same network and contract the ones that were made before.

    Args:
        reference: what `embed` is, in words.
        source_sha256: of the checkpoint, or the adopted ONNX file.
    """
    contracts = dataclasses.replace(input, name="", batch=None), dataclasses.replace(embedding, name="")
    key = (reference, source_sha256, size, *contracts)
    if key not in _made:
        client = Client(size=size, input=input, flip_tta=embedding.flip_tta)
        _made[key] = _make(embed, reference, source_sha256, client, embedding.normalised)
        while len(_made) > KEPT:
            del _made[next(iter(_made))]
    return _made[key]


def possible_mistakes(manifest: Manifest) -> list[str]:
    """The mistakes that the selftest of a file with this manifest names."""
    client = Client(size=manifest.preprocessing, input=manifest.input, flip_tta=manifest.embedding.flip_tta)
    crops = selftest_crops(client.size)
    return [mistake.name for mistake in _visible_mistakes(client, crops, client.right(crops))]


def _visible_mistakes(client: Client, crops: Sequence[Crops], right: Fed) -> dict[ClientMistake, Fed]:
    """What the file is fed where each mistake is made, of those that change what it is fed."""
    fed = {mistake: mistake.feed(crops) for mistake in client.mistakes()}
    # of floats, what differs by rounding alone is the same
    return {mistake: array for mistake, array in fed.items() if not np.allclose(array, right, rtol=0, atol=1e-4)}


def _make(embed: EmbedFed, reference: str, source_sha256: str, client: Client, normalised: bool) -> SelftestVectors:
    crops = selftest_crops(client.size)
    right = client.right(crops)
    shown = _visible_mistakes(client, crops, right)
    rounded = client.rounded_otherwise(crops)
    expected, *others = _embed_each(embed, [right, *rounded, *shown.values()])
    wrong = others[len(rounded) :]
    arrays: dict[str, npt.NDArray[Any]] = {f"crop_{row}": crop for row, crop in enumerate(crops)}
    arrays["expected"] = expected
    known = []
    for mistake, embeddings in zip(shown, wrong, strict=True):
        if np.isfinite(embeddings).all():  # else a client sees it at once
            facts = {field.name: getattr(mistake, field.name) for field in dataclasses.fields(KnownMistake)}
            known.append(KnownMistake(**facts))
            arrays[f"mistake_{mistake.name}"] = embeddings
    return SelftestVectors(
        reference=reference,
        source_sha256=source_sha256,
        height=client.size.height,
        width=client.size.width,
        normalised=normalised,
        crops=tuple(
            SelftestCrop(name=f"crop-{row}.png", height=crop.shape[0], width=crop.shape[1])
            for row, crop in enumerate(crops)
        ),
        mistakes=tuple(known),
        impossible=client.impossible(),
        rounding=_rounding(expected, others[: len(rounded)]),
        arrays=arrays,
    )


def _rounding(expected: Embeddings, rounded: list[Embeddings]) -> Tolerance:
    """`ROOM_FOR_ROUNDING` times what the furthest of `rounded` differ, within bounds."""
    right, others = expected.astype(np.float64), [rows.astype(np.float64) for rows in rounded]
    least = 1 - ROOM_FOR_ROUNDING * (1 - min(float(cosines(rows, right).min()) for rows in others))
    most = ROOM_FOR_ROUNDING * max(float(norm_errors(rows, right).max()) for rows in others)
    return Tolerance(min_cosine=min(1.0, max(least, LEAST_ROUNDED)), max_norm_error=min(most, MOST_ROUNDED))


def _embed_each(embed: EmbedFed, feeds: list[Fed]) -> list[Embeddings]:
    """The embeddings of each of `feeds` [N, ...]; images that several have in common are run once."""
    images = np.concatenate(feeds)
    places: dict[bytes, int] = {}
    rows = [places.setdefault(image.tobytes(), len(places)) for image in images]
    first = [rows.index(place) for place in range(len(places))]
    unique = images[first]
    embedded = np.concatenate([embed(unique[k : k + BATCH]) for k in range(0, len(unique), BATCH)])
    return np.split(np.asarray(embedded[rows], np.float32), len(feeds))


def checkpoint_reference(
    model: nn.Module, size: Preprocessing, fed: Preprocessing, input: InputContract, embedding: EmbeddingContract
) -> EmbedFed:
    """The checkpoint in fp32 on the CPU, behind the contract of its export: the images are brought to what it was
    trained on, mirroring and norm are applied to its embeddings.

    Args:
        size, fed: how the checkpoint's crops are prepared, and its export's.
    """
    import torch

    model = model.cpu().eval()
    factors = size.scale_and_offset() if input.normalised_by == "graph" else size.scale_and_offset_from(fed)
    scale, offset = (torch.from_numpy(each).view(3, 1, 1) for each in factors)

    def run(images: Tensor) -> npt.NDArray[np.float64]:
        return model(images).double().numpy()

    @torch.inference_mode()
    def embed(images_fed: Fed) -> Embeddings:
        images = torch.from_numpy(np.ascontiguousarray(images_fed)).float()
        images = images.permute(0, 3, 1, 2) if input.layout == "NHWC" else images
        images = images.flip(1) if input.colour == "bgr" else images
        images = (images * scale - offset).contiguous()
        embeddings = run(images)
        if embedding.flip_tta:
            embeddings = (embeddings + run(images.flip(3))) / 2
        if embedding.normalised:
            embeddings = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
        return embeddings.astype(np.float32)

    return embed


def with_own_mistakes(
    vectors: SelftestVectors, embed: EmbedFed, size: Preprocessing, input: InputContract
) -> SelftestVectors:
    """The same, but for the embeddings of mistakes, which `embed`, the file itself, computes."""
    client, names = Client(size=size, input=input), [each.name for each in vectors.mistakes]
    feeds = {each.name: each.feed(vectors.images) for each in client.mistakes() if each.name in names}
    own, *wrong = _embed_each(embed, [client.right(vectors.images), *feeds.values()])
    if not all(np.isfinite(embeddings).all() for embeddings in (own, *wrong)):
        return vectors
    arrays = {"own": own, **{f"mistake_{name}": rows for name, rows in zip(feeds, wrong, strict=True)}}
    return dataclasses.replace(vectors, has_own=True, arrays={**vectors.arrays, **arrays})


def onnx_reference(content: bytes, manifest: Manifest, path: str) -> EmbedFed:
    """An ONNX file in ONNX Runtime on the CPU, as it is. Raises InvalidFile if that cannot run it."""
    return session_reference(open_session(content, path), manifest)


def session_reference(session: Any, manifest: Manifest) -> EmbedFed:
    """The same of a session of ONNX Runtime that is open."""

    def run(fed: Fed) -> Embeddings:
        return session.run([manifest.embedding.name], {manifest.input.name: fed})[0]

    return lambda fed: run_in_batches(run, fed, manifest.input.batch)
