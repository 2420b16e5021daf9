"""What the chain builds of one gallery: our certified search, and indexes of the libraries that are installed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pmm.bench.chain.indexes import (
    RESCORED,
    CertifiedIndex,
    FaissIndex,
    Quantizer,
    SearchIndex,
    UsearchIndex,
    file_bytes,
)
from pmm.gallery.gallery import Gallery
from pmm.utils.arrays import Ints, Singles
from pmm.utils.extras import import_library

FEWEST_PROBES = 8
"""Lists that are searched even if there are few."""
LATE = 10
"""Rows that a gallery gets after the others."""
POINTS_PER_CENTROID = 39
"""Fewest training points that faiss wants for each."""


@dataclass(frozen=True, kw_only=True)
class IndexSpec:
    """One index that the chain builds."""

    name: str
    parent: Literal["stored fp32", "stored fp16"] = "stored fp32"
    library: str = ""
    """That must be installed; empty for ours."""
    own: bool = False
    """Whether it is our gallery."""
    shares: str = ""
    """What it shares with others of the same word."""
    build: Callable[[IndexBuilder], SearchIndex]


class IndexBuilder:
    """Builds the indexes of one gallery: vectors [N, D], which may be memory-mapped, in a folder of its own."""

    def __init__(
        self,
        vectors: Singles,
        camids: Ints,
        folder: Path,
        metric: Literal["euclidean", "cosine"] = "euclidean",
        *,
        made_up: int = 0,
    ) -> None:
        """`made_up`: how many of the last rows are."""
        self.vectors, self.camids, self.folder, self.metric = vectors, camids, folder, metric
        self._trained_on = ", trained on made-up crops too" if made_up else ""
        late = min(LATE, len(vectors) // 2)
        self.removed = np.arange(len(vectors), len(vectors) + late)
        """Rows that `certified` is given and takes out again."""
        self._graph: Any = None
        self._graph_bytes = 0
        self._codes: Any = None
        self._seconds: dict[str, float] = {}

    def build(self, spec: IndexSpec) -> tuple[SearchIndex, float]:
        """The index and the seconds that it took; of what several share, those of the first."""
        begin = time.perf_counter()
        index = spec.build(self)
        seconds = time.perf_counter() - begin
        return index, max(seconds, self._seconds.setdefault(spec.shares or spec.name, seconds))

    def certified(self, precision: Literal["fp32", "fp16"]) -> SearchIndex:
        """Our own gallery: its last rows are added later, with copies of the first ones, which are removed again."""
        path, late = self.folder / f"gallery-{precision}", len(self.removed)
        start = len(self.vectors) - late
        gallery = Gallery.create(
            path,
            self.vectors[:start],
            np.arange(start),
            self.metric,
            columns={"camera": self.camids[:start]},
            precision=precision,
        )
        again = np.r_[start : start + late, :late]
        gallery.add(self.vectors[again], np.r_[start : start + late, self.removed], {"camera": self.camids[again]})
        gallery.remove(self.removed)
        gallery.search(self.vectors[:1], 1)  # what is made when it is first searched
        return CertifiedIndex(gallery)

    def ivf_sq8(self) -> SearchIndex:
        """Inverted lists of scalar-quantized residuals."""
        faiss = import_library("faiss")
        dim, lists = self.vectors.shape[1], self._lists
        kind = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatL2(dim), dim, lists, kind, faiss.METRIC_L2)
        return self._inverted(index, "int8 per dimension", "scalar")

    def ivf_pq(self, *, rescored: bool) -> SearchIndex:
        """Inverted lists of product-quantized residuals; `rescored`: the first thousand are measured again in fp32."""
        faiss = import_library("faiss")
        dim = self.vectors.shape[1]
        parts = next(parts for parts in range(max(1, dim // 8), 0, -1) if dim % parts == 0)
        bits = min(8, max(1, int(math.log2(max(2, len(self.vectors) / POINTS_PER_CENTROID)))))
        if self._codes is None:
            self._codes = faiss.IndexIVFPQ(faiss.IndexFlatL2(dim), dim, self._lists, parts, bits)
        words = f"{parts} codes of {bits} bits" + (f", {RESCORED:,} measured again in fp32" if rescored else "")
        return self._inverted(self._codes, words, "coarse", self.vectors if rescored else None)

    def pca(self, dimensions: int) -> SearchIndex:
        """A projection, whose distances are those of the projected vectors: too short, all of them."""
        faiss = import_library("faiss")
        dim = self.vectors.shape[1]
        kept = min(dimensions, dim // 2) or 1
        vectors, projection = np.ascontiguousarray(self.vectors), faiss.PCAMatrix(dim, kept)
        index = faiss.IndexPreTransform(projection, faiss.IndexFlatL2(kept))
        index.train(vectors)
        index.add(vectors)
        knob = f"number of dimensions (now {kept} of {dim}), or measure again in all of them"
        return FaissIndex(index, settings=f"{kept} dimensions, fp32{self._trained_on}", knob=knob, quantizer="coarse")

    def hnsw(self, ef: int) -> SearchIndex:
        """A graph, which all `ef` share."""
        faiss = import_library("faiss")
        if self._graph is None:
            self._graph = faiss.IndexHNSWFlat(self.vectors.shape[1], 16)
            self._graph.add(np.ascontiguousarray(self.vectors))
            self._graph_bytes = file_bytes(self._graph)
        settings, knob = f"M 16, ef {ef}, fp32", f"efSearch (now {ef})"
        parameters = {"efSearch": ef}
        return FaissIndex(
            self._graph, settings=settings, knob=knob, parameters=parameters, disk_bytes=self._graph_bytes
        )

    def usearch(self, ef: int) -> SearchIndex:
        """A graph by another library."""
        library = import_library("usearch.index")
        index = library.Index(
            ndim=self.vectors.shape[1], metric="l2sq", dtype="f32", connectivity=16, expansion_add=40,
            expansion_search=ef,
        )  # fmt: skip
        index.add(np.arange(len(self.vectors)), np.ascontiguousarray(self.vectors))
        return UsearchIndex(index, ef)

    @property
    def _lists(self) -> int:
        count = len(self.vectors)
        return max(1, min(int(4 * math.sqrt(count)), count // POINTS_PER_CENTROID))

    def _inverted(
        self, index: Any, words: str, quantizer: Quantizer, rescored_from: Singles | None = None
    ) -> SearchIndex:
        probes = min(self._lists, max(FEWEST_PROBES, self._lists // 16))
        if not index.ntotal:
            vectors = np.ascontiguousarray(self.vectors)
            index.cp.seed = 0
            index.train(vectors)
            index.add(vectors)
        settings = f"{self._lists} lists, nprobe {probes}, {words}{self._trained_on}"
        knob, parameters = f"nprobe (now {probes} of {self._lists} lists)", {"nprobe": probes}
        return FaissIndex(
            index,
            settings=settings,
            knob=knob,
            quantizer=quantizer,
            parameters=parameters,
            rescored_from=rescored_from,
        )


INDEXES = {
    spec.name: spec
    for spec in (
        IndexSpec(name="certified", own=True, build=lambda make: make.certified("fp32")),
        IndexSpec(name="certified-fp16", own=True, parent="stored fp16", build=lambda make: make.certified("fp16")),
        IndexSpec(name="pca-64", library="faiss", build=lambda make: make.pca(64)),
        IndexSpec(name="ivf-sq8", library="faiss", build=IndexBuilder.ivf_sq8),
        IndexSpec(name="ivf-pq", library="faiss", shares="pq", build=lambda make: make.ivf_pq(rescored=False)),
        IndexSpec(name="ivf-pq-rescored", library="faiss", shares="pq", build=lambda make: make.ivf_pq(rescored=True)),
        IndexSpec(name="hnsw-16", library="faiss", shares="graph", build=lambda make: make.hnsw(16)),
        IndexSpec(name="hnsw-64", library="faiss", shares="graph", build=lambda make: make.hnsw(64)),
        IndexSpec(name="hnsw-256", library="faiss", shares="graph", build=lambda make: make.hnsw(256)),
        IndexSpec(name="usearch-64", library="usearch", build=lambda make: make.usearch(64)),
    )
}
"""By the names that --indexes takes."""
