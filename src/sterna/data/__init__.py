"""Data: readers of small real data sets, each a file with ``load(data_dir=None) -> Dataset``."""

from sterna.data.examples import Dataset, Examples
from sterna.data.files import DataError

__all__ = ["DataError", "Dataset", "Examples"]
