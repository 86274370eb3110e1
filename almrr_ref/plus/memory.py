"""A memory of normal patches: how far is each place of an image from the nearest one seen on a good image?

The reconstruction answers "does this place fit its surroundings?", the memory "has anything like it been seen?". What
one misses the other often finds, so ``--preset plus`` adds the logarithm of this distance to the map's evidence, and
shows it to the U-Net. In training an image must not find its own stored patches, nor those of another image of the same
part, which no new part has: a U-Net that has seen distances of 0 where nothing is wrong takes new places for anomalies.
When all is trained and measured, patches of the images kept aside join the choice (`complete_memory`).

Patches are those of PatchCore (Roth et al. 2022): the stages from the second on, each the mean of every 3x3
neighbourhood, joined on the second stage's grid; the stored ones are a greedy k-center selection. Deviations: the
stages are standardised as the network's are, so that what is usual at its own place is no news, and every value x
becomes sign(x) log(1 + |x|), so that many channels that differ a little count more than one that differs a lot; of the
joined channels the COMPONENTS principal ones are compared, which costs a quarter of the products and on a check set
found no less than all of them (bench/RESULTS.md); a fixed number of patches instead of a share, chosen from at most
POOL; and at the border a mean is that of the cells inside. PatchCore has zeros beyond it, which hides defects at the
border; that they hide how much good images vary there is the task of the image score's margin (``score_margin``).
Source: ours; the paper has no memory.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.deploy.packed import PackedLinear
from almrr_ref.features import resize

POOL = 2**19  # patches among which the stored ones are chosen; they take 0.2 GB while it is filled
COMPONENTS = 96  # of a patch's channels: the directions in which good images vary most
LOWEST = -4.0  # e^-4 of the middle distance: what is nearer is a stored patch itself, and the rest is rounding
FAR = 1e9  # squared distance of a patch that does not count
PART = 1024  # stored patches to compare with at a time: the distances to all of them would fill the main memory
SOME = 16384  # patches whose distances tell the middle one
CANDIDATES = 8192  # points that the greedy selection looks at between two updates of all


class NormalMemory(nn.Module):
    """Standardised stages [(b, c_k, h_k, w_k)] -> log squared distance to the nearest stored patch, (b, 1, n, n).

    The distance is relative: 0 is the middle value of the good training images, so that it can be added to a logit.

    Args:
        channels: of the stages.
        count: patches to store.
        grid: n, the side of the second stage (of the first, if there is only one).
    """

    centre: Tensor
    axes: Tensor
    patches: Tensor
    source: Tensor
    middle: Tensor

    def __init__(self, channels: tuple[int, ...], count: int, grid: int) -> None:
        super().__init__()
        self.grid, self.skip = grid, min(1, len(channels) - 1)
        width = sum(channels[self.skip :])
        kept = min(COMPONENTS, width)
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("axes", torch.zeros(width, kept))  # unit vectors
        self.register_buffer("patches", torch.zeros(count, kept))
        self.register_buffer("source", torch.full((count,), -1))  # the part that a patch is of
        self.register_buffer("middle", torch.zeros(()))

    def describe(self, stages: list[Tensor]) -> Tensor:
        """Patches of every place of the grid, all channels: (b, n n, c)."""
        compressed = [stage.sign() * stage.abs().log1p() for stage in stages[self.skip :]]
        means = [F.avg_pool2d(stage.to(self.centre.dtype), 3, 1, 1, count_include_pad=False) for stage in compressed]
        return torch.cat([resize(mean, self.grid) for mean in means], dim=1).flatten(2).transpose(1, 2)

    def points(self, stages: list[Tensor]) -> Tensor:
        """The principal components of every patch, (b, n n, k)."""
        return (self.describe(stages) - self.centre) @ self.axes

    def log_distance(self, points: Tensor, own: Tensor | None = None) -> Tensor:
        """Log of the squared distance to the nearest stored patch: (b, l, k) -> (b, l).

        Args:
            own: (b,) the parts that the points are of, whose own patches do not count.
        """
        nearest = torch.stack([part.amin(dim=-1) for part in self.products(points, own)]).amin(dim=0)
        return (nearest + points.square().sum(dim=-1)).clamp(min=1e-6).log()

    def products(self, points: Tensor, own: Tensor | None) -> Iterator[Tensor]:
        """|p|^2 - 2 p . q of every stored p, PART at a time: points q (b, l, k) -> (b, l, PART) each."""
        for part, source in zip(self.patches.split(PART), self.source.split(PART)):
            squares = part.square().sum(dim=1).expand(len(points), -1)
            if own is not None:
                squares = squares + FAR * (source == own[:, None].to(source.device))
            yield torch.baddbmm(squares[:, None], points, part.T.expand(len(points), -1, -1), alpha=-2)

    def forward(self, stages: list[Tensor], own: Tensor | None = None) -> Tensor:
        relative = (self.log_distance(self.points(stages), own) - self.middle).clamp(min=LOWEST)
        return relative.unflatten(1, (1, self.grid, self.grid))

    def fit_axes(self, batches: Iterable[list[Tensor]]) -> None:
        """Learn centre and principal components from the stages of good images, [(b, c_k, h_k, w_k)] each."""
        width, count = len(self.centre), 0
        total, moment = (self.centre.new_zeros(shape, dtype=torch.float64) for shape in ((width,), (width, width)))
        for stages in batches:
            rows = self.describe(stages).flatten(0, 1)
            count += len(rows)
            total += rows.double().sum(dim=0)
            moment += (rows.T @ rows).double()
        mean = total / count
        _, vectors = torch.linalg.eigh((moment / count - mean.outer(mean)).cpu())  # the largest come last
        self.centre.copy_(mean)
        self.axes.copy_(vectors[:, -self.axes.shape[1] :])

    def draw(self, stages: list[Tensor], share: int, generator: torch.Generator) -> Tensor:
        """Draw at most ``share`` patches of every image, (b, m, k) on the CPU, for `fit`."""
        points = self.points(stages).cpu()
        return torch.stack([image[torch.randperm(len(image), generator=generator)[:share]] for image in points])

    def fit(self, pool: Tensor, parts: Tensor, progress: Callable[[int, int], object] | None = None) -> None:
        """Choose the stored patches, as `store` does, and take the middle of all distances to them as 0."""
        self.store(pool, parts, progress)
        points = pool.to(self.patches).flatten(0, 1)
        some = points[:: max(1, len(points) // SOME)]
        self.middle.copy_(torch.cat([self.log_distance(part[None])[0] for part in some.split(PART)]).median())

    def store(self, pool: Tensor, parts: Tensor, progress: Callable[[int, int], object] | None = None) -> None:
        """Choose the stored patches from those of good images, (images, m, k) on any device.

        Args:
            parts: (images,), which part each image shows.
            progress: called with the number of patches chosen so far, and of all.
        """
        if progress is not None:
            progress(0, len(self.patches))
        points = pool.to(self.patches).flatten(0, 1)
        chosen = k_center(points, min(len(self.patches), len(points)), first=0, progress=progress)
        rows = torch.arange(len(self.patches), device=chosen.device) % len(chosen)  # too few to choose from: repeated
        self.patches.copy_(points[chosen[rows]])
        if len(parts.unique()) > 1:  # one part alone has no others to be compared with
            self.source.copy_(parts.to(chosen.device)[chosen[rows] // pool.shape[1]])


class PackedMemory(NormalMemory):
    """The memory of the deployed form: a filled one whose products have their weights packed (packed.py)."""

    def __init__(self, memory: NormalMemory) -> None:
        nn.Module.__init__(self)
        self.grid, self.skip = memory.grid, memory.skip
        for name, value in memory.named_buffers():
            if name not in ("patches", "source"):
                self.register_buffer(name, value.clone())
        parts = memory.patches.split(PART)
        self.search = nn.ModuleList(PackedLinear(-2 * part, part.square().sum(dim=1)) for part in parts)

    def products(self, points: Tensor, own: Tensor | None) -> Iterator[Tensor]:
        """The same, but that no patch is anybody's own."""
        for part in self.search:
            yield part(points)


