"""Runs side by side: what each experiment reached and spent, and how far that is from a baseline.

The score and the seconds and their confidence intervals are taken over the seeds (``estimate``). The
difference to the baseline is taken seed by seed, over the seeds that both have, so what a seed does to both
cancels; its p-value is that of the two-sided paired t-test. Intervals and p-values are not
corrected for the number of experiments. A ratio is the baseline's mean over this experiment's
mean: 16 for bits means 16 times fewer. The time to a target accuracy is a mean over the seeds that
reached it, and says how many did.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sterna.data.merit import MERITS
from sterna.runs.estimate import Difference, Estimate, estimate, paired
from sterna.runs.files import StoreError, read_json, write_json
from sterna.runs.target import KEY, require_judged_by_accuracy, require_target

FORMAT = 1
FIGURES = (
    "loss",
    "bits_sent",
    "bits_received",
    "messages",
    "compute_s",
    "wait_s",
    "wall_s",
    "steps",
    "examples",
    "staleness_mean",
    "staleness_max",
    "peak_memory_bytes",
    "peak_activation_bytes",
    "parameters",
    "multiply_adds",
    "model_bits",
)
"""The figures of ``summary.json`` that are averaged over seeds."""
TIMES = ("compute_s", "wait_s", "wall_s")
"""Those of them that are seconds, which differ from seed to seed where nothing else does."""

Summary = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """One experiment over its seeds.

    Args:
        experiment: its name.
        baseline: the name of the experiment that it is compared with.
        seeds: in rising order.
        score_name: of the `Merit` by which the runs are judged; None where no run reports one.
        score: the score over the seeds where it is finite; None where there is none.
        difference: score minus the baseline's; None for the baseline itself and where no seed has
            both.
        means: mean over seeds of every figure in `FIGURES`; None where a seed has no finite value.
        ratios: baseline's mean over this mean; None where either is missing or zero.
        times: of every figure in `TIMES`, the estimate that its mean is of; None where there is no mean.
        longer: wall seconds minus the baseline's; None as for ``difference``.
        to_target: seconds to the target accuracy over the seeds that reached it, of which it has the
            number; None where none did, and where there is no target.
        times_sooner: baseline's mean of these seconds over this mean; None unless all seeds of both
            reached the target.
    """

    experiment: str
    baseline: str
    seeds: tuple[int, ...]
    score_name: str | None
    score: Estimate | None
    difference: Difference | None
    means: Mapping[str, float | None]
    ratios: Mapping[str, float | None]
    times: Mapping[str, Estimate | None]
    longer: Difference | None
    to_target: Estimate | None = None
    times_sooner: float | None = None

    @property
    def num_reached(self) -> int:
        """How many seeds reached the target accuracy."""
        return 0 if self.to_target is None else self.to_target.num

    @property
    def num_seeds(self) -> int:
        """How many seeds."""
        return len(self.seeds)

    @property
    def is_baseline(self) -> bool:
        """Whether the others are compared with this one."""
        return self.experiment == self.baseline

    @property
    def higher_is_better(self) -> bool:
        """Which way the score improves."""
        return self.score_name is None or MERITS[self.score_name].higher_is_better


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What ``compare.json`` holds: the runs, their statistics, and what to keep in mind."""

    baseline: str
    confidence: float
    runs: tuple[Summary, ...]
    statistics: tuple[Statistic, ...]
    cautions: tuple[str, ...]
    target_accuracy: float | None = None
    """A fraction in [0, 1]; each of the runs then has ``seconds_to_target``, null if it never got there."""


def number(summary: Summary, key: str) -> float | None:
    """A figure of a summary; None where it is missing, null, NaN or infinite.

    Raises:
        ValueError: the figure is no number.
    """
    value = summary.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"summary.json: {key} must be a number or null, got {value!r}")
    return float(value) if math.isfinite(value) else None


