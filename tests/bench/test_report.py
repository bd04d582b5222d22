"""Pictures and the HTML report: complete, self-contained, and drawn by a real browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest

from bench import plots, report, summary
from tests.bench import records

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FACTS = {
    "machine": {"cpu": "a processor", "threads": 2, "memory_gib": 16.0},
    "versions": {"python": "3.11", "onnxruntime": "1.31"},
    "command": "python bench/compare.py --engines 'my engines'",
    "time": "2026-01-01T00:00:00+00:00",
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    everything = records.everything()
    pictures = plots.draw(everything, folder)
    assert [path.name for path in pictures] == ["latency.png", "speedup.png", "memory.png", "operators.png"]
    report.write(folder / "report.html", everything, pictures, proofs=["parity gate green"], facts=FACTS)
    return folder / "report.html"


class Page(HTMLParser):
    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_needs_no_other_file(page: Path):
    parser = Page()
    parser.feed(page.read_text())
    assert not parser.open  # every element is closed
    assert len(parser.links) == 4
    assert all(link.startswith("data:image/png;base64,") for link in parser.links)
    text = re.sub(r"base64,[^\"]+", "", page.read_text())
    assert "://" not in text and "url(" not in text and "@import" not in text


def test_the_report_says_everything(page: Path):
    text = page.read_text()
    for heading in ("What was compared", "Pictures", "Tables", "Machine", "To repeat it", "Limits"):
        assert f"<h2>{heading}</h2>" in text
    assert "At 8,192 tokens of context" in text
    assert "parity gate green" in text
    assert "needs a &lt;GPU&gt; &amp; more" in text
    assert "python bench/compare.py --engines &#39;my engines&#39;" in text
    assert "prefers-color-scheme: dark" in text


def text_of(found: list[records.Record], path: Path) -> str:
    report.write(path, found, [], proofs=[], facts=FACTS)
    return path.read_text()


def test_the_report_says_where_caches_were_random(tmp_path: Path, page: Path):
    some = [*records.pair(30, 10), *records.pair(30, 10, context=512, caches="random")]
    assert "Random caches:" in text_of(some, tmp_path / "report.html")
    assert "Random caches:" not in page.read_text()


def test_the_report_names_every_rate_once(tmp_path: Path):
    slow = {"bytes_per_s": 2.5e9, "flops_per_s": 1.25e12, "how": "copies in fp16"}
    text = text_of([*records.pair(30, 10), *records.pair(9, 5, rates=slow, precision="int4")], tmp_path / "report.html")
    assert text.count("20.0 GB/s, 100.0 GFLOP/s: copies<") == 1
    assert text.count("2.5 GB/s, 1250.0 GFLOP/s: copies in fp16<") == 1


def test_the_report_lists_every_engine_with_the_hashes_of_its_source(tmp_path: Path):
    other = records.timing("sparse", 5, engine="int4/sparse", precision="int4", source={"sha256": "c" * 64})
    facts = {"precision": "fp32", "graph": "a" * 16, "weights": "b" * 16}
    assert report.sources([*records.pair(30, 10), *records.pair(9, 5, context=512), other]) == [
        {"engine": "out/engines/ort/dense", "core": "Attention", **facts},
        {"engine": "out/engines/ort/sparse", "core": "SparseAttention", **facts},
        {"engine": "int4/sparse", "core": "SparseAttention", "precision": "int4", "graph": "c" * 16, "weights": ""},
    ]
    assert "<code>out/engines/ort/sparse</code>" in text_of(records.pair(30, 10), tmp_path / "report.html")


def test_a_panel_shows_the_contexts_of_its_phase_and_tells_what_was_predicted():
    decoding = [record for n in (512, 8192) for record in records.pair(30, 10, context=n)]
    measured = summary.pairs([*decoding, *records.pair(30, 10, context=512, phase="prefill")])
    for figure in (plots.latency(measured, []), plots.speedup(measured)):
        labels = [[tick.get_text() for tick in panel.get_xticklabels()] for panel in figure.axes]
        assert labels == [["512", "8K"], ["512"]]
    marks = [line.get_markerfacecolor() for line in figure.axes[1].lines if line.get_marker() == "o"]
    assert len(set(marks)) == len(marks) == 2


@pytest.mark.parametrize(("highest", "least", "most"), [(1.1, 2, 9), (8, 3, 9), (2000, 4, 14)])
def test_a_logarithmic_axis_has_some_numbers_and_not_too_many(highest: float, least: int, most: int):
    _, panels = plots._panels(summary.pairs(records.pair(30, 10)))
    (panel,) = panels.values()
    panel.plot([1, 2], [0.7, highest])
    plots._log_axis(panel, "{x:g}")
    low, high = panel.get_ylim()
    shown = [tick for tick in panel.get_yticks() if low <= tick <= high]
    assert least <= len(shown) <= most, shown


def test_pictures_are_left_out_where_nothing_was_measured(tmp_path: Path):
    bare = [{**record, "peak_mib": None} for record in records.pair(30, 10)]
    assert [path.name for path in plots.draw(bare, tmp_path)] == ["latency.png", "speedup.png"]


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if not found:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_draws_it(page: Path, browser: str, tmp_path: Path, dark: bool):
    shot = tmp_path / "shot.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,3000", f"--screenshot={shot}"]
    command += ["--force-dark-mode"] if dark else []
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert shot.is_file(), done.stderr[-500:]
    pixels = matplotlib.image.imread(shot)[..., :3]
    corner = pixels[5, 5].mean()
    assert (corner < 0.3) if dark else (corner > 0.9)
    row_has_ink = (abs(pixels - pixels[5, 5]) > 0.2).any(axis=(1, 2))
    assert row_has_ink.mean() > 0.3  # text and pictures down the page
    assert (abs(pixels[..., 2] - pixels[..., 0]) > 0.4).sum() > 500  # coloured lines of the pictures
