# SPDX-License-Identifier: Apache-2.0
"""The module of the int4 linear family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from torch_kernels import _checks
from torch_kernels.int4_linear import Int4Weight, autograd, packing
from torch_kernels.int4_linear.op import MODES
from torch_kernels.int4_linear.packing import Packed

PORTABLE = ("qweight", "scales", "zeros", "g_idx")


class Int4Linear(nn.Module):
    """``torch.nn.Linear`` with a weight of 4 bits; see :func:`torch_kernels.int4_linear`.

    Args:
        weight: the weight, N x K.
        bias: None, or a parameter or tensor ``[N]``.
        mode: ``"exact"``, ``"a8"`` or ``"fast"``.

    The weight is kept once, packed for the kernels of its device, and packed anew when the module moves to a device of
    another kind. ``state_dict`` holds the portable form (``qweight``, ``scales``, and ``zeros`` and ``g_idx`` where the
    weight has them) and ``bias``, so it is the same on every device. ``.half()`` and the like convert the bias; scales
    and zero points keep their precision.
    """

    bias: nn.Parameter | None
    scales: Tensor
    zeros: Tensor | None
    g_idx: Tensor | None
    packed_weight: Tensor
    packed_scales: Tensor
    packed_zeros: Tensor | None
    packed_perm: Tensor | None

    def __init__(self, weight: Int4Weight, bias: Tensor | None = None, mode: str = "exact") -> None:
        super().__init__()
        if not isinstance(weight, Int4Weight):
            _checks.fail("Int4Linear", "weight", "an Int4Weight", type(weight).__name__, TypeError)
        if mode not in MODES:
            _checks.fail("Int4Linear", "mode", " or ".join(map(repr, MODES)), repr(mode))
        if bias is not None:
            _checks.is_tensor("Int4Linear", bias=bias)
            _checks.shape("Int4Linear", {"N": weight.out_features}, bias=(bias, "N"))
            bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.group_size, self.mode = weight.group_size, mode
        self.register_parameter("bias", bias)
        self._hold(weight, packing.layout_for(weight.device))

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, group_size: int = 128, symmetric: bool = True, mode: str = "exact"
    ) -> Int4Linear:
        """The layer with its weight quantised by :meth:`Int4Weight.quantize`. It has the same bias parameter."""
        return cls(Int4Weight.quantize(linear.weight, group_size, symmetric), linear.bias, mode)

    def forward(self, x: Tensor) -> Tensor:
        layout = packing.layout_for(self.packed_weight.device)
        if layout != self._layout[0]:  # a backend is forced that was not before, or no longer
            self._hold(self.weight, layout)
        return autograd.linear(x, self._arguments(), self.bias, self.mode)

    @property
    def weight(self) -> Int4Weight:
        """The weight in its portable form."""
        return Int4Weight._of_packed(
            self._layout, self._arguments(), self.scales, self.zeros, self.g_idx, group_size=self.group_size
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}, symmetric={self.zeros is None}, act_order={self.g_idx is not None}, "
            f"mode={self.mode!r}"
        )

    def _hold(self, weight: Int4Weight, layout: str) -> None:
        packed = weight.pack(layout)
        self._layout = (layout, packing.LAYOUTS[layout].VERSION)
        buffers: dict[str, Tensor | None] = {"scales": weight.scales, "zeros": weight.zeros, "g_idx": weight.g_idx}
        buffers |= {f"packed_{name}": getattr(packed, name) for name in ("weight", "scales", "zeros", "perm")}
        self._packed_group_size = packed.group_size
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)

    def _arguments(self) -> Packed:
        return Packed(
            self.packed_weight, self.packed_scales, self.packed_zeros, self.packed_perm,
            self.in_features, self.out_features, self._packed_group_size,
        )  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int4Linear:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        moved: dict[int, Tensor] = {}  # what was one tensor under two names stays one
        for name, tensor in before.items():
            after = self._buffers[name]
            if tensor is not None and after is not None:
                exact = after if after.dtype == tensor.dtype else tensor.to(after.device)
                self._buffers[name] = moved.setdefault(id(tensor), exact)
        device = self.packed_weight.device
        if device.type != "meta" and packing.layout_for(device) != self._layout[0]:
            self._hold(self.weight, packing.layout_for(device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.weight
        for name in PORTABLE:
            tensor = getattr(weight, name)
            if tensor is not None:
                destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {name: state_dict[prefix + name] for name in PORTABLE if prefix + name in state_dict}
        others = {key for key in state_dict if key.startswith(prefix)} - {prefix + name for name in PORTABLE}
        super()._load_from_state_dict(
            {key: state_dict[key] for key in state_dict if key in others}, prefix, local_metadata, strict, missing_keys,
            unexpected_keys, error_msgs,
        )  # fmt: skip
        missing = [prefix + name for name in ("qweight", "scales") if name not in given]
        if missing:
            missing_keys.extend(missing)
            return
        device = self.packed_weight.device
        if not local_metadata.get("assign_to_params_buffers") and device.type != "meta":
            given = {name: tensor.to(device, copy=True) for name, tensor in given.items()}
        try:
            weight = Int4Weight(**given, in_features=self.in_features, group_size=self.group_size)
            _checks.shape("Int4Linear", {"N": self.out_features}, qweight=(weight.qweight, "N ceil(K/2)"))
        except (ValueError, TypeError) as error:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
        else:
            self._hold(weight, packing.layout_for(weight.device))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        layout, version = self._layout
        if version != packing.LAYOUTS[layout].VERSION:
            raise ValueError(
                f"Int4Linear: the pickle holds a weight packed in version {version} of the layout {layout!r}, this "
                f"release reads version {packing.LAYOUTS[layout].VERSION}; a state_dict does not depend on it"
            )
