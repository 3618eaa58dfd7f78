"""The style sheet of the HTML report: light or dark, as the reader's system says."""

from __future__ import annotations

from typing import Final

STYLE: Final = """
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #ffffff; --text: #1c2330; --soft: #5b6472; --edge: #dfe3e9;
  --integer: #10a37f; --float: #f59e0b; --passthrough: #b6bfcc; --broken: #ef4444;
  --good: #0b7a5f; --bad: #c81e1e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10141b; --card: #181e28; --text: #e4e8ee; --soft: #98a2b3; --edge: #2c3543;
    --passthrough: #485365; --good: #34d399; --bad: #f87171;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 24px; max-width: 1320px; background: var(--page); color: var(--text);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
}
h1 { margin: 0; font-size: 24px; }
h2 { margin: 0 0 12px; font-size: 17px; }
h3 { margin: 16px 0 4px; font-size: 14px; overflow-wrap: anywhere; }
h3:first-child { margin-top: 0; }
p { margin: 4px 0 12px; }
.soft { color: var(--soft); }
.good { color: var(--good); }
.bad { color: var(--bad); font-weight: 600; }
.paths { margin: 4px 0 16px; color: var(--soft); overflow-wrap: anywhere; }
section {
  margin: 0 0 16px; padding: 16px 20px; background: var(--card); border: 1px solid var(--edge);
  border-radius: 10px; overflow-x: auto;
}
.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); }
.card {
  padding: 12px 16px; background: var(--card); border: 1px solid var(--edge); border-radius: 10px;
}
.cards { margin-bottom: 16px; }
.card b { display: block; font-size: 22px; line-height: 1.3; overflow-wrap: anywhere; }
.card span { color: var(--soft); font-size: 12px; }
.pair { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(360px, 1fr)); }
.pair > * { min-width: 0; }
table { width: 100%; border-collapse: collapse; }
th { color: var(--soft); font-weight: 600; text-align: left; white-space: nowrap; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--edge); vertical-align: top; }
td { overflow-wrap: anywhere; }
tbody tr:last-child td { border-bottom: 0; }
td.quantity, th.quantity { text-align: right; white-space: nowrap; }
.quantity { font-variant-numeric: tabular-nums; }
details { margin: 8px 0 0; }
summary { cursor: pointer; color: var(--soft); }
ul { margin: 0; padding-left: 20px; }
li { overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 10px; color: var(--soft); }
.legend i, .map i { display: inline-block; width: 12px; height: 12px; border-radius: 2px; }
.legend i { margin-right: 6px; vertical-align: -1px; }
.map { display: flex; flex-wrap: wrap; gap: 2px; max-height: 420px; overflow-y: auto; }
.map.many { gap: 1px; }
.map.many i { width: 7px; height: 7px; border-radius: 1px; }
.map i:hover { outline: 2px solid var(--text); }
i.q { background: var(--integer); }
i.f { background: var(--float); }
i.p { background: var(--passthrough); }
i.x { background: var(--broken); }
.chart { width: 100%; }
.chart .main-svg text { fill: var(--text) !important; }
.chart .main-svg .gridlayer path { stroke: var(--edge) !important; }
.chart .main-svg .hoverlayer .hovertext path,
.chart .main-svg .hoverlayer .legend rect {
  fill: var(--card) !important; stroke: var(--edge) !important;
}
"""
