# SPDX-License-Identifier: Apache-2.0
"""Int8Weight, nn.Int8Linear, calibrate, and quantize_ with 8 bits."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
import torch_kernels
from torch import Tensor, nn
from torch_kernels import Int8Weight
from torch_kernels.int8_linear import weight
from torch_kernels.nn import Int8Linear

from ..backends import Backend
from ..tolerance import assert_bitwise
from . import oracle


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(y: Tensor, truth: Tensor) -> float:
    return float((y - truth).detach().norm() / truth.detach().norm())


# ---- Int8Weight ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_quantize(dtype: torch.dtype) -> None:
    dense = normal(0, 37, 70).to(dtype) * 10.0 ** torch.arange(-3, 34)[:, None].clamp(max=3).to(dtype)
    dense[5] = 0
    w = Int8Weight.quantize(dense.requires_grad_())
    q, scale, _ = oracle.quantize(dense)
    assert_bitwise("weight", w.weight, torch.from_numpy(q).to(torch.int8))
    assert_bitwise("scale", w.scale, torch.from_numpy(scale))
    assert not w.weight.requires_grad and w.scale[5] == 0 and int(w.weight.min()) == -127
    error = (w.dequantize(torch.float64) - dense.detach().double()).abs()
    assert (error <= w.scale.double()[:, None] * 0.50001).all()


def test_quantize_rounds_half_to_even() -> None:
    w = Int8Weight.quantize(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [-381.0, 1.5, 4.5, 7.5, -1.5, -4.5]]))
    assert w.scale.tolist() == [1.0, 3.0]
    assert w.weight.tolist() == [[127, 0, 2, 2, 0, -2], [-127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1)])
def test_small_weights(shape: tuple[int, int]) -> None:
    w = Int8Weight.quantize(torch.full(shape, -2.0))
    assert w.shape == shape and (w.out_features, w.in_features) == shape and w.nbytes == shape[0] * (shape[1] + 4)
    assert (w.weight == -127).all() and w.dequantize().shape == shape


def test_large_weights_are_quantised_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = normal(0, 23, 10)
    whole = Int8Weight.quantize(dense)
    monkeypatch.setattr(weight, "CHUNK", 45)
    assert_bitwise("weight", Int8Weight.quantize(dense).weight, whole.weight)
    assert_bitwise("scale", Int8Weight.quantize(dense).scale, whole.scale)


def test_dequantize() -> None:
    w = Int8Weight(torch.tensor([[127, -128], [3, 0]], dtype=torch.int8), torch.tensor([0.1, 2.0]))
    tenth = float(np.float32(0.1))
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        expected = torch.tensor([[127 * tenth, -128 * tenth], [6.0, 0.0]], dtype=torch.float64).to(dtype)
        torch.testing.assert_close(w.dequantize(dtype), expected)
    assert w.dequantize().dtype == torch.float32


def test_state_dict_round_trip() -> None:
    w = Int8Weight.quantize(normal(0, 5, 8))
    state = w.state_dict()
    assert {name: (x.dtype, x.shape) for name, x in state.items()} == {
        "weight": (torch.int8, (5, 8)), "scale": (torch.float32, (5,)),
    }  # fmt: skip
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    again = Int8Weight.from_state_dict(torch.load(file))
    assert_bitwise("weight", again.weight, w.weight)
    assert_bitwise("scale", again.scale, w.scale)


def test_to_and_repr() -> None:
    w = Int8Weight.quantize(normal(0, 5, 8))
    assert w.to("cpu") is w
    meta = w.to("meta")
    assert (meta.device.type, meta.weight.dtype, meta.scale.dtype) == ("meta", torch.int8, torch.float32)
    assert repr(w) == "Int8Weight(out_features=5, in_features=8, device='cpu')"


def test_weights_may_have_any_distance_between_rows(backend: Backend) -> None:
    x, parts = normal(0, 3, 16).to(backend.device), Int8Weight.quantize(normal(1, 6, 32).to(backend.device))
    half = Int8Weight(parts.weight[::2, 16:], parts.scale[::2])
    with torch_kernels.use_backend(backend.name):
        y = torch_kernels.int8_linear(x, half)
        expected = torch_kernels.int8_linear(x, Int8Weight(half.weight.contiguous(), half.scale.contiguous()))
    assert_bitwise("y", y, expected)


# ---- Int8Linear ----


OPTIONS: list[dict[str, Any]] = [
    {}, {"threshold": 3.0}, {"x_scale": torch.tensor([0.03])}, {"rotate": True}, {"smooth": normal(3, 48).abs() + 0.5},
    {"rotate": True, "smooth": normal(3, 48).abs() + 0.5, "x_scale": torch.tensor([0.05])},
]  # fmt: skip


def name(options: dict[str, Any]) -> str:
    return " ".join(options) or "plain"


@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_close_to_the_dense_one(backend: Backend, options: dict[str, Any], bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 21, bias=bias)
    x = normal(1, 2, 3, 48)
    linear, x = linear.to(backend.device), x.to(backend.device).requires_grad_()
    with torch_kernels.use_backend(backend.name):
        layer = Int8Linear.from_linear(linear, **options)
        y = layer(x)
        grad = normal(2, *y.shape).to(y)
        got = torch.autograd.grad(y, (x, *layer.parameters()), grad)
    expected = linear(x)
    wanted = torch.autograd.grad(expected, (x, *([linear.bias] if bias else [])), grad)
    assert len(got) == len(wanted) and y.shape == expected.shape and y.dtype == expected.dtype
    for one, other in zip((y, *got), (expected, *wanted)):
        assert relative_error(one, other) < (0.05 if "x_scale" in options else 0.03)
    assert layer.bias is linear.bias


def test_a_rotated_layer_copes_with_outliers(backend: Backend) -> None:
    linear, x = nn.Linear(96, 30).to(backend.device), normal(0, 5, 96).to(backend.device)
    x[:, 7] *= 200
    expected = linear(x)
    with torch_kernels.use_backend(backend.name), torch.no_grad():
        errors = [
            relative_error(Int8Linear.from_linear(linear, **options)(x), expected)
            for options in ({}, {"rotate": True}, {"threshold": 20.0})
        ]
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.5 * errors[0]


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_layer_round_trips_through_state_dict(any_backend: Backend, options: dict[str, Any]) -> None:
    device = any_backend.device
    with torch_kernels.use_backend(any_backend.name), torch.no_grad():
        layer = Int8Linear.from_linear(nn.Linear(48, 21).to(device), **options)
        other_options = {key: value * 2 if isinstance(value, Tensor) else value for key, value in options.items()}
        other = Int8Linear.from_linear(nn.Linear(48, 21).to(device), **other_options)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        state = torch.load(file)
        x = normal(0, 2, 48).to(device)
        assert set(state) == {"bias", "weight", "weight_scale"} | {
            {"rotate": "signs"}.get(key, key) for key in options if key != "threshold"
        }
        assert state["weight"].dtype == torch.int8
        assert not torch.equal(other(x), layer(x))
        other.load_state_dict(state)
        assert_bitwise("y", other(x), layer(x))
        assert_bitwise("y", copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("rotate", [False, True])
def test_a_layer_is_loaded_without_a_dense_weight(any_backend: Backend, rotate: bool) -> None:
    with torch_kernels.use_backend(any_backend.name), torch.no_grad():
        layer = Int8Linear.from_linear(nn.Linear(48, 21).to(any_backend.device), rotate=rotate)
        empty = Int8Linear.from_linear(nn.Linear(48, 21, device="meta"), rotate=rotate)
        empty.load_state_dict(layer.state_dict(), assign=True)
        x = normal(0, 2, 48).to(any_backend.device)
        assert_bitwise("y", empty(x), layer(x))


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_conversions_leave_scales_alone(any_backend: Backend, options: dict[str, Any]) -> None:
    with torch_kernels.use_backend(any_backend.name), torch.no_grad():
        layer = Int8Linear.from_linear(nn.Linear(48, 21).to(any_backend.device), **options)
        before = copy.deepcopy(layer.state_dict())
        x = normal(0, 2, 48).to(any_backend.device)
        y = layer(x)
        layer.half()
        for key, value in layer.state_dict().items():
            if key == "bias":
                assert value.dtype == torch.float16
            else:
                assert_bitwise(key, value, before[key])
        half = layer(x.half())
        assert half.dtype == torch.float16
        torch.testing.assert_close(half.float(), y, rtol=0.02, atol=0.04)
        assert_bitwise("y of float32 rows", layer.float()(x)[:, :0], y[:, :0])


def test_layer_says_what_it_is() -> None:
    layer = Int8Linear.from_linear(nn.Linear(8, 3), threshold=6.0)
    assert repr(layer) == "Int8Linear(in_features=8, out_features=3, bias=True, threshold=6.0)"


# ---- quantize_ and calibrate ----


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(48)
        self.up, self.down = nn.Linear(48, 160), nn.Linear(160, 48)

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x) + shift)))


def model(device: str) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(Block(), Block(), nn.Linear(48, 12)).to(device)
    with torch.no_grad():
        for block in made[:2]:
            block.norm.weight[5] = 60.0  # a channel with outliers, as in real models
    return made


def batches(device: str) -> list[Tensor]:
    return [normal(seed, 4, 48).to(device) for seed in range(3)]


def test_quantised_models_stay_close(backend: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    dense, x = model(backend.device), batches(backend.device)[1]
    with torch_kernels.use_backend(backend.name), torch.no_grad():
        truth = dense(x)
        errors = {}
        plain = torch_kernels.calibrate(dense, batches(backend.device))
        rotated = torch_kernels.calibrate(dense, batches(backend.device), rotate=True)
        for key, options in {
            "plain": {},
            "threshold": {"threshold": 20.0},
            "smooth": {"smooth": plain},
            "rotate": {"rotate": True},
            "rotate smooth": {"rotate": True, "smooth": rotated},
            "static": {"rotate": True, "smooth": rotated.smooth, "x_scale": rotated.x_scale},
        }.items():
            quantised = torch_kernels.quantize_(copy.deepcopy(dense), bits=8, **options)
            assert "5 linear layers to 8 bits" in capsys.readouterr().out
            assert sum(isinstance(module, Int8Linear) for module in quantised.modules()) == 5
            errors[key] = relative_error(quantised(x), truth)
    assert errors["plain"] < 0.1
    assert all(errors[key] < 0.03 for key in ("threshold", "smooth", "rotate", "rotate smooth", "static")), errors


def test_folding_changes_nothing_but_rounding(backend: Backend) -> None:
    """A weight whose rounding is exact even after rotation and smoothing gives the dense result up to float32."""
    linear = nn.Linear(64, 5, bias=False).to(backend.device)
    smooth = torch.exp2(torch.arange(64) % 4 - 1.0).to(backend.device)
    generator = torch.Generator().manual_seed(0)
    folded = torch.randint(-126, 127, (5, 64), generator=generator).double()
    folded[:, 0] = 127
    x = torch.zeros(2, 64, device=backend.device)
    x[0, 3], x[1, 60] = 127.0, -127.0
    with torch_kernels.use_backend(backend.name), torch.no_grad():
        signs = Int8Linear.from_linear(linear, rotate=True).signs.cpu().double()
        h = torch.from_numpy(oracle.hadamard(64)).double()
        linear.weight.copy_((folded / smooth.cpu().double()) @ h / 8 * signs)
        smoothed = Int8Linear.from_linear(linear, rotate=True, smooth=smooth)
        assert_bitwise("weight", smoothed.weight, folded.to(torch.int8))
        # The rotated x holds 127 / 8 and its negative, so its rounding is exact as well, without smoothing.
        assert relative_error(Int8Linear.from_linear(linear, rotate=True)(x), linear(x)) < 0.02
        assert relative_error(smoothed(x), linear(x)) < 0.02


def test_shared_weights_stay_shared(any_backend: Backend) -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    made = torch_kernels.quantize_(nn.Sequential(first, second, first), bits=8)
    assert made[0] is made[2] and made[0].weight.data_ptr() == made[1].weight.data_ptr()
    lone = torch_kernels.quantize_(nn.Linear(8, 8), bits=8)
    assert isinstance(lone, Int8Linear)


def test_filter(any_backend: Backend) -> None:
    made = torch_kernels.quantize_(model("cpu"), bits=8, filter=lambda name, module: name.endswith("up"))
    assert [name for name, module in made.named_modules() if isinstance(module, Int8Linear)] == ["0.up", "1.up"]


def test_a_model_that_cannot_be_quantised_stays_as_it_was(any_backend: Backend) -> None:
    dense = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)).to(any_backend.device)
    layers = list(dense)
    for options, message in (
        ({"rotate": True}, "quantize_: in_features of '1' must be"),
        ({"smooth": {"2": torch.ones(8)}}, "quantize_: smooth must be .* got '2'"),
        ({"x_scale": {"nothing": torch.ones(1)}}, "quantize_: x_scale must be"),
        ({"smooth": {"1": -torch.ones(6)}}, "smooth must be positive"),
        ({"threshold": -1.0}, "threshold must be at least 0"),
        ({"rotate": True, "threshold": 6.0, "filter": lambda name, _: name == "0"}, "rotate must be False"),
        ({"smooth": torch_kernels.Calibration(rotate=True)}, "smooth must be calibrated with rotate=False"),
        ({"bits": 4, "rotate": True}, "quantize_: rotate must be left out with bits=4"),
        ({"bits": 3}, "quantize_: bits must be 4 or 8, got 3"),
    ):
        with torch_kernels.use_backend(any_backend.name), pytest.raises(ValueError, match=message):
            torch_kernels.quantize_(dense, **({"bits": 8} | options))
        assert list(dense) == layers


def test_calibration_is_what_it_says(any_backend: Backend) -> None:
    dense = model("cpu")
    dense[0].train(False)
    inputs = batches("cpu")
    seen: list[Tensor] = []
    handle = dense[0].up.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    result = torch_kernels.calibrate(dense, inputs, alpha=0.7, filter=lambda name, _: name != "2")
    handle.remove()
    assert set(result.absmax) == set(result.smooth) == set(result.x_scale) == {"0.up", "0.down", "1.up", "1.down"}
    assert dense.training and not dense[0].training and not dense[0].up._forward_pre_hooks
    x = torch.cat(seen).detach().abs().amax(0)
    assert_bitwise("absmax", result.absmax["0.up"], x)
    smooth = x**0.7 / dense[0].up.weight.detach().abs().amax(0) ** 0.3
    torch.testing.assert_close(result.smooth["0.up"], smooth)
    torch.testing.assert_close(result.x_scale["0.up"], ((x / smooth).amax() / 127)[None])
    assert not result.smooth["0.up"].requires_grad and result.x_scale["0.up"].shape == (1,)


def test_calibration_without_smoothing(any_backend: Backend) -> None:
    with torch_kernels.use_backend(any_backend.name):
        device = any_backend.device
        result = torch_kernels.calibrate(model(device), batches(device), alpha=None, rotate=True)
    assert result.smooth == {} and result.rotate
    torch.testing.assert_close(result.x_scale["0.up"], result.absmax["0.up"].amax()[None] / 127)


def test_batches_of_every_kind(any_backend: Backend) -> None:
    block, x = Block(), normal(0, 3, 48)
    kinds = [x, (x,), [x, 0.5], {"x": x}, {"x": x, "shift": 0.5}]
    tops = [float(torch_kernels.calibrate(block, [batch]).absmax["up"].max()) for batch in kinds]
    assert tops[0] == tops[1] == tops[3] and tops[2] == tops[4] != tops[0]
    together = torch_kernels.calibrate(block, (batch for batch in kinds))
    assert float(together.absmax["up"].max()) == max(tops)


def test_layers_that_saw_nothing_are_left_out(any_backend: Backend) -> None:
    layers = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Linear(8, 8), "zero": nn.Linear(8, 8)})
    layers.forward = lambda x: layers["zero"](input=layers["used"](input=x) * 0)
    result = torch_kernels.calibrate(layers, [normal(0, 2, 8)])
    assert set(result.smooth) == set(result.x_scale) == {"used"} and set(result.absmax) == {"used", "zero"}
    torch_kernels.quantize_(layers, bits=8, smooth=result, x_scale=result.x_scale)


def test_calibration_refuses(any_backend: Backend) -> None:
    x = normal(0, 2, 6)
    with pytest.raises(ValueError, match="calibrate: alpha must be None, or from 0 to 1, got 1.5"):
        torch_kernels.calibrate(nn.Linear(6, 6), [x], alpha=1.5)
    with pytest.raises(ValueError, match="calibrate: in_features of '' must be"):
        torch_kernels.calibrate(nn.Linear(6, 6), [x], rotate=True)
    x[1, 3] = float("nan")
    with pytest.raises(ValueError, match="calibrate: the input of '' must be finite"):
        torch_kernels.calibrate(nn.Linear(6, 6), [x, x.nan_to_num()])
