"""The place of a run: written by one process at a time, replaced as a whole, and mended after a kill."""

import contextlib
import ctypes
import datetime
import errno
import glob
import itertools
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from ppl_vae.runs import stops, storage
from ppl_vae.runs.spec_file import Say, quiet

_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


class Busy(ValueError):
    """Another process writes the run."""


class Place:
    """A run directory that this process alone writes, as `claimed` gives it.

    Args:
        path: the directory, as its user calls it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.resolve()
        self.known = self._content()

    def _content(self) -> str | None:
        """What tells the run at the place from any other."""
        paths = [self.folder / name for name in (storage.MANIFEST, "model.safetensors")]
        return next((storage.digest(path) for path in paths if path.is_file()), None)

    def reserve(self, size: int) -> None:
        """Check that the disk takes files of `size` bytes, so that a full one is noticed before the work.

        Raises:
            OSError: If it does not.
        """
        if hasattr(os, "posix_fallocate"):
            with _partial(self.folder) as partial, (partial / "space").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)

    @contextlib.contextmanager
    def replacing(self, **records: Any) -> Iterator[Path]:
        """Write the run as a whole: under a temporary name, sealed, flushed to disk, then swapped into place.

        If the block raises, the run stays as it was, and nothing half-written is left.

        Args:
            **records: what the manifest says beside the digests.

        Raises:
            ValueError: If by then the place holds anything but the run that was claimed. The new run is then kept
                beside it.
        """
        with _partial(self.folder) as partial:
            yield partial
            storage.seal(partial, records)
            for path in [*partial.rglob("*"), partial]:
                _sync(path)
            with stops.held_off():
                try:
                    storage.check_replaceable(self.folder)
                    if self._content() != self.known:
                        raise ValueError(f"Expected {self.folder} to be as it was at the start; it has changed since.")
                except ValueError as error:
                    beside = _free(self.folder)
                    partial.rename(beside)
                    raise ValueError(f"{error} The new run is in {beside}.") from None
                _swap(partial, self.folder)
                self.known = self._content()
                _sync(self.folder.parent)


@contextlib.contextmanager
def claimed(folder: Path, *, new: bool = False, say: Say = quiet) -> Iterator[Place]:
    """Claim a place for a run: make the folder, let nobody else write it meanwhile, and try that it can be replaced.

    What a killed process left there is put in order first. If the block raises, the folders made are removed unless
    they hold something by then.

    Args:
        folder: the run directory.
        new: whether nothing may be there.
        say: takes messages for the user.

    Raises:
        Busy: If another process writes there, with its name.
        FileExistsError: If something is there, and nothing may be.
        ValueError: If it holds anything but a run, or cannot be replaced as a whole.
        OSError: If it cannot be written.
    """
    made = [path for path in reversed([folder, *folder.parents]) if not path.is_dir()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.resolve()):
            _mend(folder.resolve(), say)
            storage.check_replaceable(folder)
            if folder.resolve() == Path.cwd():
                raise ValueError(
                    f"Expected a folder other than {folder.resolve()}, where you are, since a run replaces its folder. "
                    "Choose one inside it, such as ./run."
                )
            folder.mkdir(exist_ok=not new)
            _try_swap(folder.resolve())
            yield Place(folder)
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # it holds something
                path.rmdir()
        raise


def mend(folder: Path, say: Say = quiet) -> None:
    """Put back a run that is missing since a process was killed while it replaced it."""
    folder = folder.resolve()
    if not folder.exists() and any(folder.parent.glob(f"{glob.escape(f'.{folder.name}.former-')}*")):
        with _locked(folder):
            _mend(folder, say)


def _sign(handle: int) -> None:
    """Write into a lock who holds it."""
    user = os.environ.get("LOGNAME") or os.environ.get("USER") or "somebody"
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} of {user} on {socket.gethostname()}, since {since}".encode())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock beside a folder; it ends with the process, however that ends."""
    path = folder.parent / f".{folder.name}.lock"
    lock: Any = FileLock(path, timeout=0.2, is_singleton=True, on_acquired=_sign)
    try:
        try:
            lock.acquire()
        except OSError as error:
            if isinstance(error, Timeout) or error.errno not in _NO_FLOCK:
                raise
            lock = SoftFileLock(path, timeout=0.2, is_singleton=True)
            lock.acquire()
    except Timeout:
        holder = " ".join(path.read_text("utf-8", "replace").split()) if path.is_file() else ""
        raise Busy(
            f"Expected nobody else to write {folder}; {holder or 'another process'} does. Wait until it ends, or "
            "choose another place."
        ) from None
    try:
        yield
    finally:
        if lock.lock_counter == 1 and isinstance(lock, FileLock):
            path.unlink(missing_ok=True)  # whoever opened it meanwhile notices, and makes a new one
        lock.release()


def _beside(folder: Path, what: str) -> Path:
    return folder.parent / f".{folder.name}.{what}-{os.getpid()}"


@contextlib.contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """An empty folder beside another, removed at the end unless it was renamed."""
    partial = _beside(folder, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    finally:
        with stops.held_off():
            shutil.rmtree(partial, ignore_errors=True)


def _free(folder: Path) -> Path:
    """A name beside a folder that is not taken."""
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(beside for beside in names if not beside.exists())


def _try_swap(folder: Path) -> None:
    """Rename an empty folder over the run, which the system refuses in one way if the run could be swapped."""
    with _partial(folder) as partial:
        try:
            partial.rename(folder)
        except OSError as error:
            if error.errno in (errno.EBUSY, errno.EXDEV):
                raise ValueError(
                    f"Expected a folder that can be replaced as a whole; {folder} is a mount point. Choose one inside "
                    f"it, such as {folder / 'run'}."
                ) from None
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def _swap(partial: Path, folder: Path) -> None:
    """Put a folder in the place of another; what was there is at the former's place, or gone."""
    if not folder.exists():
        partial.rename(folder)
    elif not _exchanged(partial, folder):
        former = _beside(folder, "former")
        folder.rename(former)
        try:
            partial.rename(folder)
        except BaseException:
            former.rename(folder)
            raise
        shutil.rmtree(former, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders in one operation; False where there is none."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and not rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)


def _mend(folder: Path, say: Say) -> None:
    """Put back a run that a killed process had put aside, and remove what else it left."""
    names = f"{glob.escape(f'.{folder.name}.')}%s-[0-9]*"
    for former in sorted(folder.parent.glob(names % "former")):
        if not folder.exists():
            former.rename(folder)
            say(f"put {folder} back, which a process that was killed had put aside")
    for left in sorted([*folder.parent.glob(names % "former"), *folder.parent.glob(names % "partial")]):
        if all(storage.is_own_name(path.relative_to(left)) for path in left.rglob("*")):
            shutil.rmtree(left, ignore_errors=True)
            say(f"removed {left}, which a process that was killed had left unfinished")


def _sync(path: Path) -> None:
    if sys.platform != "win32":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
