"""Tables that took long to read, kept in the cache folder, so that the next run need not read them anew.

An entry is found by the SHA-256 of the file's bytes and of all that reading depends on, so that an edited file never
meets what was made of it before. It holds a SHA-256 of itself; one that is damaged is made anew.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from ppl_vae.data.files import LARGEST, RawData, cache_folder, chunks

SIZE = "PPL_VAE_CACHE_SIZE"  # the variable with the size, in bytes, of all that is kept; 0 for nothing
_LOG = logging.getLogger(__name__)
_SMALLEST, _SLOW = 2**22, 1.0  # bytes of a file that is looked for, and seconds of reading from which it is kept
_MARK, _NAME, _ALIGNED = b"ppl_vae table 1\n", re.compile(r"[0-9a-f]{64}\.(table|partial)"), 64


def remember(path: Path, about: Any, read: Callable[[], RawData], mapped: bool) -> RawData:
    """What `read` makes of a file, from the cache if the same bytes were read in the same way before.

    Args:
        path: the file.
        about: all that reading depends on beside the file, as its `repr` tells it apart.
        read: reads the file.
        mapped: whether to map arrays that are kept, in place of reading them.

    Raises:
        ValueError: If `read` does, or the variable PPL_VAE_CACHE_SIZE is no size.
    """
    given = os.environ.get(SIZE, "")
    with contextlib.suppress(ValueError):
        given = float(given or math.inf)  # type: ignore[assignment]
    if not isinstance(given, float) or not given >= 0:
        raise ValueError(f"Expected bytes in the variable {SIZE}, such as 4e9, or 0 to keep no tables; got {given!r}.")
    try:
        if not given or not path.is_file() or path.stat().st_size < _SMALLEST:
            return read()
        digest = _digest(path)
    except OSError:  # which `read` puts in words
        return read()
    try:
        how = (about, mapped, os.environ.get(LARGEST), _versions())
        entry = _folder() / f"{hashlib.sha256(f'{digest} {how!r}'.encode()).hexdigest()}.table"
        if (known := _find(entry, mapped)) is not None:
            return known
    except OSError as error:
        _LOG.warning("%s was read without the cache of tables: %s", path, error)
        return read()
    start = time.monotonic()
    raw = read()
    try:
        if time.monotonic() - start > _SLOW and _digest(path) == digest:  # else it was edited meanwhile
            _keep(entry, raw, given)
    except (OSError, NotImplementedError) as error:
        _LOG.warning("%s is read anew next time, for it cannot be kept: %s", path, error)
    return raw


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _versions() -> tuple[str, ...]:
    """What reads tables: Python, the libraries, and the code beside this."""
    code = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))))
    found = [sys.version, code.hexdigest()]
    for name in ("ppl-vae", "numpy", "pandas", "pyarrow"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return tuple(found)


def _folder() -> Path:
    """The folder of entries, made if need be.

    Raises:
        OSError: If it cannot be made, is a link, or others may write to it.
    """
    folder = cache_folder() / "tables"
    folder.mkdir(mode=0o700, exist_ok=True)
    known = folder.lstat()
    others = hasattr(os, "geteuid") and (known.st_uid != os.geteuid() or known.st_mode & 0o022)
    if not stat.S_ISDIR(known.st_mode) or others:
        raise OSError(f"{folder} is a link, or others may write to it")
    return folder


def _is_own(known: os.stat_result) -> bool:
    """Whether something in the folder can be an entry: a regular file, and this user's."""
    return stat.S_ISREG(known.st_mode) and (not hasattr(os, "geteuid") or known.st_uid == os.geteuid())


