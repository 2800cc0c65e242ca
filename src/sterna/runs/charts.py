"""Line and bar charts as inline SVG. Colours, dashes and fonts are the page's style sheet's.

Every mark carries class ``sN``, the place of its experiment modulo 8, for its colour; dashes and
markers repeat with other periods, so that lines stay distinct without colour.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from sterna.runs import figures
from sterna.runs.curves import Curve
from sterna.runs.scales import Scale, around, decades, from_tick

COLOURS = 8
DASHES = ("", "7 4", "2 3.5", "11 4 2 4", "5 2.5")
MARKERS = (
    "M4 0A4 4 0 1 1-4 0A4 4 0 1 1 4 0Z",
    "M-3.6-3.6H3.6V3.6H-3.6Z",
    "M0-4.8L4.6 3.4H-4.6Z",
    "M0-5L5 0L0 5L-5 0Z",
    "M0 4.8L4.6-3.4H-4.6Z",
    "M-1.6-4.6H1.6V-1.6H4.6V1.6H1.6V4.6H-1.6V1.6H-4.6V-1.6H-1.6Z",
    "M-4.6-2.2H4.6V2.2H-4.6Z",
)
WIDTH, HEIGHT = 560, 360
LEFT, RIGHT, TOP, BOTTOM = 58, 548, 14, 300
AXIS_LABELS = {
    "step": "steps",
    "seconds": "seconds of training",
    "bits": "bits sent by all workers",
}


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What a chart shows upwards: ``key`` for the page, a title in words, and a factor and unit.

    ``from_start``: whether the value before training stretches the vertical axis.
    """

    key: str
    title: str
    factor: float = 1.0
    unit: str = ""
    from_start: bool = False


def available(curves: Sequence[Curve], axis: str) -> bool:
    """Whether some curve has two points that differ along the axis."""
    return any(_span(curve, axis) for curve in curves)


def _span(curve: Curve, axis: str) -> bool:
    known = [x for x in curve.x[axis].tolist() if math.isfinite(x)]
    return len(known) > 1 and min(known) < max(known)


def line_chart(curves: Sequence[Curve], measure: Measure, axis: str) -> str:
    """One line per experiment with the range over its seeds behind it."""
    curves = [curve for curve in curves if _span(curve, axis)]
    across, up = scales(curves, measure, axis)
    name = f"{measure.key}-{axis}"
    title = f"{measure.title} against {AXIS_LABELS[axis]}"
    ends = "; ".join(f"{c.name} ends at {_last(c, measure)}" for c in curves)
    log = " data-xlog" * across.log + " data-ylog" * up.log
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0"'
        f' aria-labelledby="{name}-t {name}-d" data-measure="{measure.key}" data-axis="{axis}"'
        f' data-x="{across.low!r} {across.high!r}" data-y="{up.low!r} {up.high!r}"{log}>',
        f'<title id="{name}-t">{escape(title)}</title>',
        f'<desc id="{name}-d">{escape(ends)}.</desc>',
        f'<clipPath id="{name}-c"><rect x="{LEFT}" y="{TOP - 6}" width="{RIGHT - LEFT + 6}"'
        f' height="{BOTTOM - TOP + 6}"/></clipPath>',
        *_axes(across, up, axis),
        f'<g clip-path="url(#{name}-c)">',
        *(_band(curve, across, up, measure, axis) for curve in curves if curve.num_seeds > 1),
        *(_line(curve, across, up, measure, axis) for curve in curves),
        "</g>",
        f'<line class="rule" y1="{TOP}" y2="{BOTTOM}"/><g class="dots"></g>',
        "</svg>",
    ]
    return "\n".join(part for part in parts if part)


def scales(curves: Sequence[Curve], measure: Measure, axis: str) -> tuple[Scale, Scale]:
    """The axes. Bits are logarithmic where they span more than 1.5 decades, losses more than 2.

    A linear vertical axis that does not start at zero starts at a tick, so that its label says so.
    The value before training (step 0) does not stretch the vertical axis, but where the measure says so.
    """
    xs = [x for curve in curves for x in curve.x[axis].tolist()]
    log = axis == "bits" and decades(xs) > 1.5
    low, high = around(xs, log=log, zero=not log)
    across = Scale(low=low, high=high, start=LEFT, end=RIGHT, log=log)
    ys = []
    for curve in curves:
        late = len(curve.mean) > 2 and not measure.from_start
        trained = curve.x["step"] > 0 if late else curve.x["step"] >= 0
        for line in (curve.low, curve.high):
            ys += [y * measure.factor for y in line[trained].tolist()]
    finite = [y for y in ys if math.isfinite(y)]
    log = measure.key.endswith("loss") and min(finite, default=0) > 0 and decades(finite) > 2
    low, high = around(ys, log=log)
    if measure.key == "accuracy":
        low, high = max(low, 0.0), min(high, 100.0 * 1.002)
    low = low if log else from_tick(low, high)
    return across, Scale(low=low, high=high, start=BOTTOM, end=TOP, log=log)


def _axes(across: Scale, up: Scale, axis: str) -> list[str]:
    parts = ['<g class="grid">']
    up_ticks, across_ticks = up.ticks(), across.ticks()
    for tick in up_ticks:
        y = _n(up(tick))
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/>')
    parts += ["</g>", '<g class="ticks">']
    for tick in up_ticks:
        parts.append(
            f'<text x="{LEFT - 10}" y="{_n(up(tick))}" dy=".34em" text-anchor="end">'
            f"{figures.compact(tick)}</text>"
        )
    for tick in across_ticks:
        x = _n(across(tick))
        anchor = ' text-anchor="end"' if across(tick) > RIGHT - 14 else ' text-anchor="middle"'
        parts.append(f'<line x1="{x}" x2="{x}" y1="{BOTTOM}" y2="{BOTTOM + 5}"/>')
        parts.append(f'<text x="{x}" y="{BOTTOM + 24}"{anchor}>{figures.compact(tick)}</text>')
    parts.append("</g>")
    label = AXIS_LABELS[axis] + (", logarithmic" if across.log else "")
    parts.append(f'<line class="base" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    parts.append(
        f'<text class="label" x="{RIGHT}" y="{HEIGHT - 10}" text-anchor="end">{label}</text>'
    )
    if up.log:
        parts.append(f'<text x="{LEFT}" y="{HEIGHT - 10}">upwards logarithmic</text>')
    return parts


