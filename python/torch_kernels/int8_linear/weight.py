# SPDX-License-Identifier: Apache-2.0
"""An 8-bit weight: what quantised layers and checkpoints hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torch_kernels import _checks
from torch_kernels._numbers import divide

CHUNK = 2**24  # weights that are quantised at a time: bounds the memory that float32 takes


class Int8Weight:
    r"""The weight of a linear layer in 8 bits, one scale for each output feature:
    :math:`W_{n,k} = \mathrm{scale}_n \, \mathrm{weight}_{n,k}`.

    Args:
        weight: int8 ``[N, K]``; the same on every device, with any distance between rows.
        scale: float32 ``[N]``.

    Raises:
        ValueError, TypeError: an argument has a wrong dtype, shape or device.

    The tensors are kept as they are, not copied.
    """

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        name = "Int8Weight"
        _checks.is_tensor(name, weight=weight, scale=scale)
        _checks.dtype(name, (torch.int8,), weight=weight)
        _checks.dtype(name, (torch.float32,), scale=scale)
        _checks.shape(name, {}, weight=(weight, "N K"), scale=(scale, "N"))
        _checks.same_device(name, weight, scale=scale)
        self.weight = weight.detach()
        self.scale = scale.detach()

    @classmethod
    def quantize(cls, dense: Tensor) -> Int8Weight:
        """Rounds a weight ``[N, K]`` to ``round(W / scale)``, half to even, with ``scale = max|W| / 127`` of its row.

        No weight moves by more than half a scale, and -128 never occurs. A row of zeros has scale 0 and stays zero.

        Raises:
            ValueError, TypeError: ``dense`` is not a finite floating-point matrix.
        """
        name = "Int8Weight.quantize"
        _checks.is_tensor(name, dense=dense)
        _checks.dtype(name, _checks.FLOATING, dense=dense)
        _checks.shape(name, {}, dense=(dense, "N K"))
        dense = dense.detach()
        rows, columns = dense.shape
        weight = dense.new_empty((rows, columns), dtype=torch.int8)
        scale = dense.new_zeros((rows,), dtype=torch.float32)
        step = max(1, CHUNK // max(1, columns))
        for start in range(0, rows if columns else 0, step):
            part = slice(start, start + step)
            w = dense[part].float()
            scale[part] = divide(w.abs().amax(1), 127)
            divisor = scale[part].where(scale[part] > 0, 1.0)[:, None]
            weight[part] = (w / divisor).round().clamp(-127, 127).nan_to_num(0.0).to(torch.int8)
        if not scale.is_meta and not bool(scale.isfinite().all()):
            row = int((~scale.isfinite()).nonzero()[0])
            _checks.fail(name, "dense", "finite in float32", f"NaN or infinity in row {row}")
        return cls(weight, scale)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def shape(self) -> torch.Size:
        """``[N, K]``."""
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def nbytes(self) -> int:
        """Bytes of weight and scale together."""
        return self.weight.nbytes + self.scale.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight ``[N, K]``, rounded to ``dtype`` once."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.weight.to(exact) * self.scale.to(exact)[:, None]).to(dtype)

    def to(self, device: torch.device | str | int) -> Int8Weight:
        """The weight on another device (itself if it is there); the dtypes stay."""
        if isinstance(device, torch.dtype):
            _checks.fail("Int8Weight.to", "device", "a device", f"{device}: a weight keeps its dtypes", TypeError)
        weight = self.weight.to(device)
        return self if weight is self.weight else Int8Weight(weight, self.scale.to(device))

    def state_dict(self) -> dict[str, Tensor]:
        """``{"weight": int8 [N, K], "scale": float32 [N]}``, as ``torch.save`` and safetensors take it."""
        return {"weight": self.weight, "scale": self.scale}

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> Int8Weight:
        """The weight that :meth:`state_dict` describes."""
        if set(state_dict) != {"weight", "scale"}:
            keys = ", ".join(sorted(state_dict)) or "none"
            _checks.fail("Int8Weight.from_state_dict", "state_dict", "a mapping with the keys weight and scale", keys)
        return cls(state_dict["weight"], state_dict["scale"])

    def __repr__(self) -> str:
        return (
            f"Int8Weight(out_features={self.out_features}, in_features={self.in_features}, device={str(self.device)!r})"
        )
