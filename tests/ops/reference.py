"""The mix cell by cell in plain Python, from the definition, to judge the ops by."""

import math

import torch


def blocks_of(h, w, block):
    rows = math.ceil(h / block[0])
    return {(i, j): (j // block[1]) * rows + i // block[0] for i in range(h) for j in range(w)}


def scores_by_hand(cam, block):
    n, h, w = cam.shape
    ids = blocks_of(h, w, block)
    scores = torch.zeros(n, max(ids.values(), default=-1) + 1, dtype=cam.dtype)
    for s in range(n):
        for i in range(h):  # row-major: the cells of each block come in the order the definition adds them
            for j in range(w):
                scores[s, ids[i, j]] += cam[s, i, j]
    return scores


def ranks_by_hand(scores):
    scores = [-math.inf if math.isnan(v) else v for v in scores]
    order = sorted(range(len(scores)), key=lambda b: (-scores[b], b))
    return [order.index(b) for b in range(len(scores))]


def replaced_by_hand(cam, block, k, on_empty):
    n, h, w = cam.shape
    ids = blocks_of(h, w, block)
    replaced = torch.zeros(n, h, w, dtype=torch.bool)
    scores = scores_by_hand(cam, block)
    for s in range(n):
        if on_empty == "skip" and not any(v > 0 for v in cam[s].flatten().tolist()):
            continue
        ranks = ranks_by_hand(scores[s].tolist())
        for (i, j), b in ids.items():
            replaced[s, i, j] = ranks[b] < k
    return replaced


def mixed_by_hand(x, replaced, partner):
    mixed = x.clone()
    for s, i, j in replaced.nonzero().tolist():
        mixed[s, :, i, j] = x[partner[s], :, i, j]
    return mixed


def adjoint_by_hand(dy, replaced, partner):
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    dx = torch.zeros_like(dy, dtype=wide)
    for s in range(len(dy)):
        dx[s] += torch.where(replaced[s], 0, dy[s].to(wide))
    for s in range(len(dy)):
        for i, j in replaced[s].nonzero().tolist():
            dx[partner[s], :, i, j] += dy[s, :, i, j].to(wide)
    return dx.to(dy.dtype)
