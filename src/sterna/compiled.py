"""Functions compiled by numba: without Python's lock, and kept on disk for the next process."""

from collections.abc import Callable
from typing import Any

import numba

Function = Callable[..., Any]


def compiled(**options: Any) -> Callable[[Function], Function]:
    """Compile a function when it is first called; ``options`` are those of ``numba.njit``.

    Where the package's folder cannot be written, nor numba's own, every process compiles anew.
    """

    def decorate(function: Function) -> Function:
        made: Function
        try:
            made = numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:  # nowhere to write the cache
            made = numba.njit(nogil=True, **options)(function)
        return made

    return decorate
