"""Handwritten digits of 8x8 pixels, bundled with scikit-learn: real data without a download.

1,797 images by 13 people, the test part of the UCI set "Optical Recognition of Handwritten Digits"
(E. Alpaydin and C. Kaynak, 1998). They are split here once and for all, class by class, into 1,437
for training and 360 for testing.
"""

import gzip
from importlib.metadata import distribution
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from sterna.data.examples import Dataset, Examples
from sterna.data.files import DataError, check
from sterna.data.split import stratified
from sterna.randomness import generator

NUM_TEST = 360
_FILE = "sklearn/datasets/data/digits.csv.gz"
_CONTENT = "6ebb3d2fee246a4e99363262ddf8a00a3c41bee6014c373ed9d9216ba7f651b8"


def load(data_dir: Path | None = None, *, shape: Literal["vector", "image"] = "vector") -> Dataset:
    """The digits, less the mean of the training pixels and divided by their standard deviation.

    Args:
        data_dir: not used; every reader takes it.
        shape: "vector" gives inputs of shape (n, 64), "image" of shape (n, 1, 8, 8); float32.

    Raises:
        DataError: scikit-learn does not hold the file that it comes with.
        ValueError: ``shape`` is neither of the two.

    Example:
        >>> load().train, load(shape="image").test
        (Examples(inputs=(1437, 64) float32, targets=(1437,) int64), \
Examples(inputs=(360, 1, 8, 8) float32, targets=(360,) int64))
    """
    if shape not in ("vector", "image"):
        raise ValueError(f"digits.load: shape must be 'vector' or 'image'; got {shape!r}.")
    pixels, targets = _table()
    kept, cut = stratified(targets, NUM_TEST, generator(0, "digits", "split"))
    mean, std = pixels[kept].mean(), pixels[kept].std(correction=0)
    inputs = ((pixels - mean) / std).float()
    if shape == "image":
        inputs = inputs.view(-1, 1, 8, 8)
    train, test = (Examples(inputs[part], targets[part]) for part in (kept, cut))
    return Dataset("digits", train, test, classes=10)


def _table() -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (n, 64) in 0..16 as float64, and classes; read without importing scikit-learn."""
    path = Path(str(distribution("scikit-learn").locate_file(_FILE)))
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(
            f"{path}, which is part of scikit-learn, cannot be read ({error}). Install "
            "scikit-learn again."
        ) from error
    check(content, _CONTENT, path)
    table = np.loadtxt(content.decode("ascii").splitlines(), delimiter=",", dtype=np.float64)
    return torch.from_numpy(table[:, :-1]), torch.from_numpy(table[:, -1].astype(np.int64))
