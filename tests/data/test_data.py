import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import platformdirs
import platformdirs.macos
import platformdirs.unix
import platformdirs.windows
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from ppl_vae._seeds import fold_in
from ppl_vae.data import Data, datasets, load, loading, transforms
from ppl_vae.data.batches import as_batch, check_finite, minibatches, permutation

ROOT = os.environ.get("PPL_VAE_DATA", "")


def _needs(name: str) -> pytest.MarkDecorator:
    there = bool(ROOT) and (Path(ROOT) / name).exists()
    return pytest.mark.skipif(not there, reason=f"PPL_VAE_DATA holds no {name}")


def _sorted_rows(*parts: Tensor | npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    x = np.concatenate([np.asarray(part, np.float64) for part in parts])
    return x[np.lexsort(x.T)]


def _tensors(data: Data) -> dict[str, Tensor]:
    parts = {"train": data.train, "validation": data.validation or {}, "test": data.test}
    return {f"{part}.{key}": value for part, batch in parts.items() for key, value in batch.items()}


def _same(a: Data, b: Data) -> bool:
    a_all, b_all = _tensors(a), _tensors(b)
    return a_all.keys() == b_all.keys() and all(torch.equal(a_all[key], b_all[key]) for key in a_all)


@pytest.fixture
def images() -> npt.NDArray[np.uint8]:
    """60 pictures of 4 by 3 grey levels, the first pixel constant."""
    x = np.random.default_rng(0).integers(0, 256, (60, 4, 3), dtype=np.uint8)
    x[:, 0, 0] = 7
    x[0, 0, 1], x[1, 0, 1] = 0, 255
    return x


@pytest.fixture
def image_file(tmp_path: Path, images: npt.NDArray[np.uint8]) -> Path:
    np.save(tmp_path / "images.npy", images)
    return tmp_path / "images.npy"


def _save(path: Path, x: object) -> Path:
    np.save(path, np.asarray(x))
    return path


# Splits


@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_digits_are_partitioned_with_their_labels(fraction: float) -> None:
    data = load("digits", validation_fraction=fraction)
    parts = [part for part in (data.train, data.validation, data.test) if part is not None]
    assert [len(part["x"]) for part in parts] == ([1500, 297] if fraction == 0 else [1350, 150, 297])
    raw = load_digits()
    labelled = [torch.cat([part["x"], part["y"][:, None]], 1) for part in parts]
    expected = np.concatenate([raw.data, raw.target[:, None]], 1)
    np.testing.assert_array_equal(_sorted_rows(*labelled), _sorted_rows(expected))
    assert data.train["x"].dtype == torch.float32
    assert data.train["y"].dtype == torch.int64
    assert (data.shape, data.features, data.feature_names) == ((8, 8), 64, None)


def test_a_split_is_deterministic_and_by_seed() -> None:
    assert _same(load("digits", seed=3), load("digits", seed=3))
    assert not torch.equal(load("digits", seed=3).test["x"], load("digits", seed=4).test["x"])


def test_a_split_is_shuffled() -> None:
    plain, split = load("digits"), load("digits", validation_fraction=0.1)
    assert not np.array_equal(plain.train["x"].numpy(), load_digits().data[:1500])
    assert split.validation is not None
    assert not torch.equal(plain.train["x"][:150], split.validation["x"])
    assert not torch.equal(plain.train["x"][150:], split.train["x"])


def test_a_validation_part_leaves_the_test_part_alone() -> None:
    plain, split = (
        load("digits", binarization="static"),
        load("digits", binarization="static", validation_fraction=0.5),
    )
    assert torch.equal(plain.test["x"], split.test["x"])
    assert plain.protocol["digest"] == split.protocol["digest"]


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_a_file_is_split_by_test_fraction(fraction: float, image_file: Path, images: npt.NDArray[np.uint8]) -> None:
    data = load(str(image_file), test_fraction=fraction)
    assert len(data.test["x"]) == 60 * fraction
    assert "y" not in data.train
    np.testing.assert_array_equal(_sorted_rows(data.train["x"], data.test["x"]), _sorted_rows(images.reshape(60, 12)))
    assert data.shape == (4, 3)
    assert data.name == data.protocol["name"] == "images.npy"


def test_global_random_state_is_untouched() -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
    data = load("digits", binarization="dynamic", validation_fraction=0.1)
    data.epoch(2)
    load("digits", dequantization="uniform").epoch(1)
    list(minibatches(data.train, 100, seed=0, epoch=0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]


# Binarization


def test_threshold_is_half_the_range(tmp_path: Path, image_file: Path) -> None:
    grey, binary = load("digits"), load("digits", binarization="threshold")
    for before, after in zip(_tensors(grey).values(), _tensors(binary).values(), strict=True):
        if before.ndim == 2:
            assert torch.equal(after, (before >= 8).float())
    grey, binary = load(image_file), load(image_file, binarization="threshold")
    assert torch.equal(binary.train["x"], (grey.train["x"] > 127).float())
    path = _save(tmp_path / "unit.npy", np.linspace(0, 1, 21).reshape(-1, 1))
    assert (
        load(path, binarization="threshold").train["x"].sum() + load(path, binarization="threshold").test["x"].sum()
        == 11
    )


def test_a_uint8_array_of_zeros_and_ones_is_binary_already(tmp_path: Path) -> None:
    path = _save(tmp_path / "binary.npy", np.eye(10, dtype=np.uint8))
    for binarization in ("threshold", "static"):
        data = load(path, binarization=binarization)
        assert data.train["x"].sum() + data.test["x"].sum() == 10


@pytest.mark.parametrize("binarization", ["static", "dynamic"])
def test_bernoulli_draws_have_the_intensities_as_means(binarization: str) -> None:
    grey = load("digits", validation_fraction=0.2)
    drawn = load("digits", binarization=binarization, validation_fraction=0.2)
    for part, p in _tensors(grey).items():
        if part.endswith("x"):
            x, p = _tensors(drawn)[part], p.double() / 16
            assert set(x.flatten().tolist()) == {0.0, 1.0}
            assert bool((x[p == 0] == 0).all())
            assert bool((x[p == 1] == 1).all())
            se = (p * (1 - p)).sum().sqrt()
            assert abs((x - p).sum()) < 5 * se
    # Each intensity by itself, over many epochs.
    if binarization == "dynamic":
        p = grey.train["x"].double() / 16
        x = torch.stack([drawn.epoch(e)["x"] for e in range(20)]).double()
        for level in range(1, 16):
            at = p == level / 16
            q, n = level / 16, 20 * int(at.sum())
            assert abs(x[:, at].mean() - q) < 5 * (q * (1 - q) / n) ** 0.5


def test_dynamic_draws_differ_by_epoch_and_are_reproducible() -> None:
    data, again = (load("digits", binarization="dynamic") for _ in range(2))
    epochs = [data.epoch(e) for e in range(3)]
    assert epochs[0]["x"] is data.train["x"]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert not torch.equal(epochs[a]["x"], epochs[b]["x"])
    assert torch.equal(epochs[1]["x"], again.epoch(1)["x"])
    assert epochs[1]["y"] is data.train["y"]
    assert not torch.equal(epochs[1]["x"], load("digits", binarization="dynamic", seed=1).epoch(1)["x"])
    assert set(data.train["x"].flatten().tolist()) == {0.0, 1.0}


def test_epochs_of_fixed_data_are_the_stored_tensors() -> None:
    for binarization in ("none", "threshold", "static"):
        data = load("digits", binarization=binarization)
        assert data.epoch(5)["x"] is data.train["x"]


def test_static_and_dynamic_share_their_test_part_and_the_first_epoch() -> None:
    static, dynamic = (load("digits", binarization=b, validation_fraction=0.1) for b in ("static", "dynamic"))
    assert _same(static, dynamic)
    assert static.protocol["digest"] == dynamic.protocol["digest"]


def test_parts_are_drawn_with_independent_noise(tmp_path: Path) -> None:
    data = load(
        _save(tmp_path / "half.npy", np.full((300, 50), 0.5)),
        binarization="static",
        test_fraction=1 / 3,
        validation_fraction=0.5,
    )
    assert data.validation is not None
    parts = [part["x"] for part in (data.train, data.validation, data.test)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        agreement = (parts[a] == parts[b]).double().mean()
        assert abs(agreement - 0.5) < 5 * 0.5 / 5000**0.5


# Scaling and dequantization


def test_unit_scaling(tmp_path: Path, image_file: Path) -> None:
    for name, maximum in (("digits", 16), (image_file, 255)):
        raw, unit = load(name), load(name, scaling="unit")
        assert torch.equal(unit.train["x"], raw.train["x"] / maximum)
        assert unit.protocol["scale"] == maximum
        assert unit.protocol["log_volume"] == pytest.approx(raw.features * np.log(maximum))
    path = _save(tmp_path / "table.npy", np.random.default_rng(1).normal(0, 30, (50, 3)))
    raw, unit = load(path, dtype=torch.float64), load(path, scaling="unit", dtype=torch.float64)
    largest = raw.train["x"].abs().max()
    torch.testing.assert_close(unit.test["x"], raw.test["x"] / largest, rtol=1e-14, atol=0)
    assert unit.protocol["scale"] == largest


def test_standardizing_agrees_with_scikit_learn(image_file: Path) -> None:
    for name in ("digits", image_file):
        raw, scaled = (load(name, scaling=s, dtype=torch.float64) for s in ("none", "standardize"))
        oracle = StandardScaler().fit(raw.train["x"].numpy())
        for part in ("train", "test"):
            x, expected = getattr(scaled, part)["x"], oracle.transform(getattr(raw, part)["x"].numpy())
            np.testing.assert_allclose(x, expected, atol=1e-12)
    assert scaled.protocol["loc"] == pytest.approx(oracle.mean_.tolist())
    assert scaled.protocol["scale"] == pytest.approx(oracle.scale_.tolist())
    assert scaled.protocol["log_volume"] == pytest.approx(np.log(oracle.scale_).sum())
    assert load("digits", scaling="standardize").protocol["loc"].startswith("sha256:")


def test_standardizing_keeps_digits_of_large_numbers(tmp_path: Path) -> None:
    path = _save(tmp_path / "times.npy", 1e9 + np.arange(100.0).reshape(-1, 1))
    x = load(path, scaling="standardize").train["x"]
    assert len(set(x.flatten().tolist())) == 80
    assert float(x.std(correction=0)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "scaling", "divisor"), [("digits", "none", 1), ("digits", "unit", 17), ("file", "unit", 256)]
)
def test_dequantization_adds_uniform_noise(name: str, scaling: str, divisor: int, image_file: Path) -> None:
    path = image_file if name == "file" else name
    raw, data = load(path), load(path, dequantization="uniform", scaling=scaling)
    for key, x in _tensors(data).items():
        if key.endswith("x"):
            noise = x.double() * divisor - _tensors(raw)[key].double()
            assert noise.min() > -1e-4
            assert noise.max() < 1 + 1e-4
            assert abs(noise.mean() - 0.5) < 5 * (1 / 12 / noise.numel()) ** 0.5
            assert x.max() < (17 if divisor == 1 else 1)
    if divisor == 1:
        assert torch.equal(data.train["x"].floor(), raw.train["x"])
    first, second = data.epoch(1)["x"], data.epoch(2)["x"]
    assert not torch.equal(first, second)
    assert torch.equal(first, load(path, dequantization="uniform", scaling=scaling).epoch(1)["x"])
    assert data.protocol["scale"] == divisor


def test_noise_never_reaches_the_next_bin(tmp_path: Path) -> None:
    # In single precision 1e6 + u has only 16 steps, so without care one draw in 32 rounds up.
    path = _save(tmp_path / "counts.npy", np.full((200, 50), 1_000_000))
    x = load(path, dequantization="uniform").train["x"]
    assert bool((x.floor() == 1_000_000).all())


def test_standardizing_allows_for_the_noise(image_file: Path) -> None:
    raw = load(image_file, dtype=torch.float64).train["x"].numpy()
    data = load(image_file, scaling="standardize", dequantization="uniform")
    expected = np.sqrt(raw.var(0) + 1 / 12)
    expected[0] = 1
    assert data.protocol["loc"] == pytest.approx((raw.mean(0) + 0.5).tolist())
    assert data.protocol["scale"] == pytest.approx(expected.tolist())


# Protocol, digest, device


def test_the_protocol_is_json_and_complete() -> None:
    for options in ({}, {"scaling": "standardize", "validation_fraction": 0.1}, {"binarization": "dynamic"}):
        protocol = load("digits", **options).protocol
        assert json.loads(json.dumps(protocol)) == protocol
        assert (protocol["maximum"], protocol["levels"], protocol["seed"]) == (16, 17, 0)
        assert all(protocol[key] == value for key, value in options.items() if key in protocol)


def test_the_digest_is_that_of_the_test_part() -> None:
    data, digest = load("digits"), hashlib.sha256()
    for key in ("x", "y"):
        value = data.test[key].numpy()
        digest.update(f"{key} {value.shape} {value.dtype};".encode() + value.tobytes())
    assert data.protocol["digest"] == digest.hexdigest()


@pytest.mark.parametrize(
    ("options", "digest"),
    [
        ({}, "8ed2db8db0a736a2b82bfb9ec661bf7945f5a506f92ca87e903d0605199c2877"),
        ({"scaling": "standardize"}, "4cb1ca0af505ebcf49f812a04d752ccf5082ba715858c8e409f1ac88aa75de78"),
        (
            {"binarization": "dynamic", "validation_fraction": 0.1},
            "71d72f402389051f14876667edd5ba9630c23453308788396cd689dcbd3a8cca",
        ),
    ],
)
def test_the_digits_stay_as_they_were(options: dict[str, Any], digest: str) -> None:
    """As version 0.1 had them: a run of old can be compared with one of today."""
    assert load("digits", **options).protocol["digest"] == digest


def test_the_digest_tells_test_parts_apart() -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"scaling": "unit"},
        {"scaling": "standardize"},
        {"binarization": "threshold"},
        {"binarization": "static"},
        {"binarization": "static", "seed": 1},
        {"dequantization": "uniform"},
        {"dtype": torch.float64},
    ]
    digests = [load("digits", **options).protocol["digest"] for options in variants]
    assert len(set(digests)) == len(variants)
    assert digests == [load("digits", **options).protocol["digest"] for options in variants]


