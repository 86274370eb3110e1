"""Folders on disk -> lists of samples (`find_dataset`), and samples -> one uint8 tensor (`load_images`).

The samples themselves, the layouts of folders and the pairing with masks are in layouts.py, which opens no image; here
is what looks into the files: the check of the masks' sizes, the description, the loading.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from almrr_ref.data.images import IMAGE_EXTENSIONS, ImageError, image_size, load_image
from almrr_ref.data.layouts import DataError, DataSet, Sample, read_layout
from almrr_ref.run.text import one_line

_SIZES_LOOKED_AT = 2000  # headers read by describe(); more would make it slow on large sets


def find_dataset(path: str | os.PathLike[str]) -> DataSet:
    """Folder -> its samples, by the layout that its sub-folders show.

    Raises:
        DataError: if the folder is missing, unreadable, without good images, of no known layout, or ambiguous.
    """
    root = Path(path)
    if not os.path.isdir(root):
        what = "is a file, not a folder" if os.path.exists(root) else "does not exist"
        raise DataError(f"data folder {one_line(root)} {what}; give a folder of images")
    dataset = read_layout(root)
    _note_one_class(dataset)
    if not dataset.train:
        raise DataError(
            f"no good images to train on in {one_line(root)} (read as: {dataset.layout}); "
            f"known extensions: {' '.join(IMAGE_EXTENSIONS)}"
        )
    _check_masks(dataset)
    return dataset


def describe(dataset: DataSet) -> str:
    """Data set -> a few lines that say what was found: layout, counts by class, masks, sizes, notes."""
    defective = [sample for sample in dataset.test if sample.label]
    types = Counter(sample.defect_type for sample in defective)
    lines = [f"data: {dataset.layout} at {one_line(dataset.root)}", f"train: {len(dataset.train)} good images"]
    if dataset.test:
        by_type = ", ".join(f"{one_line(name)} {count}" for name, count in sorted(types.items()))
        lines.append(
            f"test: {len(dataset.test) - len(defective)} good, {len(defective)} defective"
            + (f" ({by_type}); masks for {sum(s.mask_path is not None for s in defective)}" if defective else "")
        )
    else:
        lines.append("test: none")
    lines.append(_describe_sizes([sample.path for sample in dataset.train + dataset.test]))
    return "\n".join(lines + [f"note: {note}" for note in dataset.notes])


def load_images(
    samples: Sequence[Sample | str | os.PathLike[str]],
    size: int,
    progress: Callable[[int, int], None] | None = None,
    threads: int = 2,
) -> tuple[Tensor, list[tuple[Path, str]]]:
    """Samples or paths -> (images uint8 (n, 3, size, size) in the given order, [(path, reason)] of the broken ones).

    Every file is decoded and resized once; a broken one is left out of the images and named in the second result.

    Args:
        samples: n + number of broken ones, at least one.
        size: edge of the images, pixels.
        progress: called with (done, total) after every image.
        threads: decoding threads (Pillow releases the interpreter's lock).
    Raises:
        DataError: if there is nothing to load or every image is broken.
    """
    paths = [sample.path if isinstance(sample, Sample) else Path(sample) for sample in samples]
    if not paths:
        raise DataError("no images to load")

    def load(path: Path) -> Tensor | ImageError:
        try:
            return load_image(path, size)
        except ImageError as error:
            return error

    images = torch.empty((len(paths), 3, size, size), dtype=torch.uint8)
    failures: list[tuple[Path, str]] = []
    with ThreadPoolExecutor(threads) as pool:
        for done, (path, loaded) in enumerate(zip(paths, pool.map(load, paths), strict=True), start=1):
            if isinstance(loaded, ImageError):
                failures.append((path, loaded.reason))
            else:
                images[done - 1 - len(failures)] = loaded
            if progress is not None:
                progress(done, len(paths))
    if len(failures) == len(paths):
        raise DataError(f"none of {len(paths)} images can be read; the first: {one_line(paths[0])}: {failures[0][1]}")
    return images[: len(paths) - len(failures)], failures


def _note_one_class(dataset: DataSet) -> None:
    labels = {sample.label for sample in dataset.test}
    if labels == {1}:
        dataset.notes.append("there are no normal test images: image AUROC and AP will be undefined")
    if labels == {0}:
        dataset.notes.append("there are no defective test images: all metrics will be undefined")


def _check_masks(dataset: DataSet) -> None:
    """Refuse masks of another size than their image, by the headers. Broken files are left to the loading."""
    for sample in dataset.test:
        if sample.mask_path is None:
            continue
        try:
            image, mask = image_size(sample.path), image_size(sample.mask_path)
        except ImageError:
            continue
        if image != mask:
            raise DataError(
                f"mask {one_line(sample.mask_path)} is {mask[0]}x{mask[1]} but its image {one_line(sample.path)} "
                f"is {image[0]}x{image[1]}; save both at one size"
            )


def _describe_sizes(paths: list[Path]) -> str:
    """Paths -> one line with the image sizes, from the headers of at most _SIZES_LOOKED_AT evenly spread files."""
    step = -(-len(paths) // _SIZES_LOOKED_AT)
    sizes: Counter[tuple[int, int]] = Counter()
    broken = 0
    for path in paths[::step]:
        try:
            sizes[image_size(path)] += 1
        except ImageError:
            broken += 1
    widths, heights = [w for w, _ in sizes] or [0], [h for _, h in sizes] or [0]
    if len(sizes) == 1:
        text = f"{widths[0]}x{heights[0]}"
    else:
        text = f"{min(widths)}-{max(widths)} x {min(heights)}-{max(heights)}, {len(sizes)} different"
    looked_at = f" (of {len(paths[::step])} files looked at)" if step > 1 else ""
    return f"sizes: {text}{looked_at}" + (f"; {broken} files are no readable images" if broken else "")
