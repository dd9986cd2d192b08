# SPDX-License-Identifier: Apache-2.0
"""Timing that compares: each round samples every contender, in alternating order, so that drift hits all alike."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from .case import Call

SAMPLE_SECONDS = 2e-3  # a sample is at least this long, so that the clock's own cost vanishes
REST_SECONDS = 5e-3  # threads of the contender before may still wait for work in a busy loop
GRAPH_CALLS = 32  # calls per CUDA graph replay: the replay's own launch is spread over them

Sampler = Callable[[], float]  # one sample: seconds per call


def cpu_sampler(calls: Sequence[Call]) -> Sampler:
    """Each call uses the next copy of the inputs."""
    turn = itertools.cycle(calls)

    def sample(count: int) -> float:
        time.sleep(REST_SECONDS)
        next(turn)()  # wakes its own threads
        start = time.perf_counter()
        for _ in range(count):
            next(turn)()
        return (time.perf_counter() - start) / count

    sample(1)  # warm-up: threads, allocator, lazy set-up
    count = min(1000, max(1, math.ceil(SAMPLE_SECONDS / sample(1))))
    return lambda: sample(count)


def cuda_sampler(calls: Sequence[Call]) -> tuple[Sampler, str]:
    """Replays of a CUDA graph that walks the copies, or a loop where a call cannot be captured; and which it is."""
    torch.cuda.synchronize()  # inputs are made on another stream
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    with torch.cuda.stream(stream):  # warm-up off the default stream, as capture demands
        for call in calls[:3]:
            call()
        stream.synchronize()
        start = time.perf_counter()
        calls[0]()
        stream.synchronize()
        seconds = time.perf_counter() - start
    count = min(max(GRAPH_CALLS, len(calls)), max(len(calls), math.ceil(20e-3 / seconds)))
    sequence = list(itertools.islice(itertools.cycle(calls), count))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for call in sequence:
                call()
        mode, replay = "graph", graph.replay
    except RuntimeError:
        torch.cuda.set_stream(before)  # a capture that fails to end leaves its own
        torch.cuda.synchronize()

        def replay() -> None:
            for call in sequence:
                call()

        mode = "eager"

    def sample() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(sequence)  # which also keeps what the graph reads

    sample()
    return sample, mode


FEWEST, PATIENCE = 5, 8  # rounds, where more would take so many times the seconds meant for a case


def interleave(
    samplers: Mapping[str, Sampler],
    seconds: float,
    least: int,
    most: int,
    tick: Callable[[float], None] = lambda done: None,
) -> dict[str, list[float]]:
    """Rounds until `seconds` are spent, at least `least` and at most `most`. `tick` hears the part that is done.

    FEWEST rounds are enough where they take PATIENCE times the seconds.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    order = list(samplers)
    start = time.perf_counter()
    for turn in range(most):
        for name in order if turn % 2 == 0 else reversed(order):
            samples[name].append(samplers[name]())
        spent = time.perf_counter() - start
        tick(min(1.0, max((turn + 1) / most, min(spent / seconds, (turn + 1) / least))))
        enough = least if spent < PATIENCE * seconds else min(least, FEWEST)
        if turn + 1 >= enough and spent >= seconds:
            break
    return samples


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median with the 20th and 80th percentile."""
    if len(values) == 1:
        return {"median": values[0], "p20": values[0], "p80": values[0], "samples": 1}
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": p20, "p80": p80, "samples": len(values)}
