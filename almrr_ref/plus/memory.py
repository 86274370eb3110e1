"""A memory of normal patches: how far is each place of an image from the nearest patch of a good image?

The reconstruction asks whether a place fits its surroundings, the memory whether good images show anything like it. One
often finds what the other misses, so ``plus`` adds the log of this distance to the map's evidence and to the U-Net's
input. In training the stored patches of the image's part do not count: a new part has none, and a U-Net that learned
from distances of 0 would take every new place for an anomaly. (Ours: the paper has no memory.)

Patches are those of PatchCore (Roth et al. 2022): the stages from the second on, averaged over 3x3 neighbourhoods and
joined on block 2's grid; a greedy k-center selection of them is stored. Deviations:

- The stages are standardised as the network's are: what is usual at its place does not count.
- Every value x becomes sign(x) log(1 + |x|): many small differences count more than one large one.
- Only the COMPONENTS principal components are compared: a quarter of the products, and as much found (bench/LOG.md).
- The number of stored patches is fixed, not a fraction; they are chosen from at most POOL.
- At the border a mean is taken over the cells inside. PatchCore pads with zeros, which hides defects at the border.
- Places are compared with a shortlist of their image (`NormalMemory.shortlist`), as neighbours have nearly the same
  nearest patches; the farthest then with all. So the score is right to 1e-3, and only a quiet place may seem a little
  farther than it is (bench/LOG.md).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from almrr_ref.features import by_image, resize
from almrr_ref.kernels.checks import exporting
from almrr_ref.plus.k_center import k_center

POOL = 2**17  # patches among which the stored ones are chosen
COMPONENTS = 96  # of a patch's channels: the directions in which good images vary most
LOWEST = -4.0  # least log distance: a place nearer than e^-4 of the middle one is a stored patch, up to rounding
FAR = 1e9  # squared distance of a patch that does not count
SURPLUS = -2  # part of the copies that fill a memory for which there are too few patches: they never count
CHUNK = 1024  # stored patches compared at a time: the distances to all of them would fill the main memory
SHORTLIST = ((4, 2048), (2, 512))  # steps: side of a block of places, and the number of patches that remain
LEADING = 48  # components, those of the largest variance, that the first step of the shortlist compares
CHECKED = 1 / 32  # of the places, the farthest, which decide on the score: compared with all patches again
MIDDLE_SAMPLE = 16384  # patches whose median distance is the middle one


class NormalMemory(nn.Module):
    """Standardised stages [(b, c_k, h_k, w_k)] -> log squared distance to the nearest stored patch, (b, 1, *size).

    The distance is relative: 0 is the median of the good training images (`fit`), so that it can be added to a logit.

    Args:
        channels: c_k of the stages.
        count: patches to store.
        grid: (h, w) on which the patches lie: half the feature grid each way, which is block 2's.
        size: (height, width) of the result.
        cells: bool (h w,): the places of good images to learn from; None: all.
    """

    centre: Tensor
    axes: Tensor
    patches: Tensor
    patch_parts: Tensor
    middle: Tensor
    cells: Tensor | None
    norms: Tensor | None
    ranking: Tensor | None

    def __init__(
        self,
        channels: tuple[int, ...],
        count: int,
        grid: tuple[int, int],
        size: tuple[int, int],
        cells: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.size = grid, size
        self.skip = min(1, len(channels) - 1)  # stages left out
        width = sum(channels[self.skip :])
        components = min(COMPONENTS, width)
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("axes", torch.zeros(width, components))  # unit vectors
        self.register_buffer("patches", torch.zeros(count, components))
        self.register_buffer("patch_parts", torch.full((count,), -1))  # id of the part that a patch is of
        self.register_buffer("middle", torch.zeros(()))
        self.register_buffer("cells", cells, persistent=False)
        self.register_buffer("norms", None, persistent=False)
        self.register_buffer("ranking", None, persistent=False)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.norms = self.ranking = None  # they are of the patches before
        super()._load_from_state_dict(*arguments)

    def neighbourhoods(self, stages: list[Tensor]) -> Tensor:
        """Patches of every place of the grid, all channels: [(b, c_k, h_k, w_k)] -> (b, h w, c)."""
        return torch.cat([resize(mean, self.grid) for mean in self._means(stages)], dim=1).flatten(2).mT

    def _means(self, stages: list[Tensor]) -> list[Tensor]:
        """Means over 3x3 neighbourhoods, compressed, at each stage's own resolution."""
        compressed = [stage.sign() * stage.abs().log1p() for stage in stages[self.skip :]]
        return [F.avg_pool2d(stage.to(self.centre.dtype), 3, 1, 1, count_include_pad=False) for stage in compressed]

    def points(self, stages: list[Tensor]) -> Tensor:
        """The principal components of every patch, (b, h w, k): those of the neighbourhoods, resized after it."""
        means = self._means(stages)
        axes = self.axes.split([mean.shape[1] for mean in means])
        parts = [(mean.movedim(1, 3) @ share).movedim(3, 1) for mean, share in zip(means, axes)]
        whole = torch.stack([resize(part, self.grid) for part in parts]).sum(dim=0)
        return whole.flatten(2).mT - self.centre @ self.axes

    def forward(
        self, stages: list[Tensor], part_ids: Tensor | None = None, log_distance: Tensor | None = None
    ) -> Tensor:
        """The map; ``part_ids`` as in `log_distance`, whose result, if it is known, makes the stages unnecessary."""
        if log_distance is None:
            log_distance = self.log_distance(self.points(stages), part_ids)
        return self.relative_map(log_distance)

    def excluding(self, stages: list[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """One map (b, 1, *size) for each mask (count,) of stored patches that do not count."""
        points, stored = self.points(stages), self._stored()
        return [self.relative_map(self._search(points, *without(stored, mask))) for mask in masks]

    def freeze(self) -> None:
        """Keep what every search computes from the stored patches; `store` discards it."""
        self.norms, self.ranking = self._stored()

    def _stored(self) -> tuple[Tensor, Tensor]:
        """|p|^2 of the stored patches p, (count,), and a matrix (LEADING + 1, count) that ranks them for points q.

        The matrix holds -2 p above |p|^2, by the leading components only: its product with (q, 1) is |p - q|^2 - |q|^2.
        """
        if self.norms is not None and self.ranking is not None:
            return self.norms, self.ranking
        leading = self.patches[:, -LEADING:]
        ranking = torch.cat([-2 * leading.T, leading.square().sum(dim=1)[None]])
        return without((self.patches.square().sum(dim=1), ranking), self.patch_parts == SURPLUS)

    def _search(self, points: Tensor, norms: Tensor, ranking: Tensor) -> Tensor:
        """Log squared distance to the nearest stored patch: points of images (b, l, k), `_stored` -> (b, l)."""
        by_shortlist = []
        for (image,) in by_image(points):
            patches, squares = self.shortlist(image, norms, ranking)
            by_shortlist.append(as_log(torch.baddbmm(squares, image, patches.mT, alpha=-2).amin(dim=2), image))
        distances = torch.cat(by_shortlist)
        far = distances.topk(math.ceil(CHECKED * points.shape[1]), dim=1).indices
        again = points.gather(1, far[..., None].expand(-1, -1, points.shape[2]))
        return distances.scatter(1, far, self._exact(again, norms))

    def shortlist(self, points: Tensor, norms: Tensor, ranking: Tensor) -> tuple[Tensor, Tensor]:
        """The stored patches that may be nearest to a place of an image, and their |p|^2: (b, m, k), (b, 1, m).

        Those remain that, for the mean of some block of side x side places, are hardly farther than its nearest patch.

        Args:
            points, norms, ranking: as in `_search`.
        """
        count, b = len(self.patches), points.shape[0]  # len() would fix the batch of an export, which is traced twice
        numbers = torch.arange(count, device=points.device).expand(b, -1)
        patches, near = self.patches.expand(b, -1, -1), norms.expand(b, 1, -1)
        for side, most in SHORTLIST:
            if numbers.shape[1] > most:
                blocks = block_means(points, self.grid, side)
                if numbers.shape[1] == count:
                    products = F.pad(blocks[..., -LEADING:], (0, 1), value=1.0) @ ranking
                else:
                    products = torch.baddbmm(near, blocks, patches.mT, alpha=-2)
                behind = products.sub_(products.amin(dim=2, keepdim=True)).amin(dim=1)
                numbers = numbers.gather(1, behind.topk(most, dim=1, largest=False, sorted=False).indices)
                patches, near = F.embedding(numbers, self.patches), norms[numbers][:, None]
        return patches, near

    def log_distance(self, points: Tensor, part_ids: Tensor | None = None) -> Tensor:
        """Log squared distance to the nearest stored patch of another part than (b,): (b, h w, k) -> (b, h w)."""
        stored = self._stored()
        if part_ids is None:
            return self._search(points, *stored)
        others = [without(stored, self.patch_parts == part) for part in part_ids.to(self.patch_parts.device)]
        return torch.cat([self._search(image[None], *counted) for image, counted in zip(points, others)])

    def _exact(self, points: Tensor, norms: Tensor) -> Tensor:
        """Log squared distance to the nearest of all stored patches: (..., k), their |p|^2 (count,) -> (...)."""
        q, at_once = points.flatten(0, -2), len(norms) if points.is_cuda or exporting() else CHUNK
        chunks = zip(self.patches.split(at_once), norms.split(at_once))
        least = torch.stack([torch.addmm(norm, q, patch.T, alpha=-2).amin(dim=1) for patch, norm in chunks])
        return as_log(least.amin(dim=0), q).view(points.shape[:-1])

    def relative_map(self, log_distance: Tensor) -> Tensor:
        """Log distances of all places (b, h w) -> the map, relative to the middle distance, (b, 1, *size)."""
        relative = (log_distance - self.middle).clamp(min=LOWEST)
        return resize(relative.unflatten(1, (1, *self.grid)), self.size)

    def fit_axes(self, batches: Iterable[list[Tensor]]) -> None:
        """Learn centre and principal components from the stages of good images, [(b, c_k, h_k, w_k)] each."""
        width, count = len(self.centre), 0
        total, moment = (self.centre.new_zeros(shape, dtype=torch.float64) for shape in ((width,), (width, width)))
        for stages in batches:
            rows = self._learned(self.neighbourhoods(stages)).flatten(0, 1)
            count += len(rows)
            total += rows.double().sum(dim=0)
            moment += (rows.T @ rows).double()
        mean = total / count
        _, vectors = torch.linalg.eigh((moment / count - mean.outer(mean)).cpu())  # the largest come last
        self.centre.copy_(mean)
        self.axes.copy_(vectors[:, -self.axes.shape[1] :])

    def draw(self, stages: list[Tensor], count: int, generator: torch.Generator) -> Tensor:
        """Draw at most ``count`` patches of every image, (b, m, k) on the CPU, for `fit`."""
        points = self._learned(self.points(stages)).cpu()
        return torch.stack([image[torch.randperm(len(image), generator=generator)[:count]] for image in points])

    def _learned(self, places: Tensor) -> Tensor:
        """The places to learn from, of all places (b, h w, c)."""
        return places if self.cells is None else places[:, self.cells]

    def fit(self, pool: Tensor, part_ids: Tensor, progress: Callable[[int, int], object] | None = None) -> None:
        """`store`, then set the middle distance to the median of the distances to the stored patches. It is the least
        where more than half of the pool is stored (fewer than some 47 images); the balance takes that away again.
        """
        self.store(pool, part_ids, progress)
        points = pool.to(self.patches).flatten(0, 1)
        sample = points[:: max(1, len(points) // MIDDLE_SAMPLE)]
        norms, _ = self._stored()
        self.middle.copy_(torch.cat([self._exact(chunk, norms) for chunk in sample.split(CHUNK)]).median())

    def store(self, pool: Tensor, part_ids: Tensor, progress: Callable[[int, int], object] | None = None) -> None:
        """Choose the stored patches from a pool of patches of good images, (images, m, k) on any device.

        Args:
            part_ids: (images,), which part each image shows.
            progress: called with the number of patches chosen so far, and of all.
        """
        if progress is not None:
            progress(0, len(self.patches))
        points = pool.to(self.patches).flatten(0, 1)
        chosen = k_center(points, min(len(self.patches), len(points)), first=0, progress=progress)
        surplus = (0, len(self.patches) - len(chosen))  # copies would crowd others out of the shortlist
        self.patches.copy_(points[F.pad(chosen, surplus)])
        self.norms = self.ranking = None
        parts = part_ids if len(part_ids.unique()) > 1 else part_ids.new_full(part_ids.shape, -1)  # it stays
        self.patch_parts.copy_(F.pad(parts.to(chosen.device)[chosen // pool.shape[1]], surplus, value=SURPLUS))


def without(stored: tuple[Tensor, Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
    """`NormalMemory._stored`, with the patches of a mask (count,) moved too far away to count."""
    norms, ranking = stored
    return norms + FAR * mask, torch.cat([ranking[:-1], ranking[-1:] + FAR * mask])


def block_means(points: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Means of blocks of side x side places, fewer at the border: (b, h w, k), (h, w) -> (b, blocks, k)."""
    if any(n % side for n in grid):
        return F.avg_pool2d(points.mT.unflatten(2, grid), side, ceil_mode=True).flatten(2).mT
    blocks = points.unflatten(1, (grid[0] // side, side, grid[1] // side, side))
    return blocks.sum(dim=2).sum(dim=3).flatten(1, 2) / side**2  # an eighth of the time


def as_log(least: Tensor, points: Tensor) -> Tensor:
    """Least |p|^2 - 2 p . q (b, l), points q (b, l, k) -> log of the least |p - q|^2, (b, l).

    It is at least log(1e-6 |q|^2): where q itself is stored, the rest is rounding.
    """
    squares = points.square().sum(dim=-1)
    return (least + squares).maximum(1e-6 * squares).clamp(min=1e-6).log()