def test_to_moves_every_tensor() -> None:
    data = load("digits", binarization="dynamic", validation_fraction=0.1).to("meta")
    assert {value.device.type for value in _tensors(data).values()} == {"meta"}
    assert data.stored is not None
    assert data.stored["x"].device.type == "meta"
    assert data.protocol == load("digits", binarization="dynamic", validation_fraction=0.1).protocol


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_a_gpu_sees_the_same_order() -> None:
    data = load("digits", binarization="dynamic")
    there = data.to("cuda")
    pairs = zip(
        minibatches(data.train, 400, seed=0, epoch=1), minibatches(there.train, 400, seed=0, epoch=1), strict=True
    )
    for a, b in pairs:
        assert b["x"].is_cuda
        assert torch.equal(a["x"], b["x"].cpu())
    assert torch.equal(there.epoch(1)["x"], there.epoch(1)["x"])
    assert not torch.equal(there.epoch(1)["x"], there.epoch(2)["x"])


# Keys and batches


def test_keys_of_different_content_or_length_differ() -> None:
    keys: list[tuple[int | str, ...]] = [
        (),
        (0,),
        (0, 0),
        (1,),
        (1, 0),
        (0, 1),
        (2**32,),
        (2**32 + 1,),
        ("a",),
    ]
    keys += [(2**63,), (0, "a"), ("a", 0), ("b",), ("ab",), ("a", "b")]
    assert len({fold_in(*key) for key in keys}) == len(keys)
    assert all(0 <= fold_in(*key) < 2**63 for key in keys)
    assert fold_in(5, "a", 7) == fold_in(np.int64(5), "a", 7)
    assert len({fold_in(seed, epoch) for seed in range(60) for epoch in range(60)}) == 3600


