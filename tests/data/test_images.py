"""Folders of pictures, arrays with labels and channels, and torchvision's sets in files of their own formats."""

import hashlib
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.io
import torch
from PIL import Image

from ppl_vae.data import Data, datasets, load

Pixels = npt.NDArray[np.uint8]


def _pixels(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _picture(path: Path, pixels: Pixels, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(path)


def _by_source(data: Data, key: str = "x") -> npt.NDArray[Any]:
    """All rows in the order of the source."""
    rows = np.concatenate([data.row_numbers["train"], data.row_numbers["test"]])
    return torch.cat([data.train[key], data.test[key]]).numpy()[np.argsort(rows)]


# Folders


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 3)])
def test_a_folder_of_pictures(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = _pixels(10, *shape)
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    for i in order:
        _picture(tmp_path / "faces" / f"{i}.{'png' if i % 2 else 'bmp'}", pixels[i])
    (tmp_path / "faces" / "notes.txt").write_text("not a picture")
    (tmp_path / "faces" / ".hidden").mkdir()
    (tmp_path / "faces" / ".hidden" / "0.png").write_bytes(b"")
    data = load(f"{tmp_path}/faces/")
    rows = pixels if len(shape) == 2 else np.moveaxis(pixels, 3, 1)
    np.testing.assert_array_equal(_by_source(data), rows.reshape(10, -1))
    assert data.shape == rows.shape[1:]
    assert data.columns.levels == (256,) * rows[0].size
    assert "y" not in data.train
    names = {part: [f"{i}.{'png' if i % 2 else 'bmp'}" for i in data.row_numbers[part]] for part in ("train", "test")}
    assert {part: list(data.ids[part]) for part in names} == names  # type: ignore[arg-type]
    assert load(tmp_path / "faces", scaling="unit").train["x"].max() <= 1


def test_subfolders_are_labels(tmp_path: Path) -> None:
    pixels = _pixels(9, 2, 2)
    for i in range(9):
        _picture(tmp_path / "abc"[i // 3] / f"{i}.png", pixels[i])
    data = load(tmp_path)
    assert data.classes == ("a", "b", "c")
    np.testing.assert_array_equal(_by_source(data, "y"), np.repeat([0, 1, 2], 3))
    np.testing.assert_array_equal(_by_source(data), pixels.reshape(9, 4))
    _picture(tmp_path / "z.png", pixels[0])
    with pytest.raises(ValueError, match=r"in subfolders, which label them, or none; got z\.png and a/0\.png"):
        load(tmp_path)


def test_one_colour_picture_makes_all_of_three_channels(tmp_path: Path) -> None:
    grey, colour = _pixels(4, 2, 2), _pixels(2, 2, 3)
    for i, mode in enumerate((None, "LA", "L", "L")):
        _picture(tmp_path / f"{i}.png", grey[i], mode)
    assert load(tmp_path).shape == (2, 2)
    _picture(tmp_path / "4.png", colour, "RGBA")
    data = load(tmp_path)
    assert data.shape == (3, 2, 2)
    expected = [np.stack([picture] * 3) for picture in grey] + [np.moveaxis(colour, 2, 0)]
    np.testing.assert_array_equal(_by_source(data), np.stack(expected).reshape(5, 12))


def test_bad_pictures_are_named(tmp_path: Path) -> None:
    for i in range(4):
        _picture(tmp_path / f"{i}.png", _pixels(4, 3))
    _picture(tmp_path / "4.png", _pixels(3, 5))
    with pytest.raises(ValueError, match=r"one size \(width x height\) in .*; 0\.png has 3 x 4, 4\.png has 5 x 3"):
        load(tmp_path)
    whole = (tmp_path / "0.png").read_bytes()
    for damaged in (whole[:-30], whole[:45] + b"\0" * 20, b"", b"text"):
        (tmp_path / "4.png").write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"a picture .remove.*; got {re.escape(str(tmp_path / '4.png'))}: "):
            load(tmp_path)
    _picture(tmp_path / "4.png", _pixels(4, 3).astype(np.uint16))
    with pytest.raises(ValueError, match=r"8 bits per channel in .*4\.png; got mode I"):
        load(tmp_path)
    with pytest.raises(ValueError, match="no `label` for a folder of pictures"):
        load(tmp_path, label="x")


# Arrays


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((6, 4, 5), (4, 5)),
        ((6, 3, 4, 5), (3, 4, 5)),
        ((6, 4, 5, 3), (3, 4, 5)),
        ((6, 1, 4, 5), (1, 4, 5)),
        ((6, 4, 5, 1), (1, 4, 5)),
        ((6, 3, 5, 3), (3, 5, 3)),
        ((6, 4, 5, 6), (4, 5, 6)),
    ],
)
def test_channels_of_arrays(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    pixels = _pixels(*shape)
    np.save(tmp_path / "x.npy", pixels)
    data = load(tmp_path / "x.npy")
    assert data.shape == expected
    rows = pixels if shape[1:] == expected else np.moveaxis(pixels, 3, 1)
    np.testing.assert_array_equal(_by_source(data), rows.reshape(6, -1))


def test_labels_of_archives(tmp_path: Path) -> None:
    x, words = _pixels(12, 3), np.array(["b", "a", "c"] * 4)
    np.savez(tmp_path / "x.npz", images=x, y=np.arange(12) % 2 + 5, kind=words, other=np.arange(12) / 7)
    data = load(tmp_path / "x.npz", array="images")
    np.testing.assert_array_equal(_by_source(data, "y"), np.arange(12) % 2)
    assert data.classes == ("5", "6")
    data = load(tmp_path / "x.npz", array="images", label="kind")
    np.testing.assert_array_equal(np.array(data.classes)[_by_source(data, "y")], words)
    with pytest.raises(ValueError, match=r"whole numbers as labels in .*x\.npz:other; got 0\.14"):
        load(tmp_path / "x.npz", array="images", label="other")
    with pytest.raises(ValueError, match=r"`label` to be a key of .*\('images', 'y', .*got 'z'"):
        load(tmp_path / "x.npz", array="images", label="z")
    np.savez(tmp_path / "one.npz", x=x, y=np.arange(12))
    assert load(tmp_path / "one.npz").protocol["name"] == "one.npz:x"
    np.savez(tmp_path / "short.npz", x=x, y=np.arange(11))
    with pytest.raises(ValueError, match=r"labels \(12,\) in .*short\.npz:y; got \(11,\)"):
        load(tmp_path / "short.npz")
    np.savez(tmp_path / "targets.npz", x=x, y=np.arange(12) / 7)
    assert "y" not in load(tmp_path / "targets.npz").train
    np.savez(tmp_path / "only.npz", y=x)
    np.testing.assert_array_equal(_by_source(load(tmp_path / "only.npz")), x)


# torchvision's sets


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def _idx(path: Path, values: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(head + values.tobytes())


Made = tuple[Pixels, npt.NDArray[Any]]


def _make_idx(folder: str, prefix: str) -> Callable[[Path, pytest.MonkeyPatch], Made]:
    def make(root: Path, patch: pytest.MonkeyPatch) -> Made:
        x, y = _pixels(9, 28, 28), np.arange(9, dtype=np.uint8) % 4
        for part, rows in (("train", slice(6)), ("test" if "emnist" in prefix else "t10k", slice(6, 9))):
            _idx(root / folder / f"{prefix}{part}-images-idx3-ubyte", x[rows])
            _idx(root / folder / f"{prefix}{part}-labels-idx1-ubyte", y[rows])
        return (x.swapaxes(1, 2) if "emnist" in prefix else x), y

    return make


def _make_cifar(root: Path, patch: pytest.MonkeyPatch) -> Made:
    x, y, folder = _pixels(9, 3, 32, 32), np.arange(9) % 4, root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    files = {"one": (x[:2], y[:2]), "two": (x[2:6], y[2:6]), "test": (x[6:], y[6:])}
    for name, (pixels, labels) in files.items():
        (folder / name).write_bytes(pickle.dumps({"data": pixels.reshape(len(pixels), -1), "labels": labels.tolist()}))
    (folder / "names").write_bytes(pickle.dumps({"label_names": ["a", "b", "c", "d"]}))
    kind = datasets.torchvision_datasets().CIFAR10
    patch.setattr(kind, "train_list", [[name, _md5(folder / name)] for name in ("one", "two")])
    patch.setattr(kind, "test_list", [["test", _md5(folder / "test")]])
    patch.setattr(kind, "meta", {"filename": "names", "key": "label_names", "md5": _md5(folder / "names")})
    return x, y


def _make_svhn(root: Path, patch: pytest.MonkeyPatch) -> Made:
    x, y = _pixels(9, 3, 32, 32), np.arange(9) % 10
    sums = {}
    for part, rows in (("train", slice(6)), ("test", slice(6, 9))):
        path = root / f"{part}_32x32.mat"
        labels = np.where(y[rows] == 0, 10, y[rows])[:, None].astype(np.uint8)  # as the set writes a zero
        scipy.io.savemat(path, {"X": np.transpose(x[rows], (2, 3, 1, 0)), "y": labels})
        sums[part] = ["", path.name, _md5(path)]
    patch.setattr(datasets.torchvision_datasets().SVHN, "split_list", sums)
    return x, y


def _make_omniglot(root: Path, patch: pytest.MonkeyPatch) -> Made:
    x, folder, sums, i = _pixels(8, 105, 105), root / "omniglot-py", {}, 0
    for part, characters in (("images_background", ("A/1", "A/2", "B/1")), ("images_evaluation", ("C/1",))):
        for character in characters:
            for copy in range(2):
                _picture(folder / part / character / f"{copy}.png", x[i])
                i += 1
        with zipfile.ZipFile(folder / f"{part}.zip", "w"):
            pass
        sums[part] = _md5(folder / f"{part}.zip")
    patch.setattr(datasets.torchvision_datasets().Omniglot, "zips_md5", sums)
    return x, np.repeat(np.arange(4), 2)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("mnist", _make_idx("MNIST/raw", "")),
        ("fashionmnist", _make_idx("FashionMNIST/raw", "")),
        ("kmnist", _make_idx("KMNIST/raw", "")),
        ("emnist", _make_idx("EMNIST/raw", "emnist-balanced-")),
        ("cifar10", _make_cifar),
        ("svhn", _make_svhn),
        ("omniglot", _make_omniglot),
    ],
)
def test_sets_in_their_own_formats(name: str, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' under {re.escape(str(tmp_path))} .*that holds .*give download"):
        load(name, root=tmp_path)
    x, y = make(tmp_path, monkeypatch)
    data = load(name, root=tmp_path, dtype=torch.float64)
    np.testing.assert_allclose(_by_source(data), x.reshape(len(x), -1) / 255, rtol=1e-15)
    np.testing.assert_array_equal(_by_source(data, "y"), y)
    assert data.shape == x.shape[1:]
    assert len(data.train["x"]) == 6
    assert data.columns.levels == (256,) * x[0].size
    assert (data.protocol["split"]["by"], data.protocol["maximum"]) == ("the set's own", 255)
    assert data.classes == (("a", "b", "c", "d") if name == "cifar10" else data.classes)


def test_a_changed_pickle_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_cifar(tmp_path, monkeypatch)

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "cifar-10-batches-py" / "two").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="Expected 'cifar10' under .*corrupted"):
        load("cifar10", root=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_every_name_is_in_the_message() -> None:
    with pytest.raises(ValueError, match=r"`name` to be .* or the path") as caught:
        load("nothing")
    assert all(repr(name) in str(caught.value) for name in datasets.NAMES)
    there = vars(datasets.torchvision_datasets())
    assert all(kind in there and name == kind.lower() for name, (kind, *_) in datasets.TORCHVISION.items())
