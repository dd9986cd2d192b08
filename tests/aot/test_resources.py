# SPDX-License-Identifier: Apache-2.0
"""Every GPU kernel compiles for every architecture, keeps its data in registers, fits in shared memory and uses the
tensor cores it should.

The committed table records exact numbers. They are compared when this machine has the compiler that made them;
otherwise only the rules hold.
After a change that is meant: ``python -m tests.aot.resources --update``.
"""

import collections
import os
import re

import pytest

from . import resources

# In some Triton kernels ptxas parks one 64-bit value on the stack, which is allowed; where in a kernel is not checked.
PARKED_BYTES = 8
PARKED_ACCESSES = 8


def _check_rules(entries):
    for entry in entries:
        where = f"{entry['kernel']} on {entry['arch']}: {entry}"
        parks = entry["compiler"].startswith("triton")
        assert entry["stack"] <= (PARKED_BYTES if parks else 0), f"stack memory in {where}"
        assert entry["local"] <= (PARKED_ACCESSES if parks else 0), f"register spills in {where}"
        assert entry["shared"] <= resources.shared_limit(entry["arch"]), f"too much shared memory in {where}"
        # CUDA's is dynamic: launch() allows a kernel all there is. From sm_90 on the system takes 1 KB besides.
        assert not entry["compiler"].startswith("nvcc") or entry["shared"] in (0, 1024), f"static memory in {where}"


def _expected_mma(arch: str, rows: int, kind: str) -> str | None:
    """The tensor-core opcode of a product with so many rows; None where there is none (float32 is computed in full)."""
    opcodes = {"i8": ("IMMA", "IGMMA", "UTCIMMA")} | dict.fromkeys(("f16", "bf16"), ("HMMA", "HGMMA", "UTCHMMA"))
    if kind not in opcodes:
        return None
    if arch.startswith("gfx"):
        return "v_mfma"
    few_rows, hopper, blackwell = opcodes[kind]
    if rows < 64:
        return few_rows
    return {"sm_90": hopper, "sm_100": blackwell}.get(arch, few_rows)


def _check_table(entries, committed):
    recorded = {(entry["kernel"], entry["arch"]): entry for entry in committed}
    changed = []
    for entry in entries:
        old = recorded.pop((entry["kernel"], entry["arch"]), None)
        assert old is not None, (
            f"{entry['kernel']} on {entry['arch']} is not in the table; run python -m tests.aot.resources --update"
        )
        assert set(entry["mma"]) == set(old["mma"]), (
            f"tensor-core opcodes of {entry['kernel']} on {entry['arch']} changed"
        )
        if entry["compiler"] == old["compiler"] and entry != old:
            changed.append((old, entry))
    assert not changed, "resources changed; if that is meant, run python -m tests.aot.resources --update"
    assert not NIGHTLY or not recorded, f"the table has kernels that are gone: {sorted(recorded)}"


# Everything takes minutes for each architecture. So by default a sample is compiled for one of them; that all rows of
# the table come from the sources as they are is always checked.
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
TRITON_ARCHS = resources.TRITON_ARCHS if NIGHTLY else ("sm_90",)
CUDA_ARCHS = resources.CUDA_ARCHS if NIGHTLY else ("sm_90a",)


def _sample_of_cuda() -> set[str]:
    """Of every op the source with the fewest kernels, if possible one that uses tensor cores."""
    kernels = collections.defaultdict(list)
    for entry in _table("nvcc"):
        if entry["arch"] in CUDA_ARCHS:
            kernels[entry["kernel"].split(":")[0]].append(bool(entry["mma"]))
    best_last = sorted(kernels, key=lambda label: (any(kernels[label]), -len(kernels[label]), label))
    return set({label.split("/")[0]: label for label in best_last}.values())


def test_triton_kernels():
    entries = resources.collect(resources.triton_jobs(TRITON_ARCHS, every=1 if NIGHTLY else 8))
    _check_rules(entries)
    for entry in entries:
        for rows, kind in entry["dots"]:
            opcode = _expected_mma(entry["arch"], rows, kind)
            assert opcode is None or entry["mma"].get(opcode), (
                f"no {opcode} in {entry['kernel']} on {entry['arch']}: {entry['mma']}"
            )
    _check_table(entries, [entry for entry in _table("triton") if entry["arch"] in TRITON_ARCHS])


@pytest.mark.skipif(resources.nvcc_version() is None, reason="nvcc is not installed")
def test_cuda_kernels():
    entries = resources.collect(resources.cuda_jobs(CUDA_ARCHS, None if NIGHTLY else _sample_of_cuda()))
    _check_rules(entries)
    _check_table(entries, [entry for entry in _table("nvcc") if entry["arch"] in CUDA_ARCHS])


@pytest.mark.parametrize("compiler", ["triton", "nvcc"])
def test_the_table_is_of_these_sources(compiler):
    table = _table(compiler)
    _check_rules(table)
    sources = resources.triton_sources() if compiler == "triton" else resources.cuda_sources()
    archs = resources.TRITON_ARCHS if compiler == "triton" else resources.CUDA_ARCHS
    # "op/kernel" in Triton, "op/file: kernel" in CUDA
    made = {
        (re.split("/" if compiler == "triton" else ":", entry["kernel"])[0], entry["arch"], entry["source"])
        for entry in table
    }
    expected = {(label, arch, sources[label]) for label in sources for arch in archs}
    assert made == expected, "sources changed; run python -m tests.aot.resources --update"


def _table(compiler: str):
    return [entry for entry in resources.read_table() if entry["compiler"].startswith(compiler)]


def test_rules_notice_a_spill():
    entry = {"kernel": "k", "arch": "sm_80", "compiler": "nvcc 13.0", "stack": 0, "local": 1, "shared": 0}
    with pytest.raises(AssertionError, match="spills"):
        _check_rules([entry])
    with pytest.raises(AssertionError, match="shared memory"):
        _check_rules([entry | {"local": 0, "shared": 164 * 1024}])
