"""Writing results so that nothing is lost, half written, or written elsewhere than asked.

Source: own. A file is written beside its destination as `.<name>.part`, flushed to the disk and renamed over it, so
that a reader finds the old content or the new, never a mixture, also after a kill at any moment. The temporary name is
fixed: a killed run leaves at most one such file per destination, and the next run replaces it.
"""

import errno
import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath

if sys.platform != "win32":
    import fcntl

OVERLAYS, MAPS, SCORES = "overlays", "maps", "scores.csv"  # what evaluate and predict write into --out
_PLAIN = frozenset(" -_.,()[]+=@!~&'")  # kept in output names beside letters and digits
_LONGEST_PART = 180  # bytes; file systems allow 255, and suffixes are added
_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space or name another output folder",
    errno.EDQUOT: "the disk quota is used up; free some space or name another output folder",
    errno.EFBIG: "the file would exceed the size limit; raise the limit or name another output folder",
    errno.EACCES: "permission denied; name an output folder that you may write to",
    errno.EPERM: "permission denied; name an output folder that you may write to",
    errno.EROFS: "the file system is read-only; name another output folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder; name another output folder",
    errno.EEXIST: "a file is in the place of a folder; name another output folder",
    errno.EISDIR: "a folder of that name is in the way; remove it or name another output",
    errno.ENAMETOOLONG: "the name is too long; name a shorter output folder",
}


class OutputError(ValueError):
    """An output cannot be written; the message is one line that names the file, the cause and the remedy."""


def output_error(error: OSError, path: str | os.PathLike[str]) -> OutputError:
    """Turn an operating-system error about `path` into one line: cause and remedy."""
    reason = _REMEDIES.get(error.errno or 0, error.strerror or str(error))
    return OutputError(f"cannot write {os.fspath(path)!r}: {reason}")


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced to the disk and renamed to `path`, else removed.

    Missing parent folders are created. The body creates the file; what was at `path` stays until the rename.

    Raises:
        OutputError: for an OSError here or in the body. Other exceptions of the body pass unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise output_error(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write bytes, or text as UTF-8, to `path` at once: readers see the old content or all of the new.

    Raises:
        OutputError: if the file cannot be written; the old content is still there then.
    """
    content = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create an output folder and its parents, and prove that it can be written to; return it.

    Raises:
        OutputError: if it cannot be created or written to.
    """
    probe = Path(path) / ".writable.part"
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # of two processes, one may be the first
    except OSError as error:
        raise output_error(error, path) from error
    return Path(path)


def is_of_results(folder: Path) -> bool:
    """Whether a folder holds the pictures or maps of a prediction: by its name, and the scores beside it."""
    return folder.name in (OVERLAYS, MAPS) and any(folder.parent.glob(SCORES + "*"))  # also .part, and a rank's share


@contextmanager
def hold_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep an output folder for this process while the block runs: a second run into it is refused.

    It holds a record lock on ``.lock`` there. The system drops such a lock with the process, however that ends, so a
    file that a killed run left behind holds nobody up; and the processes that prepare samples do not inherit it. Of
    the ranks of one torchrun the first holds the folder for all. Windows has no such locks: no check there.

    Raises:
        OutputError: if another process holds the folder, which is named with that process; or it cannot be written to.
    """
    if sys.platform == "win32":
        yield
        return
    path = Path(folder) / ".lock"
    descriptor = _take(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _take(path: Path) -> int:
    """Open a lock file, lock it and write into it who holds it -> its descriptor."""
    try:
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if _lock(path, descriptor):
                break
            os.close(descriptor)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
    except OSError as error:
        raise output_error(error, path) from error
    return descriptor


def _lock(path: Path, descriptor: int) -> bool:
    """Lock an open file -> whether it is still the one at ``path``: its last holder may have removed it meanwhile."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise OutputError(
                f"{os.fspath(path.parent)!r} is in use by {holder}; wait, or name another --out"
            ) from None
        print(
            f"note: {str(path.parent)!r} cannot be locked ({error.strerror}): start no second run in it",
            file=sys.stderr,
        )
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def output_name(relative_path: str | os.PathLike[str], suffix: str) -> str:
    """Name the output that belongs to an input: "a/x.png", ".png" -> "a/x.png.png".

    Different inputs get different names: folders and the input's extension are kept, odd characters are percent-encoded
    (as is % itself), overlong parts end in a hash. The name is relative and holds no "..", whatever came in.

    Args:
        relative_path: path of the input below the input folder; "..", an absolute path or a drive is made harmless.
        suffix: extension of the output, with its dot.
    """
    parts = PurePath(relative_path).parts or ("image",)
    folders = [_safe_part(part) for part in parts[:-1]]
    # "x.jpg" becomes the file "x.jpg.png"; a folder of that very name must not stand in its way.
    folders = [f"{part[: -len(suffix)]}%2E{suffix[1:]}" if part.endswith(suffix) else part for part in folders]
    return "/".join([*folders, _safe_part(parts[-1]) + suffix])


def _safe_part(part: str) -> str:
    """Encode one part of a path, injectively, to a plain name."""
    safe = "".join(char if char.isalnum() or char in _PLAIN else _percent(char) for char in part)
    if safe.startswith("."):
        safe = "%2E" + safe[1:]
    if len(safe.encode()) > _LONGEST_PART:
        digest = hashlib.sha256(part.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        safe = safe.encode()[: _LONGEST_PART - 33].decode(errors="ignore") + "%" + digest
    return safe


def _percent(char: str) -> str:
    """Encode one character as %XX per byte, also one that stands for an undecodable byte of a file name."""
    return "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogatepass"))


def _sync_folder(folder: Path) -> None:
    """Flush a rename to the disk, where the system can open folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
