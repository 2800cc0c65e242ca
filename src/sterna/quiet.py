"""Torch's tracers and exporters without what they print and log: what fails is raised all the same."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from warnings import catch_warnings, simplefilter

_LOGGERS = ("torch.", "onnxscript", "onnx_ir")


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, the user sees nothing of what torch and its exporters warn of, log and print.

    Example:
        >>> with quiet():
        ...     print("a graph of a thousand lines")
    """
    known = [name for name in logging.root.manager.loggerDict if name.startswith(_LOGGERS)]
    before = {name: logging.getLogger(name).level for name in known}
    try:
        for name in before:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
