"""Where the axes of charts start."""

import pytest

from sterna.runs.charts import BOTTOM, line_chart, scales
from sterna.runs.curves import score_curves
from sterna.runs.reading import collect
from sterna.runs.scales import Scale, from_tick
from unit.test_report import ACCURACY, make_comparison


@pytest.mark.parametrize(
    ("ends", "low"),
    [((67.2, 96), 65), ((99.3, 100.2), 99.2), ((3, 100.2), 0), ((0, 1), 0), ((-0.1, 2), -0.1)],
)
def test_an_axis_above_zero_starts_at_a_label(ends, low):
    found = from_tick(*ends)
    assert found == pytest.approx(low)
    first, *_ = Scale(low=found, high=ends[1], start=0, end=1).ticks()
    assert first == pytest.approx(max(low, 0))


def test_the_lowest_label_of_a_chart_stands_on_its_axis(tmp_path):
    curves = score_curves(collect([make_comparison(tmp_path / "c")])[0], "accuracy")
    assert scales(curves, ACCURACY, "step")[1].low == 40  # 48.1 is the lowest that is shown
    chart = line_chart(curves, ACCURACY, "step")
    assert f'y="{BOTTOM}" dy=".34em" text-anchor="end">40</text>' in chart