def _stretches(
    curve: Curve, ys: Sequence[float], across: Scale, up: Scale, axis: str
) -> list[list[tuple[float, float, int]]]:
    """Places of the points in unbroken stretches: a value without a place makes a gap."""
    found: list[list[tuple[float, float, int]]] = [[]]
    for i, (x, y) in enumerate(zip(curve.x[axis].tolist(), ys, strict=True)):
        if across.shows(x) and up.shows(y):
            found[-1].append((across(x), up(y), i))
        elif found[-1]:
            found.append([])
    return [stretch for stretch in found if stretch]


def _line(curve: Curve, across: Scale, up: Scale, measure: Measure, axis: str) -> str:
    ys = [y * measure.factor for y in curve.mean.tolist()]
    stretches = _stretches(curve, ys, across, up, axis)
    path = "".join("M" + "L".join(f"{_n(x)} {_n(y)}" for x, y, _ in s) for s in stretches)
    points = [point for stretch in stretches for point in stretch]
    every = 1 if len(points) <= 16 else len(points) / 7
    shift = (0.5 + 0.37 * curve.place) % 1 if every > 1 else 0  # keeps markers apart
    chosen = {round(every * (i + shift)) for i in range(len(points))}
    shape = MARKERS[curve.place % len(MARKERS)]
    marks = "".join(
        f'<path d="{shape}" transform="translate({_n(x)} {_n(y)})"/>'
        for k, (x, y, _) in enumerate(points)
        if k in chosen
    )
    dash = DASHES[curve.place % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<g class="s{curve.place % COLOURS}"><path class="line" d="{path}"{dashed}/>'
        f'<g class="marks">{marks}</g></g>'
    )


def _band(curve: Curve, across: Scale, up: Scale, measure: Measure, axis: str) -> str:
    lows = [y * measure.factor for y in curve.low.tolist()]
    highs = [y * measure.factor for y in curve.high.tolist()]
    path = ""
    for stretch in _stretches(curve, lows, across, up, axis):
        forth = [(x, up(highs[i])) for x, _, i in stretch if up.shows(highs[i])]
        back = [(x, y) for x, y, _ in reversed(stretch)]
        path += "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in itertools.chain(forth, back)) + "Z"
    return f'<path class="band s{curve.place % COLOURS}" d="{path}"/>'


def _last(curve: Curve, measure: Measure) -> str:
    value = float(curve.mean[-1]) * measure.factor
    return f"{figures.plain(value)}{measure.unit}" if math.isfinite(value) else "no finite value"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One experiment's bar: segments as (name, length or None), and the text beside its name."""

    name: str
    place: int
    segments: Sequence[tuple[str, float | None]]
    text: str


def bar_chart(bars: Sequence[Bar], key: str, title: str) -> str:
    """Horizontal bars from zero; the first segment is filled, the second hatched."""
    row, width = 58, WIDTH - 2
    height = row * len(bars) + 4
    longest = max(math.fsum(v or 0.0 for _, v in bar.segments) for bar in bars) or 1.0
    told = "; ".join(f"{bar.name}: {bar.text}" for bar in bars)
    parts = [
        f'<svg class="bars" viewBox="0 0 {WIDTH} {height}" role="img"'
        f' aria-labelledby="{key}-t {key}-d">',
        f'<title id="{key}-t">{escape(title)}</title><desc id="{key}-d">{escape(told)}.</desc>',
        f'<defs><pattern id="{key}-h" width="6" height="6" patternUnits="userSpaceOnUse"'
        ' patternTransform="rotate(45)"><line class="hatch" x1="0" x2="0" y1="0" y2="6"/>'
        "</pattern></defs>",
    ]
    for i, bar in enumerate(bars):
        top, x = row * i, 1.0
        parts.append(f'<text class="name" x="0" y="{top + 20}">{escape(bar.name)}</text>')
        parts.append(
            f'<text class="value" x="{WIDTH}" y="{top + 20}" text-anchor="end">'
            f"{escape(bar.text)}</text>"
        )
        parts.append(f'<g class="s{bar.place % COLOURS}">')
        for k, (name, value) in enumerate(bar.segments):
            if value:
                length = value / longest * width
                shape = f'x="{_n(x)}" y="{top + 30}" width="{_n(length)}" height="14"'
                hatched = f'<rect {shape} fill="url(#{key}-h)"/>' if k else ""
                parts.append(
                    f'<g><title>{escape(name)}</title><rect class="part{k}" {shape}/>{hatched}</g>'
                )
                x += length
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"])


def swatch(place: int) -> str:
    """A short piece of an experiment's line with its marker, for legends."""
    dash = DASHES[place % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<svg class="swatch s{place % COLOURS}" viewBox="0 0 34 12" aria-hidden="true">'
        f'<path class="line" d="M1 6H33"{dashed}/><g class="marks">'
        f'<path d="{MARKERS[place % len(MARKERS)]}" transform="translate(17 6)"/></g></svg>'
    )


def _n(value: float) -> str:
    """A place with one decimal, as short as it goes."""
    return f"{value:.1f}".removesuffix(".0")