def k_center(points: Tensor, count: int, first: int, progress: Callable[[int, int], object] | None = None) -> Tensor:
    """Greedy k-center: points (n, d) -> indices (count,), each that of the point farthest from all before it.

    Exact, but not one pass over all points for each: distances to the nearest centre only shrink, so as long as one of
    the CANDIDATES farthest points is as far as the nearest of them was, it is the farthest of all. Only when none is,
    all points meet the new centres, in one product of matrices.
    """
    points = points - points.mean(0)  # small norms keep the digits of |a|^2 - 2 ab + |b|^2
    squares = points.square().sum(1)
    nearest = torch.full_like(squares, math.inf)  # squared distance to the nearest centre; -1 for the centres
    chosen, fresh = [first], [first]
    while len(chosen) < count:
        for part in torch.tensor(fresh, device=points.device).split(512):
            for rows, norms, old in zip(points.split(16384), squares.split(16384), nearest.split(16384)):
                found = (squares[part] - 2 * (rows @ points[part].T)).amin(1).add(norms).clamp(min=0)
                torch.minimum(old, found, out=old)
        nearest[fresh] = -1
        far, candidates = nearest.topk(min(CANDIDATES, len(points)))
        bound, near_points, near_squares, fresh = float(far[-1]), points[candidates], squares[candidates], []
        while len(chosen) < count:
            distance, best = far.max(0)
            if fresh and distance < bound:
                break
            fresh.append(int(candidates[best]))
            chosen.append(fresh[-1])
            found = (near_squares - 2 * (near_points @ near_points[best]) + near_squares[best]).clamp(min=0)
            far = torch.minimum(far, found)
            far[best] = -1
        if progress is not None:
            progress(len(chosen), count)
    return torch.tensor(chosen, device=points.device)
