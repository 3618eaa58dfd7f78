"""What the checker of report pages calls a problem; the browser itself is not needed here."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from check_report import problems_of

DRAWN = '<section><div class="chart js-plotly-plot" id="a"><div><svg></svg></div></div></section>'
EMPTY = '<section><div class="chart" id="b"></div></section>'
QUIET = "[1:2:1120/220000.0:INFO:headless.cc(1)] 123 bytes written to file\n"
ERROR = '[1:2:1120/220000.0:INFO:CONSOLE:9] "Uncaught ReferenceError: x", source: file (9)\n'


def test_a_page_with_drawn_charts_and_a_silent_console_is_fine() -> None:
    assert problems_of(DRAWN, QUIET) == []


def test_a_chart_without_svg_is_named() -> None:
    assert problems_of(DRAWN + EMPTY + DRAWN, QUIET) == ["b: nothing is drawn"]


def test_an_svg_of_the_next_section_does_not_count() -> None:
    assert problems_of(EMPTY + "<section><svg></svg></section>", "") == ["b: nothing is drawn"]


def test_what_the_console_says_is_a_problem() -> None:
    assert problems_of(DRAWN, QUIET + ERROR) == [ERROR.strip()]


def test_a_page_without_charts_is_a_problem() -> None:
    assert problems_of("<section></section>", "") == ["the page has no chart"]
