"""What each command does."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sterna.cli import listing
from sterna.cli.compress import compress_command, export_command
from sterna.cli.execute import execute, require_timeout, setting_of, under_torchrun
from sterna.cli.flags import (
    LISTS,
    CompareFlags,
    ListFlags,
    ReplayFlags,
    ReportFlags,
    ResumeFlags,
    RunFlags,
    parse,
)
from sterna.cli.ranges import built
from sterna.cli.usage import UsageError, meant, require
from sterna.comm.launch import WorkerFailed, explains_itself
from sterna.runs.compare import Comparison, compare, write_comparison
from sterna.runs.conclusion import conclusion
from sterna.runs.experiment import (
    UnknownExperiment,
    all_experiments,
    located,
    resolve,
)
from sterna.runs.files import StoreError, read_json
from sterna.runs.recorder import FORMAT, plain_arguments
from sterna.runs.reopen import described
from sterna.runs.request import Request
from sterna.runs.run import Run
from sterna.runs.setting import Setting
from sterna.runs.table import ComparisonTable, run_table
from sterna.runs.target import require_judged_by_accuracy, seconds_to_target


def dispatch(arguments: Sequence[str]) -> int:
    """Carry out one command; the exit status: 0 done, 1 failed, 2 typed wrongly, 130 interrupted."""
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, _terminated)
    command, *rest = arguments
    commands: Mapping[str, Callable[[list[str]], None]] = {
        "run": _run,
        "compare": _compare,
        "report": _report,
        "list": _list,
        "compress": compress_command,
        "export": export_command,
    }
    try:
        if command not in commands:
            raise UsageError(
                f"There is no command {command!r}; there is {', '.join(commands)}."
                f"{meant(command, commands)}"
            )
        commands[command](rest)
    except KeyboardInterrupt:
        console.print("[bold]Interrupted.[/bold]")
        return 130
    except (UsageError, UnknownExperiment) as error:
        return _complain(console, error, 2)
    except (ValueError, RuntimeError, OSError, LookupError, TypeError) as error:
        if isinstance(error, WorkerFailed) and error.details:
            console.print(error.details, markup=False, highlight=False)
        elif not isinstance(error, WorkerFailed) and not explains_itself(error):
            console.print(traceback.format_exc(), markup=False, highlight=False)
        return _complain(console, error, 1)
    return 0


def _complain(console: Console, error: Exception, status: int) -> int:
    text = str(error.args[0]) if isinstance(error, LookupError) and error.args else str(error)
    console.print(f"[bold red]error:[/bold red] {escape(text)}", highlight=False, soft_wrap=True)
    return status


def _terminated(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


def _run(arguments: list[str]) -> None:
    """``sterna run``."""
    for flag, kind in (("--replay", ReplayFlags), ("--resume", ResumeFlags)):
        if _has(arguments, flag) and {"-h", "--help"} & set(arguments):
            parse(kind, [], ["--help"], f"sterna run {flag} RUN")
    if _has(arguments, "--replay"):
        _replay(parse(ReplayFlags, [], arguments, "sterna run")[0])
        return
    if _has(arguments, "--resume"):
        flags, _ = parse(ResumeFlags, [], arguments, "sterna run --resume")
        summary, folder = _resume(flags)
    else:
        if not arguments or arguments[0].startswith("-"):
            if {"-h", "--help"} & set(arguments):
                parse(RunFlags, [], ["--help"], "sterna run EXPERIMENT")
            raise UsageError("sterna run needs an EXPERIMENT first; `sterna list` shows them.")
        name, *rest = arguments
        flags, (values,) = parse(RunFlags, [_resolved(name)], rest, f"sterna run {name}")
        folder = flags.out or Path("runs") / f"{_file_name(name)}-{time.strftime('%Y%m%d-%H%M%S')}"
        if under_torchrun() and flags.out is None:
            raise UsageError(
                "Under torchrun, name the run folder with --out: the same on every host."
            )
        every = flags.checkpoint_every
        require(every >= 0, "--checkpoint-every", "0 or more", every)
        request = Request(
            experiment=name,
            source=located(name),
            arguments=values,
            folder=folder,
            seed=flags.seed,
            checkpoint_every=flags.checkpoint_every,
            device=flags.device,
            quiet=flags.quiet,
        )
        setting = setting_of(flags, flags.workers, flags.max_restarts)
        _refuse_existing(folder)
        summary = execute(request, setting, flags.timeout)
    if not under_torchrun() or os.environ["RANK"] == "0":
        console = Console()
        console.print(run_table(summary))
        console.print(f"Run folder: {folder}", highlight=False)


def _resolved(name: str) -> Callable[..., Run]:
    """The experiment of that name.

    Raises:
        UsageError: there is none.
    """
    try:
        return resolve(name)
    except UnknownExperiment as error:
        near = "" if ".py" in name else meant(name, all_experiments())
        raise UsageError(
            f"There is no experiment {name!r}.{near}" if near else str(error)
        ) from None


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder}; name one of sterna run or sterna compare.")


def _has(arguments: list[str], flag: str) -> bool:
    return any(a == flag or a.startswith(f"{flag}=") for a in arguments)


def _replay(flags: ReplayFlags) -> None:
    """``sterna run --replay``.

    Raises:
        StoreError: the weights are others.
    """
    from sterna.runs.replayed import replay_run

    _require_folder(flags.replay)
    about, request = described(flags.replay, quiet=True)
    verdict = replay_run(flags.replay, request, about.get("threads", 1))
    if not verdict.equal:
        raise StoreError(
            f"{flags.replay}: {verdict.pushes} gradients were computed again, and the weights are others: "
            f"{verdict.name!r} by up to {verdict.largest:.3g}. The code, the data or torch's arithmetic "
            "on this machine are not those of the run."
        )
    Console().print(
        f"{verdict.pushes} gradients computed again, one by one: the weights are equal, bit for bit.",
        highlight=False,
    )


def _resume(flags: ResumeFlags) -> tuple[Mapping[str, Any], Path]:
    folder = flags.resume
    _require_folder(folder)
    require(flags.max_restarts >= 0, "--max-restarts", "0 or more", flags.max_restarts)
    require_timeout(flags.timeout)
    about, request = described(folder, flags.quiet)
    finished = folder / "summary.json"
    if finished.exists() and request.setting is not None:
        text = f"{folder} is finished already."
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)
        return read_json(finished, "a run folder"), folder
    processes = about["workers"]
    if request.setting is not None and request.setting.engine == "torchrun":
        processes += request.setting.shards
        if not under_torchrun():
            raise UsageError(
                f"{folder} is a run under torchrun; resume it as it was started, with {processes} "
                "processes."
            )
    if under_torchrun() and int(os.environ["WORLD_SIZE"]) != processes:
        raise StoreError(
            f"{folder} is a run of {processes} processes; torchrun started "
            f"{os.environ['WORLD_SIZE']}."
        )
    setting = request.setting
    if setting is None:
        engine = "in-process" if about["engine"] == "in_process" else "processes"
        setting = Setting(workers=about["workers"], engine=engine)
    setting = replace(setting, restarts=flags.max_restarts)
    return execute(request, setting, flags.timeout), folder


def _refuse_existing(folder: Path) -> None:
    """A new run must not write into an old one."""
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    leads = os.environ.get("RANK", "0") == "0"
    if leads and not restarted and (folder / "run.json").exists():
        raise StoreError(
            f"{folder} holds a run already; choose another --out, or go on with it: "
            f"sterna run --resume {folder}"
        )


def _compare(arguments: list[str]) -> None:
    """``sterna compare``."""
    if under_torchrun():
        raise UsageError(
            "sterna compare starts its own workers; under torchrun use sterna run, then report."
        )
    names: list[str] = []
    while arguments and not arguments[0].startswith("-"):
        names.append(arguments.pop(0))
    if len(names) < 2 and not {"-h", "--help"} & set(arguments):
        raise UsageError("sterna compare needs two EXPERIMENTs or more, before any flag.")
    if len(set(names)) < len(names):
        raise UsageError("sterna compare: an experiment is named twice.")
    functions = [_resolved(name) for name in names]
    title = f"sterna compare {' '.join(names) or 'EXPERIMENT ...'}"
    flags, values = parse(CompareFlags, functions, arguments, title)
    require(flags.seeds >= 1, "--seeds", "at least 1", flags.seeds)
    target = flags.target_accuracy
    _require_target(target)
    for name, given in zip(names, values, strict=True):  # before hours of training, not after
        if given or target is not None:
            tried = Request(experiment=name, source=located(name), arguments=given, folder=Path())
            merit = built(tried).data.merit
            if target is not None:
                require_judged_by_accuracy(name, merit)
    setting = setting_of(flags, flags.workers, 0)
    folder = flags.out or Path("runs") / f"compare-{time.strftime('%Y%m%d-%H%M%S')}"
    if (folder / "compare.json").exists():
        raise StoreError(f"{folder} holds a comparison already; choose another --out.")
    console = Console(stderr=True, quiet=flags.quiet)
    summaries: list[dict[str, Any]] = []
    first = Request(experiment="", arguments={}, folder=folder, device=flags.device, quiet=True)
    for seed in range(flags.seeds):  # seed by seed, so that a busy machine slows all alike
        for name, given in zip(names, values, strict=True):
            request = replace(
                first,
                experiment=name,
                source=located(name),
                arguments=given,
                folder=folder / _file_name(name) / f"seed-{seed}",
                seed=seed,
                quiet=flags.quiet or not console.is_terminal,
            )
            summary = _done_before(request, setting) or execute(request, setting, flags.timeout)
            console.print(
                f"{len(summaries) + 1:>3}/{flags.seeds * len(names)}  {name}  seed {seed}  "
                f"{summary['wall_s']:.1f} s",
                highlight=False,
            )
            row = {**summary, "run": str(request.folder.relative_to(folder))}
            if target is not None:
                row["seconds_to_target"] = seconds_to_target(request.folder, target)
            summaries.append(row)
    from sterna.runs.report import write_report

    comparison = compare(summaries, names[0], target_accuracy=target)
    write_comparison(folder, comparison)
    _show(comparison, write_report([folder], folder / "report.html"))


def _done_before(request: Request, setting: Setting) -> Mapping[str, Any] | None:
    """The summary that an interrupted comparison left; None where this run has to be (or go) on.

    Raises:
        StoreError: the folder holds a run of other settings.
    """
    if not (request.folder / "run.json").exists():
        return None
    about = read_json(request.folder / "run.json", "a run folder")
    wanted = {
        "format": FORMAT,
        "experiment": request.experiment,
        "arguments": plain_arguments(request.arguments),
        "seed": request.seed,
        "workers": setting.workers,
    }
    if "setting" in about:
        wanted["setting"] = replace(setting, engine=setting.engine or "local").as_json()
        about["setting"] = Setting.from_json(about["setting"]).as_json()
    odd = [key for key, value in wanted.items() if about.get(key) != value]
    if odd:
        raise StoreError(
            f"{request.folder} holds a run of another {odd[0]} ({about.get(odd[0])!r}); choose another "
            "--out."
        )
    finished = request.folder / "summary.json"
    return read_json(finished, "a run folder") if finished.exists() else None


def _require_target(target: float | None) -> None:
    require(
        target is None or 0 < target <= 1,
        "--target-accuracy",
        "a fraction above 0 and up to 1, such as 0.95",
        target,
    )


def _show(comparison: Comparison, page: Path) -> None:
    console = Console()
    for sentence in conclusion(comparison):
        console.print(sentence, highlight=False)
    console.print(ComparisonTable(comparison))
    console.print(f"Report: {page}", highlight=False, soft_wrap=True)


def _report(arguments: list[str]) -> None:
    """``sterna report``."""
    flags, _ = parse(ReportFlags, [], arguments, "sterna report")
    if not flags.runs:
        raise UsageError("sterna report needs a RUN folder or more.")
    for folder in flags.runs:
        _require_folder(folder)
    from sterna.runs.report import side_by_side, write_report

    target = flags.target_accuracy
    _require_target(target)
    page = write_report(
        flags.runs, flags.out or flags.runs[0] / "report.html", target_accuracy=target
    )
    _show(side_by_side(flags.runs, target_accuracy=target)[1], page)


def _list(arguments: list[str]) -> None:
    """``sterna list``."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in LISTS:
        word = arguments[0]
        raise UsageError(f"sterna list shows {', '.join(LISTS)}; got {word}.{meant(word, LISTS)}")
    flags, _ = parse(ListFlags, [], arguments, "sterna list")
    console = Console()
    if flags.what in ("all", "experiments"):
        table = Table("experiment", "what it trains", box=None, title_justify="left")
        for name, function in all_experiments().items():
            table.add_row(name, _first_line(function.__doc__))
        console.print(table)
    if flags.what in ("all", "methods"):
        for line in listing.lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def _file_name(experiment: str) -> str:
    """An experiment's name as a folder name."""
    return Path(experiment).name.replace(":", ".").replace(".py.", ".")


if sys.platform == "win32":  # pragma: no cover
    raise RuntimeError("Sterna runs on Linux and macOS: the fork server is POSIX only.")
