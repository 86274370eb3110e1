"""Greedy k-center selection: few points that leave none of many far from its nearest one.

It chooses what the memory stores (memory.py), and PatchCore's coreset (Roth et al. 2022), after Sener & Savarese 2018.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

CANDIDATES = 8192  # points among which it chooses between two updates of all points
AT_ONCE = 32  # choices between two looks of the host at them, each of which waits for the GPU


def k_center(points: Tensor, count: int, first: int, progress: Callable[[int, int], object] | None = None) -> Tensor:
    """Greedy k-center: points (n, d) -> indices (count,), each of the point farthest from all centres before it.

    Exact, but without a pass over all points per choice. Distances to the nearest centre only shrink. So as long as one
    of the CANDIDATES farthest points is at least as far as the nearest candidate was, it is the farthest of all. When
    none is, the distances of all points are updated by the new centres, in one product of matrices.
    """
    points = points - points.mean(0)  # small norms keep the digits of |a|^2 - 2 ab + |b|^2
    squares = points.square().sum(1)
    nearest = torch.full_like(squares, math.inf)  # squared distance to the nearest centre; -1 for the centres
    at_once = 16384 if points.is_cuda else 512  # products of so many rows stay in a CPU's cache
    chunks = list(zip(points.split(at_once), squares.split(at_once), nearest.split(at_once)))
    chosen, fresh = [first], [first]
    while len(chosen) < count:
        for centres in torch.tensor(fresh, device=points.device).split(512):
            columns, added = points[centres].T, squares[centres]
            for rows, norms, old in chunks:
                distance = torch.addmm(added, rows, columns, alpha=-2).amin(1).add_(norms).clamp_(min=0)
                torch.minimum(old, distance, out=old)
        nearest[fresh] = -1
        far, candidates = nearest.topk(min(CANDIDATES, len(points)))
        bound, near_points, near_squares, fresh = float(far[-1]), points[candidates], squares[candidates], []
        left, over = count - len(chosen), False
        while len(fresh) < left and not over:
            picks, distances = [], []
            for _ in range(min(AT_ONCE, left - len(fresh))):
                farthest, best = far.max(dim=0, keepdim=True)
                distances.append(farthest)
                picks.append(best)
                distance = near_squares - 2 * (near_points @ near_points[best].T)[:, 0] + near_squares[best]
                far = torch.minimum(far, distance.clamp(min=0)).index_fill(0, best, -1)
            for pick, farthest in zip(candidates[torch.cat(picks)].tolist(), torch.cat(distances).tolist()):
                over = bool(fresh) and farthest < bound
                if over:
                    break
                fresh.append(pick)
        chosen += fresh
        if progress is not None:
            progress(len(chosen), count)
    return torch.tensor(chosen, device=points.device)
