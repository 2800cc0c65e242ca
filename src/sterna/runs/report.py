"""One self-contained HTML page on some runs: conclusion, ledger, curves, and how each was made.

Runs of an asynchronous server also show staleness, a timeline of their workers, and what was lost.

The page holds its style and script, asks for nothing from anywhere (its content security policy
forbids it), works without script, and is the same for the same runs. Text from run folders is
escaped.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from sterna.data.merit import ACCURACY, MERITS
from sterna.runs import figures
from sterna.runs.charts import Bar, Measure, available, bar_chart, line_chart, swatch
from sterna.runs.compare import Comparison, Summary, compare
from sterna.runs.conclusion import conclusion
from sterna.runs.curves import AXES, Curve, loss_curves, score_curves
from sterna.runs.entropy_sections import entropy_curves, entropy_section
from sterna.runs.files import StoreError, write_whole
from sterna.runs.reading import Finished, collect
from sterna.runs.sections import how_made, ledger_table, workers_table
from sterna.runs.server_sections import server_sections
from sterna.runs.target import KEY, first_reached, stored_target

_LOSS = Measure(key="loss", title="Training loss")
_SCORES = {
    name: Measure(key=name, title=merit.title, factor=merit.factor, unit=merit.unit)
    for name, merit in MERITS.items()
}
_TEST_LOSS = Measure(key="test-loss", title="Test loss")
_AXIS_BUTTONS = {"step": "steps", "seconds": "seconds", "bits": "bits sent"}


def write_report(
    folders: Sequence[Path],
    out: Path,
    baseline: str | None = None,
    target_accuracy: float | None = None,
) -> Path:
    """Write the report on some run and comparison folders.

    Args:
        folders: run folders, comparison folders, or both.
        out: the file to write; for a folder, ``report.html`` in it.
        baseline: the experiment that others are compared with. By default that of the first
            comparison folder, else one whose name ends in ``.sync``, else the first.
        target_accuracy: fraction in [0, 1]; the page then tells how long each experiment took to reach
            it. By default that of the first comparison folder that has one.

    Returns:
        The path of the page.

    Raises:
        StoreError: a folder is neither, or cannot be read; the page cannot be written; the baseline is
            not among the experiments, a figure is no number, or the target no fraction.
    """
    page = report(folders, baseline, target_accuracy)
    out = out / "report.html" if out.is_dir() else out
    write_whole(out, lambda beside: _write(beside, page))
    return out


def side_by_side(
    folders: Sequence[Path], baseline: str | None = None, target_accuracy: float | None = None
) -> tuple[list[Finished], Comparison]:
    """The runs of some folders, and their comparison. Arguments and errors are `write_report`'s."""
    runs, compared_with = collect(folders)
    target = target_accuracy
    if target is None and all(run.summary.get(ACCURACY.name) is not None for run in runs):
        target = stored_target(folders)
    try:
        summaries = [run.summary if target is None else _timed(run, target) for run in runs]
        base = baseline or _baseline(runs, compared_with)
        return runs, compare(summaries, base, target_accuracy=target)
    except ValueError as error:
        names = ", ".join(str(folder) for folder in folders)
        raise StoreError(f"{names}: {error}") from error


def _timed(run: Finished, target: float) -> Summary:
    seconds = first_reached(run.evaluations, target, run.folder / "metrics.jsonl")
    return {**run.summary, KEY: seconds}


def report(
    folders: Sequence[Path], baseline: str | None = None, target_accuracy: float | None = None
) -> str:
    """The page itself. Arguments and errors are those of `write_report`."""
    runs, comparison = side_by_side(folders, baseline, target_accuracy)
    order = [statistic.experiment for statistic in comparison.statistics]
    places = {experiment: place for place, experiment in enumerate(order)}
    runs = sorted(runs, key=lambda run: (places[run.experiment], run.seed))
    drawn, entropies = _drawn(runs, comparison), entropy_curves(runs)
    entropy = entropy_section(runs, entropies, places)
    script = _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sections = [
        _section(
            "Ledger",
            "What was reached and what it took, measured. " + _differences_note(comparison),
            ledger_table(comparison, places),
        ),
        _training(drawn, places),
        _spending(comparison, places),
        _section(*entropy) if entropy is not None else "",
        *(_section(*section) for section in server_sections(runs, places)),
        _workers(runs),
        _section("How it was made", "", how_made(runs)),
    ]
    return Template(_asset("report.html")).substitute(
        title=escape(_title(order, runs)),
        eyebrow=escape(_eyebrow(order, runs)),
        lead=_lead(conclusion(comparison)),
        cautions=_list("cautions", comparison.cautions),
        sections="\n".join(section for section in sections if section),
        footnotes=_footnotes(comparison),
        style=_asset("report.css"),
        script=script,
        script_hash=f"sha256-{digest}",
        curves=_data([*drawn, *entropies]),
    )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _asset(name: str) -> str:
    return files("sterna.runs").joinpath(name).read_text(encoding="utf-8")


