# SPDX-License-Identifier: Apache-2.0
"""Numbers in documents: stale and loose ones are found, sound ones are left alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import report

RECORD = {
    "op": "demo",
    "machine": "box",
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "abc",
    "hardware": {"cpu": {"name": "Some CPU"}},
    "versions": {"torch": "2.9"},
    "settings": {"threads": 4},
    "ceilings": {"bandwidth": {"unit": "B/s", "median": 51.7e9}, "bfloat16": {"unit": "FLOP/s", "median": 1.2e12}},
    "cases": {
        "one": {
            "time": {"median": 0.00214}, "floor": 0.0015, "percent_of_floor": 70.1, "bound": "memory",
            "rate": 36.2e9, "rate_unit": "B/s",
            "peers": {"sdpa": {"ratio": {"median": 2.71}}, "flex": {"refused": "wrong: error 1"}},
        },
        "two": {"failed": "RuntimeError: no"},
    },
}  # fmt: skip
TABLE = """Some CPU, 4 threads, torch 2.9, 2026-01-02, commit abc. \
Measured ceilings: bandwidth 51.7 GB/s, bfloat16 1.20 TFLOP/s.

| case | time | rate | of the floor | sdpa takes | flex takes |
| --- | ---: | ---: | ---: | ---: | ---: |
| one | 2.14 ms | 36.2 GB/s | 70 % (memory) | 2.71x | – |"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "docs" / "ops").mkdir(parents=True)
    results = tmp_path / "bench" / "results" / "box"
    results.mkdir(parents=True)
    (results / "demo.json").write_text(json.dumps(RECORD))
    return tmp_path


def test_a_table(root):
    assert report.render("demo --machine box", root) == TABLE
    assert report.render("demo", root) == TABLE
    assert "flex" not in report.render("demo --peers sdpa", root)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("one time", "2.14 ms"),
        ("one rate", "36.2 GB/s"),
        ("one floor", "1.50 ms"),
        ("one of-floor", "70 %"),
        ("one ratio.sdpa", "2.71x"),
        ("ceiling bandwidth", "51.7 GB/s"),
    ],
)
def test_a_value(root, path, text):
    assert report.render(f"demo --machine box --value '{path}'", root) == text


def test_an_op_without_results_says_so(root):
    assert report.render("other", root) == report.NOTHING


@pytest.mark.parametrize(
    "arguments",
    [
        "other --machine box",
        "demo --machine nowhere",
        "demo --cases three",
        "demo --peers nobody",
        "demo --machine box --value 'two time'",
        "demo --machine box --value 'one ratio.flex'",
        "demo --machine box --value 'one nonsense'",
        "demo --machine box --value 'ceiling int8'",
        "demo --value 'one time'",
        "demo --nonsense",
        "--machine box",
    ],
)
def test_what_is_not_there_is_an_error(root, arguments):
    with pytest.raises(report.ReportError):
        report.render(arguments, root)


def test_writing_makes_a_document_pass_and_a_changed_number_fails(root):
    document = root / "README.md"
    document.write_text(
        "# Title\n\n<!-- generated: bench/report.py demo --machine box -->\n<!-- /generated -->\n\nIt is "
        "<!-- generated: bench/report.py demo --machine box --value 'one ratio.sdpa' -->?<!-- /generated --> faster.\n"
    )
    assert [complaint.split(": ")[0] for complaint in report.check(root)] == ["README.md:3", "README.md:6"]
    document.write_text(report.refresh(document.read_text(), root))
    assert report.check(root) == []
    assert "-->2.71x<!-- /generated --> faster" in document.read_text()
    document.write_text(document.read_text().replace("36.2 GB/s", "46.2 GB/s"))
    assert report.check(root) == ["README.md:3: stale, run python bench/report.py --write"]


def test_new_results_make_documents_stale(root):
    document = root / "docs" / "ops" / "demo.md"
    document.write_text(report.refresh("<!-- generated: bench/report.py demo -->\n<!-- /generated -->", root))
    assert report.check(root) == []
    changed = json.dumps(RECORD).replace("2.71", "2.5")
    (root / "bench" / "results" / "box" / "demo.json").write_text(changed)
    assert len(report.check(root)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "<!-- generated: bench/report.py demo -->\nno end",
        "no start <!-- /generated -->",
        "<!-- generated: bench/report.py demo -->\n<!-- /generated --> <!-- /generated -->",
    ],
)
def test_unbalanced_markers_are_found(root, text):
    (root / "README.md").write_text(text)
    assert any("not closed" in complaint for complaint in report.check(root))


@pytest.mark.parametrize(
    "text",
    [
        "runs 2.7x faster than SDPA",
        "is 3 × slower",
        "3 times as fast",
        "gives a 2x speedup",
        "40% faster",
        "reaches 47.3 GB/s",
        "4.8 TB/s",
        "1,300 GFLOP/s and more",
        "1.3 TFLOPS",
        "takes 12 µs",
        "takes 0.5–0.6 ms per call",
        "85 % of the floor",
        "at 90% of peak",
        "150 tok/s",
        "```\n2.1 ms\n```",
    ],
)
def test_loose_claims_are_found(root, text):
    (root / "docs" / "ops" / "demo.md").write_text(f"# Op\n\n{text}\n")
    assert report.check(root)


@pytest.mark.parametrize(
    "text",
    [
        "error at most 2x that of plain PyTorch",
        "a 64x64 tile, 8 heads, 128 columns, 2 ulp",
        "T = 64 at P = 8192 takes bf16 in 48 KB of shared memory",
        "up to 1024 nodes, 5 % dense",
        "# Published numbers\n\nMedusa is 2.3x faster.\n\n## Where\n\n300 GB/s",
        "## What was tried in October\n\nSmaller tiles: 3 ms.",
        "torch 2.13.0 and Python 3.12",
    ],
)
def test_other_numbers_are_left_alone(root, text):
    (root / "docs" / "ops" / "demo.md").write_text(f"# Op\n\n{text}\n")
    assert report.check(root) == []


def test_an_exempt_section_ends_with_the_next_heading_of_its_level(root):
    (root / "README.md").write_text("## Published numbers\n\n3 ms\n\n### More\n\n4 ms\n\n## Speed\n\n5 ms\n")
    assert report.check(root) == ["README.md:11: '5 ms' is not generated from bench/results"]
