"""The elements that the HTML report is put together from; whatever is not `Html` is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from qpass.report import wording


class Html(str):
    """Text that is HTML already: it came from a function of this module or from a literal."""

    __slots__ = ()


def escape(text: str) -> Html:
    """Return `text` as HTML; `Html` stays as it is."""
    return text if isinstance(text, Html) else Html(html.escape(wording.visible(text)))


def join(parts: Iterable[str]) -> Html:
    """Put `parts` one behind the other, escaped where they have to be."""
    return Html("".join(escape(part) for part in parts))


def element(tag: str, content: str, kind: str = "") -> Html:
    """Return `<tag class=kind>content</tag>`."""
    mark = f' class="{kind}"' if kind else ""
    return Html(f"<{tag}{mark}>{escape(content)}</{tag}>")


def section(title: str, *parts: Html, about: str = "") -> Html:
    """Return one box of the page, with a sentence on how to read it."""
    lead = element("p", about, "soft") if about else Html("")
    return element("section", join((element("h2", title), lead, *parts)))


def details(summary: str, inner: Html) -> Html:
    """Return `inner` folded away under `summary`."""
    return element("details", join((element("summary", summary), inner)))


def bullets(items: Iterable[str]) -> Html:
    """Return a list of `items`."""
    return element("ul", join(element("li", item) for item in items))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], quantities: int = 0) -> Html:
    """Return a table; the last `quantities` columns hold numbers, which stand on the right."""
    first = len(columns) - quantities
    kinds = ["quantity" if index >= first else "" for index in range(len(columns))]

    def line(tag: str, cells: Sequence[str]) -> Html:
        marked = zip(cells, kinds, strict=True)
        return element("tr", join(element(tag, cell, kind) for cell, kind in marked))

    head = element("thead", line("th", columns))
    body = element("tbody", join(line("td", row) for row in rows))
    return element("table", join((head, body)))