def test_keys_are_the_same_on_every_machine() -> None:
    words = [2, 5, 0, 1, 1]
    expected = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1
    assert fold_in(5, 2**32 + 1) == expected


@pytest.mark.parametrize("bad", [-1, 2**64])
def test_bad_keys_are_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=f"from 0 to .*got {bad}"):
        fold_in(0, bad)
    with pytest.raises(ValueError, match=f"seed.*got {bad}"):
        load("digits", seed=bad)


@pytest.mark.parametrize(("n", "size", "sizes"), [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 5, [3]), (2, 1, [1, 1])])
def test_batches_cover_each_datum_once(n: int, size: int, sizes: list[int]) -> None:
    data = {"x": torch.arange(2.0 * n).reshape(n, 2), "y": torch.arange(n)}
    parts = list(minibatches(data, size, seed=0, epoch=0))
    assert [len(part["x"]) for part in parts] == sizes
    y = torch.cat([part["y"] for part in parts])
    assert y.sort().values.tolist() == list(range(n))
    assert torch.equal(torch.cat([part["x"] for part in parts]), data["x"][y])
    assert torch.equal(y, permutation(n, seed=0, epoch=0))


def test_the_order_is_by_seed_and_epoch() -> None:
    data = {"y": torch.arange(100)}

    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(torch.cat([b["y"] for b in minibatches(data, 30, seed=seed, epoch=epoch)]).tolist())

    keys = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({order(*key) for key in keys}) == 4
    assert order(1, 1) == order(1, 1)
    assert order(0, 0) != tuple(range(100))


