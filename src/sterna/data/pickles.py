"""Reading pickles without running what they say.

A pickle is a program: it can call any function it names. This reader lets it build plain
containers, numbers, bytes and text, and NumPy arrays of numbers or text, and refuses every other
name. It keeps a file from running code; it does not keep a hostile one from asking for much memory,
so published files are checked against their checksum first.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sterna.data.files import DataError

Allowed = Mapping[tuple[str, str], Callable[..., Any]]


class _Array(np.ndarray[tuple[int, ...], np.dtype[Any]]):
    """An array that takes its content from a pickle, but only as plain numbers or text."""

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array needs a dtype")
        super().__setstate__((1, shape, dtype.dtype, fortran, raw))


class _Dtype:
    """A dtype of numbers or text; one of objects or records is refused."""

    def __init__(self, code: str | bytes, _align: object = False, _copy: object = True) -> None:
        self.dtype: np.dtype[Any] = np.dtype(_text(code))
        if self.dtype.kind not in "biufcSU":
            raise pickle.UnpicklingError(f"arrays of {self.dtype} are not allowed")

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(_text(state[1]))  # the rest follows from the code


def _text(x: str | bytes) -> Any:
    return x.decode("ascii") if isinstance(x, bytes) else x


def _reconstruct(_subtype: object, _shape: object, _code: object) -> _Array:
    """An empty array, which the pickle then fills."""
    return _Array((0,), np.int8)


def _no_call(*_: object) -> None:
    """Stands for ``numpy.ndarray``, which a pickle of an array names but never calls."""
    raise pickle.UnpicklingError("numpy.ndarray may not be called")


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    """How old protocols spell bytes."""
    return text.encode(encoding)


_ALLOWED: Allowed = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _no_call,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    **{
        (module, kind.__name__): kind
        for module in ("__builtin__", "builtins")
        for kind in (bytes, bytearray, complex, set, frozenset)
    },
}


class _Restricted(pickle.Unpickler):
    def __init__(self, content: bytes, encoding: str, allow: Allowed) -> None:
        super().__init__(io.BytesIO(content), encoding=encoding)
        self.allow = allow

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for an allowed name."""
        if (module, name) not in self.allow:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return self.allow[module, name]


def read(
    content: bytes, path: Path | str, *, encoding: str = "bytes", allow: Allowed | None = None
) -> Any:
    """The plain data and NumPy arrays in the bytes of a pickle.

    Arrays come as a subclass of ``numpy.ndarray``; ``numpy.asarray`` makes them plain.

    Args:
        content: the pickle.
        path: named in errors.
        encoding: how text of Python 2 is read; "bytes" leaves it as it is.
        allow: more names that the pickle may use: (module, name) to what stands for it. What stands
            for it can be called with any arguments that the pickle chooses.

    Raises:
        DataError: the pickle asks for anything else, or is cut off or damaged.

    Example:
        >>> read(pickle.dumps({"labels": [3, 1]}), "batch")
        {'labels': [3, 1]}
        >>> read(pickle.dumps(print), "x")
        Traceback (most recent call last):
        ...
        sterna.data.files.DataError: x is refused: it asks for builtins.print, which is not allowed.
    """
    try:
        return _Restricted(content, encoding, {**_ALLOWED, **(allow or {})}).load()
    except pickle.UnpicklingError as error:
        raise DataError(f"{path} is refused: {error}.") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(
            f"{path} is not a pickle that can be read ({type(error).__name__}: {error})."
        ) from error
