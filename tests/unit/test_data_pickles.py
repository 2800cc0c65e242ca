"""Pickles are read without running what they say."""

import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest

from sterna.data import DataError, pickles


class Malicious:
    """Runs a command when it is unpickled by an ordinary reader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_command_is_refused_by_name(tmp_path, protocol):
    content = pickle.dumps({b"data": [Malicious(tmp_path / "owned")]}, protocol)
    with pytest.raises(DataError, match=r"batch is refused: it asks for posix.system"):
        pickles.read(content, "batch")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"csterna.data.pickles\nread\n.",
        pickle.dumps(OrderedDict()),
        pickle.dumps(print),
    ],
)
def test_every_other_name_is_refused(content):
    with pytest.raises(DataError, match=r"x is refused: it asks for [\w.]+, which is not allowed"):
        pickles.read(content, "x")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.uint8).reshape(3, 4),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(3, dtype=">i4"),
        np.array(["ab", "cde"]),
        np.array([b"ab", b"cde"]),
        np.zeros((0, 3), np.float32),
    ],
)
def test_arrays_of_numbers_and_text(array, protocol):
    got = pickles.read(pickle.dumps({"x": array}, protocol), "x", encoding="latin1")["x"]
    assert np.array_equal(np.asarray(got), array)
    assert got.dtype == array.dtype.newbyteorder("=")  # as NumPy itself reads it
    assert np.dtype("i4").isnative  # reading a big-endian array changes nothing for others


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data(protocol):
    value = {b"labels": [1, 2.5, None, True, "text", (3, b"")], "more": {1: {2, 3}}, "c": 1j}
    assert pickles.read(pickle.dumps(value, protocol), "x") == value


@pytest.mark.parametrize(
    "array", [np.array([{}], dtype=object), np.zeros(2, dtype=[("a", "i4"), ("b", "O")])]
)
def test_arrays_of_objects_are_refused(array):
    with pytest.raises(DataError, match=r"refused: arrays of .* are not allowed"):
        pickles.read(pickle.dumps(array, 2), "x")


def test_numpy_ndarray_cannot_be_called_over_foreign_memory():
    content = b"cnumpy\nndarray\n((I1\ntVO\nC\x08AAAAAAAAtR."
    with pytest.raises(DataError, match=r"numpy.ndarray may not be called"):
        pickles.read(content, "x")


@pytest.mark.parametrize("content", [b"", b"abc", pickle.dumps([1] * 100)[:-20], b"\x80\x63."])
def test_a_damaged_pickle_is_named(content):
    with pytest.raises(DataError, match="batch is"):
        pickles.read(content, "batch")


def test_more_names_can_be_allowed():
    content = pickle.dumps(OrderedDict(a=1))
    assert pickles.read(content, "x", allow={("collections", "OrderedDict"): dict}) == {"a": 1}
