"""How fast models really are, side by side: interleaved rounds, medians with their spread, a control.

    sample = seconds of c calls in a row / c       c: as many as take ``least`` seconds
    round  = one sample of every model in every engine, in an order that turns from round to round
    ratio  = median over rounds of (control's sample / model's sample in the same round)

A machine that is slow for a while is slow for all models of a round, so ratios hold where seconds do
not. The control is the first model. An engine that cannot run a model is in the table with the reason.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from sterna.export.inputs import Example, at_batch, feeds
from sterna.export.onnx import onnx_bytes
from sterna.export.runtime import session
from sterna.quiet import quiet
from sterna.surgery.program import copied

Engine: TypeAlias = Literal["onnxruntime", "eager", "compiled"]
ENGINES: tuple[Engine, ...] = get_args(Engine)

TITLES = ("engine", "model", "ms a batch", "quartiles", "times faster", "quartiles")

_Call: TypeAlias = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One model in one engine. Seconds are of one batch.

    Args:
        model: its name.
        engine: what ran it.
        seconds: median over the rounds; None if it did not run.
        low: lower quartile.
        high: upper quartile.
        fastest: the least of them, which other work on the machine disturbs least.
        ratio: how many times faster than the control in the same engine; None where one did not run.
        ratio_low: lower quartile of the rounds' ratios.
        ratio_high: upper quartile.
        unavailable: why it did not run; empty if it did.
    """

    model: str
    engine: Engine
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    fastest: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    unavailable: str = ""


