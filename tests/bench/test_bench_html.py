# SPDX-License-Identifier: Apache-2.0
"""The report of benchmarks: everything is in it, it needs nothing else, and a browser shows it well on a phone."""

from __future__ import annotations

import copy
import html as escaping
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from harness import curves, html

COMMITTED = sorted((Path(__file__).resolve().parents[2] / "bench" / "results").glob("*/*.json"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FRAMES = {"phone-light": (390, "light"), "phone-dark": (390, "dark"), "desktop": (1280, "light")}


def timed(seconds: float) -> dict[str, Any]:
    return {"median": seconds, "p20": 0.9 * seconds, "p80": 1.2 * seconds, "samples": 9}


def peer(ratio: float, error: float = 1e-3) -> dict[str, Any]:
    return {"time": timed(2e-3 * ratio), "ratio": timed(ratio), "mode": "loop", "error": error}


def result(**changes: Any) -> dict[str, Any]:
    peers = {"sdpa": peer(2.5), "coarse": peer(0.5, error=0.2), "slow": peer(400.0), "absent": {"refused": "not here"}}
    return {
        "time": timed(2e-3), "mode": "loop", "error": 1e-3, "allowed_error": 3e-2, "copies": 1, "peers": peers,
        "rotated_times_cache": 1.0, "notes": ["a slow path"], "dtype": "bfloat16", "bytes": 10**7, "flops": 10**9,
        "bound": "memory", "floor": 5e-4, "percent_of_floor": 25.0, "rate": 5e9, "rate_unit": "B/s",
    } | changes  # fmt: skip


def run() -> dict[str, Any]:
    long_name = "a-model-with-a-long-name-and-shapes-of-every-kind-b8-t64-p8192-int8-window128-sinks"
    cases = {long_name: result(extra_bytes=3 * 10**6), "<script>alert(1)</script>": result(peers={})}
    cases["broken"] = {"failed": "ValueError: x & y"}
    for items in (0, 4096):
        for x in (1, 16, 65536):
            curve = {"series": f"series of {items}", "axis": "tokens", "x": x, "baseline": "sdpa", "items": items * x}
            cases[f"curve-{items}-{x}"] = result(curve=curve, time=timed(1e-5 * x))
    ceiling = {"unit": "B/s", "median": 2e10, "min": 1e10, "max": 3e10, "readings": 5, "best_by_source": {"sum": 3e10}}
    cpu = {"name": "A CPU", "architecture": "x86_64", "cores": 2, "features": ["avx2"], "caches": {"L2": 2**21}}
    gpu = {"name": "A GPU", "compute_capability": [9, 0], "l2_bytes": 50 << 20, "memory_bytes": 80 << 30}
    return {
        "format": 1, "op": "demo", "machine": "some-machine", "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789ab", "command": "python bench/demo.py " + "--option value " * 40,
        "hardware": {"cpu": cpu | {"memory_bytes": 2**34}, "gpu": gpu},
        "versions": {"python": "3.12", "torch": "2.11"},
        "settings": {"device": "cuda", "threads": 2, "rotation_times_cache": 3.0},
        "ceilings": {"bandwidth": ceiling}, "cases": cases,
    }  # fmt: skip


def committed() -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in COMMITTED]


def test_everything_is_said():
    text = html.render([run()])
    plain = escaping.unescape(re.sub(r"<[^>]+>", " ", text))
    for words in (
        "A GPU, compute capability 9.0", "80 GB", "A CPU (x86_64), 2 cores, 2 threads used", "torch 2.11",  # machine
        "demo", "commit 0123456789ab, 2026-01-02", "python bench/demo.py --option value",
        "2.00 ms (1.80–2.40)", "25 %", "500 µs memory", "5.00 GB/s", "1e-03", "3 MB",  # a case
        "2.50x", "0.50x*", "400x", "failed: ValueError: x & y",
        "20.0 GB/s", "10.0 GB/s – 30.0 GB/s",  # ceilings
        "absent refused: not here", "a slow path",
        "series of 0: times as fast as sdpa", "series of 4096: tokens per second", "65536", "64k",  # curves
    ):  # fmt: skip
        assert " ".join(words.split()) in " ".join(plain.split()), words
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text


def test_verdicts_need_most_rounds():
    def verdict(p20: float, p80: float) -> str:
        ratio = {"median": (p20 + p80) / 2, "p20": p20, "p80": p80, "samples": 9}
        return html._ratio(result(peers={"sdpa": peer(1.0) | {"ratio": ratio}}), "sdpa")["style"]

    assert [verdict(1.1, 1.3), verdict(0.9, 1.2), verdict(0.5, 0.8)] == ["ahead", "even", "behind"]


def test_it_asks_for_nothing():
    text = html.render([run(), *committed()])
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|<(?:script|link|img|iframe|object|embed)\b|\burl\(|@import|\b(?:src|srcset)=", text)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', text))


def test_several_machines_are_told_apart():
    other = copy.deepcopy(run()) | {"machine": "another-machine", "commit": "unknown"}
    other["versions"]["torch-kernels"] = "1.2.3"
    text = html.render([run(), other])
    assert "demo on some-machine" in text and "demo on another-machine" in text
    assert "torch-kernels 1.2.3" in text
    anchors = re.findall(r'<section id="([^"]*)"', text)
    assert len(set(anchors)) == 2 and set(re.findall(r'href="#([^"]*)"', text)) == set(anchors)


def test_axes_show_whole_powers():
    assert curves._powers(10, [3e-3, 20.0]) == [1e-3, 1e-2, 0.1, 1, 10, 100]
    assert curves._powers(2, [0.7, 1.0]) == [0.5, 1]
    assert curves._powers(2, [1.0, 1.0]) == [1, 2]
    assert [curves._fraction(x) for x in (0.125, 1.0, 16.0)] == ["1/8", "1", "16"]
    assert [curves.length(x) for x in (0.5, 300.0, 1024.0, 2.0**20)] == ["0.5", "300", "1k", "1M"]


SHOW = """<!doctype html><body>%s<pre id="seen"></pre><script>
addEventListener("load", () => {
  const seen = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow;
    const style = selector => view.getComputedStyle(page.querySelector(selector));
    seen[frame.id] = {
      width: view.innerWidth, needed: root.scrollWidth, height: root.scrollHeight, text: page.body.innerText,
      requests: view.performance.getEntriesByType("resource").map(entry => entry.name),
      page: style("body").backgroundColor,
      inks: ["body", "a", "th", ".faint", ".muted", ".ahead", ".behind", "svg text"].map(
        selector => selector === "svg text" ? style(selector).fill : style(selector).color),
      shapes: ["svg", ".bar i", ".line path"].flatMap(selector => [...page.querySelectorAll(selector)].map(shape => {
        const box = shape.getBoundingClientRect();
        return [box.left, box.right, box.width];
      })),
      smallest: Math.min(...[...page.querySelectorAll("svg")].map(svg => 11 * svg.getBoundingClientRect().width / 400)),
    };
  }
  document.getElementById("seen").textContent = JSON.stringify(seen);
});
</script>"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a browser makes of the report in each frame, whose colour scheme the page takes for the system's."""
    if CHROMIUM is None:
        pytest.skip("no browser: apt-get install chromium")
    report = escaping.escape(html.render([run(), *committed()]))
    frames = [
        f'<iframe id="{name}" style="border:0; width:{width}px; color-scheme:{scheme}" srcdoc="{report}"></iframe>'
        for name, (width, scheme) in FRAMES.items()
    ]
    folder = tmp_path_factory.mktemp("browser")
    (folder / "show.html").write_text(SHOW % "".join(frames), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    command = [CHROMIUM, *options, (folder / "show.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = re.search(r'<pre id="seen">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-3000:]
    return json.loads(escaping.unescape(found[1]))


@pytest.mark.parametrize("frame", FRAMES)
def test_it_fits_and_is_all_there(seen, frame):
    page = seen[frame]
    assert page["width"] == FRAMES[frame][0]
    assert page["needed"] <= page["width"]
    assert page["requests"] == []
    for words in (
        "torch-kernels benchmarks",
        "A GPU",
        "demo",
        "2.50x",
        "series of 0",
        "Ceilings",
        "Notes (",
        *[r["op"] for r in committed()],
    ):
        assert words in page["text"], words
    assert page["shapes"] and all(0 <= left and right <= page["width"] for left, right, _ in page["shapes"])
    assert max(width for _, _, width in page["shapes"]) > 300
    assert page["smallest"] >= 9  # of the letters in drawings, in pixels


def luminance(color: str) -> float:
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


def test_both_themes_are_readable(seen):
    light, dark = seen["phone-light"], seen["phone-dark"]
    assert luminance(light["page"]) > 0.8 > 0.1 > luminance(dark["page"])
    for page in (light, dark):
        for ink in page["inks"]:
            low, high = sorted((luminance(ink), luminance(page["page"])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, page["page"])  # WCAG AA
