"""The HTML page: complete, escaped, alone, and the same bytes each time."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qpass.errors import UserError
from qpass.report.html import MANY_NODES, MAX_REASONS, page, write_html
from qpass.report.model import FloatOp, MapNode, Report

HOSTILE = "<script>alert('node')</script>"
SCRIPT = "/* plotly.js */"


class Reader(HTMLParser):
    """What a browser makes of a page: its elements, their attributes, and the text of each tag."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def values(self, tag: str, attribute: str) -> list[str]:
        return [value for t, key, value in self.attributes if (t, key) == (tag, attribute)]


def figures_of(text: str) -> dict[str, Any]:
    found = re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    figures: dict[str, Any] = json.loads(found.group(1))
    return figures


def test_every_element_is_closed_in_order(report: Report) -> None:
    reader = Reader(page(report, SCRIPT))
    assert reader.open == []
    assert reader.counts["section"] == 10


def test_all_layers_are_in_the_table(report: Report) -> None:
    cells = Reader(page(report, SCRIPT)).texts["td"]
    for layer in report.layers:
        assert layer.name in cells
    assert "-" in cells  # NaN
    assert "exact" in cells  # infinity


def test_hostile_names_do_not_become_elements(report: Report) -> None:
    """Three scripts are ours: plotly.js, the figures, and the code that draws them."""
    text = page(report, SCRIPT)
    assert Reader(text).counts["script"] == 3
    assert HOSTILE not in text
    assert HOSTILE in Reader(text).texts["td"]
    hostile = replace(
        report,
        model=HOSTILE,
        output=HOSTILE,
        notes=(HOSTILE,),
        rounds=(HOSTILE,),
        options={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
    )
    assert Reader(page(hostile, SCRIPT)).counts["script"] == 3


def test_the_figures_cannot_end_their_element(report: Report) -> None:
    """JSON is not HTML-escaped: `<` travels as its code."""
    text = page(report, SCRIPT)
    data = text[text.index('id="figures">') + len('id="figures">') :]
    assert "<" not in data[: data.index("</script>")]
    assert figures_of(text)["chart-layers"]["data"][0]["hovertemplate"] == "%{text}<br>%{y:.1f} dB"


def test_a_quote_in_a_name_does_not_end_a_tooltip(report: Report) -> None:
    name = 'a" onmouseover="x'
    node = MapNode(name=name, op="Conv", precision="integer", because="why")
    reader = Reader(page(replace(report, graph_map=(node,)), SCRIPT))
    assert reader.values("i", "title") == [f"{name}\nConv, integer\nwhy"]
    assert reader.values("i", "onmouseover") == []


def test_nothing_is_loaded_from_outside(report: Report, tmp_path: Path) -> None:
    """The file as written, with the real plotly.js in it."""
    path = tmp_path / "report.html"
    write_html(report, path)
    reader = Reader(path.read_text(encoding="utf-8"))
    loading = [row for row in reader.attributes if row[1] in ("src", "href", "srcset", "data")]
    assert loading == []
    assert reader.counts["link"] == reader.counts["img"] == reader.counts["iframe"] == 0
    style = "".join(reader.texts["style"])
    assert "url(" not in style
    assert "@import" not in style
    policy = next(value for value in reader.values("meta", "content") if "default-src" in value)
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy


def test_the_file_is_deterministic_and_holds_plotly_once(report: Report, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_html(report, tmp_path / name)
    first = (tmp_path / "a.html").read_bytes()
    assert first == (tmp_path / "b.html").read_bytes()
    assert first.count(b"* plotly.js v") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_without_plotly_the_error_tells_what_to_install(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.delitem(sys.modules, "plotly.offline", raising=False)
    with pytest.raises(UserError, match=r"pip install qpass\[report\]"):
        write_html(report, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_every_figure_has_its_element_and_the_other_way_round(report: Report) -> None:
    text = page(report, SCRIPT)
    elements = re.findall(r'<div class="chart" id="([^"]+)"', text)
    assert elements == [
        "chart-layers",
        "chart-range-0",
        "chart-range-1",
        "chart-range-2",
        "chart-time",
        "chart-memory",
    ]
    assert list(figures_of(text)) == elements


def test_the_map_colours_each_node_and_counts_it(report: Report) -> None:
    text = page(report, SCRIPT)
    cells = re.findall(r'<i class=(\w) title="([^"]*)">', text)
    assert Counter(kind for kind, _ in cells) == {"q": 7, "x": 1, "f": 6, "p": 1}
    broken = next(title for kind, title in cells if kind == "x")
    assert broken.startswith("block[red]/conv[/red]\nConv, integer\n")
    assert "float: 6<" in text
    assert "runs it in float: 1<" in text


def test_a_map_of_many_nodes_is_drawn_smaller_and_stays_small(report: Report) -> None:
    nodes = tuple(
        MapNode(name=f"node_{index}", op="Conv", precision="integer", because="rule")
        for index in range(20_000)
    )
    assert len(nodes) > MANY_NODES
    text = page(replace(report, graph_map=nodes), SCRIPT)
    assert '<div class="map many">' in text
    assert '<div class="map">' in page(report, SCRIPT)
    assert len(text) < 2_000_000  # bytes: about 70 a node


def test_float_leftovers_tell_rule_reason_and_plan(report: Report) -> None:
    reader = Reader(page(report, SCRIPT))
    cells = reader.texts["td"]
    assert cells.index("1 Conv") < cells.index("6 Softmax")
    assert "bias scale" in cells
    assert "the bias is not int32 with scale s_x * s_w" in cells
    listed = next(text for text in reader.texts["p"] if text.startswith("/encoder/layers.0/attn"))
    assert listed.count("Softmax") == 6


def test_many_reasons_are_folded_away_but_all_there(report: Report) -> None:
    ops = tuple(
        FloatOp(node=f"n{index}", op="Gelu", rule=f"rule {index}", reason="why")
        for index in range(MAX_REASONS + 7)
    )
    engine = replace(report.engines[0], float_ops=ops)
    reader = Reader(page(replace(report, engines=(engine,)), SCRIPT))
    assert "7 more reasons" in reader.texts["summary"]
    assert {op.rule for op in ops} <= set(reader.texts["td"])


def test_the_verdict_gates_and_refusals_are_there(report: Report) -> None:
    reader = Reader(page(report, SCRIPT))
    assert reader.texts["span"].count("FAILED") == 2
    assert reader.texts["span"].count("passed") == 1
    assert "REJECTED" in reader.texts["span"]
    assert "no bias to fold" in reader.texts["td"]
    assert "compensate: 1 refusals" in reader.texts["summary"]
    assert "2.71x" in reader.texts["b"]


def test_only_notes_in_capitals_are_marked(report: Report) -> None:
    text = page(report, SCRIPT)
    assert '<li class="bad">RANDOM DATA: accuracy means nothing</li>' in text
    assert "<li>the mse ranges won the trial</li>" in text


def test_a_bare_report_makes_a_page(report: Report) -> None:
    bare = replace(
        report,
        engines=(),
        layers=(),
        gates=(),
        passes=(),
        notes=(),
        rounds=(),
        histograms=(),
        graph_map=(),
        metric=None,
    )
    reader = Reader(page(bare, SCRIPT))
    assert reader.open == []
    assert "OK" in reader.texts["span"]