def statistics(
    summaries: Sequence[Summary],
    baseline: str,
    confidence: float = 0.95,
    target_accuracy: float | None = None,
) -> list[Statistic]:
    """One `Statistic` per experiment, in the order of first appearance, the baseline first.

    Args:
        summaries: what ``summary.json`` of each run holds.
        baseline: the experiment to compare with.
        confidence: probability that an interval covers the mean, in (0, 1).
        target_accuracy: fraction in [0, 1]; every summary must then have ``seconds_to_target``.

    Raises:
        ValueError: no runs; the baseline is not among the experiments; an experiment has a seed
            twice; a run names no experiment or seed; a figure is no number; the target is no fraction,
            the time to it is missing, or a run is not judged by accuracy.
    """
    if target_accuracy is not None:
        _require_times(summaries, target_accuracy)
    if not 0 < confidence < 1:
        raise ValueError(f"compare: confidence must be in (0, 1), got {confidence}")
    groups = _by_experiment(summaries)
    if not groups:
        raise ValueError("compare: there are no runs; name at least one")
    if baseline not in groups:
        raise ValueError(
            f"compare: the baseline {baseline!r} is not among the experiments; "
            f"choose one of {', '.join(groups)}"
        )
    base = groups[baseline]
    base_means = {figure: _mean(base, figure) for figure in FIGURES}
    base_score = _score_name(base)
    base_wall = _scores(base, "wall_s")
    base_times = None if target_accuracy is None else _scores(base, KEY)
    found = []
    for experiment in sorted(groups, key=lambda name: name != baseline):
        runs = groups[experiment]
        name = _score_name(runs)
        scores = _scores(runs, name)
        difference = longer = None
        if experiment != baseline and name == base_score:
            difference = _difference(scores, _scores(base, name), confidence)
        if experiment != baseline:
            longer = _difference(_scores(runs, "wall_s"), base_wall, confidence)
        means = {figure: _mean(runs, figure) for figure in FIGURES}
        ratios = {}
        for figure, mean in means.items():
            of_base = base_means[figure]
            ratios[figure] = of_base / mean if mean and of_base else None
        reached = {} if base_times is None else _scores(runs, KEY)
        found.append(
            Statistic(
                experiment=experiment,
                baseline=baseline,
                seeds=tuple(runs),
                score_name=name,
                score=estimate(list(scores.values()), confidence),
                difference=difference,
                means=means,
                ratios=ratios,
                times={
                    figure: None
                    if means[figure] is None
                    else estimate(list(_scores(runs, figure).values()), confidence)
                    for figure in TIMES
                },
                longer=longer,
                to_target=estimate(list(reached.values()), confidence),
                times_sooner=_sooner(reached, base_times or {}, len(runs), len(base)),
            )
        )
    return found


def cautions(summaries: Sequence[Summary], baseline: str) -> list[str]:
    """What makes a comparison less than fair, one sentence each; empty where nothing does."""
    groups = _by_experiment(summaries)
    found = []
    for key, consequence in (
        ("data", "the scores do not compare"),
        ("epochs", "neither the scores nor the costs compare"),
        ("workers", "totals over workers do not compare"),
        ("batch_size", "more examples a gradient are fewer messages for the same work"),
        ("engine", "seconds do not compare"),
    ):
        values: dict[str, None] = {}
        for runs in groups.values():
            for summary in runs.values():
                if summary.get(key) is not None:
                    values[str(summary[key])] = None
        if len(values) > 1:
            found.append(f"The runs differ in {key} ({', '.join(values)}): {consequence}.")
    base = groups.get(baseline, {})
    names = {experiment: _score_name(runs) for experiment, runs in groups.items()}
    for experiment, runs in groups.items():
        name = names[experiment]
        bad = [seed for seed in runs if seed not in _scores(runs, name)]
        if name is None:
            found.append(f"{experiment} reports no score.")
        elif bad:
            found.append(
                f"{experiment}: no finite {name} for {_seeds(bad)}, left out of its mean: "
                "the mean looks better than the method is."
            )
        if name is not None and names.get(baseline) not in (None, name):
            found.append(
                f"{experiment} reports {name}, {baseline} {names[baseline]}: no difference."
            )
        if base and set(runs) != set(base):
            common = [seed for seed in runs if seed in base]
            paired_by = f"paired over {_seeds(common)}" if common else "no seed in common, no pairs"
            found.append(f"{experiment} ran on other seeds than {baseline}: {paired_by}.")
        if any(
            isinstance(summary.get("loss"), float) and not math.isfinite(summary["loss"])
            for summary in runs.values()
        ):
            found.append(f"{experiment}: the loss of a run is not finite, it diverged.")
    return found


