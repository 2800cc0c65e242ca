"""Finished runs as they lie on disk: run folders, and comparison folders that hold several."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sterna.runs.compare import Summary, read_comparison, require_format
from sterna.runs.files import StoreError, read_json, read_rows

FORMAT = 1
"""The version of ``run.json`` that this reads."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a run folder tells.

    Args:
        folder: where it lies.
        summary: ``summary.json``.
        made: ``run.json``, empty where there is none.
        steps: rows of ``metrics.jsonl`` of kind ``step``.
        evaluations: rows of kind ``eval``.
        workers: the last row of ``ledger.jsonl`` of each worker.
    """

    folder: Path
    summary: Summary
    made: Row
    steps: Sequence[Row]
    evaluations: Sequence[Row]
    workers: Sequence[Row]

    @property
    def experiment(self) -> str:
        """The experiment's name, as the summary has it."""
        return str(self.summary["experiment"])

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.summary["seed"])


def read_run(folder: Path, summary: Summary | None = None) -> Finished:
    """Read a run folder.

    Args:
        folder: it holds ``summary.json``, and mostly ``run.json``, ``metrics.jsonl``,
            ``ledger.jsonl``.
        summary: stands in for ``summary.json``.

    Raises:
        StoreError: the folder holds no finished run, or files that cannot be read.
    """
    if not folder.is_dir():
        raise StoreError(f"{folder} does not exist; name a run or comparison folder.")
    if summary is None:
        summary = _summary(folder)
    for key, kind in (("experiment", str), ("seed", int)):
        if not isinstance(summary.get(key), kind):
            raise StoreError(
                f"{folder / 'summary.json'} does not say the {key}; run the experiment again."
            )
    made: Row = {}
    if (folder / "run.json").exists():
        made = read_json(folder / "run.json", "a run folder")
        require_format(folder / "run.json", made, FORMAT, "sterna run")
    rows = list(read_rows(folder / "metrics.jsonl"))
    workers = {row.get("worker"): row for row in read_rows(folder / "ledger.jsonl")}
    return Finished(
        folder=folder,
        summary=summary,
        made=made,
        steps=[row for row in rows if row.get("kind") == "step"],
        evaluations=[row for row in rows if row.get("kind") == "eval"],
        workers=list(workers.values()),
    )


def collect(folders: Sequence[Path]) -> tuple[list[Finished], str | None]:
    """All runs of some run and comparison folders, each once; and the first comparison's baseline.

    Where two folders hold the same experiment with the same seed (say, with other arguments), the
    folder's name is added to the experiment's.

    Raises:
        StoreError: a folder is neither, or cannot be read; or no folder is named.
    """
    if not folders:
        raise StoreError("There is nothing to report; name at least one run or comparison folder.")
    found: dict[Path, Finished] = {}
    named: dict[Path, str] = {}
    baseline = None
    for folder in folders:
        if (folder / "compare.json").exists():
            comparison = read_comparison(folder)
            baseline = baseline or comparison.baseline
            runs = []
            for summary in comparison.runs:
                below = summary.get("run") or f"{summary['experiment']}/seed-{summary['seed']}"
                runs.append(read_run(folder / str(below), summary))
        else:
            runs = [read_run(folder)]
        for run in runs:
            found.setdefault(run.folder.resolve(), run)
            named.setdefault(run.folder.resolve(), folder.resolve().name)
    return _distinct(found, named), baseline


def _distinct(found: dict[Path, Finished], named: dict[Path, str]) -> list[Finished]:
    times = Counter((run.experiment, run.seed) for run in found.values())
    twice = {experiment for (experiment, _), count in times.items() if count > 1}
    return [
        run
        if run.experiment not in twice
        else replace(
            run, summary={**run.summary, "experiment": f"{run.experiment} ({named[path]})"}
        )
        for path, run in found.items()
    ]


def _summary(folder: Path) -> Summary:
    path = folder / "summary.json"
    if path.exists():
        return read_json(path, "a run folder")
    if (folder / "run.json").exists():
        raise StoreError(
            f"{path} does not exist: the run is not finished. Go on with "
            f"`sterna run --resume {folder}`."
        )
    inner = sorted(folder.glob("*/seed-*/summary.json"))
    if inner:
        raise StoreError(
            f"{folder} has no compare.json: the comparison is not finished. Run `sterna compare` "
            f"again, or name finished runs in it, such as {inner[0].parent}."
        )
    raise StoreError(
        f"{folder} holds neither summary.json nor compare.json; name a folder that `sterna run` "
        "or `sterna compare` wrote."
    )
