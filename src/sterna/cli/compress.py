"""``sterna compress`` and ``sterna export``."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sterna.cli.execute import UsageError, require
from sterna.cli.flags import parse
from sterna.export.timing import TITLES, Timings
from sterna.runs.files import StoreError
from sterna.runs.subject import LOADERS, Subject, of_module, of_run

_arg = tyro.conf.arg
Method = Literal["ssl", "force", "low-rank", "ternary", "magnitude"]
EngineName = Literal["onnxruntime", "eager", "compiled"]


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """What is compressed or exported."""

    weights: Annotated[
        Path | None, _arg(help="your_module.py:build only: safetensors file of the trained weights")
    ] = None
    data: Annotated[
        str | None,
        _arg(help=f"your_module.py:build only: {', '.join(LOADERS)}, or your_file.py:function"),
    ] = None
    batch: Annotated[int, _arg(help="examples in a call when models are timed")] = 64
    threads: Annotated[int, _arg(help="threads inside an operator when models are timed")] = 1
    engines: Annotated[
        tuple[EngineName, ...],
        _arg(help="what models are timed in; compiled takes half a minute a model to build"),
    ] = ("onnxruntime", "eager")


@dataclass(frozen=True, kw_only=True)
class CompressFlags(ModelFlags):
    """Make a trained network smaller and faster, and prove it: shrink, factorise or ternarise it."""

    model: Annotated[
        str,
        tyro.conf.Positional,
        _arg(metavar="RUN|MODEL", help="a folder of sterna run, or your_module.py:build"),
    ]
    method: Annotated[
        Method,
        _arg(
            help="ssl: group lasso, then removal; force, low-rank: two layers for one, with and without "
            "a force before; ternary: values by coordinate descent; magnitude: the shortest units go"
        ),
    ] = "ssl"
    keep_accuracy: Annotated[
        float, _arg(help="percentage points of validation accuracy that may be lost")
    ] = 0.5
    out: Annotated[
        Path | None, _arg(help="folder; default: runs/compress-<method>-<date>-<time>")
    ] = None
    epochs: Annotated[
        int, _arg(help="ssl, force, low-rank: epochs with the penalty, before the cut")
    ] = 5
    finetune_epochs: Annotated[int, _arg(help="epochs after the cut")] = 5
    strength: Annotated[
        tuple[float, ...],
        _arg(
            help="ssl: strengths to try, by default six; force: lambda, one value, by default 0.03"
        ),
    ] = ()
    depth: Annotated[
        float,
        _arg(help="ssl: strength for whole residual blocks over that for units; 0 keeps them"),
    ] = 0.0
    shares: Annotated[
        tuple[float, ...],
        _arg(
            help="force, low-rank: multiply-adds that are left; magnitude: units that are; by default "
            "0.75 0.5 0.35 0.25 0.15"
        ),
    ] = ()
    form: Annotated[
        Literal["channel", "spatial"], _arg(help="force, low-rank: how a convolution is cut in two")
    ] = "channel"
    multiple_of: Annotated[int, _arg(help="widths and ranks are multiples of it: 8 is fast")] = 8
    rate: Annotated[float, _arg(help="factor of the run's learning rate in all phases")] = 1.0
    lr: Annotated[
        float, _arg(help="your_module.py:build only: learning rate, SGD with momentum 0.9")
    ] = 0.01
    batch_size: Annotated[
        int, _arg(help="your_module.py:build only: examples per training step")
    ] = 64
    passes: Annotated[int, _arg(help="ternary: most passes over all weights")] = 10
    validate_on: Annotated[
        Literal["test", "train"],
        _arg(
            help="cut the examples that candidates are judged on out of the test part, which the model has "
            "not seen; or out of the training part, which flatters the dense model"
        ),
    ] = "test"
    validation: Annotated[
        float | None, _arg(help="share of that part; default: 0.5 of test, 0.1 of train")
    ] = None
    seed: Annotated[
        int | None, _arg(help="seeds all phases and the validation part; default: the run's, or 0")
    ] = None
    quiet: Annotated[bool, _arg(help="show no progress")] = False


@dataclass(frozen=True, kw_only=True)
class ExportFlags(ModelFlags):
    """Write a trained model as ONNX, after comparing it with torch in ONNX Runtime."""

    model: Annotated[
        str,
        tyro.conf.Positional,
        _arg(
            metavar="RUN|MODEL",
            help="a folder of sterna run or sterna compress, or your_module.py:build",
        ),
    ]
    path: Annotated[
        Path,
        tyro.conf.Positional,
        _arg(metavar="FILE", help="the file to write, such as model.onnx"),
    ]
    fixed_batch: Annotated[
        bool, _arg(help="fix the batch size of the file to 2, where a model cannot leave it free")
    ] = False
    time: Annotated[bool, _arg(help="also time it")] = False


# Flags that only some methods read, with the value that stands for not given.
_ONLY_FOR: tuple[tuple[str, tuple[str, ...], Any], ...] = (
    ("strength", ("ssl", "force"), ()),
    ("depth", ("ssl",), 0.0),
    ("shares", ("force", "low-rank", "magnitude"), ()),
    ("form", ("force", "low-rank"), "channel"),
    ("passes", ("ternary",), 10),
)


def compress_command(arguments: list[str]) -> None:
    """``sterna compress``.

    Raises:
        StoreError: no candidate keeps the accuracy, or files cannot be read or written.
    """
    flags, _ = parse(CompressFlags, [], arguments, "sterna compress")
    _check(flags)
    from sterna.export.onnx import require_packages
    from sterna.runs.compress import Bench, best_reached, compress
    from sterna.runs.compressed_report import conclusion

    _explained(require_packages)

    compressor = _compressor(flags)
    subject = _subject(flags, flags.lr, flags.batch_size, flags.seed)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = flags.out or Path("runs") / f"compress-{flags.method}-{stamp}"
    progress = Console(stderr=True, quiet=flags.quiet)
    outcome = compress(
        subject,
        compressor,
        folder,
        keep_accuracy=flags.keep_accuracy,
        validate_on=flags.validate_on,
        validation=flags.validation,
        bench=Bench(batch=flags.batch, threads=flags.threads, engines=flags.engines),
        say=lambda text: progress.print(text, highlight=False, soft_wrap=True),
    )
    console = Console()
    console.print(_candidates(outcome))
    for caution in (*outcome.cautions, *dict.fromkeys(n for t in outcome.tried for n in t.notes)):
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
    _check_timing(flags)
    from sterna.export.onnx import require_packages, to_onnx
    from sterna.export.timing import time_models

    _explained(require_packages)
    if flags.path.is_dir():
        raise UsageError(f"{flags.path} is a folder; name the file to write, such as model.onnx.")
    subject = _subject(flags, 0.01, 64, None)
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
            batch=flags.batch,
            threads=flags.threads,
            engines=flags.engines,
        )
        _show_timings(console, found)


def _subject(
    flags: CompressFlags | ExportFlags, lr: float, batch_size: int, seed: int | None
) -> Subject:
    """The model of a folder, or of the user's own file."""
    text = flags.model
    if ".py:" in text:
        return of_module(
            text, flags.weights, flags.data, lr=lr, batch_size=batch_size, seed=seed or 0
        )
    for flag in ("weights", "data"):
        if getattr(flags, flag) is not None:
            raise UsageError(f"--{flag} is for your_module.py:build; a run folder has its own.")
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
    both: dict[str, Any] = {"finetune_epochs": flags.finetune_epochs, "rate": flags.rate}
    both["round_to"] = flags.multiple_of
    force = flags.strength[0] if flags.strength else 0.03
    make: Mapping[str, Callable[[], Any]] = {
        "ssl": lambda: compressors.Ssl(
            strengths=flags.strength, depth=flags.depth, epochs=flags.epochs, **both
        ),
        "force": lambda: compressors.LowRank(
            force=force, form=flags.form, epochs=flags.epochs, **shares, **both
        ),
        "low-rank": lambda: compressors.LowRank(
            form=flags.form, epochs=flags.epochs, **shares, **both
        ),
        "magnitude": lambda: compressors.Magnitude(**shares, **both),
        "ternary": lambda: compressors.Ternary(passes=flags.passes),
    }
    try:
        return make[flags.method]()
    except ValueError as error:
        raise UsageError(str(error)) from None


