"""One self-contained page on a compressed model: what was kept, removed where, tried, and timed.

It has the style of `sterna.runs.report`, holds no script, and asks for nothing from anywhere.
"""

import base64
import hashlib
import math
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

from sterna.export.timing import TITLES, Timings, quartiles
from sterna.runs import figures
from sterna.runs.charts import BOTTOM, HEIGHT, LEFT, MARKERS, RIGHT, TOP, WIDTH, Bar, bar_chart
from sterna.runs.figures import percent
from sterna.runs.scales import Scale, around, from_tick

if TYPE_CHECKING:
    from sterna.runs.compress import Outcome, Tried
    from sterna.runs.kept import Layer

_MOST_BARS = 16
_KEPT, _OTHER = 2, 0  # places of colours


def page(outcome: "Outcome") -> str:
    """The page of one `sterna compress`."""
    summary, met = outcome.summary, outcome.met
    empty = base64.b64encode(hashlib.sha256(b"").digest()).decode()
    sections = [
        _section("What it comes to", "", _ledger(summary)) if met else "",
        _section(
            "What was removed where",
            "By layer of the original: filled is what is left, hatched what is gone.",
            _picture(outcome.layers),
        ),
        _section("What was tried", _tried_note(outcome), _tried(outcome)),
        _timed(outcome.timings),
        _section("How it was made", "", _made(summary)),
    ]
    return Template(_asset("report.html")).substitute(
        title=escape(f"{summary['source']}, compressed"),
        eyebrow=escape(f"Sterna \u00b7 compress \u00b7 {summary['data']}"),
        lead="".join(f'<p class="lead">{escape(text)}</p>' for text in conclusion(outcome)),
        cautions=_cautions(outcome),
        sections="\n".join(section for section in sections if section),
        footnotes=f"<p>{escape(_footnote(summary))}</p>",
        style=_asset("report.css"),
        script="",
        script_hash=f"sha256-{empty}",
        curves="{}",
    )


def conclusion(outcome: "Outcome") -> list[str]:
    """Sentences for the head of the page and the terminal."""
    s = outcome.summary
    if not outcome.met:
        return [best_reached(outcome)]
    lost = 100 * (s["accuracy_dense"] - s["accuracy"])
    change = (
        f"{abs(lost):.2f} points {'less' if lost > 0 else 'more'} than" if lost else "as much as"
    )
    found = [
        f"Test accuracy {percent(s['accuracy'])}, {change} the dense model's "
        f"{percent(s['accuracy_dense'])}, with {_share(s['parameters'], s['parameters_dense'])} of the "
        f"parameters, {_share(s['multiply_adds'], s['multiply_adds_dense'])} of the multiply-adds and "
        f"{_share(s['model_bits'], s['model_bits_dense'])} of the storage."
    ]
    if lost > s["keep_accuracy"]:
        error = math.sqrt(s["accuracy"] * (1 - s["accuracy"]) / s["test_examples"])
        found.append(
            f"That is more than the {s['keep_accuracy']:g} points that --keep-accuracy allows: those were "
            f"kept on the {s['validation_examples']} validation examples, by which candidates are "
            f"chosen. One standard error of an accuracy on {s['test_examples']} examples is "
            f"{100 * error:.2f} points."
        )
    if s.get("times_faster"):
        threads = "one thread" if s["threads"] == 1 else f"{s['threads']} threads"
        spread = f"quartiles {s['times_faster_low']:.2f} to {s['times_faster_high']:.2f}"
        shown = not s["times_faster_low"] <= 1 <= s["times_faster_high"]
        faster = (
            f"{s['times_faster']:.2f} times as fast" if shown else "No difference in time shown"
        )
        found.append(
            f"{faster} in {_engine(s['engine'])} at batch {s['batch']} on {threads} ({spread}): "
            f"{_ms(s['seconds'])} ms, and {_ms(s['seconds_dense'])} ms before."
        )
    return found


