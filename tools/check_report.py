"""Open a report.html in headless Chromium: every chart is drawn, the console silent.

    python tools/check_report.py report.html [--png report.png] [--dark]

Saves a picture of the page. Exit code 1 when the page wrote to the console (an error, or something
that its content security policy refused to load) or a chart has no drawing in it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT_SECONDS = 120
SETTLE_MILLISECONDS = 8000  # of virtual time, for plotly.js to draw


class Charts(HTMLParser):
    """Collects the id of each chart, and whether an svg was drawn into it."""

    def __init__(self) -> None:
        """Start with no chart found."""
        super().__init__()
        self.drawn: dict[str, bool] = {}
        self._open = ""  # id of the last chart that was opened in this section

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Note a chart that opens, or the svg in the chart before."""
        values = dict(attributes)
        if "chart" in (values.get("class") or "").split():
            self._open = values.get("id") or f"chart without id {len(self.drawn)}"
            self.drawn[self._open] = False
        elif tag == "section":
            self._open = ""
        elif tag == "svg" and self._open:
            self.drawn[self._open] = True


def run_browser(browser: str, page: Path, options: list[str]) -> tuple[str, str]:
    """Run `browser` on `page` with a fresh profile; return its standard output and error."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0",
            f"--virtual-time-budget={SETTLE_MILLISECONDS}", *options, page.resolve().as_uri(),
        ]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True
        )
    return done.stdout, done.stderr


def problems_of(dom: str, log: str) -> list[str]:
    """Return what is wrong with a page, from its DOM and the browser's log."""
    charts = Charts()
    charts.feed(dom)
    problems = [line for line in log.splitlines() if ":CONSOLE" in line]
    problems += [f"{name}: nothing is drawn" for name, drawn in charts.drawn.items() if not drawn]
    if not charts.drawn:
        problems.append("the page has no chart")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--png", type=Path, help="picture (default: beside the page)")
    parser.add_argument("--size", default="1400,3600", help="window, WIDTH,HEIGHT in pixels")
    parser.add_argument("--dark", action="store_true", help="as a reader with a dark desktop")
    parser.add_argument("--browser", default=next(filter(shutil.which, BROWSERS), ""))
    arguments = parser.parse_args()
    if not arguments.browser or not arguments.page.is_file():
        parser.error(f"needs one of {', '.join(BROWSERS)}, and the file {arguments.page}")
    picture = arguments.png or arguments.page.with_suffix(".png")
    options = [f"--window-size={arguments.size}"]
    if arguments.dark:
        options.append("--blink-settings=preferredColorScheme=0")
    shot = [*options, f"--screenshot={picture.resolve()}"]
    run_browser(arguments.browser, arguments.page, shot)
    dom, log = run_browser(arguments.browser, arguments.page, [*options, "--dump-dom"])
    problems = problems_of(dom, log)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{arguments.page}: {len(problems)} problems, picture in {picture}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
