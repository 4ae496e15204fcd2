"""Data sets by name or path, before any split or transform."""

import difflib
import importlib
import keyword
import os
import re
import sys
import sysconfig
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from platformdirs import user_cache_path

from ppl_vae.data import annotated, cache, images, pieces, tables
from ppl_vae.data.files import RawData, flatten, in_memory, read_array, read_cells
from ppl_vae.data.tables import Roles, Table

BUNDLED = ("iris", "wine", "breast_cancer", "diabetes")
# class in torchvision, its settings for training and test part, and where its files lie under `root`
TORCHVISION: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "mnist": ("MNIST", {"train": True}, {"train": False}, "MNIST/raw"),
    "fashionmnist": ("FashionMNIST", {"train": True}, {"train": False}, "FashionMNIST/raw"),
    "kmnist": ("KMNIST", {"train": True}, {"train": False}, "KMNIST/raw"),
    "emnist": ("EMNIST", {"split": "balanced", "train": True}, {"split": "balanced", "train": False}, "EMNIST/raw"),
    "omniglot": ("Omniglot", {"background": True}, {"background": False}, "omniglot-py"),
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}, "cifar-10-batches-py"),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}, "train_32x32.mat"),
}
EMBEDDED = (*BUNDLED, "keywords")
NAMES = ("digits", *EMBEDDED, *TORCHVISION)
SUFFIXES = (".npy", ".npz", annotated.SUFFIX, *tables.TEXT, *tables.BINARY)
_ROLES = ("label", "id", "columns", "leave_out", "categories", "size_factor", "separator", "missing", "covariates")
_LIBRARIES: list[Any] = []  # torch forgets the operators of a library that is not referenced


def is_path(name: str) -> bool:
    """Whether the name of data is a path."""
    path = Path(name)
    return name not in NAMES and (bool(path.suffix) or len(path.parts) > 1 or name.endswith(("/", os.sep)))


def check_name(name: str) -> None:
    """Refuse what is neither a known name nor a path.

    Raises:
        ValueError: With the names, and the one that is meant.
    """
    if name not in NAMES and not is_path(name):
        close = difflib.get_close_matches(name.lower(), NAMES, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"Expected `name` to be {', '.join(map(repr, NAMES))} or the path of a file ({', '.join(SUFFIXES)}) "
            f"or of a folder of pictures (faces/); got {name!r}.{hint}"
        )


def unused_keys(name: str) -> dict[str, str]:
    """Keys of `load` that have no effect on such data, and what the data are."""
    embedded = ("root", "array", "download")
    if name == "digits":
        return dict.fromkeys((*embedded, "test_fraction", *_ROLES), "digits, which are embedded, split and all")
    if name in EMBEDDED:
        keys = (*embedded, "label", "id", "size_factor", "separator", "missing")
        return dict.fromkeys(keys, f"{name}, which is embedded, labels and all")
    if name in NAMES:
        return dict.fromkeys(("array", "test_fraction", *_ROLES), f"{name}, which has a split of its own")
    suffix = Path(name).suffix.lower()
    unused = dict.fromkeys(("root", "download"), "the path of a file; `name` says where it lies")
    unused |= {"array": "a file that is neither .npz nor .h5ad", "separator": "data that are no text"}
    several = suffix in (".npz", annotated.SUFFIX)
    unused.pop("array" if several else "separator" if suffix in tables.TEXT else "", None)
    if suffix == annotated.SUFFIX:
        unused["categories"] = "an AnnData file, whose matrix holds numbers"
    if suffix in (".npy", ".npz"):
        named = ("id", "columns", "leave_out", "categories")
        unused |= dict.fromkeys(named, "an array, whose columns have no names")
    if suffix == ".npy":
        unused |= dict.fromkeys(("label", "covariates"), "an array alone")
    if suffix not in SUFFIXES:
        unused |= dict.fromkeys(_ROLES, "a folder of pictures, whose subfolders are the labels")
    return unused


def read_dataset(
    name: str, root: str | os.PathLike[str] | None, array: str | None, download: bool, roles: Roles
) -> RawData:
    """Read a named set, or the file or folder at a path.

    Raises:
        ValueError: If there is no such set or file, it cannot be read, or a key has no effect on it.
    """
    path = Path(name).expanduser()
    if name not in NAMES and not path.exists():
        check_name(name)
        if path.suffix.lower() not in SUFFIXES and path.suffix:
            raise ValueError(f"Expected a file that ends in {', '.join(SUFFIXES)}; got {path}.")
        raise ValueError(f"Expected a data file at {path.absolute()}; got no such file or folder. Correct the path.")
    for key, reason in unused_keys(name).items():
        value = {"array": array, **vars(roles)}.get(key)
        if value is not None:
            raise ValueError(f"Expected no `{key}` for {reason}; got {value!r}. Leave it out.")
    if name == "digits":
        bunch = importlib.import_module("sklearn.datasets").load_digits()
        return RawData(bunch.data.astype(np.uint8), bunch.target.astype(np.int64), (8, 8), maximum=16, n_train=1500)
    if name == "keywords":
        return tables.choose(_count_keywords(), replace(roles, id="module"))
    if name in BUNDLED:
        return _read_bundled(name, roles)
    if name in TORCHVISION:
        return _read_torchvision(name, root, download)
    if path.is_dir():
        return images.read_folder(path)
    if path.suffix.lower() in (".npy", ".npz"):
        raw = read_array(path, array, roles.label, roles.covariates or ())
        if not roles.covariates:
            return raw
        table = Table(str(path), read_cells(path, roles.covariates))
        return tables.with_covariates(raw, table, table.cells)
    if path.suffix.lower() == annotated.SUFFIX:
        return annotated.read_annotated(path, array, roles)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"Expected a file that ends in {', '.join(SUFFIXES)}; got {path}.")
    text = [name for name in (roles.id, roles.label, *(roles.categories or ())) if name]
    large = 8 * path.stat().st_size > in_memory()

    def read() -> RawData:
        if large:
            return pieces.read_in_pieces(path, roles, text)
        return tables.choose(tables.read_table(path, roles.separator, text), roles)

    return cache.remember(path, (path.suffix.lower(), roles), read, mapped=large)


