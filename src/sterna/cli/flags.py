"""The flags of the commands: those of every run, and those that an experiment's signature gives."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import docstring_parser
import tyro

from sterna.cli import spelling
from sterna.cli.begins import SEEDS, WORKERS
from sterna.cli.usage import UsageError, meant

Engine = Literal["processes", "in-process", "virtual", "local", "ray"]
Listed = Literal["all", "experiments", "methods"]
LISTS: tuple[str, ...] = get_args(Listed)
_arg = tyro.conf.arg


@dataclass(frozen=True, kw_only=True)
class MachineFlags:
    """What runs the workers."""

    engine: Annotated[
        Engine | None,
        _arg(
            help="synchronous: processes (default), or in-process, repeatable to the bit; asynchronous: "
            "local (default), processes of this machine; virtual, one process and a virtual clock, "
            "repeatable to the bit, for synchronous experiments too; ray, a cluster"
        ),
    ] = None
    straggler: Annotated[
        tuple[str, ...],
        _arg(
            metavar="WORKER:FACTOR ...",
            help="slow workers down, for trials: 0:4.0 makes worker 0 four times slower",
        ),
    ] = ()
    jitter: Annotated[
        float, _arg(help="virtual: standard deviation of a worker's seconds, over their mean")
    ] = 0.1
    example_seconds: Annotated[
        float, _arg(help="virtual: seconds that a worker computes for one example")
    ] = 0.001
    bandwidth: Annotated[
        str, _arg(help="virtual: of each link, such as 100Mbps; 'none' leaves size out")
    ] = "none"
    latency: Annotated[str, _arg(help="virtual: of each message, such as 50us")] = "0s"
    vectorise: Annotated[
        bool, _arg(help="virtual: compute the workers' gradients together; equal but for rounding")
    ] = False
    shards: Annotated[int, _arg(help="ray: servers that share the parameters")] = 1
    cluster: Annotated[
        str, _arg(help="ray: 'auto' starts Ray here and stops it again; else its address")
    ] = "auto"
    lease: Annotated[
        float, _arg(help="local, ray: seconds without a heartbeat after which a worker is lost")
    ] = 10.0
    timeout: Annotated[
        float, _arg(help="seconds after which a worker that does not answer counts as lost")
    ] = 300.0
    device: Annotated[str, _arg(help="where the model lives: cpu; cuda is untested")] = "cpu"
    quiet: Annotated[bool, _arg(help="show no progress")] = False


@dataclass(frozen=True, kw_only=True)
class RunFlags(MachineFlags):
    """Train an experiment; its parameters are flags. For resuming and replaying runs see `sterna --help`."""

    workers: Annotated[int, _arg(help="number of worker processes on this machine")] = WORKERS[
        "run"
    ]
    seed: Annotated[int, _arg(help="seeds initialisation, data order and every coin")] = 0
    out: Annotated[
        Path | None, _arg(help="run folder; default: runs/<experiment>-<date>-<time>")
    ] = None
    max_restarts: Annotated[
        int, _arg(help="how often to replace lost workers; the others live on, and nothing is lost")
    ] = 0
    checkpoint_every: Annotated[
        int, _arg(help="steps between checkpoints; 0: at the end of every epoch")
    ] = 0


@dataclass(frozen=True, kw_only=True)
class CompareFlags(MachineFlags):
    """Train several experiments with the same seeds, and compare what each reached and took.

    The experiments come first; their parameters are flags, and go to each that has them.
    """

    workers: Annotated[int, _arg(help="number of workers of every run")] = WORKERS["compare"]
    seeds: Annotated[int, _arg(help="runs per experiment, with seeds 0, 1, ...")] = SEEDS
    out: Annotated[Path | None, _arg(help="folder; default: runs/compare-<date>-<time>")] = None
    target_accuracy: Annotated[
        float | None, _arg(help="also show the seconds until this test accuracy, such as 0.95")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ResumeFlags:
    """Go on with a run; all else is as its folder says."""

    resume: Annotated[Path, _arg(help="run folder to go on with")]
    max_restarts: Annotated[int, _arg(help="how many failed workers to survive")] = 0
    timeout: Annotated[
        float, _arg(help="seconds after which a worker that does not answer counts as lost")
    ] = 300.0
    quiet: Annotated[bool, _arg(help="show no progress")] = False


@dataclass(frozen=True, kw_only=True)
class ReplayFlags:
    """Do an asynchronous run again, and see whether it ends at the same bits."""

    replay: Annotated[
        Path,
        _arg(
            help="folder of an asynchronous run: compute its gradients again, in its order, and compare"
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class ReportFlags:
    """Write one page on some runs, and compare them."""

    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        _arg(metavar="RUN ...", help="run folders, or a comparison's folder"),
    ]
    out: Annotated[
        Path | None, _arg(help="the HTML file; default: report.html in the first folder")
    ] = None
    target_accuracy: Annotated[
        float | None, _arg(help="also show the seconds until this test accuracy, such as 0.95")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ListFlags:
    """List the experiments and methods that come with Sterna."""

    what: Annotated[Listed, tyro.conf.Positional, _arg(help="what to list")] = "all"


def experiment_fields(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """Name, type and default of each parameter, for `make_dataclass`, with its help.

    The help comes from the ``Args:`` of the function, or else of its module.

    Args:
        function: the experiment.

    Raises:
        TypeError: a parameter has no type or no default, or is positional.
    """
    module = inspect.getmodule(function)
    texts = [(module.__doc__ if module else None) or "", function.__doc__ or ""]
    documented = {p.arg_name: p for text in texts for p in docstring_parser.parse(text).params}
    hints = get_type_hints(function, include_extras=True)
    found: list[tuple[str, Any, Any]] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY or name not in hints:
            raise TypeError(
                f"{function.__name__}: an experiment takes typed keyword parameters only, so that "
                f"they can be flags; {name!r} is not one. Write (*, {name}: <type> = <default>)."
            )
        text = (documented[name].description if name in documented else "") or ""
        kind = hints[name]
        default = (
            field() if parameter.default is parameter.empty else field(default=parameter.default)
        )
        found.append(
            (name, Annotated[kind, _arg(help=" ".join(text.split()).removesuffix("."))], default)
        )
    return found


def parse(
    flags: type[Any], functions: Sequence[Callable[..., Any]], arguments: Sequence[str], title: str
) -> tuple[Any, list[dict[str, Any]]]:
    """Parse a command line made of a command's flags and the parameters of experiments.

    Args:
        flags: the command's dataclass.
        functions: the experiments; with more than one, a flag goes to each that has it.
        arguments: what the user typed.
        title: the command, for the help.

    Returns:
        The command's flags, and the keyword arguments for each of ``functions``.

    Raises:
        SystemExit: help was asked for, or a flag is missing or malformed.
        UsageError: a flag is unknown, or its value none of those that there are.
    """
    own = {f.name for f in fields(flags)}
    extra: dict[str, tuple[str, Any, Any]] = {}
    for function in functions:
        for name, kind, default in experiment_fields(function):
            if name in {*own, "resume", "replay"}:  # these two make another command of `run`
                raise TypeError(
                    f"{function.__name__}: the parameter {name!r} is a flag of the command itself; "
                    "give it another name."
                )
            extra.setdefault(name, (name, kind, default))
    common = [
        (f.name, get_type_hints(flags, include_extras=True)[f.name], _field_default(f))
        for f in fields(flags)
    ]
    every = [spelling.shown(*one) for one in (*extra.values(), *common)]
    combined = make_dataclass("Flags", every, kw_only=True, frozen=True)
    about = inspect.getdoc(functions[0]) if len(functions) == 1 else None
    lead = (about or inspect.getdoc(flags) or "").partition("\n\nArgs:")[0].replace("``", "")
    kinds = {name: kind for name, kind, _ in every}
    words = spelling.plain(arguments, kinds)
    read: Callable[..., tuple[Any, list[str]]] = partial(
        tyro.cli, combined, args=words, prog=title, description=lead, return_unknown_args=True
    )
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            parsed, unknown = read()
    except SystemExit as ended:
        if ended.code:
            spelling.check_values(words, kinds)
        parsed, unknown = read()  # it shows the help, or says what is missing
    if unknown:
        raise UsageError(_unknown(unknown[0].partition("=")[0], kinds, title))
    values: Mapping[str, Any] = {name: getattr(parsed, name) for name in extra}
    # Of several experiments, each keeps its own defaults: only what was typed is passed on.
    typed = {word.partition("=")[0].replace("_", "-") for word in arguments}
    chosen = {
        name: value
        for name, value in values.items()
        if len(functions) == 1 or _flags_of(name) & typed
    }
    per_function = [
        {name: v for name, v in chosen.items() if name in inspect.signature(function).parameters}
        for function in functions
    ]
    return flags(**{name: getattr(parsed, name) for name in own}), per_function


def _unknown(word: str, names: Mapping[str, Any], title: str) -> str:
    """A sentence on a word that no flag takes."""
    there = [flag for name in names for flag in sorted(_flags_of(name))]
    what = "flag" if word.startswith("-") else "argument"
    near = meant(word, there) if what == "flag" else ""
    if title.endswith(("--resume", "--replay")):
        near = " A run goes on with what it was started with."
    return f"{title} has no {what} {word}.{near} All are shown by: {title} --help"


def _flags_of(name: str) -> set[str]:
    """What can be typed for a parameter; `_` may stand for each `-`."""
    dashed = name.replace("_", "-")
    return {f"--{dashed}", f"--no-{dashed}"}


def _field_default(f: Any) -> Any:
    return field() if f.default is MISSING else field(default=f.default)
