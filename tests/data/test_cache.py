"""Tables from the cache, held against the same tables as they are read from their files."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock

from ppl_vae.data import cache, load, pieces, tables
from ppl_vae.data.datasets import read_dataset
from ppl_vae.data.tables import Roles

rng = np.random.default_rng(0)
ROLES: dict[str, Roles] = {
    "plain": Roles(leave_out=["id", "kind", "group"]),
    "all": Roles(label="kind", id="id", covariates=["group"], size_factor="count", leave_out=["a"]),
    "words": Roles(categories=["count"], leave_out=["id"]),
}


@pytest.fixture(autouse=True)
def _eager(tmp_path: Path, monkeypatch: Any) -> None:
    """Keep every table, however small."""
    monkeypatch.setenv("PPL_VAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PPL_VAE_CACHE_SIZE", raising=False)
    monkeypatch.setattr(cache, "_SMALLEST", 0)
    monkeypatch.setattr(cache, "_SLOW", -1.0)


@pytest.fixture
def reads(monkeypatch: Any) -> list[Path]:
    """The files that were read from their beginning."""
    found: list[Path] = []
    whole, streamed = tables.read_table, pieces.read_in_pieces

    def noted(read: Any) -> Any:
        return lambda path, *given: (found.append(path), read(path, *given))[1]

    monkeypatch.setattr(tables, "read_table", noted(whole))
    monkeypatch.setattr(pieces, "read_in_pieces", noted(streamed))
    return found


def written(path: Path, rows: int = 50) -> Path:
    frame = pd.DataFrame(rng.normal(size=(rows, 2)), columns=["a", "b"])
    frame["count"], frame["id"] = rng.poisson(2.0, rows) + 1.0, [f"0{i} é" for i in range(rows)]
    frame["kind"], frame["group"] = rng.choice(["u", "v"], rows), rng.choice(["one", "two", "tri"], rows)
    if path.suffix == ".parquet":
        frame["group"] = frame["group"].astype(pd.CategoricalDtype(["two", "one", "tri"], ordered=True))
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False)
    return path


def read(path: Path, roles: Roles = ROLES["plain"]) -> Any:
    return read_dataset(str(path), None, None, False, roles)


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "tables").glob("*.table"))


def assert_same(one: Any, other: Any) -> None:
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert (a.dtype, a.shape, a.strides) == (b.dtype, b.shape, b.strides), field.name
            assert a.tolist() == b.tolist() if a.dtype.kind in "OU" else a.tobytes() == b.tobytes(), field.name
        else:
            assert a == b, field.name
            assert type(a) is type(b), field.name


@pytest.mark.parametrize("memory", ["", "100"], ids=["in memory", "mapped"])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("roles", ROLES)
def test_a_kept_table_is_the_one_that_was_read(roles, suffix, memory, tmp_path, reads, monkeypatch):
    if memory and roles == "words":
        pytest.skip("features of words are refused there")
    monkeypatch.setenv("PPL_VAE_IN_MEMORY", memory)
    path = written(tmp_path / f"t.{suffix}")
    one, other = read(path, ROLES[roles]), read(path, ROLES[roles])
    assert reads == [path]
    assert_same(one, other)
    assert isinstance(other.x, np.memmap) == bool(memory)
    other.x[0] = 7.0  # which changes no file
    assert_same(one, read(path, ROLES[roles]))


def test_data_from_the_cache_have_the_same_digests(tmp_path, reads):
    options: Any = {"label": "kind", "id": "id", "covariates": ["group"], "scaling": "standardize"}
    one, other = (load(written(tmp_path / "t.csv") if i == 0 else tmp_path / "t.csv", **options) for i in (0, 1))
    assert len(reads) == 1
    assert (one.protocol, one.columns) == (other.protocol, other.columns)
    assert all(torch.equal(one.train[key], other.train[key]) for key in one.train)


def test_an_edit_that_keeps_size_and_times_is_read_anew(tmp_path, reads):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n3,4\n")
    known = path.stat()
    assert read(path, Roles()).x[1, 1] == 4
    with path.open("r+") as file:  # in place, so that the inode stays too
        file.seek(10)
        file.write("9")
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (known.st_size, known.st_mtime_ns, known.st_ino)
    assert read(path, Roles()).x[1, 1] == 9
    assert len(reads) == 2


def test_a_file_that_is_edited_while_it_is_read_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n3,4\n")
    whole = tables.read_table

    def edited(*given: Any) -> Any:
        found = whole(*given)
        path.write_text("a,b\n1,2\n3,5\n")
        return found

    monkeypatch.setattr(tables, "read_table", edited)
    assert read(path, Roles()).x[1, 1] == 4
    assert not entries(tmp_path)


@pytest.mark.parametrize("change", ["roles", "suffix", "mapped", "limit", "versions"])
def test_what_reading_depends_on_tells_entries_apart(change, tmp_path, reads, monkeypatch):
    path = written(tmp_path / "t.csv")
    read(path)
    roles = ROLES["plain"]
    if change == "roles":
        roles = dataclasses.replace(roles, categories=["count"])
    if change == "suffix":
        path = path.rename(tmp_path / "t.txt")
    if change == "mapped":
        monkeypatch.setenv("PPL_VAE_IN_MEMORY", "100")
    if change == "limit":
        monkeypatch.setenv("PPL_VAE_LARGEST", "1e9")
    if change == "versions":
        monkeypatch.setattr(cache, "_versions", lambda: ("another",))
    read(path, roles)
    assert len(reads) == len(entries(tmp_path)) == 2


def test_another_name_of_the_same_bytes_is_no_other_table(tmp_path, reads):
    path = written(tmp_path / "t.csv")
    read(path)
    read(path.rename(tmp_path / "other.csv"))
    assert len(reads) == 1


def test_no_damage_is_accepted_and_the_entry_is_made_anew(tmp_path, reads):
    path = written(tmp_path / "t.csv")
    truth = read(path)
    (entry,) = entries(tmp_path)
    whole, draw = entry.read_bytes(), np.random.default_rng(1)
    places = [0, 15, 16, 79, 80, 100, len(whole) - 1, *draw.integers(0, len(whole), 60)]
    damaged = [whole[:at] + bytes([whole[at] ^ 1 << draw.integers(8)]) + whole[at + 1 :] for at in places]
    damaged += [whole[:at] for at in (0, 10, 60, 80, 120, len(whole) - 1)] + [whole + b"x"]
    for count, content in enumerate(damaged, 2):
        entry.write_bytes(content)
        assert_same(truth, read(path))
        assert len(reads) == count
        assert entry.read_bytes() == whole


def test_an_entry_under_the_name_of_another_is_refused(tmp_path, reads):
    one, other = written(tmp_path / "a.csv"), written(tmp_path / "b.csv")
    read(one)
    (first,) = entries(tmp_path)
    read(other)
    (second,) = [path for path in entries(tmp_path) if path != first]
    second.write_bytes(first.read_bytes())
    assert_same(read(other), read(other))
    assert reads == [one, other, other]


def test_links_pipes_and_folders_are_neither_followed_nor_deleted(tmp_path, reads, caplog):
    path, secret = written(tmp_path / "t.csv"), tmp_path / "secret"
    truth = read(path)
    (entry,) = entries(tmp_path)
    secret.write_bytes(entry.read_bytes())
    kept = secret.read_bytes()
    for make in (
        lambda place: place.symlink_to(secret),
        lambda place: place.symlink_to("nowhere"),
        lambda place: os.mkfifo(place),
        lambda place: place.mkdir(),
    ):
        for place in (entry, entry.with_suffix(".partial"), entry.parent / "lock"):
            for old in (entry, place):
                old.rmdir() if old.is_dir() and not old.is_symlink() else old.unlink(missing_ok=True)
            make(place)
            before, count = place.lstat(), len(reads)
            caplog.clear()
            if place.name == "lock" and not place.is_symlink() and not place.is_dir():
                place.unlink()  # a pipe as a lock is locked as well as a file
                continue
            assert_same(truth, read(path))
            assert len(reads) == count + 1
            assert [record.levelname for record in caplog.records] == ["WARNING"]
            after = place.lstat()
            assert (after.st_ino, after.st_mode, after.st_mtime_ns) == (
                before.st_ino,
                before.st_mode,
                before.st_mtime_ns,
            )
            assert secret.read_bytes() == kept
            assert not (tmp_path / "nowhere").exists()
            place.rmdir() if place.is_dir() and not place.is_symlink() else place.unlink()


@pytest.mark.parametrize("what", ["a file", "a link", "open to all", "no right to write"])
def test_a_folder_that_will_not_do_is_left_alone(what, tmp_path, reads, caplog, monkeypatch):
    path, folder, other = written(tmp_path / "t.csv"), tmp_path / "cache" / "tables", tmp_path / "other"
    folder.parent.mkdir()
    other.mkdir()
    if what == "a file":
        folder.write_text("mine")
    elif what == "a link":
        folder.symlink_to(other)
    elif what == "open to all":
        folder.mkdir()
        folder.chmod(0o777)
    else:  # also where the tests run as root

        def refused(*given: Any, **more: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(cache, "FileLock", refused)
    for count in (1, 2):
        read(path)
        assert (len(reads), len(caplog.records)) == (count, count)
    assert list(other.iterdir()) == []


def test_a_full_disk_costs_one_line(tmp_path, reads, caplog, monkeypatch):
    def full(file: Any, *given: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_write", full)
    path = written(tmp_path / "t.csv")
    read(path)
    assert "No space left on device" in caplog.text
    assert len(caplog.records) == 1
    assert [one.name for one in (tmp_path / "cache" / "tables").iterdir()] == ["lock"]


def test_another_process_that_writes_is_not_waited_for(tmp_path, reads, caplog):
    path = written(tmp_path / "t.csv")
    folder = tmp_path / "cache" / "tables"
    folder.mkdir(parents=True, mode=0o700)
    with FileLock(folder / "lock"):
        start = time.monotonic()
        read(path)
        assert time.monotonic() - start < 5
    assert (len(caplog.records), entries(tmp_path)) == (1, [])
    read(path)
    assert len(entries(tmp_path)) == 1


def test_the_oldest_go_and_nothing_else(tmp_path, reads, monkeypatch):
    paths = [written(tmp_path / f"{i}.csv") for i in range(3)]
    read(paths[0])
    (first,) = entries(tmp_path)
    theirs = first.parent / "notes.table"
    theirs.write_text("mine")
    left = first.with_name("0" * 64 + ".partial")
    left.write_bytes(b"of a process that was killed")
    monkeypatch.setenv("PPL_VAE_CACHE_SIZE", str(2.5 * first.stat().st_size))
    read(paths[1])
    assert not left.exists()
    os.utime(first, (1, 1))
    read(paths[0])  # which is used, and so no longer the oldest
    (second,) = [path for path in entries(tmp_path) if path not in (first, theirs)]
    os.utime(second, (9, 9))
    read(paths[2])
    assert first.exists()
    assert not second.exists()
    assert theirs.read_text() == "mine"
    assert sum(path.stat().st_size for path in entries(tmp_path)) < 2.5 * first.stat().st_size
    read(paths[0])
    assert reads == paths


@pytest.mark.parametrize("size", ["0", "10"])
def test_the_cache_can_be_turned_off_or_too_small(size, tmp_path, reads, monkeypatch):
    monkeypatch.setenv("PPL_VAE_CACHE_SIZE", size)
    path = written(tmp_path / "t.csv")
    read(path)
    read(path)
    assert (len(reads), entries(tmp_path)) == (2, [])


@pytest.mark.parametrize("size", ["much", "nan", "-1"])
def test_a_size_that_is_none_is_refused(size, tmp_path, monkeypatch):
    monkeypatch.setenv("PPL_VAE_CACHE_SIZE", size)
    with pytest.raises(ValueError, match=f"bytes in the variable PPL_VAE_CACHE_SIZE.*got '?{size}"):
        read(written(tmp_path / "t.csv"))


def test_small_and_fast_tables_are_not_kept(tmp_path, monkeypatch):
    path = written(tmp_path / "t.csv")
    for name, value in (("_SMALLEST", 2**22), ("_SLOW", 1.0)):
        with monkeypatch.context() as patch:
            patch.setattr(cache, name, value)
            read(path)
        assert not (tmp_path / "cache" / "tables").exists() or not entries(tmp_path)


def test_what_cannot_be_kept_as_it_is_is_not_kept(tmp_path, reads):
    frame = pd.DataFrame({"a": [1.0, 2.0], "when": pd.to_datetime(["2020-01-01", "2021-01-01"])})
    frame.to_parquet(tmp_path / "t.parquet")
    for _ in (1, 2):
        assert read(tmp_path / "t.parquet", Roles(id="when")).ids.dtype.kind == "M"
    assert (len(reads), entries(tmp_path)) == (2, [])


def test_a_message_is_the_same_with_and_without(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,inf\n3,4\n")
    for _ in (1, 2):
        with pytest.raises(ValueError, match="line 2, column 'b'; got 'inf'"):
            read(path, Roles())
    assert not entries(tmp_path)


WRITER = """
import logging, sys
from ppl_vae.data import cache
from ppl_vae.data.datasets import read_dataset
from ppl_vae.data.tables import Roles

