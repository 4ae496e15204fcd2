"""Folders of pictures."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from ppl_vae.data.files import RawData, encode, flatten, reading

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
_GREY = ("1", "L", "LA")
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def read_folder(folder: Path) -> RawData:
    """Read pictures of one size, sorted by path, as (h, w) or (3, h, w) in 0..255; subfolders are labels.

    All are grey if each of them is; else all have three channels. Transparency is left out. Their ids are their paths.

    Raises:
        ValueError: If there are none, they differ in size, one is damaged or deeper than 8 bits, or some lie in
            subfolders and some do not.
    """
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in found if Path(name).suffix.lower() in SUFFIXES and "/." not in f"/{name}"]
    if not names:
        raise ValueError(f"Expected pictures ({', '.join(SUFFIXES)}) in the folder {folder}; got none.")
    labels = [name.rpartition("/")[0] for name in names]
    if "" in labels and any(labels):
        first = next(name for name in names if "/" in name)
        raise ValueError(
            f"Expected all pictures of {folder} in subfolders, which label them, or none; got "
            f"{names[labels.index('')]} and {first}."
        )
    pictures = [_open(folder / name) for name in names]
    mode = "L" if all(picture.mode in _GREY for picture in pictures) else "RGB"
    for name, picture in zip(names, pictures, strict=True):
        if picture.size != pictures[0].size:
            one, other = (f"{width} x {height}" for width, height in (pictures[0].size, picture.size))
            raise ValueError(
                f"Expected pictures of one size (width x height) in {folder}; {names[0]} has {one}, {name} has {other}."
                " Crop or resize them."
            )
    x, shape = flatten(np.stack([np.asarray(picture.convert(mode), np.uint8) for picture in pictures]))
    y, classes = encode(np.array(labels), str(folder)) if any(labels) else (None, None)
    return RawData(x, y, shape, maximum=255, classes=classes, ids=np.array(names))


def _open(path: Path) -> Any:
    """Picture in a file, read as a whole."""
    pillow = importlib.import_module("PIL.Image")
    with reading(path, "a picture (remove what is none)"), pillow.open(path) as picture:
        picture.load()
    if picture.mode in _DEEP:
        raise ValueError(f"Expected 8 bits per channel in {path}; got mode {picture.mode}. Convert the pictures.")
    return picture
