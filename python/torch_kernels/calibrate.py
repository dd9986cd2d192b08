# SPDX-License-Identifier: Apache-2.0
"""What a few batches tell about the inputs of a model's linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_kernels import _checks
from torch_kernels._numbers import divide
from torch_kernels.int8_linear import autograd, rotation


@dataclass(frozen=True)
class Calibration:
    """The result of :func:`calibrate`, by the names of the layers in ``model.named_modules()``.

    ``quantize_(model, bits=8, rotate=c.rotate, smooth=c.smooth, x_scale=c.x_scale)`` uses it. Layers that were never
    called, or saw nothing but zeros, are neither in ``smooth`` nor in ``x_scale``.
    """

    rotate: bool
    absmax: dict[str, Tensor] = field(default_factory=dict)  # [K], of each input channel, after the rotation if any
    smooth: dict[str, Tensor] = field(default_factory=dict)  # [K], what to divide channels by; empty without alpha
    x_scale: dict[str, Tensor] = field(default_factory=dict)  # [1], the static scale of what is rounded


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    rotate: bool = False,
    alpha: float | None = 0.5,
    filter: Callable[[str, nn.Module], bool] | None = None,
) -> Calibration:
    r"""Runs a model on a few batches and finds smoothing factors and static scales for its linear layers.

    .. math::
        \mathrm{smooth}_k = \frac{(\max |x_k|)^{\alpha}}{(\max_n |W_{nk}|)^{1 - \alpha}}, \qquad
        \mathrm{x\_scale} = \max_k \frac{\max |x_k|}{\mathrm{smooth}_k} / 127

    Args:
        model: runs in evaluation mode, without gradients, and is left as it was.
        batches: its inputs. A mapping is passed by keywords, a tuple or list as positional arguments, and anything
            else as the only argument. A few hundred rows of typical data suffice.
        rotate: measures x, and W, as layers with ``rotate=True`` see them.
        alpha: how much of the difficulty goes over to the weight; None for no smoothing.
        filter: ``filter(name, module)`` says of each linear layer whether to look at it.

    Returns:
        a :class:`Calibration`.

    Raises:
        ValueError: a layer's input holds a NaN or infinity, its width cannot be rotated, or alpha is not in 0..1.

    Shows a progress bar on a terminal.

    Xiao et al., *SmoothQuant*, arXiv 2211.10438; rotation before smoothing: *QuantVGGT*, arXiv 2509.21302.
    """
    from tqdm import tqdm  # here, so that the package imports without it

    if alpha is not None and not 0 <= alpha <= 1:
        _checks.fail("calibrate", "alpha", "None, or from 0 to 1", alpha)
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and (filter is None or filter(name, module))
    }
    signs: dict[str, Tensor | None] = dict.fromkeys(layers)
    if rotate:
        for name, layer in layers.items():
            rotation.check_rotatable("calibrate", f"in_features of {name!r}", layer.in_features)
            signs[name] = rotation.rotation_signs(layer.in_features).to(layer.weight.device)

    result = Calibration(rotate)

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            x = (positional[0] if positional else keywords["input"]).float()
            if (sign := signs[name]) is not None:
                x = autograd.hadamard_transform(x * sign, None)
            # Both amax and maximum pass NaN on: one look at the end finds it.
            largest = x[None].flatten(0, -2).abs().amax(0) if x.numel() else x.new_zeros(x.shape[-1])
            seen = result.absmax.get(name)
            result.absmax[name] = largest if seen is None else torch.maximum(seen, largest)

        return hook

    training = {module: module.training for module in model.modules()}
    hooks = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        model.eval()
        with torch.no_grad():
            for batch in tqdm(batches, desc="calibrate", unit="batch", disable=None):
                _call(model, batch)
    finally:
        for handle in hooks:
            handle.remove()
        for module, mode in training.items():
            module.training = mode

    for name, largest in result.absmax.items():
        if not bool(largest.isfinite().all()):
            _checks.fail("calibrate", f"the input of {name!r}", "finite", "NaN or infinity")
        if not bool(largest.any()):
            continue
        if alpha is not None:
            weight = rotation.fold(layers[name].weight.detach(), signs[name], None)
            result.smooth[name] = _smooth(largest, weight.float().abs().amax(0), alpha)
            largest = largest / result.smooth[name]
        result.x_scale[name] = divide(largest.amax(0, keepdim=True), 127)
    return result


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


def _smooth(x: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """1 where a channel of either is zero and there is nothing to balance."""
    factors = x**alpha / weight ** (1 - alpha)
    return factors.where((x > 0) & (weight > 0), 1.0)
