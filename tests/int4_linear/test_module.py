# SPDX-License-Identifier: Apache-2.0
"""nn.Int4Linear in models: quantising, saving, moving, training what is around it."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
import torch
import torch_kernels
from torch import Tensor, nn
from torch_kernels import Int4Weight, quantize_
from torch_kernels.nn import Int4Linear

from ..backends import Backend
from ..tolerance import assert_bitwise
from .cases import ACT_ORDERS, BF16, F16, F32, Case, make
from .test_weight import assert_same


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 96, generator=torch.Generator().manual_seed(5))


def module(case: Case, device: str = "cpu", mode: str = "exact") -> Int4Linear:
    call = make(case, device)
    return Int4Linear(call.weight, call.bias, mode)


CASES = [Case(zeros=zeros, act_order=act_order, bias="same") for zeros in (None, "int", "float")
         for act_order in ACT_ORDERS]  # fmt: skip


@pytest.mark.parametrize("mode", ["exact", "a8"])
def test_forward_is_the_function(backend: Backend, x: Tensor, mode: str) -> None:
    for case in CASES[:: 4 if backend.slow else 1]:
        call = make(case, backend.device)
        x = x.to(backend.device)
        with backend.forced():
            layer = Int4Linear(call.weight, call.bias, mode)
            assert_bitwise("out", layer(x), torch_kernels.int4_linear(x, call.weight, call.bias, mode))


def test_another_backend_gets_its_layout(any_backend: Backend, x: Tensor) -> None:
    layer = module(Case()).to(any_backend.device)
    x = x.to(any_backend.device)
    with any_backend.forced():
        expected = layer(x)
    with torch_kernels.use_backend("reference"):
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    with any_backend.forced():
        assert_bitwise("out", layer(x), expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.zeros}-{case.act_order}")
def test_weight_is_kept(case: Case) -> None:
    call = make(case)
    layer = Int4Linear(call.weight, call.bias)
    assert_same(layer.weight, call.weight)
    assert "packed" not in " ".join(layer.state_dict())
    assert isinstance(layer.bias, nn.Parameter) and layer.bias.requires_grad


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.zeros}-{case.act_order}")
def test_state_dict_round_trip(case: Case) -> None:
    layer, other = module(case), module(case.replace(seed=1))
    state = layer.state_dict()
    assert set(state) == {"qweight", "scales", "bias"} | ({"zeros"} if case.zeros else set()) | (
        {"g_idx"} if case.act_order else set()
    )
    assert other.load_state_dict(state, strict=True) == ([], [])
    assert_same(other.weight, layer.weight)
    assert_bitwise("bias", other.bias, layer.bias)
    assert other.scales.data_ptr() != state["scales"].data_ptr(), "a copy, as load_state_dict makes"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert module(case).load_state_dict(torch.load(buffer, weights_only=True)) == ([], [])


def test_loading_keeps_the_precision_of_what_is_loaded() -> None:
    half, single = module(Case(scale_dtype=F16)), module(Case(scale_dtype=F32, seed=1))
    half.load_state_dict(single.state_dict())
    assert half.scales.dtype == F32
    assert_same(half.weight, single.weight)


def test_loading_reports_what_is_wrong() -> None:
    layer = module(Case(bias="same"))
    before = copy.deepcopy(layer)
    good = layer.state_dict()
    for changes, message in (
        ({"qweight": None}, r"Missing key.*qweight"),
        ({"bias": None}, r"Missing key.*bias"),
        ({"weight": torch.zeros(40, 96)}, r"Unexpected key.*weight"),
        ({"qweight": torch.zeros(40, 47, dtype=torch.uint8)}, r"Int4Weight: qweight must be"),
        ({"scales": torch.zeros(2, 40)}, r"Int4Weight: scales must be \[G=3, N=40\]"),
        ({"qweight": torch.zeros(41, 48, dtype=torch.uint8), "scales": torch.zeros(3, 41)}, r"qweight must be \[N=40"),
    ):
        state = {name: value for name, value in (good | changes).items() if value is not None}
        with pytest.raises(RuntimeError, match=re.compile(message, re.DOTALL)):
            layer.load_state_dict(state)
        assert_same(layer.weight, before.weight)
    assert layer.load_state_dict({"bias": good["bias"]}, strict=False).missing_keys == ["qweight", "scales"]


def test_loading_into_a_model() -> None:
    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return quantize_(
            nn.Sequential(nn.Linear(32, 48), nn.LayerNorm(48), nn.Linear(48, 8, bias=False)), group_size=16
        )

    a, b = model(0), model(1)
    assert b.load_state_dict(a.state_dict(), strict=True) == ([], [])
    y = torch.randn(4, 32)
    assert_bitwise("out", b(y), a(y))
    assert b.load_state_dict(a.state_dict(), strict=True, assign=True) == ([], [])
    assert_bitwise("out", b(y), a(y))


def test_casts_leave_the_weight_alone(x: Tensor) -> None:
    for scale_dtype in (F32, F16, BF16):
        layer = module(Case(scale_dtype=scale_dtype, zeros="float", act_order="unequal", bias="same"))
        expected = layer.weight
        for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float):
            cast(layer)
            assert_same(layer.weight, expected)
            assert layer.packed_scales.dtype == scale_dtype and layer.packed_zeros.dtype == F32
        assert layer.bias.dtype == F32
    layer = module(Case(bias="same")).half()
    assert layer.bias.dtype == F16 and layer(x.half()).dtype == F16
    assert layer.to(BF16)(x.bfloat16()).dtype == BF16
    layer = module(Case())
    layer.float().half()
    assert layer.scales is layer.packed_scales, "held once"


def test_moves() -> None:
    layer = module(Case(zeros="int", act_order="unequal", bias="same"))
    assert copy.deepcopy(layer).to("meta").packed_weight.is_meta
    if torch.cuda.is_available():
        moved = copy.deepcopy(layer).to("cuda", F16)
        assert moved.packed_weight.dtype == torch.int32 and moved.packed_weight.is_cuda and moved.scales.is_cuda
        assert_same(moved.weight.to("cpu"), layer.weight)
        assert_same(moved.cpu().weight, layer.weight)
        assert moved.packed_weight.dtype == torch.uint8
        moved.load_state_dict(layer.to("cuda").state_dict())


def test_copies(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = module(Case(zeros="int", act_order="unequal", bias="same"))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert_same(other.weight, layer.weight)
        assert_bitwise("out", other(x), layer(x))
    buffer.seek(0)
    monkeypatch.setattr(torch_kernels.nn.int4_linear.packing.LAYOUTS["cpu"], "VERSION", 99)
    with pytest.raises(ValueError, match="version 1 of the layout 'cpu', this release reads version 99"):
        torch.load(buffer, weights_only=False)


def test_memory_is_that_of_four_bits() -> None:
    layer = Int4Linear.from_linear(nn.Linear(1024, 1024, bias=False, dtype=F16))
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in layer.buffers()}
    assert sum(held.values()) == 1024 * 1024 // 2 + 8 * 1024 * 2


def test_description() -> None:
    layer = module(Case(zeros="int", act_order="unequal", bias="same"), mode="a8")
    assert repr(layer) == (
        "Int4Linear(in_features=96, out_features=40, bias=True, group_size=32, symmetric=False, act_order=True, "
        "mode='a8')"
    )


def test_wrong_arguments() -> None:
    w = make(Case()).weight
    for arguments, error, message in (
        ((w.qweight,), TypeError, "weight must be an Int4Weight, got Tensor"),
        ((w, torch.zeros(39)), ValueError, r"bias must be \[N=40\], got shape \[39\]"),
        ((w, 3), TypeError, "bias must be a tensor, got int"),
        ((w, None, "a4"), ValueError, "mode must be 'exact' or 'a8' or 'fast', got 'a4'"),
    ):
        with pytest.raises(error, match=f"Int4Linear: {message}"):
            Int4Linear(*arguments)


# ---- quantize_ ----


class Model(nn.Module):
    """A shared module, a tied weight, a subclass of Linear, attention, and a layer in a list."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 64)
        self.block = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64, bias=False))
        self.again = self.block[0]
        self.back = nn.Linear(96, 64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.layers = nn.ModuleList([nn.Linear(64, 64)])
        self.head = nn.Linear(64, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.twin = nn.Linear(64, 20)
        self.twin.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        h = h + self.block(h) + self.back(self.again(h))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(self.layers[0](h)) + self.twin(h)


@pytest.mark.parametrize("mode", ["exact", "a8"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantised_model_is_close(mode: str, symmetric: bool) -> None:
    model = Model().eval()
    tokens = torch.randint(20, (2, 7), generator=torch.Generator().manual_seed(0))
    expected = model(tokens)
    quantised = quantize_(copy.deepcopy(model), group_size=16, symmetric=symmetric, mode=mode)
    assert not quantised.training and not quantised.back.training
    error = (quantised(tokens) - expected).norm() / expected.norm()
    assert error < (0.15 if symmetric else 0.12), error


def test_every_linear_is_replaced_in_place(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model()
    embedding, bias = model.embedding.weight, model.back.bias
    before = sum(t.nbytes for t in model.parameters())
    assert quantize_(model, group_size=32) is model
    assert not any(type(m) is nn.Linear for m in model.modules())
    assert isinstance(model.layers[0], Int4Linear) and isinstance(model.block[2], Int4Linear)
    assert model.again is model.block[0], "a shared module stays shared"
    assert model.twin.packed_weight is model.head.packed_weight, "and so does a shared weight"
    assert model.embedding.weight is embedding and model.back.bias is bias and model.block[2].bias is None
    assert type(model.attention.out_proj) is not Int4Linear, "attention reads the weight of this subclass itself"
    out = capsys.readouterr().out
    kept = {t.untyped_storage()._cdata: t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert out == (
        f"quantize_: 6 linear layers to 4 bits; the model went from {before / 1000:.3g} KB to "
        f"{sum(kept.values()) / 1000:.3g} KB, {1 - sum(kept.values()) / before:.0%} saved\n"
        "quantize_: left as they are: attention.in_proj_weight (49.2 KB), attention.out_proj.weight (16.4 KB), "
        "embedding.weight (5.12 KB)\n"
    )


def test_filter() -> None:
    seen = []

    def keep(name: str, layer: nn.Module) -> bool:
        seen.append(name)
        assert type(layer) is nn.Linear
        return name != "head" and not name.startswith("layers")

    model = quantize_(Model(), filter=keep)
    assert type(model.head) is nn.Linear and type(model.layers[0]) is nn.Linear
    assert isinstance(model.twin, Int4Linear) and isinstance(model.back, Int4Linear)
    assert sorted(seen) == ["back", "block.0", "block.2", "head", "layers.0", "twin"]


def test_skip() -> None:
    for skip, left in (("head", {"head"}), (["layers.*", "b*"], {"layers.0", "back", "block.0", "block.2"})):
        model = quantize_(Model(), group_size=16, skip=skip, filter=lambda name, layer: name != "twin")
        linear = {name for name, layer in model.named_modules() if type(layer) is nn.Linear}
        assert linear == left | {"twin"}


def test_a_linear_layer_alone() -> None:
    layer = nn.Linear(32, 8)
    replaced = quantize_(layer, group_size=16)
    assert isinstance(replaced, Int4Linear) and replaced.bias is layer.bias


def test_a_model_without_linear_layers(capsys: pytest.CaptureFixture[str]) -> None:
    quantize_(nn.ReLU())
    assert "0 linear layers" in capsys.readouterr().out


def test_options_reach_the_layers() -> None:
    layer = quantize_(nn.Sequential(nn.Linear(64, 8)), group_size=64, symmetric=False, mode="a8")[0]
    assert (layer.group_size, layer.mode, layer.zeros.dtype) == (64, "a8", torch.uint8)
    again = Int4Linear.from_linear(nn.Linear(64, 8), group_size=64, symmetric=False, mode="a8")
    assert repr(again) == repr(layer)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bits": 3}, "bits must be 4 or 8, got 3"), ({"group_size": 33}, "group_size"), ({"mode": "x"}, "mode")],
)
def test_wrong_options_change_nothing(options: dict[str, Any], message: str) -> None:
    model = Model()
    with pytest.raises(ValueError, match=message):
        quantize_(model, **options)
    assert type(model.block[0]) is nn.Linear and type(model.head) is nn.Linear


def test_training_around_quantised_layers() -> None:
    """As with adapters: what lies before and after learns, the 4-bit weight does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 1))
    quantize_(model, group_size=16, filter=lambda name, layer: name == "1")
    frozen = model[1].weight
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    data = torch.randn(64, 16)
    target = data.sum(1, keepdim=True).tanh()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(data) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert_same(model[1].weight, frozen)
    assert isinstance(frozen, Int4Weight)


def test_functional_linear_takes_the_weight() -> None:
    call = make(Case(zeros="int", bias="same"))
    expected = torch_kernels.int4_linear(call.x, call.weight, call.bias)
    assert_bitwise("out", nn.functional.linear(call.x, call.weight, call.bias), expected)
    assert_bitwise("out", nn.functional.linear(call.x, weight=call.weight, bias=call.bias), expected)
    with pytest.raises(TypeError):
        torch.matmul(call.x, call.weight)


def test_encoder_layer_in_evaluation() -> None:
    """torch's fused path reads weights itself; it must notice that these are not its own."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    tokens = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = layer(tokens)
        actual = quantize_(layer, group_size=16)(tokens)
    assert (actual - expected).norm() / expected.norm() < 0.1