def _find(entry: Path, mapped: bool) -> RawData | None:
    """The table of an entry; None if there is none, or it is damaged."""
    careful = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # neither links nor pipes
    try:
        file = open(entry, "rb", opener=lambda path, flags: os.open(path, flags | careful))  # noqa: SIM115
    except OSError:
        return None
    with file:
        if not _is_own(os.fstat(file.fileno())) or file.read(len(_MARK)) != _MARK:
            return None
        told = file.read(64).decode(errors="replace")
        if hashlib.file_digest(file, "sha256").hexdigest() != told:
            return None
        file.seek(len(_MARK) + 64)
        about = json.loads(file.readline())
        if about.pop("entry") != entry.stem:
            return None
        with contextlib.suppress(OSError):
            os.utime(file.fileno())  # the oldest go first
        for name, (dtype, shape) in about.pop("arrays").items():
            at = file.seek(file.tell() + -file.tell() % _ALIGNED)
            if mapped:
                about[name] = np.memmap(file, dtype, "c", at, tuple(shape))
            else:
                about[name] = np.fromfile(file, dtype, math.prod(shape)).reshape(shape)
            file.seek(at + about[name].nbytes)
    return RawData(**_restored(about))


def _keep(entry: Path, raw: RawData, limit: float) -> None:
    """Write an entry as a whole, once there is room for it.

    Raises:
        OSError: If it cannot be written, or another process writes one just now.
    """
    values = {field.name: getattr(raw, field.name) for field in fields(raw)}
    if raw.ids is not None and raw.ids.dtype.kind in "OU":
        values["ids"] = raw.ids.tolist()
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    about = {name: value for name, value in values.items() if name not in arrays}
    text = json.dumps(about, default=sorted)
    again = _restored(json.loads(text))
    plain = all(value.dtype.kind in "biuf" and value.flags.c_contiguous for value in arrays.values())
    if raw.ids is not None and "ids" in about:
        plain &= again["ids"].dtype == raw.ids.dtype and again.pop("ids").tolist() == about.pop("ids")
    if not plain or again != about:  # what would come back as something else, such as dates
        return
    listed = {name: (value.dtype.str, value.shape) for name, value in arrays.items()}
    head = json.dumps({"entry": entry.stem, "arrays": listed, **json.loads(text)}).encode() + b"\n"
    size, lock, disk = len(head) + sum(each.nbytes for each in arrays.values()), entry.parent / "lock", entry.parent
    limit = shutil.disk_usage(disk).total / 10 if limit == math.inf else limit
    if size > min(limit, shutil.disk_usage(disk).free / 2):
        raise OSError(f"it takes {size:,} bytes, more than {SIZE} or the disk allows")
    if lock.is_symlink():
        raise OSError(f"{lock} is a link")
    with FileLock(lock, timeout=0):
        _make_room(entry.parent, limit - size)
        if os.path.lexists(entry) and not _is_own(entry.lstat()):
            raise OSError(f"{entry} is not the cache's own")
        partial = entry.with_suffix(".partial")
        try:
            with open(partial, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                _write(file, head, arrays)
            partial.replace(entry)
        except FileExistsError:  # of something that is no file of the cache
            raise
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _write(file: IO[bytes], head: bytes, arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Write the mark, the SHA-256 of what follows, the head, and arrays that each begin on a boundary."""
    found = hashlib.sha256(head)
    file.write(_MARK + b"0" * 64 + head)
    for value in arrays.values():
        parts = (part.data for part in chunks(value))
        for part in itertools.chain([bytes(-file.tell() % _ALIGNED)], parts):
            found.update(part)
            file.write(part)
    file.seek(len(_MARK))
    file.write(found.hexdigest().encode())
    file.flush()


def _make_room(folder: Path, room: float) -> None:
    """Delete the oldest entries beyond some bytes, and what killed processes left, while nobody writes."""
    known = [(path, path.lstat()) for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    for path, about in sorted(known, key=lambda each: -each[1].st_mtime_ns):
        if _is_own(about):
            room -= about.st_size
            if room < 0 or path.suffix == ".partial":
                path.unlink(missing_ok=True)


def _restored(about: dict[str, Any]) -> dict[str, Any]:
    """Entries of `RawData` as they were before they were JSON."""
    tuples = {name: tuple(about[name]) for name in ("names", "shape", "classes") if about[name] is not None}
    words = {
        name: {key: tuple(each) for key, each in about[name].items()} for name in ("categories", "covariate_words")
    }
    ids = {"ids": np.asarray(about["ids"])} if isinstance(about.get("ids"), list) else {}
    return {**about, **tuples, **words, **ids, "ordered": frozenset(about["ordered"])}
