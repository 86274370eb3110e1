"""What a run is trained on, so that a resumed run notices when the files have become others meanwhile.

A resumed run continues exactly only on the same images: sample i is drawn from image number k, and an image more or
less gives every sample another one. Good images are known by the digest of their bytes; textures, of which a
collection has gigabytes that a run may never draw, by their size.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from almrr_ref.data.layouts import DataSet
from almrr_ref.data.sources import MixedTextures, OwnTextures, TextureFolder
from almrr_ref.run.text import one_line

Files = dict[str, dict[str, str]]  # kind of file -> path below the folder -> digest or size


def training_files(data: DataSet, textures: TextureFolder | OwnTextures | MixedTextures) -> Files:
    """The files of a run: -> {"images": {path: digest}, "textures": {path: size}}, paths below their folders."""
    images = _known_by(_digest, (sample.path for sample in data.train), data.root)
    sizes: dict[str, str] = {}
    for source in textures.sources if isinstance(textures, MixedTextures) else (textures,):
        if isinstance(source, TextureFolder):
            sizes |= _known_by(_size, source.paths, source.root)
    return {"images": images, "textures": sizes}


def refuse_other_files(before: Files | None, now: Files, run: Path) -> None:
    """Refuse to go on with other files than a run began with.

    Args:
        before: of the checkpoint; None in one of an earlier version, about which a note is printed.
        now: the files that are there.
        run: the run's folder, for the message.
    Raises:
        ValueError: if a file is new, gone or changed; the line names the first of each.
    """
    if before is None:
        print(
            f"note: {one_line(run)} does not say what it was trained on: whether the images are the same is not checked"
        )
        return
    found = [text for kind in now for text in _differences(kind, before.get(kind, {}), now[kind])]
    if found:
        raise ValueError(
            f"--resume: the files are not those that the run in {run} began with: {'; '.join(found)}; "
            "put them back, or start anew with another --out"
        )


def _differences(kind: str, before: dict[str, str], now: dict[str, str]) -> Iterable[str]:
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
    for what, names in (("new", now.keys() - before), ("gone", before.keys() - now), ("changed", changed)):
        if names:
            yield f"{len(names)} {kind} {what} (first: {one_line(min(names))})"


def _known_by(mark: Callable[[Path], str], paths: Iterable[Path], root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): mark(path) for path in paths}


def _digest(path: Path) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256; "" for what cannot be read, which training leaves out."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would wait for ever
            return ""
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


def _size(path: Path) -> str:
    try:
        return str(path.stat().st_size)
    except OSError:
        return ""
