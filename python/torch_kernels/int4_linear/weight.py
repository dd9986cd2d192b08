# SPDX-License-Identifier: Apache-2.0
"""A 4-bit weight in the form that does not depend on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_kernels import _checks
from torch_kernels._numbers import divide
from torch_kernels.int4_linear import autograd, formats, packing
from torch_kernels.int4_linear.op import DTYPES, GROUP_SIZES, number_of_groups
from torch_kernels.int4_linear.packing import Packed

CHUNK = 2**24  # weights that are quantised at a time: bounds the memory that float64 takes


class Int4Weight:
    r"""The weight of a linear layer in 4 bits, quantised in groups of input columns.

    .. math::
        W_{n,k} = \mathrm{scales}_{\gamma(k), n} \, (q_{n,k} - \mathrm{zeros}_{\gamma(k), n}), \qquad
        q \in 0..15, \quad \gamma(k) = \lfloor k / g \rfloor \ \text{or}\ \mathrm{g\_idx}_k

    Args:
        qweight: uint8 ``[N, ceil(K / 2)]``, two values a byte, the even column in the low half.
        scales: ``[G, N]``, float16, bfloat16 or float32, of any sign.
        zeros: None (8 everywhere), uint8 with values 0..15, or float32; ``[G, N]``.
        g_idx: None, or the group of each column, int32 or int64 ``[K]`` (GPTQ's act-order); groups may be unequal or
            empty then.
        in_features: K.
        group_size: g: 16, 32, 64, 128, 256, or -1 for one group; the last group may be shorter. With ``g_idx`` it is
            a description only.

    Raises:
        ValueError, TypeError: an argument has a wrong dtype, shape, device or value.

    The tensors are kept as they are and must not be changed. What kernels read is packed on first use for each device
    and remembered; it is part neither of ``state_dict`` nor of a pickle or a copy.
    """

    def __init__(
        self,
        qweight: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        g_idx: Tensor | None = None,
        *,
        in_features: int,
        group_size: int,
    ) -> None:
        name = "Int4Weight"
        for argument, value in (("in_features", in_features), ("group_size", group_size)):
            if not isinstance(value, int) or isinstance(value, bool):
                _checks.fail(name, argument, "an int", type(value).__name__, TypeError)
        if in_features < 0:
            _checks.fail(name, "in_features", "at least 0", in_features)
        if group_size not in GROUP_SIZES:
            _checks.fail(name, "group_size", f"one of {', '.join(map(str, GROUP_SIZES))}", group_size)
        _checks.is_tensor(name, qweight=qweight, scales=scales)
        _checks.is_tensor(name, **{k: v for k, v in (("zeros", zeros), ("g_idx", g_idx)) if v is not None})
        _checks.dtype(name, (torch.uint8,), qweight=qweight)
        _checks.dtype(name, DTYPES, scales=scales)
        _checks.dtype(name, (torch.uint8, torch.float32), zeros=zeros)
        _checks.dtype(name, _checks.INDEX, g_idx=g_idx)
        dims = {"ceil(K/2)": -(-in_features // 2), "K": in_features}
        if g_idx is None:
            dims["G"] = number_of_groups(in_features, group_size)
        _checks.shape(name, dims, qweight=(qweight, "N ceil(K/2)"), scales=(scales, "G N"), zeros=(zeros, "G N"))
        _checks.shape(name, dims, g_idx=(g_idx, "K"))
        _checks.same_device(name, qweight, scales=scales, zeros=zeros, g_idx=g_idx)
        _within(name, "zeros", zeros if zeros is not None and zeros.dtype == torch.uint8 else None, 0, 15)
        _within(name, "g_idx", g_idx, 0, dims["G"] - 1)
        self._qweight: Tensor | None = qweight
        self._packed: dict[tuple[str, int], Packed] = {}
        self.scales = scales.detach()
        self.zeros = None if zeros is None else zeros.detach()
        self.g_idx = None if g_idx is None else g_idx.to(torch.int32)
        self.in_features = in_features
        self.out_features = qweight.shape[0]
        self.group_size = group_size

    @classmethod
    def _of_packed(
        cls, key: tuple[str, int], packed: Packed, scales: Tensor, zeros: Tensor | None, g_idx: Tensor | None,
        group_size: int,
    ) -> Int4Weight:  # fmt: skip
        """A weight that is packed already; its qweight is unpacked when someone asks for it."""
        weight = cls.__new__(cls)
        weight._qweight, weight._packed = None, {key: packed}
        weight.scales, weight.zeros, weight.g_idx = scales, zeros, g_idx
        weight.in_features, weight.out_features = packed.in_features, packed.out_features
        weight.group_size = group_size
        return weight

    @classmethod
    def _of(cls, values: formats.Values) -> Int4Weight:
        zeros = None if values.zeros is None else values.zeros.contiguous()
        return cls(
            packing.to_nibbles(values.q), values.scales.contiguous(), zeros, values.g_idx,
            in_features=values.q.shape[1], group_size=values.group_size,
        )  # fmt: skip

    # ---- made from other weights ----

    @classmethod
    def quantize(cls, dense: Tensor, group_size: int = 128, symmetric: bool = True) -> Int4Weight:
        """Rounds a weight ``[N, K]`` to the nearest 4-bit values; no weight moves by more than half a step.

        The step of a group is ``2 max|W| / 15`` (symmetric, as MARLIN has it) or ``(max - min) / 15`` with 0 counted
        in (asymmetric), rounded up in ``dense``'s dtype, or in float32 where that one is too coarse for such small
        weights. A group of zeros stays exactly zero.

        Raises:
            ValueError, TypeError: ``dense`` is not a finite floating-point matrix, or ``group_size`` is not allowed.
        """
        name = "Int4Weight.quantize"
        _checks.is_tensor(name, dense=dense)
        _checks.dtype(name, _checks.FLOATING, dense=dense)
        _checks.shape(name, {}, dense=(dense, "N K"))
        if group_size not in GROUP_SIZES:
            _checks.fail(name, "group_size", f"one of {', '.join(map(str, GROUP_SIZES))}", group_size)
        dense = dense.detach()
        rows, columns = dense.shape
        width = max(columns, 1) if group_size == -1 else group_size
        groups = number_of_groups(columns, group_size)
        # Zeros that fill up the last group change neither its largest magnitude nor its range with 0.
        grouped = torch.nn.functional.pad(dense, (0, groups * width - columns)).view(rows, groups, width)
        low, high = _range(grouped)
        if not bool((low.isfinite() & high.isfinite()).all()):
            _checks.fail(name, "dense", "finite", "NaN or infinity")
        if symmetric:
            largest = torch.maximum(high, -low)
            steps, limit = divide(largest * 2, 15), divide(largest, 7)
        else:
            steps = divide(high - low, 15)
            limit = steps * (1 + 2 * torch.finfo(dense.dtype).eps)
        dtype = dense.dtype if dense.dtype in DTYPES else torch.float32
        scales = _round_up(steps, dtype)
        if bool((scales.double() > limit).any()):
            scales = _round_up(steps, torch.float32)
        if not bool(scales.isfinite().all()):
            _checks.fail(
                name, "dense", "in float32's range", f"magnitudes up to {float(torch.maximum(high, -low).max())}"
            )
        scales = scales.where(steps > 0, 1.0)
        zeros = None if symmetric else (-low / scales.double()).round()
        qweight = dense.new_empty((rows, -(-columns // 2)), dtype=torch.uint8)
        step = max(1, CHUNK // max(1, columns))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            q = (grouped[part].double() / scales[part].double()[:, :, None]).round()
            q += 8 if zeros is None else zeros[part][:, :, None]
            qweight[part] = packing.to_nibbles(q.clamp(0, 15).to(torch.uint8).flatten(1)[:, :columns])
        return cls(
            qweight, scales.T.contiguous(), None if zeros is None else zeros.to(torch.uint8).T.contiguous(),
            in_features=columns, group_size=group_size,
        )  # fmt: skip

    @classmethod
    def from_gptq(
        cls, qweight: Tensor, qzeros: Tensor | None, scales: Tensor, g_idx: Tensor | None = None, version: int = 1
    ) -> Int4Weight:
        """A GPTQ checkpoint (arXiv 2210.17323), with or without act-order.

        Args:
            qweight: int32 ``[K / 8, N]``, along K in natural order.
            qzeros: int32 ``[G, N / 8]``, along N in natural order, or None for 8 everywhere.
            scales: ``[G, N]``.
            g_idx: None, or the group of each column, ``[K]``.
            version: 1 if ``qzeros`` holds z - 1 (modulo 16), 2 if it holds z.
        """
        return cls._of(formats.gptq(qweight, qzeros, scales, g_idx, version))

    @classmethod
    def from_awq(cls, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Int4Weight:
        """An AWQ checkpoint (arXiv 2306.00978).

        Args:
            qweight: int32 ``[K, N / 8]``, along N in AWQ's order 0 2 4 6 1 3 5 7.
            qzeros: int32 ``[G, N / 8]``, in the same order.
            scales: ``[G, N]``.
        """
        return cls._of(formats.awq(qweight, qzeros, scales))

    @classmethod
    def from_hqq(cls, W_q: Tensor, scale: Tensor, zero: Tensor, shape: Sequence[int]) -> Int4Weight:
        """HQQ's ``4bit_u8`` weights, quantised along axis 1.

        Args:
            W_q: uint8 ``[N K / g / 2, g]``: the first half of the groups in the high nibbles, the second in the low.
            scale: ``[N K / g, 1]``.
            zero: ``[N K / g, 1]``, fractional; kept in float32.
            shape: ``(N, K)``.
        """
        return cls._of(formats.hqq(W_q, scale, zero, shape))

    @classmethod
    def from_tinygemm(cls, packed: Tensor, scales_and_zeros: Tensor) -> Int4Weight:
        """The weights of torch's ``_weight_int4pack_mm`` on CUDA.

        Args:
            packed: int32 ``[N / 8, K / (16 i), 32, i / 2]`` with inner k tiles i of 2, 4 or 8. torch's CPU layout
                depends on the CPU that made it and is refused.
            scales_and_zeros: ``[G, N, 2]``; there ``W = (q - 8) scale + zero``, so zero points become fractional.
        """
        return cls._of(formats.tinygemm(packed, scales_and_zeros))

    @classmethod
    def from_ggml_q4_0(cls, blocks: Tensor) -> Int4Weight:
        """ggml's (llama.cpp's) Q4_0.

        Args:
            blocks: uint8 ``[N, K / 32 * 18]``: per 32 columns a float16 scale, which may be negative, and 16 bytes.
        """
        return cls._of(formats.ggml_q4_0(blocks))

    @classmethod
    def from_marlin(cls, B: Tensor, s: Tensor) -> Int4Weight:
        """MARLIN's own checkpoints (arXiv 2408.11743).

        Args:
            B: int32 ``[K / 16, 2 N]``, in the order of tensor core fragments.
            s: ``[G, N]``, permuted as MARLIN does.
        """
        return cls._of(formats.marlin(B, s))

    # ---- use ----

    @property
    def qweight(self) -> Tensor:
        """uint8 ``[N, ceil(K / 2)]``, the even column in the low half of a byte."""
        if self._qweight is None:
            (layout, _), packed = next(iter(self._packed.items()))
            self._qweight = packing.unpack(layout, packed)
        return self._qweight

    @property
    def device(self) -> torch.device:
        return self.scales.device

    @property
    def shape(self) -> torch.Size:
        """``[N, K]``, the shape of the dense weight."""
        return torch.Size((self.out_features, self.in_features))

    @property
    def nbytes(self) -> int:
        """The size of the portable form."""
        rest = (self.scales, self.zeros, self.g_idx)
        return self.out_features * -(-self.in_features // 2) + sum(t.nbytes for t in rest if t is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight ``[N, K]``."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        width = max(self.in_features, 1) if self.group_size == -1 else self.group_size
        group = torch.arange(self.in_features, device=self.device) // width if self.g_idx is None else self.g_idx
        q = packing.from_nibbles(self.qweight, self.in_features).to(exact)
        q = q - (8 if self.zeros is None else self.zeros.to(exact)[group].T)
        return (self.scales.to(exact)[group].T * q).to(dtype)

    def to(self, device: torch.device | str | int) -> Int4Weight:
        """The weight on another device (itself if it is there). Scales and zero points keep their dtype."""
        if isinstance(device, torch.dtype):
            _checks.fail("Int4Weight.to", "device", "a device", f"{device}: a weight keeps its dtypes", TypeError)
        moved = self.scales.to(device)
        if moved.device == self.device:
            return self
        zeros, g_idx = (None if t is None else t.to(device) for t in (self.zeros, self.g_idx))
        sizes = {"in_features": self.in_features, "group_size": self.group_size}
        return type(self)(self.qweight.to(device), moved, zeros, g_idx, **sizes)

    def pack(self, layout: str | None = None) -> Packed:
        """The arguments of ``torch.ops.kernels.int4_linear`` for this weight, remembered per layout.

        Args:
            layout: ``"cpu"`` or ``"gpu"`` (CUDA, Triton, and the emulator); None for the one that is used on the
                weight's device.
        """
        layout = packing.layout_for(self.device) if layout is None else layout
        if layout not in packing.LAYOUTS:
            _checks.fail("Int4Weight.pack", "layout", " or ".join(map(repr, packing.LAYOUTS)), repr(layout))
        key = (layout, packing.LAYOUTS[layout].VERSION)
        found = self._packed.get(key)
        if found is None:
            found = self._packed[key] = packing.pack(
                layout, self.qweight, self.scales, self.zeros, self.g_idx, self.in_features, self.group_size
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """Tensors ``qweight``, ``scales``, and ``zeros`` and ``g_idx`` where the weight has them; ints ``in_features``
        and ``group_size``.

        ``torch.save`` and ``torch.load`` take it as it is. safetensors holds tensors only:
        ``save_file({name: torch.as_tensor(value) for name, value in w.state_dict().items()}, path)``, and
        ``Int4Weight.from_state_dict(load_file(path))``.
        """
        tensors = {"qweight": self.qweight, "scales": self.scales, "zeros": self.zeros, "g_idx": self.g_idx}
        ints = {"in_features": self.in_features, "group_size": self.group_size}
        return {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None} | ints

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any]) -> Int4Weight:
        """The weight that :meth:`state_dict` describes; ints may also be tensors of one element."""
        name = "Int4Weight.from_state_dict"
        required = ("qweight", "scales", "in_features", "group_size")
        optional = ("zeros", "g_idx")
        missing = [key for key in required if key not in state_dict]
        unexpected = [key for key in state_dict if key not in (*required, *optional)]
        if missing or unexpected:
            _checks.fail(name, "state_dict", f"with the keys {', '.join(required)} and perhaps {', '.join(optional)}",
                         f"missing {missing}, unexpected {unexpected}")  # fmt: skip
        arguments = {key: state_dict[key] for key in (*required, *optional) if key in state_dict}
        for key in ("in_features", "group_size"):
            if isinstance(arguments[key], Tensor) and arguments[key].numel() == 1:
                arguments[key] = int(arguments[key])
        return cls(**arguments)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """``torch.nn.functional.linear(x, w, bias)`` works; torch's fused layers see that this is no dense tensor."""
        if function is torch.nn.functional.linear:
            return _linear(*args, **(kwargs or {}))
        return NotImplemented

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_qweight": self.qweight, "_packed": {}}

    def __repr__(self) -> str:
        zeros = None if self.zeros is None else str(self.zeros.dtype).removeprefix("torch.")
        return (
            f"Int4Weight(out_features={self.out_features}, in_features={self.in_features}, "
            f"group_size={self.group_size}, scales={str(self.scales.dtype).removeprefix('torch.')}, zeros={zeros}, "
            f"act_order={self.g_idx is not None}, device={str(self.device)!r})"
        )


def _linear(input: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    return autograd.linear(input, weight.pack(packing.layout_for(input.device)), bias, "exact")


def _within(name: str, argument: str, values: Tensor | None, low: int, high: int) -> None:
    if values is None or values.is_meta or not values.numel():
        return
    least, most = (int(value) for value in values.aminmax())
    if least < low or most > high:
        _checks.fail(name, argument, f"in {low}..{high}", least if least < low else most)


def _range(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest of each group in float64, with 0 counted in."""
    if not grouped.numel():
        nothing = grouped.new_zeros(grouped.shape[:2], dtype=torch.float64)
        return nothing, nothing
    return grouped.amin(-1).double().clamp(max=0), grouped.amax(-1).double().clamp(min=0)


def _round_up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Non-negative float64 values to the next larger numbers of a dtype."""
    rounded = values.to(dtype)
    next_larger = (rounded.view(torch.int32 if dtype == torch.float32 else torch.int16) + 1).view(dtype)
    return torch.where(rounded.double() < values, next_larger, rounded)
