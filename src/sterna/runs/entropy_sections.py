"""What the page says of weight entropy: bits a weight through training, of the model and layer by layer."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from sterna.runs import figures
from sterna.runs.charts import Measure, available, line_chart, swatch
from sterna.runs.curves import Curve, score_curves
from sterna.runs.reading import Finished, Row
from sterna.runs.server_sections import Section

FIXED, RELATIVE = "fixed_bits", "relative_bits"
_MEASURES = {
    FIXED: Measure(key="entropy-fixed", title="At a fixed step", unit=" bits", from_start=True),
    RELATIVE: Measure(
        key="entropy-relative", title="At a relative step", unit=" bits", from_start=True
    ),
}

Drawn = list[tuple[Measure, list[Curve]]]


def entropy_curves(runs: Sequence[Finished]) -> Drawn:
    """Bits a weight of the whole model at each evaluation, at both steps; empty where none was noted."""
    flat = [replace(run, evaluations=[_flat(row) for row in run.evaluations]) for run in runs]
    found = ((measure, score_curves(flat, key)) for key, measure in _MEASURES.items())
    return [(measure, curves) for measure, curves in found if available(curves, "step")]


def _flat(row: Row) -> Row:
    noted = row.get("entropy") or {}
    return {**row, FIXED: noted.get(FIXED), RELATIVE: noted.get(RELATIVE)}


def entropy_section(
    runs: Sequence[Finished], drawn: Drawn, places: Mapping[str, int]
) -> Section | None:
    """The curves, and a table of all layers that unfolds; None where there is nothing to draw.

    Args:
        runs: in the order of the page.
        drawn: what `entropy_curves` found.
        places: of the experiments, for their colours.
    """
    if not drawn:
        return None
    noted = {
        run.folder: [r["entropy"] for r in run.evaluations if r.get("entropy")] for run in runs
    }
    first = next(rows[0] for rows in noted.values() if rows)
    names = {curve.name for _, curves in drawn for curve in curves}
    legend = "".join(
        f"<li>{swatch(place)}{escape(name)}</li>" for name, place in places.items() if name in names
    )
    said = {
        FIXED: f"steps of {figures.plain(first.get('step'))}",
        RELATIVE: f"steps of {figures.plain(first.get('relative_step'))} of a tensor\u2019s root mean square",
    }
    keys = {measure.key: key for key, measure in _MEASURES.items()}
    shown = "".join(
        f"<figure><figcaption>{measure.title}<br><span>bits a weight, "
        f"{said[keys[measure.key]]}</span></figcaption>{line_chart(curves, measure, 'step')}</figure>"
        for measure, curves in drawn
    )
    content = f'<ul class="legend">{legend}</ul>\n' if len(names) > 1 else ""
    content += f'<div class="pair">{shown}</div>\n{_layers(runs, noted)}'
    note = (
        "Empirical entropy of the weights, rounded to whole steps: what an entropy coder would make of them. "
        "At a fixed step it follows the weights\u2019 size, and falls where weight decay shrinks them; at a "
        "relative one only the shape of their distribution counts."
    )
    return Section("Weight entropy", note, content)


def _layers(runs: Sequence[Finished], noted: Mapping[Path, Sequence[Row]]) -> str:
    """Every layer of every experiment, before and after training, mean over the seeds."""
    groups: dict[str, list[Sequence[Row]]] = {}
    for run in runs:
        if noted[run.folder]:
            groups.setdefault(run.experiment, []).append(noted[run.folder])
    heads = "".join(
        f'<th scope="col">{head}</th>'
        for head in ("fixed, at first", "at last", "relative, at first", "at last")
    )
    parts = [
        '<div class="scroll" tabindex="0" role="region" aria-label="Weight entropy of each layer">'
        f'<table class="workers"><thead><tr><th scope="col">bits a weight</th>{heads}</tr></thead>'
    ]
    count = 0
    for name, seeds in groups.items():
        layers = list(seeds[0][-1].get("layers", {}))
        count += len(layers)
        parts.append(
            f'<tbody><tr class="group"><th scope="rowgroup" colspan="5">{escape(name)}</th></tr>'
        )
        for layer in layers:
            cells = "".join(
                f"<td>{_mean(seeds, at, layer, which)}</td>" for which in (0, 1) for at in (0, -1)
            )
            parts.append(f'<tr><th scope="row">{escape(layer)}</th>{cells}</tr>')
        parts.append("</tbody>")
    parts.append("</table></div>")
    return (
        f'<details><summary>Layer by layer <span class="of">{count} parameter tensors</span></summary>'
        f"<div>{''.join(parts)}</div></details>"
    )


def _mean(seeds: Sequence[Sequence[Row]], at: int, layer: str, which: int) -> str:
    values = [rows[at].get("layers", {}).get(layer) for rows in seeds]
    known = [float(value[which]) for value in values if value is not None]
    return f"{sum(known) / len(known):.2f}" if known else figures.MISSING
