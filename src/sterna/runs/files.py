"""Files that are whole or absent: written beside, then renamed; appended line by line."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class StoreError(RuntimeError):
    """A run folder cannot be written or read; the message names the path and the way out."""


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it: readers see the old or the new.

    Raises:
        StoreError: no space or no permission; what was at ``path`` before is untouched.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except Exception as error:
        reason = error if isinstance(error, OSError) else _os_error_in(error)
        if reason is None:
            raise
        raise StoreError(
            f"{path} could not be written: {reason} ({_free_space(path)} MiB free). Earlier files are "
            "whole; free some space or permission and go on with `sterna run --resume`."
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def _os_error_in(error: Exception) -> str | None:
    """The text of an I/O error that a library (safetensors) reports as its own class."""
    text = str(error)
    return text if "I/O error" in text or "os error" in text.lower() else None


def _free_space(path: Path) -> int:
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free >> 20


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """One JSON object, indented, written whole; figures that are not finite become null."""
    text = json.dumps(finite(value), indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda beside: _write_text(beside, text))


def finite(value: Any) -> Any:
    """The value with NaN and infinities, which JSON does not have, replaced by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """One JSON object.

    Raises:
        StoreError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoreError(f"{path} does not exist, so {path.parent} is not {what}.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StoreError(f"{path} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise StoreError(f"{path} must hold a JSON object; got {type(value).__name__}.")
    return value


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line of JSON per row at the end of ``path``; figures that are not finite become null.

    Raises:
        StoreError: the lines could not be written.
    """
    text = "".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise StoreError(f"{path} could not be written: {error}.") from error


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line that was cut short is left out.

    Raises:
        StoreError: a line before the last is not JSON.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise StoreError(f"{path}, line {number}, is not JSON: {error}.") from error
        yield row


def keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a JSON-lines file with the rows for which ``keep`` holds."""
    rows = [json.dumps(row) for row in read_rows(path) if keep(row)]
    write_whole(path, lambda beside: _write_text(beside, "".join(f"{row}\n" for row in rows)))