def _read_bundled(name: str, roles: Roles) -> RawData:
    """Read a table of scikit-learn's; that of `diabetes` in its own units, its target only if `columns` has `y`."""
    options = {"scaled": False} if name == "diabetes" else {}
    bunch = getattr(importlib.import_module("sklearn.datasets"), f"load_{name}")(**options)
    table = Table(name, dict(zip(map(str, bunch.feature_names), bunch.data.T, strict=True)))
    if name == "diabetes":
        if "y" in (roles.columns or ()):
            table.cells["y"] = bunch.target
        return tables.choose(table, replace(roles, categories=[*(roles.categories or ()), "sex"]))
    y, classes = bunch.target.astype(np.int64), tuple(map(str, bunch.target_names))
    return replace(tables.choose(table, roles), y=y, classes=classes)


def _count_keywords() -> Table:
    """How often each keyword stands in the text of each module of the Python that runs, docstrings included."""
    folder, counts = Path(sysconfig.get_path("stdlib")), {}
    for file in sorted([*folder.glob("*.py"), *folder.glob("*/*.py")]):
        if file.parent.name not in ("site-packages", "test", "tests"):
            words = Counter(re.findall(r"\w+", file.read_text(encoding="utf-8", errors="replace")))
            counts[file.relative_to(folder).as_posix()] = [float(words[word]) for word in keyword.kwlist]
    named = {name: values for name, values in counts.items() if sum(values)}
    columns = dict(zip(keyword.kwlist, np.array(list(named.values())).T, strict=True))
    return Table("keywords", {"module": list(named), **{word: each for word, each in columns.items() if each.any()}})


def _read_torchvision(name: str, root: str | os.PathLike[str] | None, download: bool) -> RawData:
    """Read a named set through torchvision, which checks the sums of files before it unpickles them."""
    (folder, origin), (kind, *settings, place) = root_folder(root), TORCHVISION[name]
    datasets = torchvision_datasets(name)
    try:
        parts = [getattr(datasets, kind)(str(folder), **setting, download=download) for setting in settings]
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        remedy = (
            "Check the network connection, and that the folder can be written"
            if download
            else f"Set `root` or PPL_VAE_DATA to the folder that holds {place}, or give download=True"
        )
        raise ValueError(
            f"Expected {name!r} under {folder} ({origin}); got: {str(error).strip().rstrip('.')}. {remedy}."
        ) from error
    own: dict[str, Any] = {"maximum": 255, "in_order": True, "unit": True}
    if name == "omniglot":  # torchvision takes its files in no sure order; the parts are of different characters
        one, other = (vars(images.read_folder(Path(part.target_folder))) for part in parts)
        x, y = np.concatenate([one["x"], other["x"]]), np.concatenate([one["y"], other["y"] + len(one["classes"])])
        return RawData(x, y, one["shape"], n_train=len(one["x"]), classes=one["classes"] + other["classes"], **own)
    x = np.concatenate([np.asarray(part.data) for part in parts])
    labels = [np.asarray(part.labels if name == "svhn" else part.targets) for part in parts]
    rows, shape = flatten(x.swapaxes(1, 2) if name == "emnist" else x)  # EMNIST's files lay pictures on their side
    classes = tuple(getattr(parts[0], "classes", ())) or None
    y = np.concatenate(labels).astype(np.int64)
    return RawData(rows, y, shape, n_train=len(labels[0]), classes=classes, **own)


def root_folder(root: str | os.PathLike[str] | None) -> tuple[Path, str]:
    """Folder of the named sets, and what chose it: `root`, the variable PPL_VAE_DATA or the platform."""
    if root is not None:
        return Path(root).expanduser(), "`root`"
    if chosen := os.environ.get("PPL_VAE_DATA"):
        return Path(chosen).expanduser(), "the environment variable PPL_VAE_DATA"
    return user_cache_path("ppl_vae", appauthor=False, opinion=False), "the cache folder"


def torchvision_datasets(name: str = "mnist") -> ModuleType:
    """Import `torchvision.datasets`, even if torchvision's operators do not match this build of torch.

    Raises:
        ValueError: If torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision.datasets")
    except ImportError as error:
        raise ValueError(f"Expected torchvision for {name!r}; got: {error}. Install torchvision.") from error
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