def _baseline(runs: Sequence[Finished], compared_with: str | None) -> str:
    names = list(dict.fromkeys(run.experiment for run in runs))
    if compared_with in names:
        return str(compared_with)
    return next((name for name in names if name.endswith(".sync")), names[0])


def _title(order: Sequence[str], runs: Sequence[Finished]) -> str:
    if len(order) == 1:
        return f"{order[0]}, seed {runs[0].seed}" if len(runs) == 1 else order[0]
    if len(order) == 2:
        return f"{order[1]} against {order[0]}"
    return f"{len(order) - 1} ways of training against {order[0]}"


def _eyebrow(order: Sequence[str], runs: Sequence[Finished]) -> str:
    parts = ["Sterna"]
    if len(runs) > 1:
        experiments = f"{len(order)} experiments, " if len(order) > 1 else ""
        parts.append(f"{experiments}{len(runs)} runs")
    for key, unit in (("data", ""), ("workers", "workers"), ("epochs", "epochs")):
        values = {run.summary.get(key) for run in runs}
        value = values.pop() if len(values) == 1 else None
        if value is not None:
            parts.append(f"{value} {unit.removesuffix('s') if value == 1 else unit}".strip())
    return " \u00b7 ".join(parts)


def _lead(sentences: Sequence[str]) -> str:
    sentences = [sentence.replace(" %", "\u00a0%") for sentence in sentences]
    if len(sentences) == 1:
        return f'<p class="lead">{escape(sentences[0])}</p>'
    return _list("lead", sentences)


def _list(kind: str, items: Sequence[str]) -> str:
    inner = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f'<ul class="{kind}">{inner}</ul>' if items else ""


def _section(title: str, note: str, content: str) -> str:
    if not content:
        return ""
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{title}</h2>{said}\n{content}\n</section>"


def _differences_note(comparison: Comparison) -> str:
    several = any(statistic.num_seeds > 1 for statistic in comparison.statistics)
    level = f"{comparison.confidence * 100:.4g} %"
    if len(comparison.statistics) == 1:
        said = f" Behind \u00b1: {level} intervals over seeds." if several else ""
        return f"A dash is a figure that is not known or has no meaning here.{said}"
    return f"Differences and ratios are to {comparison.baseline}. " + (
        f"Behind \u00b1 and below differences: {level} intervals over seeds."
        if several
        else "One seed each, so there are no intervals."
    )


def _drawn(runs: Sequence[Finished], comparison: Comparison) -> list[tuple[Measure, list[Curve]]]:
    """What the charts show: by what the runs are judged, else the test loss; and the training loss."""
    wanted = dict.fromkeys(s.score_name for s in comparison.statistics if s.score_name is not None)
    judged = {s.experiment: s.score_name for s in comparison.statistics}
    found = []
    for key in wanted:
        curves = [c for c in score_curves(runs, key) if judged[c.name] == key]
        if curves:
            found.append((_SCORES[key], curves))
    if not found and (curves := score_curves(runs, "loss")):
        found.append((_TEST_LOSS, curves))
    curves = loss_curves(runs)
    return [*found, (_LOSS, curves)] if curves else found


