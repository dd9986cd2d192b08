# SPDX-License-Identifier: Apache-2.0
"""The support matrix of README.md, made from the table that dispatch uses.

python scripts/support_matrix.py             print it
python scripts/support_matrix.py --write     write it between its markers in README.md
python scripts/support_matrix.py --check     fail when README.md says something else
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch_kernels._registry import OPS, Op

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- support matrix: [^\n]*-->\n)(.*?)(<!-- /support matrix -->)", re.DOTALL)
COLUMNS = {"cpu": "CPU", "cuda": "CUDA", "triton": "Triton"}
NAMES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8", torch.int8: "int8",
}  # fmt: skip


def cell(op: Op, name: str) -> str:
    """The dtypes one backend serves; "yes" for an op that reads only index tensors, "–" where there is no kernel."""
    for backend in op.backends:
        if backend.name == name:
            text = " ".join(short for dtype, short in NAMES.items() if dtype in backend.dtypes) or "yes"
            return f"{text} ({backend.note})" if backend.note else text
    return "–"


def matrix(ops: Iterable[Op]) -> str:
    rows = [["op", *COLUMNS.values()], ["---"] * (1 + len(COLUMNS))]
    rows += [[f"`{op.name}`", *(cell(op, name) for name in COLUMNS)] for op in ops]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def refresh(text: str) -> str:
    """The text with the matrix between its markers made anew."""
    fresh, count = BLOCK.subn(lambda match: match[1] + matrix(OPS.values()) + match[3], text)
    if count != 1:
        raise ValueError(f"there must be one pair of support matrix markers, found {count}")
    return fresh


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true", help="write the matrix into README.md")
    mode.add_argument("--check", action="store_true", help="fail when README.md differs")
    options = parser.parse_args()
    if not options.write and not options.check:
        print(matrix(OPS.values()), end="")
        return 0
    text = README.read_text(encoding="utf-8")
    fresh = refresh(text)
    if options.write:
        README.write_text(fresh, encoding="utf-8")
    elif fresh != text:
        print("README.md: the support matrix is stale, run python scripts/support_matrix.py --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
