"""What a comparison shows, in plain words, and no more than it shows."""

from collections.abc import Sequence

from sterna.data.merit import MERITS
from sterna.runs import figures
from sterna.runs.compare import Comparison, Statistic, Summary, number


def conclusion(comparison: Comparison) -> list[str]:
    """One or two sentences on every experiment but the baseline; on the only one, what it did."""
    base, *others = comparison.statistics
    engines = {str(run["engine"]) for run in comparison.runs if run.get("engine") is not None}
    virtual = ["All seconds are virtual."] if engines == {"virtual"} else []
    if others:
        target, alike = comparison.target_accuracy, len(engines) < 2
        return [
            _against(statistic, base, comparison.confidence, alike)
            + _target(statistic, base, target)
            for statistic in others
        ] + virtual
    return [_alone(base, comparison), *virtual]


def _against(statistic: Statistic, base: Statistic, confidence: float, alike: bool) -> str:
    """``alike``: whether seconds compare."""
    time = _time(statistic, base) if alike else ""
    costs = [part for part in (_bits(statistic, base), time) if part]
    text = f"{statistic.experiment} {' and '.join(costs)}. " if costs else ""
    whose = "Its" if costs else f"{statistic.experiment}: the"
    return text + _score(statistic, base, confidence, whose)


def _bits(statistic: Statistic, base: Statistic) -> str:
    mine, of_base = statistic.means["bits_sent"], base.means["bits_sent"]
    if mine is None or of_base is None:
        return ""
    if mine == of_base:
        return f"sent as many bits as {base.experiment}"
    if not mine:
        return f"sent nothing, {base.experiment} {figures.megabits(of_base)} Mbit"
    if not of_base:
        return f"sent {figures.megabits(mine)} Mbit, {base.experiment} nothing"
    ratio = of_base / mine
    if ratio >= 1.05:
        return f"sent {_times(ratio)} times fewer bits than {base.experiment}"
    if ratio <= 1 / 1.05:
        return f"sent {_times(1 / ratio)} times as many bits as {base.experiment}"
    return f"sent about as many bits as {base.experiment}"


def _time(statistic: Statistic, base: Statistic) -> str:
    ratio = statistic.ratios["wall_s"]
    if ratio is None:
        return ""
    longer = 1 / ratio - 1
    if abs(longer) < 0.025:
        return "took about as long"
    text = f"took {abs(longer):.0%} {'more' if longer > 0 else 'less'} time".replace("%", " %")
    if longer >= 1:
        text = f"took {_times(1 / ratio)} times as long"
    seen = statistic.longer
    unclear = seen is not None and seen.num > 1 and not seen.shown
    return f"{text}, which the seeds do not show" if unclear else text


def _score(statistic: Statistic, base: Statistic, confidence: float, whose: str) -> str:
    name, found = statistic.score_name, statistic.difference
    if found is None or name is None:
        return f"{whose} score cannot be compared with that of {base.experiment}."
    merit = MERITS[name]
    size = f"{figures.points(abs(found.mean), name)}{merit.points}"
    way = "higher" if found.mean > 0 else "lower"
    verdict = ""
    if not merit.higher_is_better and found.mean:
        verdict = ", so worse," if found.mean > 0 else ", so better,"
    by = f"{size} {way}" if found.mean else "the same"
    if found.low is None or found.high is None:
        return (
            f"{whose} {name} was {by} with the one seed that was run, "
            "which cannot tell a difference from chance."
        )
    seeds = f"{found.num} seeds"
    if found.low == found.high:
        return f"{whose} {name} was {by}{verdict} with each of the {seeds}."
    ends = f"{figures.points(found.low, name)} to {figures.points(found.high, name)}"
    interval = f"{confidence * 100:.4g} % interval {ends}, {seeds}"
    if found.shown:
        return f"{whose} {name} was {by}{verdict.removesuffix(',')} ({interval})."
    return f"{whose} {name} was {by} ({interval}): the seeds do not show a difference."


def _target(statistic: Statistic, base: Statistic, target: float | None) -> str:
    if target is None:
        return ""
    goal = f"{figures.points(target, 'accuracy').removesuffix('.00')} %"
    found, every = statistic.to_target, statistic.num_seeds
    if found is None:
        return f" It never reached {goal}."
    if found.num < every:
        return f" It reached {goal} with {found.num} of {every} seeds only."
    text = f" It reached {goal} after {figures.estimated(found, figures.seconds)} s"
    ratio = statistic.times_sooner
    if ratio is None or abs(ratio - 1) < 0.025:
        return f"{text}."
    way = f"{_times(ratio)} times sooner" if ratio > 1 else f"{_times(1 / ratio)} times later"
    return f"{text}, {way} than {base.experiment}."


def _alone(statistic: Statistic, comparison: Comparison) -> str:
    name, score, means = statistic.score_name, statistic.score, statistic.means
    unit = MERITS[name].unit if name is not None else ""
    if score is None or name is None:
        text = f"{statistic.experiment} reports no score"
    else:
        of = f"{statistic.experiment} reached {_article(name)} {name} of"
        text = f"{of} {figures.points(score.mean, name)}{unit}"
        if score.low is not None and score.high is not None:
            ends = f"{figures.points(score.low, name)} to {figures.points(score.high, name)}"
            text += f" ({comparison.confidence * 100:.4g} % interval {ends}, {score.num} seeds)"
    epochs = _common(comparison.runs, "epochs")
    if epochs is not None:
        text += f" in {figures.count(epochs)} epoch{'s' * (epochs != 1)}"
    workers = _common(comparison.runs, "workers")
    if workers == 1 and not means["bits_sent"]:
        text += ". Its one worker sent nothing"
    elif workers is not None and means["bits_sent"] is not None:
        sent = f"{figures.megabits(means['bits_sent'])} Mbit"
        text += f". Its {figures.count(workers)} workers sent {sent}"
        if means["messages"] is not None:
            text += f" in {figures.count(means['messages'])} messages"
    wall = statistic.times["wall_s"]
    if wall is not None:
        text += f". Training took {figures.estimated(wall, figures.seconds)} s"
        compute, wait = means["compute_s"], means["wait_s"]
        if compute is not None and wait is not None and compute + wait > 0 and workers != 1:
            text += f", {100 * wait / (compute + wait):.0f} % of it waiting"
    return text + "."


def _common(runs: Sequence[Summary], key: str) -> float | None:
    values = {number(run, key) for run in runs}
    return values.pop() if len(values) == 1 else None


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 1.95 else f"{ratio:,.1f}" if ratio < 999.5 else f"{ratio:,.0f}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
