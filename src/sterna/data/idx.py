"""The IDX format of MNIST and its successors.

A big-endian header, then the values in row-major order::

    0 0 type ndim   4 bytes; type 8 is an unsigned byte, the only one in use here
    size            4 bytes for each of the ndim dimensions
    values
"""

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sterna.data.examples import Dataset, Examples
from sterna.data.files import DataError, Published, obtain, read_checked
from sterna.data.standardise import standardised


@dataclass(frozen=True, kw_only=True)
class IdxFile(Published):
    """A gzipped IDX file.

    Args:
        plain: checksum of the same file without gzip, which is accepted too.
    """

    plain: str


@dataclass(frozen=True, kw_only=True)
class IdxDataset:
    """Four IDX files, and what is known of their pixels.

    Args:
        name: name of the data set.
        subfolder: folder of its files under a data folder.
        mean: of the training pixels divided by 255.
        std: of the training pixels divided by 255.
        files: training images and labels, test images and labels.
    """

    name: str
    subfolder: str
    mean: float
    std: float
    files: tuple[IdxFile, IdxFile, IdxFile, IdxFile]

    def load(self, data_dir: Path | None = None) -> Dataset:
        """Images standardised by ``mean`` and ``std``, shape (n, 1, height, width), float32."""
        train, train_labels, test, test_labels = (self._read(file, data_dir) for file in self.files)
        return Dataset(
            name=self.name,
            train=self._examples(train, train_labels),
            test=self._examples(test, test_labels),
            classes=10,
        )

    def _read(self, file: IdxFile, data_dir: Path | None) -> NDArray[np.uint8]:
        unzipped = file.name.removesuffix(".gz")
        path = obtain(file, self.subfolder, data_dir, also=(unzipped,))
        content = read_checked(path, file.plain if path.name == unzipped else file.checksum)
        return parse(content, path)

    def _examples(self, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Examples:
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(
                f"{self.name}: images must have shape (n, height, width) and labels (n,); got "
                f"{images.shape} and {labels.shape}. The image and the label file do not belong "
                "together; delete both, and they are fetched again."
            )
        mean, std = torch.tensor([[self.mean], [self.std]], dtype=torch.float64)
        inputs = standardised(images[:, None], mean, std)
        return Examples(inputs, torch.from_numpy(labels.astype(np.int64)))


def read(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, gzipped or not, of whatever origin.

    Raises:
        DataError: the file cannot be read, is cut off, or is no IDX file of unsigned bytes.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    return parse(content, path)


def parse(content: bytes, path: Path | str) -> NDArray[np.uint8]:
    """The array in the bytes of an IDX file, gzipped or not; ``path`` is named in errors.

    Example:
        >>> parse(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]), "two.idx")
        array([7, 9], dtype=uint8)
    """
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(
                f"{path} is not a whole gzip file ({error}). Delete it, and it is fetched again."
            ) from error
    if len(content) < 4 or content[:3] != b"\0\0\x08" or not content[3]:
        raise DataError(
            f"{path} is not an IDX file of unsigned bytes: its first four bytes must be 00 00 08 "
            f"and the number of dimensions; got {content[:4].hex(' ') or 'an empty file'}."
        )
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(
            f"{path} is cut off in its header: {start} bytes needed; got {len(content)}."
        )
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    needed = int(np.prod(shape, dtype=object))
    if len(content) - start != needed:
        raise DataError(
            f"{path} must hold {needed} values, shape {shape} as its header says; got "
            f"{len(content) - start}. Delete it, and it is fetched again."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