def best_reached(outcome: "Outcome") -> str:
    """One sentence for a target that was not met: the candidate that came nearest."""
    summary = outcome.summary
    kept = f"{summary['keep_accuracy']:g} points of {percent(summary['validation_accuracy_dense'])}"
    real = [t for t in outcome.tried if t.multiply_adds < summary["multiply_adds_dense"]]
    real = real or [t for t in outcome.tried if t.bits < summary["model_bits_dense"]]
    if not real:
        return (
            f"No candidate removed anything, so nothing is within {kept}. `--shares 0.5` cuts to a size, "
            "with --method ssl, magnitude or low-rank; --multiple-of rounds widths up."
        )
    nearest = max(real, key=lambda t: t.accuracy)
    lost = 100 * (summary["validation_accuracy_dense"] - nearest.accuracy)
    return (
        f"No candidate stays within {kept} on the validation examples. The nearest, {nearest.label}, has "
        f"{percent(nearest.accuracy)}, {lost:.2f} points less. Allow more with --keep-accuracy"
        f"{'' if outcome.by_size else ', or train longer with --finetune-epochs'}."
    )


_Column = tuple[str, Callable[[Any], str], Callable[["Tried"], str]]
_COUNTS: tuple[_Column, ...] = (
    ("candidate", lambda s: "dense", lambda t: t.label),
    (
        "validation %",
        lambda s: figures.points(s["validation_accuracy_dense"], "accuracy"),
        lambda t: figures.points(t.accuracy, "accuracy"),
    ),
    (
        "parameters",
        lambda s: figures.count(s["parameters_dense"]),
        lambda t: figures.count(t.parameters),
    ),
    (
        "multiply-adds",
        lambda s: figures.count(s["multiply_adds_dense"]),
        lambda t: figures.count(t.multiply_adds),
    ),
)
_SIZE: tuple[_Column, ...] = (
    ("Mbit", lambda s: figures.megabits(s["model_bits_dense"]), lambda t: figures.megabits(t.bits)),
)
_TIME: tuple[_Column, ...] = (
    (TITLES[2], lambda s: "", lambda t: figures.seconds(t.seconds and 1e3 * t.seconds)),
    (TITLES[3], lambda s: "", lambda t: quartiles(t.low, t.high, _ms)),
)
_FASTER: tuple[_Column, ...] = (
    (TITLES[4], lambda s: "", lambda t: figures.ratio(t.ratio)),
    (TITLES[5], lambda s: "", lambda t: quartiles(t.ratio_low, t.ratio_high, "{:.2f}".format)),
)


def _columns(outcome: "Outcome") -> list[_Column]:
    """Storage is shown where it is what was gained, else milliseconds."""
    return [*_COUNTS, *(_SIZE if outcome.by_size else _TIME), *_FASTER]


def titles(outcome: "Outcome") -> list[str]:
    """Headings of `table`."""
    return [*(title for title, _, _ in _columns(outcome)), ""]


def table(outcome: "Outcome") -> list[list[str]]:
    """The dense model and every candidate, as written cells."""
    s, columns = outcome.summary, _columns(outcome)
    rows = [[*(dense(s) for _, dense, _ in columns), ""]]
    for t in outcome.tried:
        word = "chosen" if t.label == s["candidate"] else "" if t.keeps else _why_not(t, s)
        rows.append([*(cell(t) for _, _, cell in columns), word])
    return rows


def _why_not(tried: "Tried", summary: Any) -> str:
    least = summary["validation_accuracy_dense"] - summary["keep_accuracy"] / 100
    return "too low" if tried.accuracy < least - 1e-9 else "no change"


def _footnote(s: Any) -> str:
    if s["validate_on"] == "test":
        return (
            f"The test examples were cut in two, class by class: {s['validation_examples']} to choose by, "
            f"and {s['test_examples']} that were looked at once, at the end. No model was trained on either."
        )
    return (
        "Candidates are judged on training examples that no phase of the compression used; the dense model "
        "has seen them, which makes the target harder to meet. The test examples were looked at once."
    )


def _tried_note(outcome: "Outcome") -> str:
    s = outcome.summary
    return (
        f"Validation accuracy on {s['validation_examples']} examples; the target was to lose at most "
        f"{s['keep_accuracy']:g} points. Times are medians and quartiles of one interleaved run."
    )


def _tried(outcome: "Outcome") -> str:
    return _table("Candidates", titles(outcome), table(outcome)) + _front(outcome)