logging.disable()
cache._SMALLEST, cache._SLOW = 0, -1.0
for _ in range(40):
    raw = read_dataset(sys.argv[1], None, None, False, Roles(leave_out=["id", "kind", "group"]))
    entry = next((cache.cache_folder() / "tables").glob("*.table"), None)
    if entry is not None:
        entry.unlink(missing_ok=True)  # so that both write again
    print(float(raw.x.sum()))
"""


def test_two_processes_at_once_read_the_same(tmp_path):
    path = written(tmp_path / "t.csv", 5000)
    command = [sys.executable, "-c", WRITER, str(path)]
    many = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [one.communicate()[0].split() for one in many]
    assert [one.returncode for one in many] == [0, 0]
    assert set(said[0] + said[1]) == {str(float(read(path).x.sum()))}
    assert len(said[0] + said[1]) == 80
    assert not [one for one in (tmp_path / "cache" / "tables").iterdir() if one.suffix == ".partial"]


def test_a_kill_while_writing_leaves_no_wrong_table(tmp_path, reads, monkeypatch):
    path = written(tmp_path / "t.csv")
    truth = read(path)
    (entry,) = entries(tmp_path)
    entry.rename(entry.with_suffix(".partial"))  # as it stands before the last step
    assert_same(truth, read(path))
    assert len(reads) == 2
    assert [one.name for one in sorted(entry.parent.iterdir())] == [entry.name, "lock"]
