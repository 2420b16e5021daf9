"""Atomic writes, which leave a whole file or none, and one writer per output folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from pmm.utils.errors import CannotWrite, InvalidFile, one_of

_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room on the disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose another place, or change its permissions"),
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or choose another disk",
    errno.ENAMETOOLONG: "choose a shorter name",
}
_LOCKS: weakref.WeakSet[IO[str]] = weakref.WeakSet()


def _drop_locks() -> None:
    """In a forked child, which would keep the lock for as long as it outlives its parent."""
    for lock in list(_LOCKS):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_locks)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed over `path`, else removed.

    A reader sees the old file or the new one, never a part; a full disk leaves the old one intact. Of a symbolic link
    the file it leads to is replaced. Raises CannotWrite if the folder cannot be written, the disk is full, or `path` is
    no regular file.
    """
    path = _replaceable(Path(path))
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    try:
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` as `replacing` does."""
    with replacing(path) as temporary:
        # names on disk that are no UTF-8 are written as the bytes that they are
        temporary.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


def make_folder(path: Path) -> Path:
    """Create `path` and its parents. Raises CannotWrite if that is not possible."""
    _existing_folder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def cannot_write(path: Path, error: OSError) -> CannotWrite:
    """For an output path that is not writable or a disk that is full."""
    advice = _ADVICE.get(error.errno or 0, "")
    reason = f"cannot write: {error.strerror or error}"
    return CannotWrite(reason, path=path, hint="; ".join(filter(None, (advice, "earlier files are unchanged"))))


def sweep(folder: Path, names: Iterable[str]) -> None:
    """Remove what a writer of `names` in `folder` left half-written when it was killed."""
    for name in names:
        for temporary in folder.glob(f".{name}.*"):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; if it is new or empty, and gets nothing but empty files, these are removed again.

    Raises CannotWrite if another process writes there.
    """
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    empty = bool(new) or (folder.is_dir() and not any(folder.iterdir()))
    with locked(folder / ".lock", wait=False):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a parent may hold more by now; and no error of the caller's is hidden
                if empty and not any(path.is_file() and path.stat().st_size for path in folder.rglob("*")):
                    for path in folder.iterdir():
                        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                    for each in new:
                        each.rmdir()


@contextlib.contextmanager
def locked(path: Path, *, wait: bool, hint: str = "wait for it, or use another folder") -> Iterator[None]:
    """Hold the lock file `path`; if another process holds it, wait for it, or raise CannotWrite with this `hint`."""
    import fcntl

    make_folder(path.parent)
    try:
        lock = path.open("w")
    except OSError as error:
        raise cannot_write(path.parent, error) from error
    _LOCKS.add(lock)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise CannotWrite("it is in use by another process", path=path.parent, hint=hint) from None
        except OSError as error:  # not every file system has locks
            raise CannotWrite(
                f"it cannot be locked ({error.strerror})", path=path.parent, hint="use a folder on another disk"
            ) from error
        yield


def output_file(path: Path, *keep: Path, suffixes: tuple[str, ...] = ()) -> Path:
    """`path`, checked before hours of work are put into it: its folder, or the one to make it in, can be written, it is
    none of the files to `keep`, and its name ends in one of `suffixes`, if any.

    Makes no folder. Raises CannotWrite.
    """
    target = os.path.realpath(path)
    if any(target == os.path.realpath(file) for file in keep):
        raise CannotWrite("it is the file to read", path=path, hint="give another name to write to")
    if suffixes and path.suffix.lower() not in suffixes:
        ending = f"its name ends in {path.suffix}" if path.suffix else "its name has no ending"
        raise CannotWrite(ending, path=path, expected=f"a name that ends in {one_of(suffixes)}")
    existing = _existing_folder(_replaceable(path).parent)
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=f".{path.name}.", suffix=path.suffix):
            return path
    except OSError as error:
        raise cannot_write(path, error) from error


def _replaceable(path: Path) -> Path:
    """The file that `path` leads to. Raises CannotWrite if it exists and is no regular file, or one of an open stream,
    which would not be written to but replaced."""
    target = Path(os.path.realpath(path))
    if os.path.isdir(target):
        raise CannotWrite("it is a folder", path=path, hint="give the name of a file")
    folders = {str(target.parent), os.path.realpath(path.parent)}
    special = os.path.exists(target) and not os.path.isfile(target)
    if special or any(f == "/dev" or f"{f}/".startswith("/proc/") for f in folders):
        raise CannotWrite("it is no file on a disk", path=path, hint="give the name of a file")
    return target


def _existing_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists. Raises CannotWrite if a file is in its place."""
    for place in (path, *path.parents):
        try:
            os.lstat(place)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise cannot_write(place, error) from error
        else:
            break
    if os.path.isfile(place):
        raise CannotWrite("it is a file", path=place, expected="a folder to write to")
    return place


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with Path(path).open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def existing_file(path: str | Path, expected: str) -> Path:
    """`path` as a Path. Raises InvalidFile, with what was `expected`, if it is not a readable file."""
    path = Path(path)
    if path.is_dir():
        problem = "it is a folder"
    elif not path.exists():
        problem = "it does not exist"
    elif not path.is_file():
        problem = "it is a device or a pipe"
    elif not os.access(path, os.R_OK):
        problem = "it cannot be read (no permission)"
    else:
        return path
    raise InvalidFile(problem, path=path, expected=expected)


def sync_folder(folder: Path) -> None:
    """See that the names in `folder` are on the disk. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