def _table(label: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in heads)
    body = ""
    for cells in rows:
        mark = ' class="main"' if cells[-1] == "chosen" else ""
        inner = "".join(f"<td>{escape(cell)}</td>" for cell in cells[1:])
        body += f'<tr{mark}><th scope="row">{escape(cells[0])}</th>{inner}</tr>'
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table class="workers">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _front(outcome: "Outcome") -> str:
    """Accuracy against speed, with the target as a line."""
    s = outcome.summary
    points = [(t.ratio, 100 * t.accuracy, t) for t in outcome.tried if t.ratio is not None]
    if len(points) < 2:
        return ""
    dense, least = 100 * s["validation_accuracy_dense"], 100 * s["validation_accuracy_dense"]
    least -= s["keep_accuracy"]
    low, high = around([1.0, *(1.05 * x for x, _, _ in points)], zero=True)
    across = Scale(low=low, high=high, start=LEFT, end=RIGHT)
    low, high = around([dense, least, *(y for _, y, _ in points)])
    high = min(high, 100.2)
    up = Scale(low=from_tick(low, high), high=high, start=BOTTOM, end=TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="front-t front-d">',
        '<title id="front-t">Validation accuracy against speed</title>',
        f'<desc id="front-d">{escape("; ".join(f"{t.label}: {y:.2f} %, {x:.2f}x" for x, y, t in points))}'
        '.</desc><g class="grid">',
        *(
            f'<line x1="{LEFT}" x2="{RIGHT}" y1="{up(t):.1f}" y2="{up(t):.1f}"/>'
            for t in up.ticks()
        ),
        '</g><g class="ticks">',
        *(
            f'<text x="{LEFT - 10}" y="{up(t):.1f}" dy=".34em" text-anchor="end">{t:g}</text>'
            for t in up.ticks()
        ),
        *(
            f'<text x="{across(t):.1f}" y="{BOTTOM + 24}" text-anchor="middle">{t:g}x</text>'
            for t in across.ticks()
        ),
        f'</g><line class="base" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>',
        f'<line class="base" stroke-dasharray="4 4" x1="{LEFT}" x2="{RIGHT}" y1="{up(least):.1f}" '
        f'y2="{up(least):.1f}"/>',
        f'<text x="{LEFT + 4}" y="{up(least) - 6:.1f}">target</text>',
        f'<text x="{RIGHT}" y="{HEIGHT - 10}" text-anchor="end">times faster than the dense model</text>',
        _mark(across(1.0), up(dense), _OTHER, 0, "dense"),
    ]
    for x, y, t in points:
        place = _KEPT if t.label == s["candidate"] else 1
        parts.append(_mark(across(x), up(y), place, place, f"{t.label}: {y:.2f} %, {x:.2f}x"))
    legend = "".join(
        f'<li><svg class="swatch s{place}" viewBox="0 0 34 12" aria-hidden="true"><g class="marks">'
        f'<path d="{MARKERS[shape]}" transform="translate(17 6)"/></g></svg>{name}</li>'
        for place, shape, name in (
            (_OTHER, 0, "dense"),
            (1, 1, "candidate"),
            (_KEPT, _KEPT, "chosen"),
        )
        if name != "chosen" or outcome.met
    )
    return (
        '<div class="pair" style="margin-top:36px"><figure><figcaption>Validation accuracy, %<span>, '
        f"against speed</span></figcaption>{''.join(parts)}</svg></figure>"
        f'<ul class="legend">{legend}</ul></div>'
    )


def _mark(x: float, y: float, place: int, shape: int, title: str) -> str:
    return (
        f'<g class="s{place} marks"><path d="{MARKERS[shape]}" transform="translate({x:.1f} {y:.1f}) '
        f'scale(1.3)"><title>{escape(title)}</title></path></g>'
    )


def _picture(layers: Sequence["Layer"]) -> str:
    if not layers:
        return ""
    shown = ""
    for key, title, before, after in (
        ("parameters", "Parameters", "parameters_before", "parameters_after"),
        ("work", "Multiply-adds per example", "multiply_adds_before", "multiply_adds_after"),
    ):
        rows = [
            (x.name, getattr(x, before), getattr(x, after)) for x in layers if getattr(x, before)
        ]
        bars = [_bar(*row) for row in _largest(rows)]
        if bars:
            shown += (
                f"<figure><figcaption>{title}<br><span>"
                '<span class="key"></span>kept<span class="key hatched"></span>removed</span></figcaption>'
                f"{bar_chart(bars, key, title + ', kept and removed by layer')}</figure>"
            )
    return f'<div class="pair">{shown}</div>'


