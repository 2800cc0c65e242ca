"""MNIST: 60,000 + 10,000 handwritten digits of 28x28 grey pixels.

Y. LeCun, L. Bottou, Y. Bengio, P. Haffner: Gradient-based learning applied to document recognition.
Proceedings of the IEEE 86(11), 1998.
"""

from pathlib import Path

from sterna.data.examples import Dataset
from sterna.data.idx import IdxDataset, IdxFile


def _file(name: str, checksum: str, plain: str) -> IdxFile:
    homes = (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    )
    return IdxFile(
        name=name, checksum=checksum, plain=plain, urls=tuple(home + name for home in homes)
    )


MNIST = IdxDataset(
    name="MNIST",
    subfolder="mnist",
    mean=0.1306604762738429,
    std=0.3081078038564622,
    files=(
        _file(
            "train-images-idx3-ubyte.gz",
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        ),
        _file(
            "train-labels-idx1-ubyte.gz",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
        _file(
            "t10k-images-idx3-ubyte.gz",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        ),
        _file(
            "t10k-labels-idx1-ubyte.gz",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
)


def load(data_dir: Path | None = None) -> Dataset:
    """MNIST standardised by the training pixels; inputs (n, 1, 28, 28) float32, 10 classes.

    Args:
        data_dir: folder with the four IDX files, gzipped or not, or with a folder ``mnist`` of
            them. None: the folder in ``STERNA_DATA``, the cache, or the network (see `files`).

    Raises:
        DataError: a file is missing and cannot be fetched, or is not the published one.
    """
    return MNIST.load(data_dir)
