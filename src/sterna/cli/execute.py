"""Run a request on the engine that was asked for, or that fits."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from sterna.cli import units
from sterna.cli.flags import MachineFlags
from sterna.cli.ranges import built, check_device, flagged
from sterna.cli.usage import UsageError, require
from sterna.comm.distributed import Distributed
from sterna.comm.in_process import run_in_process
from sterna.comm.launch import launch
from sterna.comm.solo import Solo
from sterna.runs.parts import asynchronous
from sterna.runs.request import Request
from sterna.runs.run import Run
from sterna.runs.serve import serve
from sterna.runs.setting import Setting
from sterna.runs.worker import work

_ASYNCHRONOUS = ("virtual", "local", "ray", "torchrun")


_VIRTUAL = ("virtual",)
_ONLY_FOR: tuple[tuple[str, tuple[str, ...], object], ...] = (
    ("--jitter", _VIRTUAL, Setting().jitter),
    ("--example-seconds", _VIRTUAL, Setting().example_s),
    ("--bandwidth", _VIRTUAL, None),
    ("--latency", _VIRTUAL, 0.0),
    ("--vectorise", _VIRTUAL, False),
    ("--shards", ("ray", "torchrun"), 1),
    ("--cluster", ("ray",), "auto"),
)
_FIELDS = {"example_seconds": "example_s"}


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)


def require_timeout(seconds: float) -> None:
    """Raise unless a worker can be waited for so long.

    Raises:
        UsageError: it cannot.
    """
    _require_seconds("--timeout", 0, seconds)


def _require_seconds(flag: str, above: float, seconds: float) -> None:
    must = f"above {above} and at most {units.MOST_SECONDS:,} seconds"
    require(above < seconds <= units.MOST_SECONDS, flag, must, seconds)


def setting_of(flags: MachineFlags, workers: int, restarts: int) -> Setting:
    """The machines that the flags describe; the engine is settled later.

    Raises:
        UsageError: a flag is malformed or out of range.
    """
    require(workers >= 1, "--workers", "at least 1", workers)
    require(restarts >= 0, "--max-restarts", "0 or more", restarts)
    require_timeout(flags.timeout)
    _require_seconds("--lease", 1, flags.lease)
    require(flags.shards >= 1, "--shards", "at least 1", flags.shards)
    _require_seconds("--example-seconds", 0, flags.example_seconds)
    given: dict[str, Any] = {}
    for name, parse in (("bandwidth", units.bandwidth), ("latency", units.seconds)):
        try:
            given[name] = parse(getattr(flags, name))
        except ValueError as error:
            raise UsageError(f"--{name}: {error}") from None
    try:
        return Setting(
            workers=workers,
            engine=flags.engine or "",
            stragglers=tuple(units.straggler(text) for text in flags.straggler),
            jitter=flags.jitter,
            example_s=flags.example_seconds,
            vectorise=flags.vectorise,
            shards=flags.shards,
            cluster=flags.cluster,
            restarts=restarts,
            lease_s=flags.lease,
            **given,
        )
    except ValueError as error:
        text = str(error).removeprefix("a ").replace("stragglers", "straggler", 1)
        raise UsageError(f"--{text}") from None


def execute(request: Request, setting: Setting, timeout_s: float) -> Mapping[str, Any]:
    """Run it; the summary.

    Raises:
        UsageError: the engine does not fit the experiment, or a value is out of range.
    """
    workers = setting.workers
    if under_torchrun() and workers not in (1, int(os.environ["WORLD_SIZE"])):
        raise UsageError(
            f"Under torchrun, torchrun sets the number of workers; leave out --workers {workers}."
        )
    run = built(request)
    usual = "torchrun" if under_torchrun() else "local"
    engine = setting.engine or ("processes" if run.server is None else usual)
    _fits(request, run, engine, setting)
    check_device(request.device)
    if engine in _ASYNCHRONOUS:
        request = replace(request, setting=_settled(setting, engine))
        _check_server(request, run)
    else:
        count = int(os.environ["WORLD_SIZE"]) if under_torchrun() else workers
        fits = run.batch_size % count == 0
        require(fits, "--workers", f"a divisor of the batch size, {run.batch_size}", count)
    try:
        if engine in _ASYNCHRONOUS:
            return serve(request, run)
        return _synchronous(request, run, engine, setting, timeout_s)
    except (KeyboardInterrupt, Exception):
        _say_what_is_saved(request.folder)
        raise


def _settled(setting: Setting, engine: str) -> Setting:
    """The setting with its engine; under torchrun the servers are not counted as workers."""
    workers = setting.workers
    if engine == "torchrun":
        workers = int(os.environ["WORLD_SIZE"]) - setting.shards
        require(workers >= 1, "--shards", "less than the number of processes", setting.shards)
    try:
        return replace(setting, engine=engine, workers=workers)
    except ValueError as error:
        raise UsageError(f"--{error}") from None


def _check_server(request: Request, run: Run) -> None:
    """Raise where a server cannot be made of the run."""
    try:
        asynchronous(run, request)
    except ValueError as error:
        text = str(error)
        raise UsageError(flagged(text, request.arguments) or text) from None


def _fits(request: Request, run: Run, engine: str, setting: Setting) -> None:
    if run.server is not None and engine not in _ASYNCHRONOUS:
        raise UsageError(
            f"--engine {engine} is for synchronous experiments, and {request.experiment} is not; use "
            "virtual, local or ray."
        )
    if run.server is None and engine in ("local", "ray"):
        raise UsageError(
            f"--engine {engine} is for asynchronous experiments, and {request.experiment} is not; use "
            "processes or in-process, or virtual to see it on a virtual clock."
        )
    if setting.stragglers and engine in ("processes", "in-process"):
        raise UsageError(
            f"--straggler is for the engines virtual, local and ray; {request.experiment} runs on "
            f"{engine}. With --engine virtual it can be seen beside asynchronous ones."
        )
    for flag, kinds, usual in _ONLY_FOR:
        name = flag.removeprefix("--").replace("-", "_")
        if engine not in kinds and getattr(setting, _FIELDS.get(name, name)) != usual:
            raise UsageError(
                f"{flag} is for --engine {' or '.join(kinds)}; {request.experiment} runs on {engine}."
            )
    if request.checkpoint_every and engine in ("ray", "torchrun") and run.server is not None:
        raise UsageError(
            f"--checkpoint-every is for the other engines; with {engine} the servers save themselves every "
            "ten seconds."
        )
    if request.device != "cpu" and engine in ("local", "ray"):
        raise UsageError(
            f"--device {request.device} is for the other engines; {engine} shares memory of the CPU."
        )


def _synchronous(
    request: Request, run: Run, engine: str, setting: Setting, timeout_s: float
) -> Mapping[str, Any]:
    summary: Mapping[str, Any]
    if under_torchrun():
        comm = Distributed.connect(timeout_s=timeout_s)
        summary = work(comm, request, run)
        comm.close()
        return summary
    if setting.workers == 1:
        return work(Solo(), request, run)
    if engine == "in-process":
        ranks = run_in_process(lambda comm: work(comm, request, run), setting.workers, request.seed)
        return ranks[0]
    summary = launch(
        work,
        (request,),
        workers=setting.workers,
        max_restarts=setting.restarts,
        timeout_s=timeout_s,
        on_restart=lambda reason: Console(stderr=True).print(
            f"{reason}; replaced, and all go on with what they kept",
            highlight=False,
            soft_wrap=True,
        ),
    )
    return summary


def _say_what_is_saved(folder: Path) -> None:
    steps = sorted(folder.glob(f"checkpoint/step-{'[0-9]' * 8}/rank-0.safetensors"))
    if steps:
        step = int(steps[-1].parent.name.removeprefix("step-"))
        text = f"Saved up to step {step}; go on with: sterna run --resume {folder}"
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)
    elif (folder / "checkpoint" / "shard-0.safetensors").exists():
        text = f"The servers have saved themselves; go on with: sterna run --resume {folder}"
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)
