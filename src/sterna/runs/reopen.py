"""A run folder opened again: the request that it describes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sterna
from sterna.runs.experiment import resolve, restored
from sterna.runs.files import StoreError, read_json
from sterna.runs.recorder import FORMAT
from sterna.runs.request import Request
from sterna.runs.setting import Setting


def described(folder: Path, quiet: bool) -> tuple[Mapping[str, Any], Request]:
    """``run.json`` of a folder, and the request that it describes.

    Raises:
        StoreError: the folder holds no run, or one of another version.
        UnknownExperiment: the experiment is not there any more.
    """
    about = read_json(folder / "run.json", "a run folder")
    if about.get("format") != FORMAT:
        raise StoreError(
            f"{folder / 'run.json'} has format {about.get('format')!r}; this version of Sterna "
            f"({sterna.__version__}) reads format {FORMAT}. Resume with the version that wrote it."
        )
    source = about.get("source") or about["experiment"]
    request = Request(
        experiment=about["experiment"],
        source=source,
        arguments=restored(resolve(source), about["arguments"]),
        folder=folder,
        seed=about["seed"],
        checkpoint_every=about["checkpoint_every"],
        device=about["device"],
        quiet=quiet,
        setting=Setting.from_json(about["setting"]) if "setting" in about else None,
    )
    return about, request
