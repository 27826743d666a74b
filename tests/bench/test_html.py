from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtool.bench.html import html_report, write_html
from llmtool.bench.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Series, render, ticks
from llmtool.errors import LLMToolError
from tests.bench.made import made_records, made_result, made_run


class Page(HTMLParser):
    """Collects links to anything outside, the text, and tags left open."""

    VOID = frozenset({"meta", "line", "circle", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.charts = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.charts += tag == "svg"
        self.outside += [
            f"{name}={value}" for name, value in attrs if name in ("src", "href", "xlink:href", "data")
        ]
        if tag in ("script", "link", "iframe", "img", "object"):
            self.outside.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_run_in_one_file() -> None:
    records = made_records(1)
    records[3].success, records[3].error = False, "HTTP 503: <script>alert(1)</script>"
    run = made_run(records, goodput=["ttft:200", "itl:p99:100"])
    html = html_report(made_result(run, label="A & B <test>"))
    page = Page(html)
    assert page.open == []
    assert page.outside == []
    assert not re.search(r"@import|url\(", html)
    assert page.charts == 6  # four latencies, running requests, tokens per second
    assert "A & B <test>" in page.text
    assert "HTTP 503: <script>alert(1)</script>" in page.text  # as text, not as a tag
    m = run.metrics
    for shown in (
        f"{m['mean_ttft_ms']:.1f}",
        f"{m['p99_e2el_ms']:.1f}",
        f"{m['request_throughput']:.2f} /s",
        "119 of 120",
    ):
        assert shown in page.text
    assert "itl:p99:100" in page.text
    assert "ttft:200" in page.text
    assert "1 of 120 requests failed" in page.text


def test_a_sweep_shows_latency_against_rate_and_its_knee() -> None:
    runs = [made_run(made_records(i, scale=1 + i), 1.0 * 2**i) for i in range(4)]
    knee = {
        "request_rate": 4.0,
        "above": 8.0,
        "capacity": 9.0,
        "reason": "the knee lies between 4 and 8 requests/s",
    }
    page = Page(html_report(made_result(*runs, kind="knee", knee=knee)))
    assert page.charts == 6 + 4
    assert "the knee lies between 4 and 8" in page.text
    assert page.outside == []
    assert "request rate 4 /s" in page.text  # the detailed run is the one at the knee


def test_a_run_in_which_nothing_completed() -> None:
    records = made_records(1, n=5)
    for r in records:
        r.success, r.error = False, "gone"
    page = Page(html_report(made_result(made_run(records))))
    assert "0 of 5" in page.text
    assert "5gone" in page.text.replace("\n", "").replace(" ", "")


def test_written_to_a_file_or_not_at_all(tmp_path: Path) -> None:
    result = made_result(made_run(made_records(1, n=6)))
    write_html(result, tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text() == html_report(result)
    with pytest.raises(LLMToolError, match="Cannot write"):
        write_html(result, tmp_path / "none" / "r.html")


@given(st.floats(1e-6, 1e9), st.integers(2, 8))
def test_ticks_are_round_cover_the_data_and_are_few(top: float, wanted: int) -> None:
    values = ticks(top, wanted)
    assert values[0] == 0
    assert values[-1] >= top * (1 - 1e-6)
    assert 2 <= len(values) <= 2 * wanted + 2
    assert f"{values[1]:e}"[0] in "125"


@pytest.mark.parametrize("top", [0.0, 5e-324, 1e-310])
def test_an_axis_of_next_to_nothing(top: float) -> None:
    assert ticks(top) == [0.0, 1.0]


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), max_size=30), st.booleans())
def test_charts_are_well_formed_and_stay_inside_their_frame(
    points: list[tuple[float, float]], step: bool
) -> None:
    points.sort()
    series = Series("<s>", [x for x, _ in points], [y for _, y in points], step=step, dots=True)
    svg = ElementTree.fromstring(render(Chart("a < b", "x", "y & z", (series,), marks=((1.0, "m"),))))
    assert len(svg.findall("circle")) == len(points)
    for circle in svg.findall("circle"):
        assert LEFT - 0.01 <= float(circle.attrib["cx"]) <= WIDTH - RIGHT + 0.01
        assert TOP - 0.01 <= float(circle.attrib["cy"]) <= HEIGHT - BOTTOM + 0.01


def test_a_point_lies_where_its_value_is() -> None:
    chart = Chart("t", "x", "y", (Series("s", [0.0, 5.0, 10.0], [0.0, 50.0, 100.0], dots=True),))
    circles = ElementTree.fromstring(render(chart)).findall("circle")
    xs, ys = ([float(c.attrib[name]) for c in circles] for name in ("cx", "cy"))
    assert xs == [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT]
    assert ys == [HEIGHT - BOTTOM, (HEIGHT - BOTTOM + TOP) / 2, TOP]


def test_long_series_are_thinned_but_keep_their_peak() -> None:
    y = [1.0] * 5000
    y[1234] = 9.0
    svg = ElementTree.fromstring(
        render(Chart("t", "x", "y", (Series("s", list(map(float, range(5000))), y, dots=True),)))
    )
    circles = svg.findall("circle")
    assert len(circles) < 700
    assert min(float(c.attrib["cy"]) for c in circles) < float(circles[0].attrib["cy"]) - 100
