"""From a trained model to a smaller one on disk: try, choose, judge once, export, time, report.

    candidates  ->  accuracy on validation examples that no phase trained on, seconds in one run
    chosen      =   the fastest (of ternary ones the smallest) within ``keep_accuracy`` points
    test        ->  the dense model and the chosen one, once

The folder holds the smaller model, ``model.onnx``, ``timing.json``, ``candidates.json``,
``compress.json`` (one flat object, the stable face for other programs) and ``report.html``. What is in
the folder is read back and compared with the model that was chosen. Where no
candidate keeps the accuracy there is no model, and all the rest says how far it came.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import sterna
from sterna.data import Dataset, Examples
from sterna.data.split import stratified
from sterna.export.onnx import onnx_bytes, require_packages
from sterna.export.runtime import ExportError
from sterna.export.timing import Engine, Timing, Timings, time_models
from sterna.randomness import generator
from sterna.runs.candidate import Candidate, Compressor, control_of, stored_bits
from sterna.runs.compressed_report import page
from sterna.runs.figures import percent
from sterna.runs.files import StoreError, read_json, write_json, write_whole
from sterna.runs.kept import Layer, kept_by_layer
from sterna.runs.multiply_adds import multiply_adds
from sterna.runs.subject import ORIGINAL, Subject
from sterna.runs.written import exported_as_possible, read_back

FORMAT = 1
DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A candidate with its figures, plain enough for a file.

    Args:
        label: what made it.
        accuracy: on the validation part.
        parameters: in numbers.
        multiply_adds: of one example.
        bits: of the stored weights.
        seconds: of one batch, median; None where it could not be timed.
        low: lower quartile of them.
        high: upper quartile.
        fastest: the least seconds of one batch.
        ratio: how many times faster than the dense model.
        ratio_low: lower quartile of the rounds' ratios.
        ratio_high: upper quartile.
        keeps: whether it keeps the accuracy and removes anything.
        notes: what the library warned of.
    """

    label: str
    accuracy: float
    parameters: int
    multiply_adds: int
    bits: int
    seconds: float | None
    low: float | None
    high: float | None
    fastest: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    keeps: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out.

    Args:
        summary: ``compress.json``.
        tried: every candidate, from the least compressed to the most.
        layers: of the original, and what is left of each; empty where nothing was chosen.
        timings: of the dense model and the chosen one.
        by_size: whether storage is what is gained.
        cautions: what else should be known.
    """

    summary: Mapping[str, Any]
    tried: tuple[Tried, ...]
    layers: tuple[Layer, ...]
    timings: Timings | None
    by_size: bool
    cautions: tuple[str, ...]

    @property
    def met(self) -> bool:
        """Whether a candidate kept the accuracy."""
        return bool(self.summary["met"])

    @property
    def told(self) -> tuple[str, ...]:
        """The cautions, and what the library warned of: of the chosen candidate, or of all where none is."""
        chosen = [t for t in self.tried if t.label == self.summary["candidate"]] or self.tried
        notes = (f"{t.label}: {note}" for t in chosen for note in t.notes)
        return tuple(dict.fromkeys([*self.cautions, *notes]))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """How models are timed.

    Args:
        batch: examples in a call.
        threads: threads inside an operator.
        engines: of the last timing; candidates are timed in the first of them that runs them.
        rounds: samples of each.
    """

    batch: int = 64
    threads: int = 1
    engines: tuple[Engine, ...] = ("onnxruntime", "eager")
    rounds: int = 31


def compress(
    subject: Subject,
    compressor: Compressor,
    folder: Path,
    *,
    keep_accuracy: float,
    validate_on: Literal["test", "train"] = "test",
    validation: float | None = None,
    bench: Bench | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Compress a trained model, and write what came out into a folder.

    Args:
        subject: the model, its data and training.
        compressor: the way to compress.
        folder: new, or one in which no candidate kept the accuracy.
        keep_accuracy: percentage points of validation accuracy that may be lost, at least 0.
        validate_on: the part that the examples are cut out of on which candidates are judged. Of the
            test part, the rest is what is reported in the end, and no model has seen either; of the
            training part, the dense model has.
        validation: share of that part, in (0, 1); by default 0.5 of test, 0.1 of train.
        bench: how models are timed.
        say: told a line when a candidate is done.

    Returns:
        What came out. If no candidate keeps the accuracy, the folder has all but the model.

    Raises:
        StoreError: the folder holds a compressed model already or cannot be written; the subject is
            compressed already; the data is not judged by accuracy; what was written does not give the
            chosen model's outputs when it is read back.
        ModuleNotFoundError: the extra ``export`` is not installed.
        Refused: nothing in the model can shrink.
        ValueError: an argument is out of range, or the method does not fit the model.
    """
    start, bench = time.perf_counter(), bench or Bench()
    _check(subject, folder, keep_accuracy)
    require_packages()
    data, test = _parts(subject, validate_on, validation)
    training = replace(subject.training, data=data)
    dense, example = control_of(subject.model), subject.example
    cautions = []
    try:
        onnx_dense: int | None = len(onnx_bytes(dense, example))
    except ExportError as error:
        onnx_dense = None
        cautions.append(f"{error} There is no model.onnx, and times are torch's.")
    reached = training.judge(dense).accuracy
    least = reached - keep_accuracy / 100 - 1e-9
    say(f"dense: {percent(reached)} on {len(training.data.test)} validation examples")
    candidates: list[Candidate] = []
    misses = 0
    for found in compressor.candidates(dense, training, say):
        candidate = replace(
            found, label=_free(found.label, [DENSE, *(c.label for c in candidates)])
        )
        candidates.append(candidate)
        left = sum(p.numel() for p in candidate.model.parameters()) / _count(dense)
        say(f"{candidate.label}: {percent(candidate.accuracy)}, {left:.1%} of the parameters")
        misses = 0 if candidate.accuracy >= least else misses + 1
        if misses == 2 and not compressor.by_size:
            say("two in a row lose too much: the trying ends here")
            break
    models = {str(i): c.model for i, c in enumerate(candidates) if c.changed}
    timed = _seconds(dense, models, example, bench)
    tried = tuple(
        _tried(c, example[:1], timed.get(str(i)), least) for i, c in enumerate(candidates)
    )
    best = _chosen(tried, compressor.by_size)
    chosen = None if best is None else candidates[tried.index(best)]
    summary: dict[str, Any] = {
        "format": FORMAT,
        "sterna": sterna.__version__,
        "source": subject.name,
        "method": repr(compressor),
        "data": subject.data.name,
        "seed": subject.training.seed,
        "met": best is not None,
        "keep_accuracy": keep_accuracy,
        "candidate": best.label if best else None,
        "candidates": len(tried),
        "validate_on": validate_on,
        "validation_examples": len(data.test),
        "test_examples": len(test),
        "validation_accuracy_dense": reached,
        "validation_accuracy": best.accuracy if best else None,
        "parameters_dense": _count(dense),
        "parameters": best.parameters if best else None,
        "multiply_adds_dense": multiply_adds(dense, example[:1]),
        "multiply_adds": best.multiply_adds if best else None,
        "model_bits_dense": stored_bits(dense),
        "model_bits": best.bits if best else None,
        "onnx_bytes_dense": onnx_dense,
    }
    folder.mkdir(parents=True, exist_ok=True)
    layers: tuple[Layer, ...] = ()
    timings = None
    if chosen is not None and best is not None:
        write_json(folder / ORIGINAL, subject.original)
        write_whole(folder / "model.safetensors", chosen.write)
        read_back(folder, chosen.model, test.inputs[:64])
        judged = replace(training, data=replace(data, test=test))
        summary["accuracy_dense"] = judged.judge(dense).accuracy
        summary["accuracy"] = judged.judge(chosen.model).accuracy
        layers = kept_by_layer(dense, chosen.model, example[:1])
        both = {DENSE: dense, "compressed": chosen.model}
        timings = time_models(both, example, **_options(bench, bench.engines, bench.rounds))
        if onnx_dense is not None:
            exported, caution = exported_as_possible(chosen.model, example, folder / "model.onnx")
            cautions += [caution] if caution else []
            if exported is not None:
                summary["onnx_bytes"] = exported.bytes
                summary["onnx_difference"] = exported.largest_difference
        row = next((r for r in timings.rows if r.model == "compressed" and r.seconds), None)
        if row is not None:
            summary |= {
                "engine": row.engine,
                "batch": bench.batch,
                "threads": bench.threads,
                "seconds_dense": timings.of(DENSE, row.engine).seconds,
                "seconds": row.seconds,
                "times_faster": row.ratio,
                "times_faster_low": row.ratio_low,
                "times_faster_high": row.ratio_high,
            }
        write_json(folder / "timing.json", timings.as_json())
    summary["wall_s"] = time.perf_counter() - start
    outcome = Outcome(
        summary=summary,
        tried=tried,
        layers=layers,
        timings=timings,
        by_size=compressor.by_size,
        cautions=tuple(cautions),
    )
    write_json(folder / "candidates.json", {"candidates": [vars(t) for t in tried]})
    text = page(outcome)
    write_whole(folder / "report.html", lambda beside: _write(beside, text))
    write_json(folder / "compress.json", summary)  # last: it says that the rest is whole
    return outcome