def _training(drawn: Sequence[tuple[Measure, list[Curve]]], places: Mapping[str, int]) -> str:
    axes = [axis for axis in AXES if any(available(curves, axis) for _, curves in drawn)]
    if not axes:
        return ""
    buttons = "".join(
        f'<input type="radio" name="axis" id="axis-{axis}"{" checked" * (axis == axes[0])}>'
        f'<label for="axis-{axis}">{_AXIS_BUTTONS[axis]}</label>'
        for axis in axes
    )
    names = {curve.name for _, curves in drawn for curve in curves}
    legend = "".join(
        f"<li>{swatch(place)}{escape(name)}</li>" for name, place in places.items() if name in names
    )
    figures_ = []
    for measure, curves in drawn:
        unit = f"<span>,{escape(measure.unit)}</span>" if measure.unit else ""
        charts = "".join(
            f'<div class="by-{axis}">{line_chart(curves, measure, axis)}</div>'
            for axis in axes
            if available(curves, axis)
        )
        caption = f"<figcaption>{measure.title}{unit}{_smoothed(curves)}</figcaption>"
        figures_.append(f"<figure>{caption}{charts}</figure>")
    content = (
        f'<fieldset class="axes"><legend>Against</legend><div class="choices">{buttons}</div>'
        f'</fieldset>\n<ul class="legend">{legend}</ul>\n<div class="pair">'
        + "\n".join(figures_)
        + "</div>"
    )
    several = any(curve.num_seeds > 1 for _, curves in drawn for curve in curves)
    note = "Lines are means over seeds, bands span the seeds." if several else ""
    return _section("Training", note, content)


def _smoothed(curves: Sequence[Curve]) -> str:
    window = max(curve.window for curve in curves)
    return f"<span>, mean over {window} steps</span>" if window > 1 else ""


def _spending(comparison: Comparison, places: Mapping[str, int]) -> str:
    times, sent = [], []
    for statistic in comparison.statistics:
        name, means = statistic.experiment, statistic.means
        place = places[name]
        compute, wait = means["compute_s"], means["wait_s"]
        if compute is not None:
            text = f"{figures.seconds(compute)} s + {figures.seconds(wait)} s"
            if wait is None:
                text = f"{figures.seconds(compute)} s, waiting unknown"
            segments = (("computing", compute), ("waiting", wait))
            times.append(Bar(name=name, place=place, segments=segments, text=text))
        bits = means["bits_sent"]
        if bits is not None:
            text = f"{figures.megabits(bits)} Mbit"
            sent.append(Bar(name=name, place=place, segments=(("sent", bits),), text=text))
    shown = []
    if times:
        key = '<span class="key"></span>computing<span class="key hatched"></span>waiting'
        title = "Seconds computing and waiting, mean per worker"
        shown.append(
            f"<figure><figcaption>Seconds per worker<br><span>{key}</span></figcaption>"
            f"{bar_chart(times, 'times', title)}</figure>"
        )
    if any(bar.segments[0][1] for bar in sent):
        shown.append(
            "<figure><figcaption>Bits sent<br><span>all workers, whole training</span></figcaption>"
            f"{bar_chart(sent, 'sent', 'Bits sent by all workers')}</figure>"
        )
    content = f'<div class="pair">{"".join(shown)}</div>' if shown else ""
    return _section("Where it went", "", content)


def _workers(runs: Sequence[Finished]) -> str:
    table = workers_table(runs)
    if not table:
        return ""
    count = sum(len(run.workers) for run in runs)
    content = (
        f'<details><summary>Every worker of every run <span class="of">{count} ledgers</span>'
        f"</summary><div>{table}</div></details>"
    )
    return _section("Worker by worker", "", content)


def _footnotes(comparison: Comparison) -> str:
    said = [
        "Bits and messages are counted on the packed buffers as they leave, over all workers. "
        "Evaluation and checkpoints are not counted."
    ]
    if any(statistic.difference for statistic in comparison.statistics):
        said.append(
            "Differences are paired by seed; intervals are Student's, p-values those of the paired "
            "t-test, neither corrected for the number of experiments."
        )
    return "\n".join(f"<p>{escape(text)}</p>" for text in said)


def _data(drawn: Sequence[tuple[Measure, list[Curve]]]) -> str:
    """What the read-out needs, with four digits, safe inside a script element."""
    content: dict[str, Any] = {}
    for measure, curves in drawn:
        series = []
        for curve in curves:
            one: dict[str, Any] = {"name": curve.name, "place": curve.place}
            one |= {axis: [_short(x) for x in curve.x[axis].tolist()] for axis in AXES}
            one["y"] = [_short(y * measure.factor) for y in curve.mean.tolist()]
            if curve.num_seeds > 1:
                one["low"] = [_short(y * measure.factor) for y in curve.low.tolist()]
                one["high"] = [_short(y * measure.factor) for y in curve.high.tolist()]
            series.append(one)
        content[measure.key] = {"unit": measure.unit, "series": series}
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def _short(value: float) -> float | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.5g}")
    return int(short) if short == int(short) else short
