"""Fashion-MNIST: 60,000 + 10,000 pictures of clothing, 28x28 grey pixels, in the form of MNIST.

H. Xiao, K. Rasul, R. Vollgraf: Fashion-MNIST: a novel image dataset for benchmarking machine
learning algorithms. arXiv:1708.07747, 2017.
"""

from pathlib import Path

from sterna.data.examples import Dataset
from sterna.data.idx import IdxDataset, IdxFile


def _file(name: str, checksum: str, plain: str) -> IdxFile:
    homes = (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    )
    return IdxFile(
        name=name, checksum=checksum, plain=plain, urls=tuple(home + name for home in homes)
    )


FASHION_MNIST = IdxDataset(
    name="Fashion-MNIST",
    subfolder="fashion_mnist",
    mean=0.2860405969887955,
    std=0.35302424451492237,
    files=(
        _file(
            "train-images-idx3-ubyte.gz",
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        ),
        _file(
            "train-labels-idx1-ubyte.gz",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        ),
        _file(
            "t10k-images-idx3-ubyte.gz",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        ),
        _file(
            "t10k-labels-idx1-ubyte.gz",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
)


def load(data_dir: Path | None = None) -> Dataset:
    """Fashion-MNIST standardised by the training pixels; inputs (n, 1, 28, 28) float32, 10 classes.

    Args:
        data_dir: folder with the four IDX files, gzipped or not, or with a folder
            ``fashion_mnist`` of them (the file names are those of MNIST). None: the folder in
            ``STERNA_DATA``, the cache, or the network (see `files`).

    Raises:
        DataError: a file is missing and cannot be fetched, or is not the published one.
    """
    return FASHION_MNIST.load(data_dir)
