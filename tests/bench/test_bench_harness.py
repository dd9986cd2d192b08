# SPDX-License-Identifier: Apache-2.0
"""The benchmark harness: checks before timing, pairs by round, counts work, writes what it printed."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import harness
from harness import ceilings, plot, table, timing
from harness.case import error

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(autouse=True)
def short_probes(monkeypatch):
    monkeypatch.setattr(ceilings, "PROBE_SECONDS", 0.001)
    monkeypatch.setattr(
        ceilings, "_bandwidth_sources", lambda device, cache: {"fixed": lambda: 1e9, "slower": lambda: 1e8}
    )
    monkeypatch.setattr(ceilings, "_peak_sources", lambda device, dtype: {"fixed": lambda: 1e9})


def sleepy(seconds: float, shift: float = 0.0):
    def prepare(inputs):
        def call():
            time.sleep(seconds)
            return inputs["x"] + shift

        return call

    return prepare


def make_case(name="add", ours=0.002, ours_shift=0.0, **changes) -> harness.Case:
    fields = {
        "name": name,
        "make_inputs": lambda seed, device: {"x": torch.ones(64), "flag": 3},
        "run": sleepy(ours, ours_shift),
        "bytes": 1_000_000,  # a floor of 1 ms at the fixed ceiling
        "flops": 500_000,
        "dtype": torch.float32,
        "peers": {"slow": sleepy(0.02), "wrong": sleepy(0.001, shift=1.0), "compiled": sleepy(0.004)},
        "slow_peers": frozenset({"compiled"}),
        "truth": lambda inputs: inputs["x"].double(),
    }
    return harness.Case(**(fields | changes))


def run(cases, tmp_path, *arguments) -> tuple[int, dict]:
    path = tmp_path / "results.json"
    code = harness.main(
        "demo", cases, ["--device", "cpu", "--quick", "--time", "0.05", "--json", str(path), *arguments]
    )
    return code, json.loads(path.read_text())


def test_a_run_times_ours_and_peers_and_states_the_floor(tmp_path, capsys):
    code, record = run([make_case()], tmp_path)
    case = record["cases"]["add"]
    assert code == 0
    assert 0.002 <= case["time"]["p20"] <= case["time"]["median"] <= case["time"]["p80"]
    assert case["bound"] == "memory"
    assert case["floor"] == pytest.approx(1e-3)  # the better of the two sources counts
    assert case["percent_of_floor"] == pytest.approx(100 * 1e-3 / case["time"]["median"], rel=1e-4)
    assert case["rate"] == pytest.approx(1e6 / case["time"]["median"], rel=1e-4)
    assert case["peers"]["slow"]["ratio"]["median"] > 1.5
    assert case["time"]["samples"] >= 5
    printed = capsys.readouterr().out
    assert table.duration_spread(case["time"]) in printed
    assert record["ceilings"]["bandwidth"]["readings"] == 2


def test_a_wrong_peer_is_refused_and_not_timed(tmp_path, capsys):
    _, record = run([make_case()], tmp_path)
    assert record["cases"]["add"]["peers"]["wrong"] == {"refused": "wrong: error 1, allowed 0.0001"}
    assert "add: wrong refused" in capsys.readouterr().out


def test_ours_wrong_fails_the_case_and_the_run_but_not_the_other_cases(tmp_path):
    code, record = run([make_case("bad", ours_shift=0.5), make_case("good")], tmp_path)
    assert code == 1
    assert "wrong: error 0.5" in record["cases"]["bad"]["failed"]
    assert "time" in record["cases"]["good"]


def test_an_interrupt_keeps_what_was_measured(tmp_path):
    def interrupted(inputs):
        raise KeyboardInterrupt

    code, record = run([make_case("first"), make_case("second", run=interrupted), make_case("third")], tmp_path)
    assert code == 1 and record["interrupted"] and list(record["cases"]) == ["first"]


def test_without_a_truth_peers_are_held_against_ours(tmp_path):
    _, record = run([make_case(truth=None)], tmp_path)
    assert record["cases"]["add"]["peers"]["wrong"]["refused"].startswith("wrong")


@pytest.mark.parametrize(
    ("arguments", "peers"),
    [
        ((), {"slow", "wrong"}),
        (("--peers", "compiled"), {"compiled"}),
        (("--peers", "all"), {"slow", "wrong", "compiled"}),
        (("--peers", ""), set()),
    ],
)
def test_peers_are_picked(tmp_path, arguments, peers):
    _, record = run([make_case()], tmp_path, *arguments)
    assert set(record["cases"]["add"]["peers"]) == peers


def test_cases_are_picked_by_part_of_their_name_and_by_device(tmp_path):
    cases = [make_case("first-a"), make_case("second-a"), make_case("third-b"), make_case("gpu-a", devices=("cuda",))]
    _, record = run(cases, tmp_path, "--cases", "second,third")
    assert list(record["cases"]) == ["second-a", "third-b"]
    assert harness.main("demo", cases, ["--device", "cpu", "--cases", "gpu"]) == 1


def test_contenders_take_turns_and_share_the_drift():
    clock = iter(range(1000))
    order = []

    def sampler(name, factor):
        def sample():
            order.append(name)
            return factor * (1 + next(clock))

        return sample

    samples = timing.interleave({"a": sampler("a", 1), "b": sampler("b", 2)}, seconds=1e-9, least=4, most=10)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(values) for values in samples.values()] == [4, 4]


def test_rounds_stop_at_the_most():
    samples = timing.interleave({"a": lambda: 1.0}, seconds=60, least=2, most=7)
    assert len(samples["a"]) == 7


def test_each_call_of_a_sampler_gets_the_next_copy():
    used = []
    calls = [functools.partial(used.append, index) for index in range(3)]
    timing.cpu_sampler(calls)()
    assert used[:7] == [0, 1, 2, 0, 1, 2, 0]


def test_copies_reach_past_the_cache_within_the_budget(tmp_path):
    def inputs(seed, device):
        return {"x": torch.ones(250_000)}  # one megabyte

    _, record = run([make_case(make_inputs=inputs, truth=None)], tmp_path, "--peers", "", "--memory", "0.005")
    assert record["cases"]["add"]["copies"] == 5
    _, record = run([make_case(make_inputs=inputs, truth=None)], tmp_path, "--peers", "", "--hot")
    assert record["cases"]["add"]["copies"] == 1


def test_spread():
    assert timing.spread([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0, "samples": 6}
    assert timing.spread([2.0])["p80"] == 2.0


@pytest.mark.parametrize(
    ("output", "truth", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([1.0, math.nan], [1.0, 2.0], math.inf),
        ([math.nan, 2.0], [math.nan, 2.0], 0.0),
        ([math.inf, 2.0], [-math.inf, 2.0], math.inf),
        ([1.0, 2.0], [-math.inf, 2.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_error(output, truth, expected):
    assert error(torch.tensor(output), torch.tensor(truth)) == pytest.approx(expected)


def test_repro_prints_a_command_and_measures_nothing(capsys, monkeypatch):
    for name in ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    arguments = ["--device", "cpu", "--cases", "x", "--json", "somewhere.json", "--repro"]
    assert harness.main("demo", [], arguments) == 0
    expected = "OMP_NUM_THREADS=3 python bench/demo.py --device cpu --cases x --memory 2.0"
    assert capsys.readouterr().out.strip() == expected


def test_plot_draws_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    _, record = run([make_case("a"), make_case("b", bytes=0)], tmp_path)
    plot.draw(record, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("script", ["tree_attention.py", "overhead.py", "report.py"])
def test_scripts_run_alone(script):
    done = subprocess.run(
        [sys.executable, str(BENCH / script), "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": ""},
        cwd="/",
    )
    assert "--" in done.stdout


def test_a_failed_capture_leaves_the_stream_as_it_was(monkeypatch):
    """torch.cuda.graph sets its stream, and does not set it back when the capture cannot end."""

    class Stream:
        def synchronize(self):
            pass

    class Timed(types.SimpleNamespace):
        def elapsed_time(self, other):
            return 1.0

    class Failing:
        def __enter__(self):
            torch.cuda.set_stream(Stream())

        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    default = Stream()
    current = [default]
    nothing = lambda *_, **__: None  # noqa: E731
    event = lambda **_: Timed(record=nothing, synchronize=nothing)  # noqa: E731
    for name, replacement in {
        "synchronize": nothing,
        "Stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda: current[-1],
        "set_stream": current.append,
        "CUDAGraph": lambda: types.SimpleNamespace(replay=nothing),
        "graph": lambda graph, stream: Failing(),
        "Event": event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    sample, mode = timing.cuda_sampler([lambda: torch.ones(1)])
    assert mode == "eager" and current[-1] is default and len(current) == 3
    assert sample() > 0