@dataclass(frozen=True, kw_only=True)
class Timings:
    """All of one run.

    Args:
        rows: every model in every engine, engine by engine, the control first.
        batch: examples in a call.
        threads: threads inside an operator.
        rounds: samples of each.
    """

    rows: tuple[Timing, ...]
    batch: int
    threads: int
    rounds: int

    def of(self, model: str, engine: Engine) -> Timing:
        """One row.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if (row.model, row.engine) == (model, engine):
                return row
        raise KeyError(f"Timings: there is no {model!r} in {engine!r}.")

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return asdict(self) | {"rows": [asdict(row) for row in self.rows]}

    def markdown(self) -> str:
        """A table of milliseconds a batch, with quartiles, and a line on how it was measured.

        Example:
            >>> row = Timing(model="dense", engine="eager", seconds=0.002, low=0.0019, high=0.0021, ratio=1.0)
            >>> print(Timings(rows=(row,), batch=64, threads=1, rounds=9).markdown().splitlines()[2])
            | eager | dense | 2.00 | 1.90–2.10 | 1.00x |  |
        """
        lines = [f"| {' | '.join(TITLES)} |", "|---|---|---:|---:|---:|---:|"]
        lines += [f"| {' | '.join(row)} |" for row in self.cells()]
        lines += ["", *(self.notes())]
        return "\n".join(lines) + "\n"

    def cells(self) -> list[list[str]]:
        """The rows of the table, written."""
        found = []
        for row in self.rows:
            if row.seconds is None:
                found.append([row.engine, row.model, "not available", "", "", ""])
                continue
            found.append(
                [
                    row.engine,
                    row.model,
                    _milliseconds(row.seconds),
                    quartiles(row.low, row.high, _milliseconds),
                    "" if row.ratio is None else f"{row.ratio:.2f}x",
                    quartiles(row.ratio_low, row.ratio_high, "{:.2f}".format),
                ]
            )
        return found

    def notes(self) -> list[str]:
        """How it was measured, and why something is not available, a line each."""
        threads = "one thread" if self.threads == 1 else f"{self.threads} threads"
        first = (
            f"Batch {self.batch}, {threads}, medians of {self.rounds} interleaved rounds; ratios are to "
            f"{self.rows[0].model if self.rows else 'the first'}, round by round."
        )
        why = [
            f"{row.model} in {row.engine}: {row.unavailable}"
            for row in self.rows
            if row.unavailable
        ]
        return [first, *why]


def quartiles(low: float | None, high: float | None, write: Callable[[float], str]) -> str:
    """A cell of the lower and the upper quartile; empty where there are none.

    Example:
        >>> quartiles(1.5, 2.0, "{:.2f}".format), quartiles(None, None, "{:.2f}".format)
        ('1.50–2.00', '')
    """
    return "" if low is None or high is None else f"{write(low)}\u2013{write(high)}"


def time_models(
    models: Mapping[str, nn.Module],
    example: Example,
    *,
    batch: int = 64,
    threads: int = 1,
    engines: Sequence[Engine] = ENGINES,
    rounds: int = 31,
    least: float = 0.01,
) -> Timings:
    """Time models against the first of them, in evaluation mode, on the CPU.

    Args:
        models: by name; the first is the control. They are not changed.
        example: an input, or a tuple of positional arguments; the first dimension counts examples.
        batch: examples in a call, at least 1: those of the example, repeated where it has too few.
        threads: threads inside an operator, at least 1; torch's setting comes back afterwards.
        engines: ``"onnxruntime"``, ``"eager"`` (torch as it is) and ``"compiled"`` (`torch.compile`, which
            builds each model at its first call; that call is not timed).
        rounds: samples of each, at least 3.
        least: seconds that a sample takes at least; above 0.

    Returns:
        Seconds and ratios; a model that an engine cannot run is there with the reason.

    Raises:
        ValueError: an argument is out of range, there is no model or an unknown engine.
        ModuleNotFoundError: ``"onnxruntime"`` is asked for and the extra ``export`` is not installed.

    Example:
        >>> models = {"wide": nn.Linear(32, 32), "narrow": nn.Linear(32, 2)}
        >>> found = time_models(models, torch.ones(1, 32), engines=["eager"], rounds=3, least=1e-4)
        >>> [(row.model, row.ratio is not None) for row in found.rows]
        [('wide', True), ('narrow', True)]
    """
    _check(models, batch, threads, engines, rounds, least)
    inputs = example if isinstance(example, tuple) else (example,)
    inputs = at_batch(_on_cpu(inputs), batch)
    calls: dict[tuple[Engine, str], _Call] = {}
    why: dict[tuple[Engine, str], str] = {}
    with _threads(threads), torch.no_grad():
        for engine in engines:
            for name, model in models.items():
                try:
                    calls[engine, name] = _MAKE[engine](copied(model).cpu().eval(), inputs, threads)
                except (ModuleNotFoundError, KeyboardInterrupt):
                    raise
                except Exception as error:
                    why[engine, name] = _reason(error)
        samples = _rounds(calls, rounds, least)
    control = next(iter(models))
    rows = []
    for engine in engines:
        for name in models:
            if (engine, name) in why:
                rows.append(Timing(model=name, engine=engine, unavailable=why[engine, name]))
            else:
                rows.append(
                    _row(name, engine, samples[engine, name], samples.get((engine, control)))
                )
    return Timings(rows=tuple(rows), batch=batch, threads=threads, rounds=rounds)


def _row(
    name: str, engine: Engine, own: Sequence[float], control: Sequence[float] | None
) -> Timing:
    low, middle, high = quantiles(own, n=4)
    ratios = [c / x for c, x in zip(control, own, strict=True)] if control else []
    ratio_low, _, ratio_high = quantiles(ratios, n=4) if ratios else (None, None, None)
    return Timing(
        model=name,
        engine=engine,
        seconds=middle,
        low=low,
        high=high,
        fastest=min(own),
        ratio=median(ratios) if ratios else None,
        ratio_low=ratio_low,
        ratio_high=ratio_high,
    )


def _rounds(
    calls: Mapping[tuple[Engine, str], _Call], rounds: int, least: float
) -> dict[tuple[Engine, str], list[float]]:
    """Samples of every call; the order is turned by one and reversed from round to round."""
    repeats = {}
    for key, call in calls.items():
        call()
        repeats[key] = max(1, round(least / max(_sample(call, 2), 1e-9) + 0.5))
    samples: dict[tuple[Engine, str], list[float]] = {key: [] for key in calls}
    order = list(calls)
    for turn in range(rounds):
        shift = turn % max(1, len(order))
        turned = order[shift:] + order[:shift]
        for key in turned if turn % 2 == 0 else reversed(turned):
            samples[key].append(_sample(calls[key], repeats[key]))
    return samples


def _sample(call: _Call, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def _in_onnxruntime(model: nn.Module, inputs: tuple[Any, ...], threads: int) -> _Call:
    runner = session(onnx_bytes(model, inputs), threads)
    return partial(runner.run, None, feeds(runner, inputs))


def _in_eager(model: nn.Module, inputs: tuple[Any, ...], threads: int) -> _Call:
    model(*inputs)
    return partial(model, *inputs)


def _in_compiled(model: nn.Module, inputs: tuple[Any, ...], threads: int) -> _Call:
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.reset()
    # Without this, inductor starts processes that stay.
    with torch._inductor.config.patch(compile_threads=1), quiet():
        compiled = torch.compile(model, dynamic=False)
        compiled(*inputs)
    return partial(compiled, *inputs)


_MAKE: Mapping[Engine, Callable[[nn.Module, tuple[Any, ...], int], _Call]] = {
    "onnxruntime": _in_onnxruntime,
    "eager": _in_eager,
    "compiled": _in_compiled,
}


def _reason(error: Exception) -> str:
    """The first line of an error, as a cell of a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (lines[0] if lines else type(error).__name__).replace("|", "/")
    return text if len(text) <= 300 else f"{text[:297]}..."


def _on_cpu(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.detach().cpu() if isinstance(x, torch.Tensor) else x for x in inputs)


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{decimals}f}"


@contextmanager
def _threads(num: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(
    models: Mapping[str, nn.Module],
    batch: int,
    threads: int,
    engines: Sequence[str],
    rounds: int,
    least: float,
) -> None:
    for name, value, floor in (("batch", batch, 1), ("threads", threads, 1), ("rounds", rounds, 3)):
        if not isinstance(value, int) or isinstance(value, bool) or value < floor:
            raise ValueError(
                f"time_models: {name} must be a whole number, at least {floor}; got {value!r}."
            )
    if not least > 0:
        raise ValueError(f"time_models: least must be above 0 seconds; got {least!r}.")
    if not models:
        raise ValueError("time_models: models must name at least one, the control; got none.")
    unknown = [engine for engine in engines if engine not in ENGINES]
    if unknown or not engines:
        raise ValueError(
            f"time_models: engines must be among {', '.join(ENGINES)}, at least one; got {engines!r}."
        )