def _free(label: str, taken: Sequence[str]) -> str:
    """The label, with a number where it is taken."""
    names = itertools.chain([label], (f"{label} ({i})" for i in itertools.count(2)))
    return next(name for name in names if name not in taken)


def _tried(
    candidate: Candidate, example: torch.Tensor, timing: Timing | None, least: float
) -> Tried:
    timing = timing or Timing(model=candidate.label, engine="eager")  # no figures
    return Tried(
        label=candidate.label,
        accuracy=candidate.accuracy,
        parameters=_count(candidate.model),
        multiply_adds=multiply_adds(candidate.model, example),
        bits=candidate.bits,
        seconds=timing.seconds,
        low=timing.low,
        high=timing.high,
        fastest=timing.fastest,
        ratio=timing.ratio,
        ratio_low=timing.ratio_low,
        ratio_high=timing.ratio_high,
        keeps=candidate.changed and candidate.accuracy >= least,
        notes=candidate.notes,
    )


def _chosen(tried: Sequence[Tried], by_size: bool) -> Tried | None:
    """The smallest in storage, or of the fastest (to a tenth: the clock says no more) the least work."""
    able = [t for t in tried if t.keeps]
    if by_size:
        return min(able, key=lambda t: (t.bits, -t.accuracy), default=None)
    timed = [t for t in able if t.seconds is not None and t.fastest is not None]
    quick = able
    if timed:
        middle = 1.1 * min(t.seconds or 0.0 for t in timed)
        least = 1.1 * min(t.fastest or 0.0 for t in timed)
        quick = [t for t in timed if (t.seconds or 0) <= middle or (t.fastest or 0) <= least]
    return min(quick, key=lambda t: t.multiply_adds, default=None)


