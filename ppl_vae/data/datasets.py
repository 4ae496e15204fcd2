"""Data sets by name or path, before any split or transform."""

import difflib
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from platformdirs import user_cache_path

from ppl_vae.data.files import SUFFIXES, RawData, read_file

NAMES = ("digits", "mnist")
_LIBRARIES: list[Any] = []  # torch forgets the operators of a library that is not referenced


def read_dataset(name: str, root: str | os.PathLike[str] | None, array: str | None, download: bool) -> RawData:
    """Read a named set, or the file at a path.

    Raises:
        ValueError: If there is no such set or file, or it cannot be read.
    """
    path = Path(name).expanduser()
    if array is not None and path.suffix.lower() != ".npz":
        raise ValueError(f"Expected `array` for an .npz file only; got {array!r} for {name}. Leave it out.")
    if name == "digits":
        bunch = importlib.import_module("sklearn.datasets").load_digits()
        return RawData(bunch.data.astype(np.uint8), bunch.target.astype(np.int64), (8, 8), maximum=16, n_train=1500)
    if name == "mnist":
        return _read_mnist(root, download)
    if path.is_dir():
        raise ValueError(f"Expected a file ({', '.join(SUFFIXES)}); got the folder {path}.")
    if not path.suffix and len(path.parts) == 1:
        close = difflib.get_close_matches(name.lower(), NAMES, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"Expected `name` to be {', '.join(map(repr, NAMES))} or the path of a file "
            f"({', '.join(SUFFIXES)}); got {name!r}.{hint}"
        )
    return read_file(path, array)


def _read_mnist(root: str | os.PathLike[str] | None, download: bool) -> RawData:
    folder, origin = root_folder(root)
    datasets = torchvision_datasets()
    try:
        parts = [datasets.MNIST(str(folder), train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        remedy = (
            "Check the network connection, and that the folder can be written"
            if download
            else "Set `root` or PPL_VAE_DATA to the folder that holds MNIST/raw, or give download=True"
        )
        raise ValueError(f"Expected 'mnist' under {folder} ({origin}); got: {error} {remedy}.") from error
    x = np.concatenate([part.data.numpy() for part in parts])
    y = np.concatenate([part.targets.numpy() for part in parts]).astype(np.int64)
    n_train = len(parts[0])
    return RawData(x.reshape(len(x), -1), y, x.shape[1:], maximum=255, n_train=n_train, in_order=True, unit=True)


def root_folder(root: str | os.PathLike[str] | None) -> tuple[Path, str]:
    """Folder of the named sets, and what chose it: `root`, the variable PPL_VAE_DATA or the platform."""
    if root is not None:
        return Path(root).expanduser(), "`root`"
    if chosen := os.environ.get("PPL_VAE_DATA"):
        return Path(chosen).expanduser(), "the environment variable PPL_VAE_DATA"
    return user_cache_path("ppl_vae", appauthor=False, opinion=False), "the cache folder"


def torchvision_datasets() -> ModuleType:
    """Import `torchvision.datasets`, even if torchvision's operators do not match this build of torch.

    Raises:
        ValueError: If torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision.datasets")
    except ImportError as error:
        raise ValueError(f"Expected torchvision for 'mnist'; got: {error}. Install torchvision.") from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for module in [key for key in sys.modules if key.split(".")[0] == "torchvision"]:
        del sys.modules[module]
    library: Any = importlib.import_module("torch.library").Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)
    return importlib.import_module("torchvision.datasets")