@pytest.mark.parametrize("size", [0, -1, 2.0])
def test_bad_batch_sizes_are_refused_at_once(size: Any) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=re.escape(f"`size` to be a whole number, at least 1; got {size}")):
        minibatches({"x": torch.zeros(3, 1)}, size, seed=0, epoch=0)


@pytest.mark.parametrize("sizes", [{"x": (3, 1), "y": (4,)}, {"x": ()}, {}])
def test_batches_of_differing_sizes_are_refused(sizes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="share their leading size"):
        minibatches({key: torch.zeros(shape) for key, shape in sizes.items()}, 2, seed=0, epoch=0)


# as_batch and check_finite


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (torch.ones(2, 3, dtype=torch.float32), torch.float32),
        (torch.ones(2, 3, dtype=torch.float64), torch.float64),
        (np.ones((2, 3), np.float32), torch.float32),
        (np.ones((2, 3), ">f8"), torch.float64),
        (np.ones((2, 3), np.longdouble), torch.float64),
        (np.ones((3, 2)).T[::-1], torch.float64),
        (np.ones((2, 3), np.int32), None),
        (np.ones((2, 3), np.uint16), None),
        (np.ones((2, 3), np.bool_), None),
        ([[1.0, 1, 1], [1, 1, 1]], torch.float64),
        ({"x": [[1, 1, 1], [1, 1, 1]]}, None),
    ],
)
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_as_batch_takes_arrays(x: object, dtype: torch.dtype | None, default: torch.dtype) -> None:
    """Where `dtype` is None, the default is expected."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        batch = as_batch(x)
    finally:
        torch.set_default_dtype(before)
    dtype = dtype or default
    assert list(batch) == ["x"]
    assert batch["x"].dtype == dtype
    assert torch.equal(batch["x"], torch.ones(2, 3, dtype=dtype))


def test_as_batch_does_not_share_what_may_not_be_written() -> None:
    x = np.ones((2, 2))
    x.flags.writeable = False
    as_batch(x)["x"][0, 0] = 5
    assert x[0, 0] == 1


def test_as_batch_keeps_a_tensor_as_it_is() -> None:
    x = torch.zeros(3, 2, requires_grad=True)
    assert as_batch(x)["x"] is x


def test_as_batch_gives_each_key_its_dtype() -> None:
    batch = as_batch(
        {
            "x": np.zeros((2, 1), np.uint8),
            "y": np.array([1, 2], np.uint8),
            "index": np.array([0, 1], np.int32),
            "mask": np.array([[1], [0]]),
            "c": np.array([3, 4], np.int32),
        }
    )
    assert {key: value.dtype for key, value in batch.items()} == {
        "x": torch.get_default_dtype(),
        "y": torch.int64,
        "index": torch.int64,
        "mask": torch.bool,
        "c": torch.int32,
    }
    assert batch["mask"].tolist() == [[True], [False]]
    assert batch["y"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (np.zeros(5), ValueError, r"shape \(n, x\); got \(5,\)"),
        (torch.tensor(1.0), ValueError, r"shape \(n, x\); got \(\)"),
        (np.zeros((0, 3)), ValueError, "n = 0"),
        ([["a", "b"]], TypeError, "`x` to be an array of real numbers; got list"),
        (object(), TypeError, "real numbers; got object"),
        ([[1.0, 2.0], [3.0]], TypeError, "`x` to be an array of real numbers"),
        (torch.zeros(2, 2, dtype=torch.complex64), TypeError, "real numbers; got dtype torch.complex64"),
        ({}, ValueError, "leading size n"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(2)}, ValueError, r"leading size n; got shapes .*\(2,\)"),
        ({1: np.zeros((3, 2))}, TypeError, "strings as the keys of a batch; got 1"),
        (
            {"x": np.zeros((3, 2)), "mask": np.ones((3, 1), bool)},
            ValueError,
            r"`mask` .*\(3, 2\); got .*\(3, 1\)",
        ),
        ({"x": np.zeros((3, 2)), "mask": np.full((3, 2), 2)}, ValueError, "beside 0 and 1"),
    ],
)
def test_as_batch_refuses(x: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        as_batch(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_check_finite_names_the_first_entry_and_counts(bad: float) -> None:
    x = torch.zeros(5, 4)
    check_finite({"x": x})
    x[2, 3] = x[3, 0] = bad
    with pytest.raises(ValueError, match=rf"`x`; got {bad} in row 2, column 3 .*, 2 such.*`mask`"):
        check_finite({"x": x})


def test_check_finite_follows_the_mask() -> None:
    x, mask = torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool)
    x[0, 1] = x[2, 0] = float("nan")
    mask[0, 1] = False
    with pytest.raises(ValueError, match=r"row 2, column 0 .*1 such"):
        check_finite({"x": x, "mask": mask})
    mask[2, 0] = False
    check_finite({"x": x, "mask": mask})
    with pytest.raises(ValueError, match=r"`y`; got nan in row 1 \(counted"):
        check_finite({"x": x, "mask": mask, "y": torch.tensor([0.0, float("nan"), 0.0])})
    with pytest.raises(ValueError, match="`mask` to be boolean"):
        check_finite({"x": x, "mask": mask[:, :1]})


# Options


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"binarization": "dynamics"}, "`binarization` to be one of 'none', 'threshold', .*; got 'dynamics'"),
        ({"scaling": "minmax"}, "`scaling` to be one of 'none', 'unit', 'standardize'; got 'minmax'"),
        ({"dequantization": "normal"}, "`dequantization` to be one of 'none', 'uniform'; got 'normal'"),
        ({"dtype": torch.float16}, "`dtype` torch.float32 or torch.float64; got torch.float16"),
        ({"validation_fraction": 1.0}, r"`validation_fraction` in \[0, 1\); got 1.0"),
        ({"validation_fraction": -0.1}, r"`validation_fraction` in \[0, 1\); got -0.1"),
        ({"validation_fraction": 1e-6}, "0 for validation"),
        ({"test_fraction": -0.1}, r"`test_fraction` in \[0, 1\); got -0.1"),
        ({"test_fraction": float("nan")}, r"`test_fraction` in \[0, 1\); got nan"),
        ({"binarization": "static", "scaling": "standardize"}, "leave out one of the two"),
        ({"binarization": "static", "dequantization": "uniform"}, "leave out one of the two"),
        ({"array": "images"}, "no `array` for digits, which are embedded, split and all; got 'images'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        load("digits", **options)


def test_options_that_do_not_suit_the_values_are_refused(tmp_path: Path) -> None:
    grey = _save(tmp_path / "grey.npy", np.linspace(-1, 2, 40).reshape(20, 2))
    for binarization in ("threshold", "static", "dynamic"):
        with pytest.raises(ValueError, match=f'binarization = "{binarization}".*from -1.0 to 2.0'):
            load(grey, binarization=binarization)
    with pytest.raises(ValueError, match='whole numbers for dequantization = "uniform"; got -0.92'):
        load(grey, dequantization="uniform")
    with pytest.raises(ValueError, match=r"within torch.float32; got larger.*`dtype`"):
        load(_save(tmp_path / "large.npy", np.full((10, 2), 1e300)))


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_rows_are_refused(tmp_path: Path, n: int) -> None:
    with pytest.raises(ValueError, match=rf"got {n} rows, which makes {n} for training.* 0 for testing"):
        load(_save(tmp_path / "few.npy", np.zeros((n, 2))))


# Names and files


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("digts", "'digits', 'iris', .*, 'mnist', .* or the path .*; got 'digts'. Did you mean 'digits'"),
        ("FashionMNIST", "Did you mean 'fashionmnist'"),
        ("MNIST", "got 'MNIST'. Did you mean 'mnist'"),
        ("cifar", "got 'cifar'. Did you mean 'cifar10'"),
        ("faces", r"folder of pictures \(faces/\); got 'faces'\.$"),
    ],
)
def test_unknown_names_are_refused(name: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        load(name)


def test_bad_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"pictures .* in the folder {re.escape(str(tmp_path))}; got none"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"data file at .*none\.csv; got no such file"):
        load(tmp_path / "none.csv")
    for name in ("x.mat", "x"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=rf"ends in \.npy, \.npz, \.h5ad, \.csv, .*; got .*{re.escape(name)}\.$"):
            load(tmp_path / name)
    with pytest.raises(ValueError, match=r"data file at .*folder.x; got no such file or folder"):
        load(tmp_path / "folder" / "x")


def test_npz_keys(tmp_path: Path, images: npt.NDArray[np.uint8]) -> None:
    np.savez(tmp_path / "two.npz", images=images, labels=np.arange(60))
    np.savez(tmp_path / "one.npz", a=images)
    data = load(tmp_path / "two.npz", array="images")
    np.testing.assert_array_equal(_sorted_rows(data.train["x"], data.test["x"]), _sorted_rows(images.reshape(60, -1)))
    assert set(data.train) == {"x"}
    assert data.protocol["name"] == "two.npz:images"
    assert load(tmp_path / "one.npz").protocol["name"] == "one.npz:a"
    for array in (None, "image"):
        with pytest.raises(ValueError, match=rf"two\.npz \('images', 'labels'\); got {array!r}"):
            load(tmp_path / "two.npz", array=array)
    with pytest.raises(ValueError, match=r"two\.npz:labels; got \(60,\)"):
        load(tmp_path / "two.npz", array="labels")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (np.array([["a"]] * 9), "real numbers in .*dtype <U1"),
        (np.ones((9, 2), complex), "real numbers in .*complex128"),
        (np.ones(9), r"shape \(n, x\) or \(n, h, w\), or .* in .*got \(9,\)"),
        (np.ones((9, 0)), r"shape \(n, x\) .*got \(9, 0\)"),
        (np.ones((0, 9)), r"shape \(n, x\) .*got \(0, 9\)"),
        (
            np.where(np.arange(18).reshape(9, 2) == 5, np.nan, 1.0),
            r"missing cells in x.npy; got some in 'column 2' \(1\): row 2 .*model them \(missing",
        ),
    ],
)
def test_bad_arrays_are_refused(tmp_path: Path, values: npt.NDArray[Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        load(_save(tmp_path / "x.npy", values))


def test_pickles_and_damaged_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "object.npy", np.array([[{}]] * 9), allow_pickle=True)
    np.savez(tmp_path / "object.npz", a=np.array([[{}]] * 9))
    (tmp_path / "text.npy").write_text("1,2,3\n")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    for name in ("object.npy", "object.npz", "text.npy", "empty.npz", "cut.npz"):
        with pytest.raises(ValueError, match=f"NumPy file without objects; got .*{name}"):
            load(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a,b\n1,2\n3,4.5\n-5e1, 6\n\n7,8\n9,10\n", ["a", "b"]),
        ("\ufeff1, b\r\n1,2\r\n3,4.5\r\n-50,6\r\n7,8\r\n9,10", ["1", "b"]),
        ("1,2\n3,4.5\n-50,6\n7,8\n9,10\n", None),
    ],
)
def test_csv(tmp_path: Path, text: str, names: list[str] | None) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8", newline="")
    data = load(tmp_path / "t.csv", dtype=torch.float64)
    expected = np.array([[1, 2], [3, 4.5], [-50, 6], [7, 8], [9, 10]])
    np.testing.assert_array_equal(_sorted_rows(data.train["x"], data.test["x"]), _sorted_rows(expected))
    assert data.feature_names == names
    assert data.shape is None
    assert len(data.test["x"]) == 1


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "rows of numbers in .*; got none"),
        ("\n\n", "rows of numbers in .*; got none"),
        ("a,b\n", "rows of numbers in .*; got only a header"),
        ("a,b\n1,2\n3,x\n", "t.csv, line 3, column 'b'; got 'x'"),
        ("a,b\n1,2\n\n3,\n", r"missing cells in t.csv; got some in 'b' \(1\): line 4"),
        ("1,2\n3,4\nnan,5\n", r"missing cells in t.csv; got some in 'column 1' \(1\): line 3"),
        ("1,2\n3,inf\n", "t.csv, line 2, column 2; got 'inf'"),
        ("1,,3\n4,,6\n", r"got some in 'column 2' \(2\): 2 rows, the first in line 1\. .*leave_out = \[.column 2.\]"),
        ("1,NA,3\n4,5,6\n", r"got some in 'column 2' \(1\): line 1"),
        ("1,2\n3\n", "Expected 2 cells in .*t.csv, line 2, .*got 1"),
        ("a,b\n1,2\n3,4,5\n", "Expected 2 cells in .*t.csv, line 3, .*got 3"),
    ],
)
def test_bad_csv_cells_are_refused(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=match):
        load(tmp_path / "t.csv")


def test_csv_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("größe\n1\n2\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"UTF-8; got .*t\.csv"):
        load(tmp_path / "t.csv")


# MNIST, Frey Faces, torchvision


def test_root_is_the_argument_then_the_variable_then_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPL_VAE_DATA", str(tmp_path / "variable"))
    assert datasets.root_folder(tmp_path / "a")[0] == tmp_path / "a"
    assert datasets.root_folder(None)[0] == tmp_path / "variable"
    monkeypatch.delenv("PPL_VAE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("platformdirs.windows.get_win_folder", lambda name: str(tmp_path / name.lower()))
    for platform, expected in (
        (platformdirs.unix.Unix, tmp_path / "cache" / "ppl_vae"),
        (platformdirs.macos.MacOS, Path.home() / "Library" / "Caches" / "ppl_vae"),
        (platformdirs.windows.Windows, tmp_path / "csidl_local_appdata" / "ppl_vae"),
    ):
        with monkeypatch.context() as patch:
            if platform is platformdirs.macos.MacOS:
                patch.delenv("XDG_CACHE_HOME")
            patch.setattr(platformdirs, "PlatformDirs", platform)
            assert datasets.root_folder(None) == (expected, "the cache folder")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(platformdirs, "PlatformDirs", platformdirs.unix.Unix)
    assert datasets.root_folder(None)[0] == Path.home() / ".cache" / "ppl_vae"


class _NoMNIST:
    """Stands for `torchvision.datasets` where nothing can be found, and records how it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []

    def MNIST(self, root: str, train: bool, download: bool) -> None:  # noqa: N802
        self.asked.append((root, download))
        raise RuntimeError("Dataset not found.")


