# SPDX-License-Identifier: Apache-2.0
"""What the documents say is so: their code runs, their links lead somewhere, what they name exists."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch_kernels import _registry

ROOT = Path(__file__).resolve().parents[1]
WITH_CODE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = ("CHANGELOG.md", "SECURITY.md", "bench/README.md", "bench/results/README.md", "examples/README.md")
ALL = [*WITH_CODE, *(ROOT / name for name in OTHERS)]
OP_PAGES = sorted((ROOT / "docs" / "ops").glob("*.md"))
SOURCES = [
    *(
        path
        for name in ("bench", "csrc", "examples", "python", "scripts", "tests")
        for path in (ROOT / name).rglob("*")
    ),
    *(
        ROOT / name
        for name in ("CITATION.cff", "CMakeLists.txt", "Makefile", "mkdocs.yml", "pyproject.toml", ".ci/run")
    ),
]
FAMILIES = sorted(page.stem for page in OP_PAGES)
HEADINGS = ["Formula", "Shapes and dtypes", "Example", "Accuracy", "Speed", "How the kernel works", "Limits"]

FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\((?P<target>[^)\s]+)\)")
PLACE = re.compile(r"`((?:csrc|python|tests|bench|docs|scripts|examples)/[\w./*-]*)`")
MAKE = re.compile(r"\bmake ([a-z]+)")
PAPER = re.compile(r"\barxiv(?:\s+|\.org/abs/)(\d{4}\.\d{5})\b", re.IGNORECASE)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_blocks(text: str) -> Iterator[tuple[int, str, str]]:
    """(line of the first statement, the words after ```, source) of each fenced block."""
    for match in FENCE.finditer(text):
        yield text.count("\n", 0, match.start("body")) + 1, match["info"].strip(), match["body"]


def run_code(path: Path) -> int:
    """Runs a file's Python blocks in one namespace; returns how many. A block marked ``python gpu`` needs a GPU, one
    marked ``python`` and a package needs that."""
    namespace: dict[str, Any] = {"__name__": path.stem}
    count = 0
    for line, info, source in code_blocks(path.read_text(encoding="utf-8")):
        language, _, needs = info.partition(" ")
        here = not needs or (torch.cuda.is_available() if needs == "gpu" else importlib.util.find_spec(needs))
        if language == "python" and here:
            exec(compile("\n" * (line - 1) + source, str(path), "exec"), namespace)
            count += 1
    return count


def anchors(text: str) -> set[str]:
    """The fragments that GitHub makes of a document's headings."""
    titles = re.findall(r"^#+ +(.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path: Path) -> list[str]:
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text(encoding="utf-8")))
    broken = []
    for match in LINK.finditer(prose):
        place, _, fragment = match["target"].partition("#")
        if re.match(r"\w+:", place):
            continue
        target = (path.parent / place).resolve() if place else path
        if not target.exists() or (fragment and fragment not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(match["target"])
    return broken


def support_matrix() -> ModuleType:
    spec = importlib.util.spec_from_file_location("support_matrix", ROOT / "scripts" / "support_matrix.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", WITH_CODE, ids=name_of)
def test_code_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    count = run_code(path)
    assert count or (path.name != "README.md" and path not in OP_PAGES), "a page without an example"


@pytest.mark.parametrize("path", WITH_CODE, ids=name_of)
def test_quoted_sources_are_so(path):
    """A block of C++ begins with the file that it is from."""
    for _, language, body in code_blocks(path.read_text(encoding="utf-8")):
        if language == "cpp":
            source, _, code = body.removeprefix("// ").partition("\n")
            assert code in (ROOT / source).read_text(encoding="utf-8"), source


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_links_lead_somewhere(path):
    assert broken_links(path) == []


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_places_and_commands_exist(path):
    text = path.read_text(encoding="utf-8")
    assert [place for place in PLACE.findall(text) if not any(ROOT.glob(place))] == []
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    code = "".join(body for _, _, body in code_blocks(text)) + " ".join(re.findall(r"`[^`\n]*`", text))
    assert set(MAKE.findall(code)) <= set(targets)


def test_support_matrix_is_current():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert support_matrix().refresh(text) == text, "run python scripts/support_matrix.py --write"


def test_every_op_has_a_page():
    pages = "".join(page.read_text(encoding="utf-8") for page in OP_PAGES)
    assert [name for name in _registry.OPS if f"`{name}`" not in pages] == []


@pytest.mark.parametrize("path", OP_PAGES, ids=name_of)
def test_op_pages_have_the_same_headings(path):
    titles = re.findall(r"^## (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    assert [title for title in titles if title in HEADINGS] == HEADINGS


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_what_the_checklist_asks_for(family):
    """CONTRIBUTING.md, "Add an op"."""
    csrc, python = ROOT / "csrc" / family, ROOT / "python" / "torch_kernels" / family
    files = [csrc / name for name in ("params.h", "kernels.h", "bind.cpp")]
    files += [python / name for name in ("__init__.py", "op.py", "reference.py", "selftest.py", "triton_kernels")]
    files += [ROOT / "tests" / family / "samples.py", ROOT / "bench" / f"{family}.py"]
    assert [str(path) for path in files if not path.exists()] == []
    assert any(csrc.glob("*_cpu.cpp")) and any(csrc.glob("*.cu"))
    for place in ("README.md", "mkdocs.yml", "docs/api/ops.md"):
        assert re.search(rf"\b{family}\b", (ROOT / place).read_text(encoding="utf-8")), place


def test_sources_name_the_licence():
    suffixes = {".py", ".h", ".cpp", ".cu", ".cuh", ".sh", ".css", ".cff", ".toml", ".txt", ".yml", ""}
    sources = [path for path in SOURCES if path.is_file() and path.suffix in suffixes and path.stat().st_size]
    assert len(sources) > 300
    missing = [name_of(path) for path in sources if "SPDX-License-Identifier: Apache-2.0" not in head(path)]
    assert [name for name in missing if not name.startswith(("bench/results/", "bench/data/", "tests/data/"))] == []


def head(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return "".join(itertools.islice(file, 3))


def test_cited_papers_are_those_of_the_citation_file():
    python = [path for path in SOURCES if path.suffix == ".py" and path.is_relative_to(ROOT / "python")]
    cited = {paper for path in (*python, *ALL) for paper in PAPER.findall(path.read_text(encoding="utf-8"))}
    assert cited == set(PAPER.findall((ROOT / "CITATION.cff").read_text(encoding="utf-8")))


# The checks themselves.


def test_code_that_fails_is_found_at_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n```python\nx = 1\n```\n\n```\nno code\n```\n\n```python\nassert x == 1\nassert x == 2\n```\n"
    )
    with pytest.raises(AssertionError) as caught:
        run_code(page)
    assert caught.traceback[-1].lineno + 1 == 13
    page.write_text("```python\ny = 1\n```\n\n```python gpu\nassert torch_sees_a_gpu\n```\n")
    if not torch.cuda.is_available():
        assert run_code(page) == 1
    page.write_text("```python numpy\nimport numpy\n```\n\n```python no_such_package\nimport no_such_package\n```\n")
    assert run_code(page) == 1


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# One title, *two* words\n")
    page.write_text(
        "[a](other.md) [b](other.md#one-title-two-words) [c](https://example.org/x) ![d](none.png) "
        "[`e`](other.md#three) [f](#here) `[g](code.md)`\n\n## Here\n\n```\n[h](fence.md)\n```\n"
    )
    assert broken_links(page) == ["none.png", "other.md#three"]


def test_a_stale_matrix_is_found():
    module = support_matrix()
    fresh = module.refresh("<!-- support matrix: x -->\nold\n<!-- /support matrix -->")
    assert "`tree_attention`" in fresh and "old" not in fresh
    with pytest.raises(ValueError, match="markers"):
        module.refresh("none")
