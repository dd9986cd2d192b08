# SPDX-License-Identifier: Apache-2.0
"""The ops as torch sees them: schemas, fakes, compilation."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch_kernels
from torch import Tensor, nn
from torch_kernels import _registry
from torch_kernels.nn import Int4Linear

from ..backends import Backend
from ..tolerance import assert_bitwise
from .cases import Case, make
from .samples import samples


def test_signature() -> None:
    assert str(inspect.signature(torch_kernels.int4_linear)).startswith(
        "(x: 'Tensor', w: 'Int4Weight', bias: 'Tensor | None' = None, mode: 'str' = 'exact')"
    )
    assert "arXiv" in torch_kernels.int4_linear.__doc__


def test_arguments_may_be_left_out(any_backend: Backend) -> None:
    positional, keywords = samples(any_backend.device, any_backend.name)["int4_linear"][0]
    expected = any_backend("int4_linear", *positional.values(), **keywords)
    short = [positional[name] for name in ("x", "weight", "scales")]
    assert_bitwise("out", any_backend("int4_linear", *short, **keywords), expected)
    by_name = any_backend("int4_linear", **positional, **keywords, mode="exact")
    assert_bitwise("out", by_name, expected)


def test_many_rows_go_to_triton_in_mode_fast_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, "_unavailable", lambda name, device: "not here" if name == "cpu" else None)
    for rows, mode, expected in ((64, "fast", "cuda"), (65, "fast", "triton"), (65, "exact", "cuda")):
        call = make(Case(rows=(rows,)))
        packed = call.weight.pack("gpu")
        arguments = (call.x, *packed[:4], None, 40, packed.group_size, mode)
        assert _registry.OPS["int4_linear"].backend_for(*arguments).name == expected
        with torch_kernels.use_backend("cuda"):
            assert _registry.OPS["int4_linear"].backend_for(*arguments).name == "cuda"


# ---- compilation ----


class Block(nn.Module):
    """Two layers with something around them."""

    def __init__(self, mode: str, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        first, second = nn.Linear(40, 64), nn.Linear(64, 24, bias=False)
        self.first = Int4Linear.from_linear(first, 32, True, mode).to(device)
        self.second = Int4Linear.from_linear(second, 16, False, mode).to(device)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))) + 1


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mode", ["exact", "a8"])
def test_module_compiles_without_a_break(any_backend: Backend, compiler: str, mode: str) -> None:
    torch.compiler.reset()
    with any_backend.forced():
        block = Block(mode, any_backend.device)
        compiled = torch.compile(block, fullgraph=True, backend=compiler)
        for rows in ((3,), (2, 5)):
            x = torch.randn(*rows, 40, device=any_backend.device)
            with torch.no_grad():
                assert_bitwise("out", compiled(x), block(x))
            results = []
            for module in (block, compiled):
                leaf = x.clone().requires_grad_()
                block.zero_grad()
                module(leaf).sum().backward()
                results.append((leaf.grad, block.first.bias.grad.clone()))
            for ours, eager in zip(results[1], results[0], strict=True):
                torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


def test_weight_and_cast_compile_without_a_break(any_backend: Backend) -> None:
    torch.compiler.reset()
    w = make(Case(zeros="int", act_order="unequal"), any_backend.device).weight

    def around(x: Tensor, bias: Tensor) -> Tensor:
        return torch_kernels.int4_linear(x + 0, w, bias, "exact") * 2

    x, bias = torch.randn(3, 96, device=any_backend.device), torch.randn(40, device=any_backend.device)
    with any_backend.forced():
        w.pack()
        compiled = torch.compile(around, fullgraph=True, backend="aot_eager")
        assert_bitwise("out", compiled(x, bias), around(x, bias))
        if torch.bfloat16 in any_backend.dtypes:
            with torch.autocast(any_backend.device, torch.bfloat16):
                out = compiled(x, bias)
                assert out.dtype == torch.bfloat16
                assert_bitwise("autocast", out, around(x, bias))


def test_a_weight_not_packed_yet_compiles_too(any_backend: Backend) -> None:
    torch.compiler.reset()
    w = make(Case(), any_backend.device).weight
    x = torch.randn(3, 96, device=any_backend.device)
    with any_backend.forced():
        compiled = torch.compile(lambda x: torch_kernels.int4_linear(x, w), fullgraph=True, backend="aot_eager")
        first, second = compiled(x), compiled(x)
        assert_bitwise("first", first, torch_kernels.int4_linear(x, w))
        assert_bitwise("second", second, first)


def test_compiled_module_follows_other_sizes_and_weights(any_backend: Backend) -> None:
    torch.compiler.reset()
    with any_backend.forced(), torch.no_grad():
        block, other = Block("exact", any_backend.device), Block("exact", any_backend.device)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            other.first = Int4Linear.from_linear(nn.Linear(40, 64), 32).to(any_backend.device)
        compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
        for rows in (3, 7, 1, 20):
            x = torch.randn(rows, 40, device=any_backend.device)
            assert_bitwise(f"{rows} rows", compiled(x), block(x))
        block.load_state_dict(other.state_dict())
        assert_bitwise("other weights", compiled(x), other(x))


def test_fakes_check_too(any_backend: Backend) -> None:
    positional, keywords = samples(any_backend.device, any_backend.name)["int4_linear"][1]

    def on_fakes(**changes: Any) -> Tensor:
        mode = torch._subclasses.FakeTensorMode()
        fakes = {k: v if v is None else mode.from_tensor(v) for k, v in (positional | changes).items()}
        with mode:
            return torch.ops.kernels.int4_linear(*fakes.values(), **keywords)

    assert on_fakes().shape == (2, 3, 40)
    with pytest.raises((ValueError, TypeError), match="int4_linear: bias"):
        on_fakes(bias=positional["bias"][:-1])
