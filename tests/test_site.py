# SPDX-License-Identifier: Apache-2.0
"""The site builds without a warning, is complete, and asks no other server for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch_kernels
import torch_kernels.distributed

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if missing := [name for name in ("latex2mathml", "material", "mkdocs", "mkdocstrings") if not find_spec(name)]:
        pytest.skip(f"not installed: {', '.join(missing)} (pip install '.[docs]')")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
    return folder


def test_public_names_are_documented(site: Path) -> None:
    header, compressed = re.match(rb"((?:#[^\n]*\n){4})(.*)", (site / "objects.inv").read_bytes(), re.DOTALL).groups()
    documented = {line.split()[0] for line in zlib.decompress(compressed).decode().splitlines()}
    names = {*torch_kernels.__all__, *torch_kernels.nn.__all__, *torch_kernels.distributed.__all__}
    names |= {"GraphKVCache", "TreeKVCache", "TorchKernelsConfig"}
    names -= {"nn", "trees"}
    assert names - {path.rpartition(".")[2] for path in documented} == set()


def test_pages_need_no_other_server(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r'(?:\bsrc|<link[^>]*\bhref)="?https?://[^" >]+', text) == [], page.name


def test_formulas_are_drawn(site: Path) -> None:
    for page in (ROOT / "docs" / "ops").glob("*.md"):
        text = (site / "ops" / f"{page.stem}.html").read_text(encoding="utf-8")
        assert text.count("<math") > 10 and "arithmatex" not in text and "$$" not in text
