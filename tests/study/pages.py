"""Pages of reports, read back."""

from html.parser import HTMLParser
from pathlib import Path

from src.study.report.make_report import write_report
from tests.study import synthetic
from tests.study.synthetic import Arm

ARMS = {
    "none": Arm(num_failing=6),
    "shaken": Arm(num_failing=5, first=320, acts_from=240),
    "router_eps": Arm(loss=(2.01, 2.03, 2.02)),
    "warmdown": Arm(num_failing=2, acts_from=240, spikes=([300], [])),
    "early_stop": Arm(acts_from=280, steps=280),
}


class Page(HTMLParser):
    """The elements of a page, and its tables by title."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._rows: list[list[str]] = []
        self._in_cell = False
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._rows = self.tables.setdefault(dict(attrs)["aria-label"], [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
            self._in_cell = True
        elif tag == "small":
            self._rows[-1][-1] += "|"

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data):
        if self._in_cell:
            self._rows[-1][-1] += data

    def table(self, start: str) -> list[list[str]]:
        """The body of the one table whose title begins so."""
        (rows,) = (rows for title, rows in self.tables.items() if title.startswith(start))
        return rows[1:]


def report(study, tmp_path):
    files = write_report(study, tmp_path / "out", show=False)
    return files, Page(files.page)


def full_report(folder):
    """A study of five arms and its report."""
    study = synthetic.study(folder, ARMS)
    files = write_report(study, show=False)
    return study, files, Page(files.page)
