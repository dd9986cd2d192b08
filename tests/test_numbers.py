# SPDX-License-Identifier: Apache-2.0
"""Every performance number in README.md and docs/ comes from a committed measurement, and those are sound."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "bench" / "results").glob("*/*.json"))


def test_documents_say_what_was_measured():
    assert report.check(ROOT) == []


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_results_are_sound(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["format"] == 1
    assert (record["machine"], record["op"]) == (path.parent.name, path.stem)
    assert re.fullmatch(r"[0-9a-f]{12}", record["commit"]), "results must come from a commit without further changes"
    assert record["cases"]
    for name, case in record["cases"].items():
        assert "failed" not in case, f"{name}: {case['failed']}"
        assert case["time"]["p20"] <= case["time"]["median"] <= case["time"]["p80"]
        if "floor" in case:
            assert case["error"] <= case["allowed_error"]
            assert case["percent_of_floor"] == pytest.approx(100 * case["floor"] / case["time"]["median"], rel=1e-3)
        for peer in case.get("peers", {}).values():
            assert "refused" in peer or peer["ratio"]["median"] > 0
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(?:home|root|tmp|Users)/", text), "results must not name local paths"
