"""``sterna compress`` and ``sterna export``."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sterna.cli.compress_flags import (
    OF_TIMING,
    ONLY_OF_MODULES,
    USUAL,
    CompressFlags,
    ExportFlags,
    check,
    check_timing,
    value,
)
from sterna.cli.flags import parse
from sterna.cli.usage import UsageError, dashed
from sterna.comm.launch import explains_itself
from sterna.export.timing import TITLES, Timings
from sterna.runs.files import StoreError
from sterna.runs.subject import NotNamed, Subject, of_module, of_run


def compress_command(arguments: list[str]) -> None:
    """``sterna compress``.

    Raises:
        UsageError: a flag is wrong, or the method does not fit the model.
        StoreError: no candidate keeps the accuracy, or files cannot be read or written.
    """
    flags, _ = parse(CompressFlags, [], arguments, "sterna compress")
    check(flags)
    progress = Console(stderr=True, quiet=flags.quiet)
    progress.print(f"Compressing {flags.model} by {flags.method}", highlight=False, soft_wrap=True)
    from sterna.export.onnx import require_packages
    from sterna.runs.compress import Bench, compress
    from sterna.runs.compressed_report import best_reached, conclusion
    from sterna.runs.noted import in_flags

    _explained(require_packages)

    compressor = _compressor(flags)
    subject = _subject(flags, value(flags, "lr"), value(flags, "batch_size"), flags.seed)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = flags.out or Path("runs") / f"compress-{flags.method}-{stamp}"
    try:
        outcome = compress(
            subject,
            compressor,
            folder,
            keep_accuracy=flags.keep_accuracy,
            validate_on=flags.validate_on,
            validation=flags.validation,
            bench=Bench(**{name: value(flags, name) for name in OF_TIMING}),
            say=lambda text: progress.print(text, highlight=False, soft_wrap=True),
        )
    except ValueError as error:
        text = in_flags(str(error)) if explains_itself(error) else ""
        if text.startswith("--"):
            raise UsageError(text) from None
        raise
    console = Console()
    _show_candidates(console, outcome)
    for caution in outcome.told:
        console.print(f"[yellow]![/yellow] {escape(caution)}", highlight=False, soft_wrap=True)
    if not outcome.met:
        console.print(f"Report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
        raise StoreError(best_reached(outcome))
    for sentence in conclusion(outcome):
        console.print(sentence, highlight=False)
    if outcome.timings is not None:
        _show_timings(console, outcome.timings)
    console.print(f"Folder: {folder}", highlight=False, soft_wrap=True)
    console.print(f"Report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def export_command(arguments: list[str]) -> None:
    """``sterna export``.

    Raises:
        ExportError: the model has no ONNX file that agrees with torch.
        StoreError: the folder holds no trained model, or the file cannot be written.
    """
    flags, _ = parse(ExportFlags, [], arguments, "sterna export")
    for name in OF_TIMING:
        if not flags.time and getattr(flags, name) is not None:
            raise UsageError(f"{dashed(name)} needs --time.")
    check_timing(flags)
    from sterna.export.onnx import require_packages, to_onnx
    from sterna.export.timing import time_models

    _explained(require_packages)
    if flags.path.is_dir():
        raise UsageError(f"{flags.path} is a folder; name the file to write, such as model.onnx.")
    if flags.path.exists():
        raise UsageError(f"{flags.path} is there already; name another file.")
    subject = _subject(flags, USUAL["lr"], USUAL["batch_size"], None)
    exported = to_onnx(
        subject.model, subject.example, flags.path, dynamic_batch=not flags.fixed_batch
    )
    console, batches = Console(), ", ".join(map(str, exported.batches))
    console.print(
        f"{exported.path}: {exported.bytes:,} bytes, opset {exported.opset}, "
        f"{'any batch' if exported.dynamic_batch else f'batch {batches} only'}.",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"Largest difference from torch: {exported.largest_difference:.2g}, at batches of {batches}.",
        highlight=False,
    )
    if flags.time:
        found = time_models(
            {"model": subject.model},
            subject.example,
            **{name: value(flags, name) for name in OF_TIMING},
        )
        _show_timings(console, found, columns=4)  # there is nothing that it could be faster than


def _subject(
    flags: CompressFlags | ExportFlags, lr: float, batch_size: int, seed: int | None
) -> Subject:
    """The model of a folder, or of the user's own file."""
    text = flags.model
    if ".py:" in text:
        try:
            return of_module(
                text, flags.weights, flags.data, lr=lr, batch_size=batch_size, seed=seed or 0
            )
        except (NotNamed, StoreError) as error:  # all of it was named on the command line
            raise UsageError(str(error)) from None
    if text.endswith(".py"):
        raise UsageError(f"{text} needs the function that builds the model: {text}:build, say.")
    for name in ONLY_OF_MODULES:
        if getattr(flags, name, None) is not None:
            raise UsageError(
                f"{dashed(name)} is for your_module.py:build; a run folder has its own."
            )
    if not Path(text).is_dir():
        raise UsageError(
            f"There is no folder {text}; name one of sterna run, or your_module.py:build with --weights "
            "and --data."
        )
    subject = of_run(Path(text))
    if seed is None:
        return subject
    return replace(subject, training=replace(subject.training, seed=seed))


