# SPDX-License-Identifier: Apache-2.0
"""The emulator computes what the instructions define, and reports the faults it is there to catch."""

import re
import shutil
import subprocess

import pytest

SEEDS = range(6)


@pytest.mark.parametrize("build", ["instructions", "instructions_sanitized"])
def test_instructions(programs, build):
    assert programs.run(build) == (0, "ok")


def test_instructions_on_device(programs):
    if "instructions_device" not in programs.names:
        pytest.skip("no nvcc")
    if not shutil.which("nvidia-smi") or subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode:
        pytest.skip("compiled for sm_80; no GPU to run it on")
    assert programs.run("instructions_device") == (0, "ok")


@pytest.mark.parametrize(
    "kernel",
    ["gemm", "reverse", "reverse:raw", "overwrite", "neighbours", "handover", "follow", "bounds:right", "after"],
)
@pytest.mark.parametrize("build", ["faults", "faults_sanitized"])
def test_right_kernels_are_not_reported(programs, kernel, build):
    for seed in SEEDS:
        assert programs.run(build, kernel, seed) == (0, "right")


RACE = (
    r"thread \d+ (reads|writes) shared memory byte \d+, (read|written) by thread \d+ at faults.cu:\d+, with no barrier"
)
# What the report must say; the name of the fault picks the kernel in faults.cu.
REPORTS = {
    "gemm:no_wait": r"thread \d+ reads shared memory byte \d+, being copied by cp.async by thread \d+ at faults.cu:\d+",
    "gemm:no_syncwarp": RACE,
    "reverse:no_barrier": RACE,
    "overwrite:no_barrier": RACE,
    "neighbours:across": RACE,
    "handover:early": RACE,
    "follow:never_waits": r"started early and has not waited",
    "bounds:array": r"thread 31 uses element 32 of a shared array of 32 \[faults.cu:\d+",
    "bounds:vector": r"uses element 32 of a shared array of 32",
    "bounds:unaligned": r"at an address that is not a multiple of 8",
    "bounds:cp_async": r"cp.async to byte \d+ of 256 bytes of shared memory",
    "bounds:cp_async_unaligned": r"cp.async of 16 bytes at an unaligned address",
    "bounds:ldmatrix": r"ldmatrix.x4 of byte \d+ of 256 bytes of shared memory",
    "diverge:skipped": r"diverged: it is at __syncthreads while .*threads? .* wait at __syncthreads faults.cu:\d+",
    "diverge:exited": r"(deadlock: threads 0-6,8-63 wait at __syncthreads faults.cu:\d+; threads 7 exited|exited)",
    "diverge:lane": r"threads 32,34-63 wait at __shfl_xor_sync faults.cu:\d+; threads 33 wait at __syncthreads",
    "diverge:exited_lane": r"__shfl_xor_sync",
    "diverge:deadlock": r"deadlock: threads 0-31 wait at bar.sync faults.cu:\d+; threads 32-63 wait at bar.sync",
    "diverge:count": r"for 64 threads at barrier 1, .* for 32|for 32 .* for 64|deadlock: threads 0-31 exited",
    "diverge:mask": r"a mask that leaves out the calling lane",
    "diverge:branches": r"deadlock: threads 0,2,4.* wait at mma.m16n8k16.f16 faults.cu:\d+; threads 1,3,5",
    "partial": r"mma.m16n8k16.f16 in a warp of fewer than 32 threads",
    "oversized": r"300000 bytes of shared memory",
}


@pytest.mark.parametrize("fault", REPORTS)
@pytest.mark.parametrize("build", ["faults", "faults_sanitized"])
def test_reported(programs, fault, build):
    for seed in SEEDS:
        status, output = programs.run(build, fault, seed)
        assert status == 0, output
        assert output.startswith("emulator: "), output
        assert re.search(REPORTS[fault], output), output
        if build == "faults":  # built with -rdynamic, so kernels have names
            assert re.match(
                r"emulator: [^,]*(gemm|reverse|overwrite|neighbours|handover|follow|out_of_bounds|diverge)", output
            )


@pytest.mark.parametrize(
    "fault", ["gemm:no_wait_raw", "gemm:wrong_fragment", "reverse:raw_no_barrier", "follow:reads_first"]
)
def test_seen_in_the_result(programs, fault):
    """Through plain pointers a fault is not reported, but the result is wrong on every schedule."""
    for seed in SEEDS:
        assert re.fullmatch(r"\d+ wrong elements", programs.run("faults", fault, seed)[1])


@pytest.mark.parametrize("fault", ["bounds:raw", "bounds:global", "bounds:cp_async_source"])
def test_seen_by_address_sanitizer(programs, fault):
    status, output = programs.run("faults_sanitized", fault, 1)
    assert status != 0
    assert "AddressSanitizer: heap-buffer-overflow" in output
    assert re.search(r"faults.cu:\d+", output), output


def test_schedules_differ_and_repeat(programs):
    reports = [[programs.run("faults", "reverse:no_barrier", seed)[1] for seed in SEEDS] for _ in range(2)]
    assert reports[0] == reports[1]
    assert len(set(reports[0])) > 1


@pytest.mark.parametrize(("stride", "passes"), [(16, 4), (128, 32), (144, 4), (32, 8)])
def test_bank_conflicts(programs, stride, passes):
    """Eight rows of 16 bytes, 128 bytes apart, share four banks; 144 bytes apart they do not."""
    assert programs.run("faults", f"banks:{stride}")[1] == f"{passes} passes for 4 tiles"