def _largest(rows: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """The rows in their order; where there are many, the smallest are one."""
    if len(rows) <= _MOST_BARS:
        return list(rows)
    kept = sorted(rows, key=lambda row: -row[1])[: _MOST_BARS - 1]
    rest = [row for row in rows if row not in kept]
    told = (f"{len(rest)} smaller ones", sum(r[1] for r in rest), sum(r[2] for r in rest))
    return [row for row in rows if row in kept] + [told]


def _bar(name: str, before: int, after: int) -> Bar:
    text = f"{figures.count(after)} of {figures.count(before)}"
    if after > before:
        text += " (more)"
    segments = (("kept", float(after)), ("removed", float(max(0, before - after))))
    return Bar(name=name, place=_KEPT, segments=segments, text=text)


def _ledger(s: Any) -> str:
    rows: list[tuple[str, str, str, str]] = [
        (
            "test accuracy, %",
            figures.points(s["accuracy_dense"], "accuracy"),
            figures.points(s["accuracy"], "accuracy"),
            figures.points(s["accuracy"] - s["accuracy_dense"], "accuracy", sign=True),
        )
    ]
    counted: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
        ("parameters", "parameters", figures.count),
        ("multiply-adds per example", "multiply_adds", figures.count),
        ("stored weights, Mbit", "model_bits", figures.megabits),
        ("ONNX file, bytes", "onnx_bytes", figures.count),
    )
    for label, key, write in counted:
        a, b = s.get(f"{key}_dense"), s.get(key)
        if a is not None and b is not None:
            rows.append((label, write(a), write(b), f"{figures.ratio(a / b if b else None)} less"))
    if s.get("seconds"):
        label = f"{_engine(s['engine'])}, ms a batch of {s['batch']}"
        faster = f"{figures.ratio(s['times_faster'])} as fast"
        rows.append((label, _ms(s["seconds_dense"]), _ms(s["seconds"]), faster))
    body = "".join(
        f'<tr class="main"><th scope="row">{escape(label)}</th><td class="against">{a}</td><td>{b}</td>'
        f'<td class="against">{escape(ratio)}</td></tr>'
        for label, a, b, ratio in rows
    )
    return (
        '<div class="scroll"><table class="ledger"><thead><tr><th></th><th scope="col">dense</th>'
        f'<th scope="col">compressed</th><th scope="col"></th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _timed(timings: Timings | None) -> str:
    if timings is None:
        return ""
    content = _table("Timings", TITLES, timings.cells())
    return _section("How fast it is", " ".join(timings.notes()), content)


def _made(s: Any) -> str:
    told = {
        "method": s["method"],
        "candidate": s["candidate"] or "none",
        "seed": s["seed"],
        "validation": f"{s['validation_examples']} examples",
        "seconds in all": figures.seconds(s["wall_s"]),
        "sterna": s["sterna"],
    }
    items = "".join(f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in told.items())
    return f"<dl>{items}</dl>"


def _cautions(outcome: "Outcome") -> str:
    inner = "".join(f"<li>{escape(text)}</li>" for text in outcome.told)
    return f'<ul class="cautions">{inner}</ul>' if inner else ""


def _section(title: str, note: str, content: str) -> str:
    if not content:
        return ""
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{title}</h2>{said}\n{content}\n</section>"


def _asset(name: str) -> str:
    return files("sterna.runs").joinpath(name).read_text(encoding="utf-8")


def _engine(name: str) -> str:
    return {"onnxruntime": "ONNX Runtime", "eager": "eager torch", "compiled": "torch.compile"}[
        name
    ]


def _ms(seconds: float) -> str:
    return figures.seconds(1e3 * seconds)


def _share(after: float, before: float) -> str:
    share = 100 * after / before
    return f"{share:.1f} %" if share < 9.95 else f"{share:.0f} %"
