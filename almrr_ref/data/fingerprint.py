"""The files that a run is trained on, so that a resumed run notices when they have changed meanwhile.

Sample i shows image number k: one image more or less gives every sample another image. Good images are known by the
digest of their bytes; textures, of which a collection has gigabytes that a run may never draw, by their size.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from almrr_ref.data.layouts import DataSet
from almrr_ref.data.textures import MixedTextures, TextureFolder, TextureSource
from almrr_ref.run.text import one_line

Files = dict[str, dict[str, str]]  # kind of file -> path below the folder -> digest or size


def training_files(data: DataSet, textures: TextureSource) -> Files:
    """The files of a run: -> {"images": {path: digest}, "textures": {path: size}}, paths below their folders."""
    images = _marks(_digest, [sample.path for sample in data.train], data.root)
    source = textures.sources[0] if isinstance(textures, MixedTextures) else textures
    sizes = _marks(_size, source.paths, source.root) if isinstance(source, TextureFolder) else {}
    return {"images": images, "textures": sizes}


def refuse_other_files(before: Files, now: Files, run: Path) -> None:
    """Refuse to continue the run in a folder on other files than it began with (`before`, of its checkpoint).

    Raises:
        ValueError: if a file is new, gone or changed; the line names the first of each.
    """
    differences = [text for kind in now for text in _differences(kind, before.get(kind, {}), now[kind])]
    if differences:
        raise ValueError(
            f"--resume: the files are not those that the run in {run} began with: {'; '.join(differences)}; "
            "put them back, or start anew with another --out"
        )


def _differences(kind: str, before: dict[str, str], now: dict[str, str]) -> Iterator[str]:
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
    for what, names in (("new", now.keys() - before), ("gone", before.keys() - now), ("changed", changed)):
        if names:
            yield f"{len(names)} {kind} {what} (first: {one_line(min(names))})"


def _marks(mark: Callable[[Path], str], paths: list[Path], root: Path) -> dict[str, str]:
    """Path below the folder -> mark of the file; "" for what cannot be read, which training leaves out."""
    marks: dict[str, str] = {}
    for path in paths:
        name = path.relative_to(root).as_posix()
        try:
            marks[name] = mark(path) if path.is_file() else ""  # reading a pipe would wait for ever
        except OSError:
            marks[name] = ""
    return marks


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _size(path: Path) -> str:
    return str(path.stat().st_size)
