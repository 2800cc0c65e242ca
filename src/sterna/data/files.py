"""Where data files lie, and how they come there.

A file is looked for in the folder given (``--data-dir``), else in the one that the environment
variable ``STERNA_DATA`` names, and then in the user's cache (``$XDG_CACHE_HOME/sterna``, else
``~/.cache/sterna``). What is in none of them is fetched from its public homes into the cache. Every
file is checked against its published checksum whenever it is read.
"""

import hashlib
import http.client
import logging
import os
import tempfile
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

TIMEOUT_S = 10.0
"""Longest wait for a connection, and for each block of an answer, in seconds."""

WAY_OUT = "name the folder that holds it with --data-dir or the environment variable STERNA_DATA"

_log = logging.getLogger(__name__)


class DataError(RuntimeError):
    """A data file is missing, cannot be fetched, or does not hold what it should."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A file as its authors published it.

    Args:
        name: file name.
        checksum: hex digest, SHA-256 or, with 32 digits, MD5.
        urls: its public homes, tried in order.
    """

    name: str
    checksum: str
    urls: tuple[str, ...]


def cache() -> Path:
    """The folder that fetched files go to."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "sterna"


def folders(subfolder: str, data_dir: Path | None = None) -> tuple[Path, ...]:
    """Where the files of one data set may lie, in the order in which they are looked for.

    Raises:
        DataError: ``data_dir`` or ``STERNA_DATA`` names something that is not a folder.
    """
    roots = [cache()]
    named = os.environ.get("STERNA_DATA", "")
    given, who = (Path(data_dir), "--data-dir") if data_dir else (Path(named), "STERNA_DATA")
    if data_dir or named:
        given = given.expanduser()
        if not given.is_dir():
            raise DataError(f"{who} must name a folder that exists; got {str(given)!r}.")
        roots.insert(0, given)
    return tuple(folder for root in roots for folder in (root / subfolder, root))


def find(names: Sequence[str], among: Iterable[Path]) -> Path | None:
    """The first of ``names`` in the first of the folders ``among`` that holds one."""
    paths = (folder / name for folder in among for name in names)
    return next((path for path in paths if path.is_file()), None)


def obtain(
    file: Published, subfolder: str, data_dir: Path | None = None, also: Sequence[str] = ()
) -> Path:
    """The path of a published file, fetched first if need be. Its checksum is not yet checked.

    Args:
        file: which file.
        subfolder: folder of the data set under a data folder; the files may also lie right in it.
        data_dir: the folder to look in before the cache, or None for ``STERNA_DATA``.
        also: other names under which an acceptable form of the file may lie.

    Raises:
        DataError: the file is nowhere and cannot be fetched.
    """
    looked = folders(subfolder, data_dir)
    path = find((file.name, *also), looked)
    if path is None:
        path = cache() / subfolder / file.name
        try:
            fetch(file, path)
        except DataError as error:
            raise DataError(
                f"{file.name} was not found in {', '.join(map(str, looked))}, and {error}; "
                f"{WAY_OUT}."
            ) from error
    return path


def fetch(file: Published, target: Path) -> None:
    """Download ``file`` to ``target``: written beside it, checked, then renamed.

    Raises:
        DataError: no home gave the file; says what each one answered.
    """
    failures = []
    for url in file.urls:
        part = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
            part = Path(name)
            _log.info("fetching %s", url)
            with os.fdopen(handle, "wb") as out, _open(url) as answer:
                digest = _digest_of(file.checksum)
                while block := answer.read(1 << 20):
                    digest.update(block)
                    out.write(block)
            if digest.hexdigest() == file.checksum:
                part.replace(target)
                return
            failures.append(f"{url} (other content: {digest.name} {digest.hexdigest()})")
        except (OSError, http.client.HTTPException) as error:
            failures.append(f"{url} ({str(error) or type(error).__name__})")
        finally:
            if part is not None:
                part.unlink(missing_ok=True)
    raise DataError(f"could not be fetched from {', nor from '.join(failures)}")


def read_checked(path: Path, checksum: str) -> bytes:
    """The bytes of a file whose checksum is known.

    Raises:
        DataError: the file cannot be read or holds something else.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    check(content, checksum, path)
    return content


def check(content: bytes, checksum: str, path: Path | str) -> None:
    """Raise a `DataError` that names ``path`` if ``content`` does not have the ``checksum``."""
    digest = _digest_of(checksum)
    digest.update(content)
    if digest.hexdigest() != checksum:
        raise DataError(
            f"{path} is not the published file: its {digest.name} must be {checksum}; got "
            f"{digest.hexdigest()} ({len(content)} bytes). Delete it, and it is fetched again, or "
            f"{WAY_OUT.replace('that holds it', 'that holds the published one')}."
        )


def _digest_of(checksum: str) -> "hashlib._Hash":
    return hashlib.new("md5" if len(checksum) == 32 else "sha256", usedforsecurity=False)


def _open(url: str) -> IO[bytes]:
    answer: IO[bytes] = urllib.request.urlopen(url, timeout=TIMEOUT_S)
    return answer