def _seconds(
    dense: nn.Module, models: Mapping[str, nn.Module], example: torch.Tensor, bench: Bench
) -> dict[str, Timing]:
    """All candidates beside the dense model, in the first engine that runs every one of them."""
    if not models:
        return {}
    rows: dict[str, Timing] = {}
    for engine in bench.engines:
        found = time_models(
            {DENSE: dense, **models},
            example,
            **_options(bench, (engine,), max(3, bench.rounds // 2)),
        )
        rows = {row.model: row for row in found.rows}
        if all(row.seconds is not None for row in rows.values()):
            break
    return rows


def _options(bench: Bench, engines: tuple[Engine, ...], rounds: int) -> dict[str, Any]:
    return {"batch": bench.batch, "threads": bench.threads, "engines": engines, "rounds": rounds}


def _parts(
    subject: Subject, on: Literal["test", "train"], share: float | None
) -> tuple[Dataset, Examples]:
    """Data to train on and to choose by, and the examples for the end."""
    data, seed = subject.data, subject.training.seed
    share = {"test": 0.5, "train": 0.1}[on] if share is None else share
    if on == "train":
        return data.validation_split(share, seed), data.test
    count = round(share * len(data.test))
    if not 0 < share < 1 or not 0 < count < len(data.test):
        raise ValueError(
            f"compress: validation must be a share in (0, 1) that leaves at least one of the "
            f"{len(data.test)} test examples on either side; got {share!r}."
        )
    rest, cut = stratified(data.test.targets.cpu(), count, generator(seed, "validation"))
    parts = [Examples(data.test.inputs[part], data.test.targets[part]) for part in (cut, rest)]
    return replace(data, test=parts[0]), parts[1]


def _check(subject: Subject, folder: Path, keep_accuracy: float) -> None:
    if not 0 <= keep_accuracy < 100:
        raise ValueError(
            f"compress: keep_accuracy must be points in [0, 100), such as 0.5; got {keep_accuracy!r}."
        )
    before = folder / "compress.json"
    # Where no candidate kept the accuracy the folder has no model, and is in nobody's way.
    taken = before.exists() and read_json(before, "a compressed model").get("met") is not False
    if taken or (folder / "run.json").exists():
        raise StoreError(
            f"{folder} holds a run or a compressed model already; choose another --out."
        )
    if subject.compressed:
        raise StoreError(
            f"{subject.name} is compressed already, and what sterna compress writes is described relative to "
            "the original. Compress the original again, or combine methods in Python with "
            "sterna.procedures.sparsify(objective=...) and sterna.procedures.lowrank."
        )
    merit = getattr(subject.data, "merit", None)
    if merit is not None and merit.name != "accuracy":
        raise StoreError(
            f"{subject.data.name} is judged by {merit.name}, and sterna compress keeps an accuracy. Use "
            "sterna.procedures.sparsify on it in Python."
        )


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
