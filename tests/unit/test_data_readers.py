"""The readers of the real data sets."""

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from sterna.data import DataError, cifar10, digits, fashion_mnist, files, mnist
from sterna.data.files import Published
from sterna.data.standardise import standardised, statistics

NAMED = os.environ.get("STERNA_DATA", "")
SHARED = Path(NAMED) if NAMED else Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    """An empty cache, no STERNA_DATA, no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("STERNA_DATA", raising=False)

    def no_network(url):
        raise OSError("no network in tests")

    monkeypatch.setattr(files, "_open", no_network)


def needs(*parts):
    path = SHARED.joinpath(*parts)
    return pytest.mark.skipif(not path.exists(), reason=f"{path} is not here (set STERNA_DATA)")


def test_digits_are_split_once_and_for_all():
    data = digits.load()
    assert (len(data.train), len(data.test), data.classes) == (1437, 360, 10)
    assert data.train.inputs.dtype == torch.float32
    assert data.train.inputs.double().mean().item() == pytest.approx(0, abs=1e-6)
    assert data.train.inputs.double().std(correction=0).item() == pytest.approx(1, abs=1e-6)
    labels = torch.cat([data.train.targets, data.test.targets])
    share = data.test.targets.bincount() / labels.bincount()
    assert (share - 360 / 1797).abs().max() < 0.005
    split = hashlib.sha256(data.test.targets.numpy().tobytes()).hexdigest()
    assert split.startswith(DIGITS_SPLIT)


DIGITS_SPLIT = "9ec3aca8a8c552ab"


def test_digits_as_pictures():
    flat, picture = digits.load(), digits.load(shape="image")
    assert picture.test.inputs.shape == (360, 1, 8, 8)
    assert torch.equal(picture.test.inputs.flatten(1), flat.test.inputs)
    with pytest.raises(
        ValueError, match=r"digits.load: shape must be 'vector' or 'image'; got 'x'"
    ):
        digits.load(shape="x")


def test_digits_of_a_damaged_scikit_learn(monkeypatch, tmp_path):
    class Damaged:
        def locate_file(self, name):
            return tmp_path / "digits.csv.gz"

    monkeypatch.setattr(digits, "distribution", lambda name: Damaged())
    with pytest.raises(DataError, match=r"digits.csv.gz.*Install scikit-learn again"):
        digits.load()


@pytest.mark.parametrize(
    ("module", "counts"),
    [
        pytest.param(
            mnist,
            [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
            marks=needs("mnist"),
        ),
        pytest.param(fashion_mnist, [1000] * 10, marks=needs("fashion_mnist")),
    ],
)
def test_mnist_and_fashion_mnist(module, counts):
    data = module.load(SHARED)
    assert data.train.inputs.shape == (60000, 1, 28, 28)
    assert data.test.targets.bincount().tolist() == counts
    x = data.train.inputs
    assert x.mean(dtype=torch.float64).item() == pytest.approx(0, abs=1e-6)
    assert (x * x).mean(dtype=torch.float64).item() == pytest.approx(1, abs=1e-6)


@needs("cifar10", "cifar10_12k_3k.npz")
def test_the_cifar_10_subset_says_that_it_is_one():
    data = cifar10.load(SHARED)
    assert data.name == "CIFAR-10 subset (12k/3k, JPEG)"
    assert data.train.inputs.shape == (12000, 3, 32, 32)
    assert data.test.targets.bincount().tolist() == [300] * 10
    with np.load(SHARED / "cifar10" / "cifar10_12k_3k.npz") as raw:
        pixel = raw["x_train"][17, 5, 6] / 255
    expected = (pixel - np.array([0.4935, 0.4834, 0.4475])) / np.array([0.2457, 0.2438, 0.2615])
    assert data.train.inputs[17, :, 5, 6].tolist() == pytest.approx(list(expected), abs=2e-3)


def rng():
    return torch.Generator().manual_seed(0)


def pixels(*shape):
    return torch.randint(256, shape, generator=rng(), dtype=torch.uint8).numpy()


@pytest.fixture
def batches(monkeypatch):
    """Six small batches in the published form, which pass for the published ones."""
    made = {}
    for k, name in enumerate(cifar10.BATCHES):
        batch = {b"data": pixels(3 + k, 3072), b"labels": [c % 10 for c in range(3 + k)]}
        made[name] = pickle.dumps(batch, 2)
    monkeypatch.setattr(
        cifar10, "BATCHES", {name: hashlib.md5(raw).hexdigest() for name, raw in made.items()}
    )
    return made


def put_folder(folder, batches):
    for name, raw in batches.items():
        (folder / cifar10.FOLDER).mkdir(parents=True, exist_ok=True)
        (folder / cifar10.FOLDER / name).write_bytes(raw)


def put_archive(folder, batches, monkeypatch):
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / cifar10.ARCHIVE.name, "w:gz") as archive:
        for name, raw in {**batches, "readme.html": b"hello"}.items():
            member = tarfile.TarInfo(f"{cifar10.FOLDER}/{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    content = (folder / cifar10.ARCHIVE.name).read_bytes()
    published = Published(
        name=cifar10.ARCHIVE.name, checksum=hashlib.md5(content).hexdigest(), urls=()
    )
    monkeypatch.setattr(cifar10, "ARCHIVE", published)
    return content


def test_cifar_10_from_folder_and_archive(tmp_path, batches, monkeypatch):
    put_folder(tmp_path / "a" / "cifar10", batches)
    put_archive(tmp_path / "b", batches, monkeypatch)
    a, b = cifar10.load(tmp_path / "a"), cifar10.load(tmp_path / "b")
    assert a.name == b.name == "CIFAR-10"
    assert a.train.inputs.shape == (3 + 4 + 5 + 6 + 7, 3, 32, 32)
    assert len(a.test) == 8
    assert torch.equal(a.train.inputs, b.train.inputs)
    raw = pickle.loads(batches["data_batch_1"])[b"data"].reshape(-1, 3, 32, 32)  # noqa: S301, TID251
    assert a.train.inputs[:3].flatten(2).argmax(2).tolist() == (
        raw.reshape(3, 3, -1).argmax(2).tolist()
    )
    for channel in a.train.inputs.double().transpose(0, 1):
        assert channel.mean().item() == pytest.approx(0, abs=1e-6)
        assert channel.std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_cifar_10_is_fetched_into_the_cache(tmp_path, batches, monkeypatch):
    content = put_archive(tmp_path / "home", batches, monkeypatch)
    monkeypatch.setattr(
        cifar10,
        "ARCHIVE",
        Published(
            name=cifar10.ARCHIVE.name, checksum=cifar10.ARCHIVE.checksum, urls=("https://x/y",)
        ),
    )
    monkeypatch.setattr(files, "_open", lambda url: io.BytesIO(content))
    assert len(cifar10.load().test) == 8
    monkeypatch.setattr(files, "_open", None)
    assert len(cifar10.load().test) == 8


def test_cifar_10_nowhere(tmp_path):
    with pytest.raises(DataError, match=r"cifar-10-python.tar.gz was not found in .*toronto.edu"):
        cifar10.load(tmp_path)


def test_a_damaged_batch_is_named(tmp_path, batches, monkeypatch):
    put_folder(tmp_path, {**batches, "data_batch_3": b"damaged"})
    with pytest.raises(DataError, match=r"data_batch_3 is not the published file"):
        cifar10.load(tmp_path)
    (tmp_path / cifar10.FOLDER / "data_batch_3").unlink()
    with pytest.raises(DataError, match=r"data_batch_3 cannot be read"):
        cifar10.load(tmp_path)


def test_an_archive_without_a_batch(tmp_path, batches, monkeypatch):
    fewer = {name: raw for name, raw in batches.items() if name != "test_batch"}
    put_archive(tmp_path, fewer, monkeypatch)
    with pytest.raises(DataError, match="got no test_batch"):
        cifar10.load(tmp_path)


@pytest.mark.parametrize("content", [{}, {b"data": [1], b"labels": [0]}, [1, 2]])
def test_a_batch_of_another_form(content):
    with pytest.raises(DataError, match=r"data_batch_1 must hold b'data' of shape \(n, 3072\)"):
        cifar10._batch(pickle.dumps(content, 2), "data_batch_1")


def npz(path, **changes):
    arrays = {
        "x_train": pixels(4, 32, 32, 3),
        "y_train": np.arange(4, dtype=np.uint8),
        "x_test": pixels(2, 32, 32, 3),
        "y_test": np.arange(2, dtype=np.uint8),
        **changes,
    }
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})


def test_an_unknown_npz_is_named_after_itself(tmp_path):
    npz(tmp_path / "cifar10_mine.npz")
    data = cifar10.load(tmp_path)
    assert data.name == "cifar10_mine.npz (4/2, CIFAR-10 form)"
    assert data.train.inputs.shape == (4, 3, 32, 32)
    npz(tmp_path / "cifar10_other.npz")
    with pytest.raises(DataError, match=r"several data sets, cifar10_mine.npz, cifar10_other.npz"):
        cifar10.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"y_test": None},
            "must be an .npz with x_train, y_train, x_test and y_test; got KeyError",
        ),
        ({"x_train": np.zeros((4, 3, 32, 32), np.uint8)}, r"x_train must be uint8 of shape"),
        ({"x_test": np.zeros((2, 32, 32, 3))}, r"x_test must be .* got float64 \(2, 32, 32, 3\)"),
        ({"y_train": np.zeros(3, np.uint8)}, r"y_train of shape \(n,\); got .* and \(3,\)"),
        ({"y_train": np.array([{}] * 4)}, "must be an .npz .*pickle"),
    ],
)
def test_an_npz_of_another_form(tmp_path, changes, message):
    npz(tmp_path / "cifar10.npz", **changes)
    with pytest.raises(DataError, match=message):
        cifar10.load(tmp_path)


def test_an_npz_that_is_cut_off(tmp_path):
    npz(tmp_path / "cifar10.npz")
    content = (tmp_path / "cifar10.npz").read_bytes()
    for damaged in (content[:-100], b"", b"PK\x03\x04" + b"\0" * 50):
        (tmp_path / "cifar10.npz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"cifar10.npz must be an .npz"):
            cifar10.load(tmp_path)


def test_statistics_against_numpy_and_constant_channels():
    images = pixels(5, 3, 4, 6)
    images[:, 1] = 7
    mean, std = statistics(images)
    assert mean.tolist() == pytest.approx(list((images / 255).mean((0, 2, 3))))
    assert std.tolist() == pytest.approx(list((images / 255).std((0, 2, 3))))
    x = standardised(images, mean, std)
    assert x[:, 1].abs().max() < 1e-6
    assert x.isfinite().all()


def test_digits_are_the_ones_of_scikit_learn_which_is_not_imported_for_them():
    code = """if True:
        import sys
        from sterna.data import digits
        pixels, targets = digits._table()
        assert "sklearn" not in sys.modules
        from sklearn.datasets import load_digits
        theirs = load_digits()
        assert (pixels.numpy() == theirs.data).all() and (targets.numpy() == theirs.target).all()
        print("equal")
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200
    )
    assert done.stdout.strip() == "equal"