def _compressor(flags: CompressFlags) -> Any:
    """The way to compress that a flag names, with the flags that it reads."""
    from sterna.runs import compressors

    shares: dict[str, Any] = {"shares": flags.shares} if flags.shares else {}
    both: dict[str, Any] = {name: value(flags, name) for name in ("finetune_epochs", "rate")}
    both["round_to"] = value(flags, "multiple_of")
    epochs, form = value(flags, "epochs"), value(flags, "form")
    force = flags.strength[0] if flags.strength else 0.03
    make: Mapping[str, Callable[[], Any]] = {
        "ssl": lambda: compressors.Ssl(
            strengths=flags.strength,
            depth=value(flags, "depth"),
            epochs=epochs,
            **shares,
            **both,
        ),
        "force": lambda: compressors.LowRank(
            force=force, form=form, epochs=epochs, **shares, **both
        ),
        "low-rank": lambda: compressors.LowRank(form=form, epochs=epochs, **shares, **both),
        "magnitude": lambda: compressors.Magnitude(**shares, **both),
        "ternary": lambda: compressors.Ternary(passes=value(flags, "passes")),
    }
    try:
        return make[flags.method]()
    except ValueError as error:
        raise UsageError(str(error)) from None


def _explained(required: Callable[[], None]) -> None:
    """Say what is missing without a traceback."""
    try:
        required()
    except ModuleNotFoundError as error:
        raise StoreError(str(error)) from error


def _show_candidates(console: Console, outcome: Any) -> None:
    """The table; without quartiles where there is no room for them."""
    from sterna.runs.compressed_report import table, titles

    headings, rows = titles(outcome), table(outcome)
    shown = _candidates(headings, rows, set())
    spread = {i for i, title in enumerate(headings) if title == "quartiles"}
    wide = console.measure(shown, options=console.options.update(width=1000)).maximum
    console.print(shown if wide <= console.width else _candidates(headings, rows, spread))
    if wide > console.width:
        note = "Left out for want of room: quartiles. The report has them."
        console.print(note, style="dim", highlight=False, soft_wrap=True)


def _candidates(headings: list[str], rows: list[list[str]], left_out: set[int]) -> Table:
    found = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    kept = [i for i in range(len(headings)) if i not in left_out]
    for i in kept:
        name = headings[i].replace(" ", "\n").replace("-", "-\n")
        side: Any = "left" if i in (0, len(headings) - 1) else "right"
        found.add_column(name, justify=side, no_wrap=i > 0)
    for cells in rows:
        style = "bold" if cells[-1] == "chosen" else "dim" if cells[-1] else ""
        found.add_row(*(escape(cells[i]) for i in kept), style=style)
    return found


def _show_timings(console: Console, timings: Timings, columns: int = len(TITLES)) -> None:
    shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i, title in enumerate(TITLES[:columns]):
        side: Any = "left" if i < 2 else "right"
        shown.add_column(title.replace(" ", "\n"), justify=side, no_wrap=bool(i))
    for row in timings.cells():
        shown.add_row(*map(escape, row[:columns]))
    console.print(shown)
    for note in timings.notes():
        console.print(escape(note), style="dim", highlight=False, soft_wrap=True)