@pytest.mark.parametrize(
    ("download", "remedy"),
    [(False, "Set `root` or PPL_VAE_DATA .*download=True"), (True, "network connection")],
)
def test_missing_mnist_says_where_it_was_looked_for(
    download: bool, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = _NoMNIST()
    monkeypatch.setattr(datasets, "torchvision_datasets", lambda name: fake)
    with pytest.raises(ValueError, match=rf"under {re.escape(str(tmp_path))} \(`root`\); got.*{remedy}"):
        load("mnist", root=tmp_path, download=download)
    monkeypatch.setenv("PPL_VAE_DATA", str(tmp_path / "b"))
    with pytest.raises(ValueError, match=r"b \(the environment variable PPL_VAE_DATA\)"):
        load("mnist", download=download)
    assert fake.asked == [(str(tmp_path), download), (str(tmp_path / "b"), download)]


def test_the_real_torchvision_misses_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected 'mnist' under .*Dataset not found"):
        load("mnist", root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def _in_a_fresh_process(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    paths = [str(path), str(Path(loading.__file__).parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def _fake_torchvision(path: Path, body: str) -> None:
    (path / "torchvision").mkdir()
    (path / "torchvision" / "__init__.py").write_text(f"print('imported')\n{body}")
    (path / "torchvision" / "datasets.py").write_text("THERE = True\n")


def test_the_guard_mends_missing_operators(tmp_path: Path) -> None:
    """Imports neither torchvision nor scikit-learn at first; fails without the guard; passes with it, for good."""
    fakes = "".join(f"torch.library.register_fake('torchvision::{name}')(print)\n" for name in ("nms", "qnms"))
    _fake_torchvision(tmp_path, "import torch\n" + fakes)
    code = (
        "import gc, sys, torch\nfrom ppl_vae.data import datasets, loading\n"
        "print({'torchvision', 'sklearn'} & set(sys.modules))\n"
        "try:\n    import torchvision\nexcept RuntimeError as error:\n    print(error)\n"
        "print(datasets.torchvision_datasets().THERE)\ngc.collect()\nprint(hasattr(torch.ops.torchvision, 'nms'))"
    )
    done = _in_a_fresh_process(code, tmp_path)
    expected = "set()\nimported\noperator torchvision::nms does not exist\nimported\nimported\nTrue\nTrue\n"
    assert done.stdout == expected, done.stderr


def test_the_guard_leaves_a_matching_torchvision_alone(tmp_path: Path) -> None:
    body = "import torch\nlibrary = torch.library.Library('torchvision', 'DEF')\n"
    _fake_torchvision(tmp_path, body)
    code = (
        "import torch\nfrom ppl_vae.data import datasets\n"
        "print(datasets.torchvision_datasets().THERE, hasattr(torch.ops.torchvision, 'nms'))"
    )
    done = _in_a_fresh_process(code, tmp_path)
    assert done.stdout == "imported\nTrue False\n", done.stderr


def test_the_guard_passes_other_errors_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError(f"out of luck with {name}")

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(RuntimeError, match="out of luck with torchvision.datasets"):
        datasets.torchvision_datasets()


def test_a_missing_torchvision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ValueError, match="Expected torchvision for 'mnist'.*Install torchvision"):
        load("mnist")


def _idx(name: str) -> npt.NDArray[np.uint8]:
    raw = (Path(ROOT) / "MNIST" / "raw" / name).read_bytes()
    sizes = np.frombuffer(raw, ">i4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)


@_needs("MNIST/raw")
def test_mnist() -> None:
    data = load("mnist")
    for part, prefix in ((data.train, "train"), (data.test, "t10k")):
        expected = _idx(f"{prefix}-images-idx3-ubyte").reshape(-1, 784).astype(np.float32) / np.float32(255)
        np.testing.assert_array_equal(part["x"].numpy(), expected)
        np.testing.assert_array_equal(part["y"].numpy(), _idx(f"{prefix}-labels-idx1-ubyte"))
    assert (data.shape, data.protocol["maximum"], data.protocol["scale"]) == ((28, 28), 255, 255)
    dequantized = load("mnist", dequantization="uniform", validation_fraction=1 / 6)
    assert dequantized.validation is not None
    assert len(dequantized.validation["x"]) == 10_000
    assert 0 <= dequantized.test["x"].min() < 1e-6
    assert dequantized.test["x"].max() < 1
    assert torch.equal((dequantized.test["x"] * 256).floor(), (data.test["x"] * 255).round())
    drawn = load("mnist", binarization="dynamic")
    p = data.test["x"].double()
    assert abs((drawn.test["x"] - p).sum()) < 5 * (p * (1 - p)).sum().sqrt()
    assert torch.equal(drawn.test["x"], load("mnist", binarization="static").test["x"])


@_needs("frey_faces.npz")
def test_frey_faces() -> None:
    with np.load(Path(ROOT) / "frey_faces.npz") as archive:
        images = archive["images"]
    data = load(Path(ROOT) / "frey_faces.npz", scaling="unit", dtype=torch.float64)
    assert (data.shape, data.features, data.protocol["levels"]) == ((28, 20), 560, 256)
    np.testing.assert_allclose(
        _sorted_rows(data.train["x"], data.test["x"]), _sorted_rows(images.reshape(-1, 560) / 255), atol=1e-15
    )


@pytest.mark.parametrize("options", [{"binarization": "dynamic"}, {"dequantization": "uniform"}, {"scaling": "unit"}])
def test_data_are_the_same_however_many_are_transformed_at_once(options, monkeypatch):
    whole = load("digits", **options).epoch(3)["x"]
    monkeypatch.setattr(transforms, "_CACHED", 1000)
    assert torch.equal(load("digits", **options).epoch(3)["x"], whole)
