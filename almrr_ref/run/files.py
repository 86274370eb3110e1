"""Writing results so that nothing is lost, half written, or written elsewhere than asked.

A file is written beside its destination as `.<name>.part`, flushed to the disk and renamed over it. A reader finds the
old content or the new, never a mixture, also after a kill. The next run replaces what a killed one left behind.
"""

import errno
import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from urllib.parse import quote

if sys.platform != "win32":
    import fcntl

# What evaluate and predict write into --out.
OVERLAYS, MAPS, LAYERS, SCORES, BOXES = "overlays", "maps", "layers", "scores.csv", "boxes.json"
CALIBRATION = "calibration.json"
_PLAIN = frozenset(" -_.,()[]+=@!~&'")  # kept in output names, as are letters and digits
_LONGEST_NAME = 180  # bytes; file systems allow 255, and suffixes are added
_REASONS = {  # where the system's own words do not say enough
    errno.ENOSPC: "the disk is full; free some space or name another output folder",
    errno.EFBIG: "the file would exceed the size limit; raise the limit or name another output folder",
    errno.EEXIST: "a file is in the place of a folder; name another output folder",
    errno.EISDIR: "a folder of that name is in the way; remove it or name another output",
}


class OutputError(ValueError):
    """An output cannot be written; the message names the file, the cause and the remedy in one line."""


def output_error(error: OSError, path: str | os.PathLike[str]) -> OutputError:
    """Turn an operating-system error about `path` into one line: cause and remedy."""
    system = f"{(error.strerror or str(error)).lower()}; name another output folder"
    return OutputError(f"cannot write {os.fspath(path)!r}: {_REASONS.get(error.errno or 0, system)}")


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn every OSError of the block into an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        raise output_error(error, path) from error


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path for the block to write to; then rename it to `path`, or remove it after an exception.

    Missing parent folders are created. Every OSError, also of the block, becomes an OutputError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write bytes, or text as UTF-8, to `path` at once; if that fails (OutputError), the old content stays."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create an output folder and its parents, and return it; OutputError if it cannot be created or written to."""
    folder = Path(path)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable.part").touch()
        (folder / ".writable.part").unlink(missing_ok=True)  # another process may have removed it
    return folder


def is_of_results(folder: Path) -> bool:
    """Whether a folder holds the pictures or maps of a prediction: by its name, and the scores beside it."""
    return folder.name in (OVERLAYS, MAPS, LAYERS) and any(folder.parent.glob(SCORES + "*"))  # unfinished ones too


@contextmanager
def hold_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Make an output folder and hold it for this process while the block runs; OutputError if another process holds it.

    The system drops the record lock on ``.lock`` when the process ends, however it ends, and workers do not inherit it.
    Windows has no such locks: there the folder is not held.
    """
    path = make_folder(folder) / ".lock"
    if sys.platform == "win32":
        yield
        return
    with writing(path):  # a link in its place would have another file overwritten
        while not _lock(path, descriptor := os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)):
            os.close(descriptor)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _lock(path: Path, descriptor: int) -> bool:
    """Lock an open file -> whether it is still the one at ``path``: its last holder may just have removed it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        folder = os.fspath(path.parent)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise OutputError(f"{folder!r} is in use by {holder}; wait, or name another --out") from None
        print(f"note: {folder!r} cannot be locked ({error.strerror}): start no second run in it", file=sys.stderr)
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def output_name(relative_path: str | os.PathLike[str], suffix: str) -> str:
    """Name the output that belongs to an input: "a/x.png", ".png" -> "a/x.png.png".

    Different inputs get different names, relative and without "..". Odd characters and % are percent-encoded, overlong
    names end in a hash.
    """
    *folders, last = map(_safe_name, PurePath(relative_path).parts or ("image",))
    # "x.jpg" becomes the file "x.jpg.png"; a folder of that very name must not stand in its way.
    folders = [f"{name.removesuffix(suffix)}%2E{suffix[1:]}" if name.endswith(suffix) else name for name in folders]
    return "/".join([*folders, last + suffix])


def _safe_name(name: str) -> str:
    """Encode the name of a file or folder to a plain one; different names stay different."""
    safe = "".join(c if c.isalnum() or c in _PLAIN else quote(c, safe="", errors="surrogatepass") for c in name)
    safe = f"%2E{safe[1:]}" if safe.startswith(".") else safe
    if len(safe.encode()) > _LONGEST_NAME:
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        safe = safe.encode()[: _LONGEST_NAME - 33].decode(errors="ignore") + "%" + digest
    return safe
