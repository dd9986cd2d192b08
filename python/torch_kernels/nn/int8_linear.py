# SPDX-License-Identifier: Apache-2.0
"""The module of the int8 linear family."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torch_kernels import _checks
from torch_kernels.int8_linear import Int8Weight, autograd, rotation


class Int8Linear(nn.Module):
    """``torch.nn.Linear`` with a weight of 8 bits; see :func:`torch_kernels.int8_linear`.

    Args:
        weight: the weight ``[N, K]``. With ``signs`` or ``smooth`` it must have been changed accordingly, which
            :meth:`from_linear` does.
        bias: None, or a parameter or tensor ``[N]``.
        threshold: see :func:`torch_kernels.int8_linear`; 6.0 is LLM.int8().
        signs: ``[K]`` of +1 and -1: x is rotated, see :func:`torch_kernels.rotate_quantize`. Not with a threshold.
        smooth: ``[K]``: x is divided by it, after the rotation if there is one.
        x_scale: ``[1]``: one scale for all rows of what is rounded. Not with a threshold.

    Weight and vectors are buffers (``weight`` int8, ``weight_scale``, ``signs``, ``smooth``, ``x_scale``) and are in
    ``state_dict`` where the layer has them, beside ``bias``. ``.half()`` and the like convert the bias alone.
    """

    bias: Tensor | None
    weight: Tensor
    weight_scale: Tensor
    signs: Tensor | None
    smooth: Tensor | None
    x_scale: Tensor | None

    def __init__(
        self,
        weight: Int8Weight,
        bias: Tensor | None = None,
        threshold: float = 0.0,
        *,
        signs: Tensor | None = None,
        smooth: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        name = "Int8Linear"
        if not isinstance(weight, Int8Weight):
            _checks.fail(name, "weight", "an Int8Weight", type(weight).__name__, TypeError)
        given = {"bias": bias, "signs": signs, "smooth": smooth, "x_scale": x_scale}
        _checks.is_tensor(name, **{key: value for key, value in given.items() if value is not None})
        dims = {"N": weight.out_features, "K": weight.in_features}
        _checks.shape(name, dims, bias=(bias, "N"), signs=(signs, "K"), smooth=(smooth, "K"), x_scale=(x_scale, "1"))
        if not threshold >= 0:
            _checks.fail(name, "threshold", "at least 0", threshold)
        for key in ("signs", "x_scale"):
            if threshold > 0 and given[key] is not None:
                _checks.fail(name, key, "None with a threshold", "a tensor")
        if signs is not None:
            rotation.check_rotatable(name, "in_features", weight.in_features)
        self.out_features, self.in_features = weight.shape
        self.threshold = threshold
        self.register_parameter("bias", bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias))
        self.register_buffer("weight", weight.weight)
        self.register_buffer("weight_scale", weight.scale)
        for key, vector in (("signs", signs), ("smooth", smooth), ("x_scale", x_scale)):
            exact = None if vector is None else vector.detach().to(weight.device, torch.float32)
            self.register_buffer(key, exact)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        threshold: float = 0.0,
        *,
        rotate: bool = False,
        smooth: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> Int8Linear:
        """The layer with its weight quantised by :meth:`Int8Weight.quantize`. It has the same bias parameter.

        Args:
            linear: the layer.
            threshold: see :class:`Int8Linear`.
            rotate: rotates x by random signs (the same for every layer of this width) and a Hadamard transform, and
                the weight by the inverse before it is rounded. In_features must be as for
                :func:`torch_kernels.hadamard_transform`.
            smooth: ``[K]``, positive: divides x after the rotation, and multiplies the weight before it is rounded.
            x_scale: ``[1]``, the static scale of what is then rounded.
        """
        signs = None
        dense = linear.weight.detach()
        if rotate:
            if threshold > 0:
                _checks.fail("Int8Linear.from_linear", "rotate", "False with a threshold", rotate)
            rotation.check_rotatable("Int8Linear.from_linear", "in_features", linear.in_features)
            signs = rotation.rotation_signs(linear.in_features).to(dense.device)
        if smooth is not None:
            _check_smooth("Int8Linear.from_linear", smooth, linear.in_features)
            smooth = smooth.detach().to(dense.device, torch.float32)
        weight = Int8Weight.quantize(rotation.fold(dense, signs, smooth))
        return cls(weight, linear.bias, threshold, signs=signs, smooth=smooth, x_scale=x_scale)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight, self.weight_scale
        if self.signs is not None:
            return autograd.rotated_linear(x, *weight, self.bias, self.signs, self.smooth, self.x_scale)
        if self.smooth is not None:
            x = (x / self.smooth).to(x.dtype)
        return autograd.linear(x, *weight, self.bias, self.x_scale, self.threshold)

    def extra_repr(self) -> str:
        kind = f"threshold={self.threshold}"
        for key, present in (("rotate", self.signs), ("smooth", self.smooth), ("static", self.x_scale)):
            kind += f", {key}=True" if present is not None else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kind}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for key, tensor in before.items():
            after = self._buffers[key]
            if tensor is not None and after is not None and after.dtype != tensor.dtype:
                self._buffers[key] = tensor.to(after.device)
        return self


def _check_smooth(name: str, smooth: Tensor, features: int) -> None:
    _checks.is_tensor(name, smooth=smooth)
    _checks.shape(name, {"K": features}, smooth=(smooth, "K"))
    if not smooth.is_meta and not bool(((smooth > 0) & smooth.isfinite()).all()):
        _checks.fail(name, "smooth", "positive and finite", "a value that is not")
