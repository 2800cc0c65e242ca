"""Data: readers of small real data sets, each a file with ``load(data_dir=None) -> Dataset``."""

from sterna.data.examples import Dataset, Examples
from sterna.data.files import DataError
from sterna.data.merit import ACCURACY, PERPLEXITY, Merit

__all__ = ["ACCURACY", "PERPLEXITY", "DataError", "Dataset", "Examples", "Merit"]