def compare(
    summaries: Sequence[Summary],
    baseline: str,
    confidence: float = 0.95,
    target_accuracy: float | None = None,
) -> Comparison:
    """Statistics and cautions of some runs. Arguments and errors are those of `statistics`."""
    return Comparison(
        baseline=baseline,
        confidence=confidence,
        runs=tuple(summaries),
        statistics=tuple(statistics(summaries, baseline, confidence, target_accuracy)),
        cautions=tuple(cautions(summaries, baseline)),
        target_accuracy=target_accuracy,
    )


def write_comparison(folder: Path, comparison: Comparison) -> Path:
    """Write ``compare.json`` into a folder; NaN and infinity become null."""
    path = folder / "compare.json"
    write_json(path, {"format": FORMAT, **asdict(comparison)})
    return path


def read_comparison(folder: Path) -> Comparison:
    """Read ``compare.json``; the statistics are computed anew from the runs in it.

    Raises:
        StoreError: the file is missing, no comparison, or of another format version.
    """
    path = folder / "compare.json"
    content = read_json(path, "a comparison folder")
    require_format(path, content, FORMAT, "sterna compare")
    try:
        return compare(
            content["runs"],
            content["baseline"],
            content.get("confidence", 0.95),
            content.get("target_accuracy"),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StoreError(
            f"{path} is incomplete or wrong: {error!r}. Run `sterna compare` again."
        ) from error


def require_format(path: Path, content: Summary, known: int, command: str) -> None:
    """Refuse a file that another version of Sterna wrote."""
    written = content.get("format")
    if written != known:
        raise StoreError(
            f"{path} has format {written!r}; this version of Sterna reads format {known}. Read it "
            f"with the version that wrote it, or run `{command}` again."
        )


def _by_experiment(summaries: Sequence[Summary]) -> dict[str, dict[int, Summary]]:
    groups: dict[str, dict[int, Summary]] = {}
    for summary in summaries:
        experiment, seed = summary.get("experiment"), summary.get("seed")
        if not isinstance(experiment, str) or not isinstance(seed, int):
            raise ValueError(
                "compare: a summary must name its experiment and its seed, "
                f"got experiment {experiment!r}, seed {seed!r}"
            )
        if seed in groups.setdefault(experiment, {}):
            raise ValueError(
                f"compare: {experiment} has seed {seed} twice; leave one of the two runs out"
            )
        groups[experiment][seed] = summary
    return {name: dict(sorted(runs.items())) for name, runs in groups.items()}


def _score_name(runs: Mapping[int, Summary]) -> str | None:
    for name in MERITS:
        if any(summary.get(name) is not None for summary in runs.values()):
            return name
    return None


def _scores(runs: Mapping[int, Summary], name: str | None) -> dict[int, float]:
    found = {}
    for seed, summary in runs.items():
        value = None if name is None else number(summary, name)
        if value is not None:
            found[seed] = value
    return found


def _difference(
    mine: Mapping[int, float], of_base: Mapping[int, float], confidence: float
) -> Difference | None:
    return paired([mine[seed] - of_base[seed] for seed in mine if seed in of_base], confidence)


def _require_times(summaries: Sequence[Summary], target_accuracy: float) -> None:
    try:
        require_target(target_accuracy)
    except ValueError as error:
        raise ValueError(f"compare: {error}") from error
    for summary in summaries:
        found = next((name for name in MERITS if summary.get(name) is not None), "accuracy")
        require_judged_by_accuracy(str(summary.get("experiment")), MERITS[found])
        if KEY not in summary:
            raise ValueError(
                f"compare: with a target accuracy each summary must have {KEY}, or null there; that of "
                f"{summary.get('experiment')}, seed {summary.get('seed')}, has not"
            )


def _sooner(
    times: Mapping[int, float], of_base: Mapping[int, float], num: int, num_base: int
) -> float | None:
    if not times or not of_base or len(times) < num or len(of_base) < num_base:
        return None
    mean = math.fsum(times.values()) / num
    return math.fsum(of_base.values()) / num_base / mean if mean > 0 else None


def _mean(runs: Mapping[int, Summary], key: str) -> float | None:
    values = [number(summary, key) for summary in runs.values()]
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if len(known) == len(values) else None


def _seeds(seeds: Sequence[int]) -> str:
    return ("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, seeds))
