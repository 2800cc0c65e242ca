"""CIFAR-10: 50,000 + 10,000 colour pictures of 32x32 pixels in ten classes.

A. Krizhevsky: Learning multiple layers of features from tiny images. Technical report, University
of Toronto, 2009.

Three forms are read: the public archive ``cifar-10-python.tar.gz``, its folder
``cifar-10-batches-py``, and an ``.npz`` with ``x_train``, ``y_train``, ``x_test``, ``y_test``
(pictures as unsigned bytes, height, width, channel). An ``.npz`` may hold anything; the data set is
named after it, so that no result on a part of the data passes for one on CIFAR-10.
"""

import hashlib
import io
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sterna.data import pickles
from sterna.data.examples import Dataset, Examples
from sterna.data.files import DataError, Published, check, find, folders, obtain, read_checked
from sterna.data.standardise import standardised, statistics

FOLDER = "cifar-10-batches-py"
ARCHIVE = Published(
    name="cifar-10-python.tar.gz",
    checksum="c58f30108f718f92721af3b95e74349a",
    urls=("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
)
BATCHES: Mapping[str, str] = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
KNOWN: Mapping[str, str] = {
    "8a3b008729d16891fbad24d3a59460b0e1a1f183120ac0630fb924a1ea6a7f77": (
        "CIFAR-10 subset (12k/3k, JPEG)"
    ),
}
"""Names of ``.npz`` files by their SHA-256."""

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


def load(data_dir: Path | None = None) -> Dataset:
    """CIFAR-10 standardised by the training pixels, per channel; inputs (n, 3, 32, 32) float32.

    Args:
        data_dir: folder with the archive, the extracted folder or one ``cifar10*.npz``, or with a
            folder ``cifar10`` of them; of several forms in one folder the public one is read. None:
            the folder in ``STERNA_DATA``, the cache, or the network (see `files`).

    Raises:
        DataError: no form is there and none can be fetched, or a file does not hold what it should.
    """
    for folder in folders("cifar10", data_dir):
        if (folder / FOLDER).is_dir():
            return _from_batches(_batches_in_folder(folder / FOLDER))
        if find([ARCHIVE.name], [folder]):
            return _from_batches(_batches_in_archive(folder / ARCHIVE.name))
        packed = sorted(folder.glob("cifar10*.npz"))
        if len(packed) > 1:
            raise DataError(
                f"{folder} holds several data sets, {', '.join(path.name for path in packed)}; "
                "leave one, or name a folder with one by --data-dir."
            )
        if packed:
            return _from_npz(packed[0])
    return _from_batches(_batches_in_archive(obtain(ARCHIVE, "cifar10", data_dir)))


def _batches_in_folder(folder: Path) -> dict[str, bytes]:
    return {name: read_checked(folder / name, checksum) for name, checksum in BATCHES.items()}


def _batches_in_archive(path: Path) -> dict[str, bytes]:
    content = read_checked(path, ARCHIVE.checksum)
    found = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        for member in archive:
            name = Path(member.name).name
            stream = archive.extractfile(member) if name in BATCHES else None
            if stream is not None:
                found[name] = stream.read()
                check(found[name], BATCHES[name], f"{member.name} in {path}")
    missing = [name for name in BATCHES if name not in found]
    if missing:
        raise DataError(f"{path} must hold {', '.join(BATCHES)}; got no {', '.join(missing)}.")
    return found


def _from_batches(batches: Mapping[str, bytes]) -> Dataset:
    parts = {name: _batch(batches[name], name) for name in BATCHES}
    train = [part for name, part in parts.items() if name != "test_batch"]
    images, labels = (np.concatenate(arrays) for arrays in zip(*train, strict=True))
    return _dataset("CIFAR-10", (images, labels), parts["test_batch"])


def _batch(content: bytes, name: str) -> Arrays:
    batch: Any = pickles.read(content, name)
    try:
        images, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"], dtype=np.int64)
        return images.reshape(len(labels), 3, 32, 32), labels
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{name} must hold b'data' of shape (n, 3072) and b'labels' of shape (n,); got "
            f"{type(error).__name__}: {error}."
        ) from error


def _from_npz(path: Path) -> Dataset:
    try:
        content = path.read_bytes()
        with np.load(io.BytesIO(content), allow_pickle=False) as packed:
            a, b, c, d = (packed[key] for key in ("x_train", "y_train", "x_test", "y_test"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} must be an .npz with x_train, y_train, x_test and y_test; got "
            f"{type(error).__name__}: {error}."
        ) from error
    for key, x, y in (("train", a, b), ("test", c, d)):
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or y.shape != x.shape[:1]:
            raise DataError(
                f"{path}: x_{key} must be uint8 of shape (n, height, width, 3) and y_{key} of "
                f"shape (n,); got {x.dtype} {x.shape} and {y.shape}."
            )
    name = KNOWN.get(
        hashlib.sha256(content).hexdigest(), f"{path.name} ({len(a)}/{len(c)}, CIFAR-10 form)"
    )
    train, test = ((x.transpose(0, 3, 1, 2), y.astype(np.int64)) for x, y in ((a, b), (c, d)))
    return _dataset(name, train, test)


def _dataset(name: str, train: Arrays, test: Arrays) -> Dataset:
    mean, std = statistics(train[0])
    parts = [
        Examples(standardised(images, mean, std), torch.from_numpy(labels))
        for images, labels in (train, test)
    ]
    return Dataset(name, train=parts[0], test=parts[1], classes=10)
