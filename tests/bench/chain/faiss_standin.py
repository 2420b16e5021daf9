"""What tests need of faiss, in numpy, with its behaviour: squared distances, -1 where there is nothing, the rounding of
its 8-bit scalar quantizer (half a step up, clipped to the range of training), ef raised to k."""

from __future__ import annotations

import heapq

import numpy as np

METRIC_INNER_PRODUCT, METRIC_L2 = 0, 1


class ScalarQuantizer:
    """Kinds."""

    QT_8bit = 0


class _Flat:
    def __init__(self, d, metric):
        self.d, self.metric_type, self.is_trained = d, metric, True
        self._rows = np.empty((0, d), np.float32)

    @property
    def ntotal(self):
        return len(self._rows)

    def train(self, rows):
        """Nothing to learn."""

    def add(self, rows):
        assert rows.dtype == np.float32
        self._rows = np.concatenate([self._rows, rows])

    def reconstruct(self, row):
        return self._rows[row]

    def search(self, queries, k):
        return self._best(queries, np.arange(self.ntotal), k)

    def _values(self, queries, rows):
        if self.metric_type == METRIC_INNER_PRODUCT:
            return queries @ rows.T
        return ((queries[:, None] - rows) ** 2).sum(2)

    def _best(self, queries, ids, k):
        """Of the rows `ids`; worst values and -1 where there are no more."""
        sign = -1 if self.metric_type == METRIC_INNER_PRODUCT else 1
        values = self._values(queries, self._rows[ids]) if len(ids) else np.empty((len(queries), 0))
        order = np.argsort(sign * values, axis=1, kind="stable")[:, :k]
        found = np.full((len(queries), k), -1)
        distances = np.full((len(queries), k), sign * np.finfo(np.float32).max, np.float32)
        found[:, : order.shape[1]] = ids[order]
        distances[:, : order.shape[1]] = np.take_along_axis(values, order, 1)
        return distances, found


class IndexFlatL2(_Flat):
    def __init__(self, d):
        super().__init__(d, METRIC_L2)


class IndexFlatIP(_Flat):
    def __init__(self, d):
        super().__init__(d, METRIC_INNER_PRODUCT)


class IndexScalarQuantizer(_Flat):
    def __init__(self, d, kind, metric=METRIC_L2):
        super().__init__(d, metric)
        self.is_trained = False

    def train(self, rows):
        self._low, self._wide, self.is_trained = rows.min(0), np.ptp(rows, axis=0), True

    def add(self, rows):
        codes = np.floor(255 * ((rows - self._low) / self._wide).clip(0, 1))
        super().add((self._low + (codes + 0.5) / 255 * self._wide).astype(np.float32))


class IndexIVFFlat(_Flat):
    def __init__(self, quantizer, d, nlist, metric=METRIC_L2):
        super().__init__(d, metric)
        self.nlist, self.nprobe = nlist, 1

    def train(self, rows):
        self._centroids = rows[np.random.default_rng(0).choice(len(rows), self.nlist, replace=False)]
        for _ in range(10):
            nearest = self._values(rows, self._centroids).argmin(1)
            for i in np.unique(nearest):
                self._centroids[i] = rows[nearest == i].mean(0)

    def add(self, rows):
        super().add(rows)
        self._list = self._values(self._rows, self._centroids).argmin(1)

    def make_direct_map(self):
        """Rows can be reconstructed anyhow."""

    def search(self, queries, k):
        probed = np.argsort(self._values(queries, self._centroids), axis=1)[:, : self.nprobe]
        found = [
            self._best(query[None], np.flatnonzero(np.isin(self._list, lists)), k)
            for query, lists in zip(queries, probed, strict=True)
        ]
        return tuple(np.concatenate(each) for each in zip(*found, strict=True))


class _Graph:
    efSearch = 16  # noqa: N815


class IndexHNSWFlat(IndexFlatL2):
    """One layer: each row and its M nearest, searched from row 0 with a list of max(efSearch, k)."""

    def __init__(self, d, m=32, metric=METRIC_L2):
        super().__init__(d)
        self._m, self.hnsw = m, _Graph()

    def add(self, rows):
        super().add(rows)
        near = np.argsort(self._values(self._rows, self._rows), axis=1)[:, 1 : self._m + 1]
        self._edges = [set(row.tolist()) for row in near]
        for row, others in enumerate(near.tolist()):
            for other in others:
                self._edges[other].add(row)

    def search(self, queries, k):
        return tuple(np.concatenate(each) for each in zip(*(self._walk(query, k) for query in queries), strict=True))

    def _walk(self, query, k):
        width, seen = max(self.hnsw.efSearch, k), {0}
        first = float(((query - self._rows[0]) ** 2).sum())
        waiting, best = [(first, 0)], [(-first, 0)]
        while waiting:
            distance, row = heapq.heappop(waiting)
            if len(best) >= width and distance > -best[0][0]:
                break
            for other in self._edges[row] - seen:
                seen.add(other)
                far = float(((query - self._rows[other]) ** 2).sum())
                if len(best) < width or far < -best[0][0]:
                    heapq.heappush(waiting, (far, other))
                    heapq.heappush(best, (-far, other))
                    if len(best) > width:
                        heapq.heappop(best)
        return self._best(query[None], np.sort([row for _, row in best]), k)
