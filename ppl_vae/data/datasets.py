"""Named data sets, and the choice between these and files."""

import difflib
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ppl_vae.data.files import SUFFIXES, Table, maximum, read_csv, read_numpy

NAMES = ("digits", "mnist")
_KEPT: list[object] = []


def read_table(name: str, root: str | os.PathLike[str] | None, array: str | None, download: bool) -> Table:
    """Find `name` among the known sets and the files."""
    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    if array is not None and suffix != ".npz":
        raise ValueError(f"Expected `array` for an .npz file only; got {array!r} for {name}. Leave it out.")
    if name == "digits":
        bunch = importlib.import_module("sklearn.datasets").load_digits()
        return Table(bunch.data.astype(np.uint8), bunch.target.astype(np.int64), (8, 8), maximum=16, n_train=1500)
    if name == "mnist":
        return _mnist(root, download)
    if path.is_dir():
        raise ValueError(f"Expected a file ({', '.join(SUFFIXES)}); got the folder {path}.")
    if not suffix and len(path.parts) == 1:
        close = difflib.get_close_matches(name.lower(), NAMES, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"Expected `name` to be {', '.join(map(repr, NAMES))} or the path of a file "
            f"({', '.join(SUFFIXES)}); got {name!r}.{hint}"
        )
    if suffix not in SUFFIXES:
        raise ValueError(f"Expected a file that ends in {', '.join(SUFFIXES)}; got {path}.")
    if not path.is_file():
        raise ValueError(f"Expected a data file at {path.absolute()}; got no such file. Correct `name`.")
    if suffix == ".csv":
        values, feature_names = read_csv(path)
        return Table(values, feature_names=feature_names, maximum=maximum(values))
    values, array = read_numpy(path, array)
    shape = values.shape[1:] if values.ndim > 2 else None
    values = values.reshape(len(values), -1)
    return Table(values, shape=shape, array=array, maximum=maximum(values))


def _mnist(root: str | os.PathLike[str] | None, download: bool) -> Table:
    """Read MNIST by torchvision, from the folder that holds `MNIST/raw`."""
    folder, origin = root_folder(root)
    datasets = _torchvision_datasets()
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
    return Table(x.reshape(len(x), -1), y, x.shape[1:], maximum=255, n_train=len(parts[0]), own_split=True)


def root_folder(root: str | os.PathLike[str] | None) -> tuple[Path, str]:
    """Return the folder of named sets, and what chose it."""
    if root is not None:
        return Path(root).expanduser(), "`root`"
    if chosen := os.environ.get("PPL_VAE_DATA"):
        return Path(chosen).expanduser(), "the environment variable PPL_VAE_DATA"
    if sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "ppl_vae", "the cache folder"


def _torchvision_datasets() -> ModuleType:
    """Import `torchvision.datasets`, also where torchvision's operators do not match this build of torch."""
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
    _KEPT.append(library)
    return importlib.import_module("torchvision.datasets")