def _check(flags: CompressFlags) -> None:
    for name, methods, usual in _ONLY_FOR:
        if flags.method not in methods and getattr(flags, name) != usual:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} is for --method {' and '.join(methods)}; got {flags.method}.")
    if flags.method == "force" and len(flags.strength) > 1:
        raise UsageError("--strength takes one value with --method force.")
    for name, least in (
        ("finetune_epochs", 0),
        ("multiple_of", 1),
        ("batch_size", 1),
        ("passes", 1),
    ):
        value = getattr(flags, name)
        require(value >= least, f"--{name.replace('_', '-')}", f"{least} or more", value)
    require(flags.epochs >= 1, "--epochs", "1 or more", flags.epochs)
    require(0 <= flags.keep_accuracy < 100, "--keep-accuracy", "in [0, 100)", flags.keep_accuracy)
    share = flags.validation
    require(share is None or 0 < share < 1, "--validation", "a share in (0, 1)", share)
    require(flags.rate > 0, "--rate", "above 0", flags.rate)
    require(flags.depth >= 0, "--depth", "0 or more", flags.depth)
    require(flags.lr > 0, "--lr", "above 0", flags.lr)
    _check_timing(flags)


def _check_timing(flags: ModelFlags) -> None:
    require(flags.batch >= 1, "--batch", "1 or more", flags.batch)
    require(flags.threads >= 1, "--threads", "1 or more", flags.threads)
    require(
        bool(flags.engines), "--engines", "at least one of onnxruntime, eager, compiled", "none"
    )


def _explained(check: Callable[[], None]) -> None:
    """Say what is missing without a traceback."""
    try:
        check()
    except ModuleNotFoundError as error:
        raise StoreError(str(error)) from error


def _candidates(outcome: Any) -> Table:
    from sterna.runs.compressed_report import table, titles

    found = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    headings = titles(outcome)
    for i, title in enumerate(headings):
        name = title.replace(" ", "\n").replace("-", "-\n")
        side: Any = "left" if i in (0, len(headings) - 1) else "right"
        found.add_column(name, justify=side, no_wrap=i > 0)
    for cells in table(outcome):
        style = "bold" if cells[-1] == "chosen" else "dim" if cells[-1] else ""
        found.add_row(*map(escape, cells), style=style)
    return found


def _show_timings(console: Console, timings: Timings) -> None:
    shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i, title in enumerate(TITLES):
        side: Any = "left" if i < 2 else "right"
        shown.add_column(title.replace(" ", "\n"), justify=side, no_wrap=bool(i))
    for row in timings.cells():
        shown.add_row(*map(escape, row))
    console.print(shown)
    for note in timings.notes():
        console.print(escape(note), style="dim", highlight=False, soft_wrap=True)
