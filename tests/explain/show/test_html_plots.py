"""The report's plots."""

from __future__ import annotations

import numpy as np
import pytest

from fusion_compile.explain._show import html_plots
from tests.explain import report_data


def test_a_long_curve_keeps_its_peak() -> None:
    from matplotlib.figure import Figure

    curve = [1000] * 20_000
    curve[12_345] = 9_000_000
    axes = Figure().add_axes((0, 0, 1, 1))
    html_plots._step(axes, curve, "ink", fill=False)
    drawn = np.asarray(axes.lines[0].get_xydata())
    assert len(drawn) < 2000
    assert [12_345, 9_000_000] in drawn.tolist()


def test_the_ridge_is_where_compute_and_memory_take_equally_long() -> None:
    nodes = report_data.step_nodes(2)
    ridge = report_data.PEAK_FLOPS / report_data.BANDWIDTH
    assert html_plots._ridge(nodes) == pytest.approx(ridge)
    assert html_plots._ridge([node for node in nodes if node["flops"] == 0]) is None
    assert html_plots._ridge([node for node in nodes if node["flops"] > 1e10]) is None


def test_the_legend_is_framed_and_says_that_it_is_one() -> None:
    nodes = report_data.step_nodes(2)
    (wide, narrow) = html_plots.cost_plots({"nodes": nodes}, ["forward", "backward"], "salt")
    for plot in (wide, narrow):
        assert "Legend:" in plot.svg
        legend = plot.svg[plot.svg.index("Legend:") :]
        assert "forward" in legend and "backward" in legend
