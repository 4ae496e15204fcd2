"""AnnData files (`.h5ad`): a matrix of observations by variables, and what is known of each observation."""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ppl_vae.data.files import RawData, check_numbers, check_unpacked, intensity, reading
from ppl_vae.data.tables import Roles, Table, choose, unknown_name

SUFFIX = ".h5ad"
NAMES = "obs_names"  # what tells the rows apart, unless a column does
_MATRIX = "the matrix"


class _File:
    """An open `.h5ad` file.

    Args:
        path: where it lies.
        file: as h5py opens it.
        layer: the matrix to read in place of X.
    """

    def __init__(self, path: Path, file: Any, layer: str | None) -> None:
        self.path, self.file = path, file
        held = list(file["layers"]) if "layers" in file else []
        if layer is not None and layer not in held:
            raise ValueError(unknown_name("array", layer, held, f"layer of {path}"))
        self.matrix = file["X"] if layer is None else file[f"layers/{layer}"]
        self.shape = tuple(int(n) for n in self.matrix.attrs.get("shape", getattr(self.matrix, "shape", ())))
        if len(self.shape) != 2:
            raise ValueError("its matrix has not two dimensions")
        self.compressed: Any = None

    def array(self, dataset: Any) -> npt.NDArray[Any]:
        """A dataset as it is; text as text."""
        check_unpacked(self.path, dataset.nbytes)
        return dataset.asstr()[:] if dataset.dtype.kind in "OS" else dataset[:]  # type: ignore[no-any-return]

    def rows(self, start: int, stop: int) -> Any:
        """Rows of the matrix, dense or as a sparse array of SciPy."""
        if not hasattr(self.matrix, "keys"):
            return self.matrix[start:stop]
        sparse, wide = importlib.import_module("scipy.sparse"), self.shape[1]
        about = self.matrix.attrs
        if "csc" in str(about.get("encoding-type", about.get("h5sparse_format"))):  # by columns, as a whole
            if self.compressed is None:
                parts = [self.array(self.matrix[key]) for key in ("data", "indices", "indptr")]
                self.compressed = sparse.csc_array(tuple(parts), self.shape).tocsr()
            return self.compressed[start:stop]
        pointers = self.matrix["indptr"][start : stop + 1]
        values, places = (self.matrix[key][pointers[0] : pointers[-1]] for key in ("data", "indices"))
        return sparse.csr_array((values, places, pointers - pointers[0]), (stop - start, wide))

    def names(self, group: str) -> npt.NDArray[Any]:
        """Index of `obs` or `var`."""
        table = self.file[group]
        return self.array(table[table.attrs["_index"]]).astype(str)

    def known(self) -> dict[str, Any]:
        """The columns of `obs`, as cells of a `Table`: arrays of numbers, or lists of words, None where missing."""
        table = self.file["obs"]
        columns = {str(name): self._column(table[name]) for name in table.attrs["column-order"]}
        return {NAMES: self.names("obs").tolist(), **columns}

    def _column(self, column: Any) -> Any:
        parts = list(column) if hasattr(column, "keys") else []
        if "codes" in parts:
            codes, words = self.array(column["codes"]), self.array(column["categories"]).astype(str)
            return [None if code < 0 else words[code] for code in codes]
        values = self.array(column["values"] if "values" in parts else column)
        gone = self.array(column["mask"]) if "values" in parts else np.zeros(len(values), bool)
        if values.dtype.kind in "OU":
            return [None if hole else str(value) for value, hole in zip(values, gone, strict=True)]
        return np.where(gone, np.nan, values) if gone.any() else values


def _opened(path: Path) -> Any:
    try:
        return importlib.import_module("h5py").File(path, "r")
    except ImportError as error:
        raise ValueError(f"Expected h5py for {path}; got: {error} Install ppl-vae[h5ad].") from error


def _dense(part: Any) -> npt.NDArray[np.float64]:
    return np.asarray(part.toarray() if hasattr(part, "toarray") else part, np.float64)


def read_annotated(path: Path, layer: str | None, roles: Roles) -> RawData:
    """Read a matrix of a `.h5ad` file; columns of `obs` have roles, variables are the features.

    Args:
        path: the file.
        layer: the matrix to read in place of X.
        roles: `label`, `id`, `covariates` and `size_factor` name columns of `obs`; `columns` and `leave_out` variables.

    Raises:
        ValueError: If the file cannot be read, or has no such column, variable or layer.
    """
    with reading(path, "an AnnData file"), _opened(path) as file:
        held = _File(path, file, layer)
        (n, _), names = held.shape, held.names("var").tolist()
        for key in ("columns", "leave_out"):
            for name in set(getattr(roles, key) or ()) - set(names):
                raise ValueError(unknown_name(key, name, names, f"variable of {path}"))
        left = set(roles.leave_out or ())
        kept = [names.index(name) for name in roles.columns or names if name not in left]
        check_unpacked(path, 8 * n * len(kept))
        if not n or not kept:
            raise ValueError(f"Expected observations and variables in {path}; got {n} and {len(kept)}.")
        x = np.concatenate([_dense(held.rows(i, min(i + 1000, n))[:, kept]) for i in range(0, n, 1000)])
        cells = held.known()
    check_numbers(x, str(path))
    plain = replace(roles, id=roles.id or NAMES, columns=[_MATRIX], leave_out=None)
    about = choose(Table(str(path), {**cells, _MATRIX: x[:, 0]}), plain)
    own = {name: role for name, role in about.roles.items() if role != "left out"}
    chosen = tuple(names[j] for j in kept)
    return replace(about, x=x, names=chosen, array=layer, maximum=intensity(x), roles=own)


def stream_annotated(path: Path, layer: str | None, size: int) -> Iterator[Table]:
    """Read a `.h5ad` file as a table of its variables and of the columns of `obs`, at most `size` rows at a time."""
    with reading(path, "an AnnData file"), _opened(path) as file:
        held = _File(path, file, layer)
        names, known = held.names("var").tolist(), held.known()
        for start in range(0, held.shape[0], size):
            rows = slice(start, start + size)
            x = _dense(held.rows(start, min(start + size, held.shape[0])))
            cells = dict(zip(names, x.T, strict=True))
            yield Table(str(path), {**{name: each[rows] for name, each in known.items()}, **cells})
