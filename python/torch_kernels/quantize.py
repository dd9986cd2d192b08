# SPDX-License-Identifier: Apache-2.0
"""Quantising the linear layers of a whole model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from torch_kernels import _checks
from torch_kernels.calibrate import Calibration
from torch_kernels.int4_linear import Int4Weight
from torch_kernels.int8_linear import rotation
from torch_kernels.nn import Int4Linear, Int8Linear


def quantize_(
    model: nn.Module,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    mode: str = "exact",
    filter: Callable[[str, nn.Module], bool] | None = None,
    *,
    threshold: float = 0.0,
    rotate: bool = False,
    smooth: Calibration | Mapping[str, Tensor] | None = None,
    x_scale: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Replaces every ``torch.nn.Linear`` of a model by its quantised form, in place.

    Subclasses of ``Linear`` are left alone: they have a meaning of their own. A module that occurs several times is
    quantised once and stays shared, and so does a weight that several layers share.

    Args:
        model: the model.
        bits: 4 gives :class:`torch_kernels.nn.Int4Linear`, 8 gives :class:`torch_kernels.nn.Int8Linear`.
        group_size: of 4 bits; see :meth:`torch_kernels.Int4Weight.quantize`.
        symmetric: of 4 bits; see there.
        mode: of 4 bits; see :func:`torch_kernels.int4_linear`.
        filter: ``filter(name, module)`` says of each linear layer whether to quantise it, such as
            ``lambda name, module: name != "lm_head"``.
        threshold: of 8 bits; see :func:`torch_kernels.int8_linear`. 6.0 is LLM.int8().
        rotate: of 8 bits; rotates the inputs of every layer by a Hadamard transform, and the weight by its inverse
            before it is rounded, see :func:`torch_kernels.rotate_quantize`. Not with a threshold.
        smooth: of 8 bits; what to divide input channels by, ``[K]`` for each layer by name, and to multiply the weight
            by before it is rounded. With ``rotate`` it applies to the rotated channels. :func:`torch_kernels.calibrate`
            finds such factors; its result itself may be given. Layers without a name here are not smoothed.
        x_scale: of 8 bits; static scales ``[1]`` by the names of layers, see there. Not with a threshold.

    Returns:
        The model; if it is itself a linear layer, the module that takes its place.

    Raises:
        ValueError, TypeError: an argument has a wrong value, or a layer cannot be quantised so; the model is as before.

    Prints what that saved, and shows a progress bar on a terminal.
    """
    from tqdm import tqdm  # here, so that the package imports without it

    if bits not in _MAKERS:
        _checks.fail("quantize_", "bits", " or ".join(map(str, _MAKERS)), bits)
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    layers = {name: module for name, module in linear.items() if filter is None or filter(name, module)}
    if isinstance(smooth, Calibration):
        if smooth.rotate != rotate:
            _checks.fail("quantize_", "smooth", f"calibrated with rotate={rotate}", f"rotate={smooth.rotate}")
        smooth = smooth.smooth
    options = {"threshold": threshold, "rotate": rotate, "smooth": smooth or {}, "x_scale": x_scale or {}}
    for argument, value in options.items():
        if bits != 8 and value:
            _checks.fail("quantize_", argument, f"left out with bits={bits}", value)
    for argument, names in (("smooth", smooth or {}), ("x_scale", x_scale or {})):
        if unknown := [name for name in names if name not in linear]:
            _checks.fail("quantize_", argument, "a mapping from names of linear layers", f"{unknown[0]!r}")
    options |= {"group_size": group_size, "symmetric": symmetric, "mode": mode}
    before = _bytes(model)
    weights: dict[Tensor, Any] = {}  # quantised ones by the dense ones: layers may share a weight
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer in tqdm(layers.items(), desc="quantize_", unit="layer", disable=None):
        replacements[layer] = _MAKERS[bits](name, layer, weights, **options).train(layer.training)
    # Parents are looked up by module, not by name: a shared module has only one name but several parents.
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
    model = replacements.get(model, model)
    after = _bytes(model)
    saved = f"{_size(before)} to {_size(after)}, {1 - after / before:.0%} saved" if before else "nothing to save"
    print(f"quantize_: {len(layers)} linear layers to {bits} bits; the model went from {saved}")
    return model


def _int4(
    name: str,
    layer: nn.Linear,
    weights: dict[Tensor, Int4Weight],
    *,
    group_size: int,
    symmetric: bool,
    mode: str,
    **_: Any,
) -> Int4Linear:
    if layer.weight not in weights:
        weights[layer.weight] = Int4Weight.quantize(layer.weight, group_size, symmetric)
    return Int4Linear(weights[layer.weight], layer.bias, mode)


def _int8(
    name: str,
    layer: nn.Linear,
    weights: dict[Tensor, Int8Linear],
    *,
    threshold: float,
    rotate: bool,
    smooth: Mapping[str, Tensor],
    x_scale: Mapping[str, Tensor],
    **_: Any,
) -> Int8Linear:
    if rotate:
        rotation.check_rotatable("quantize_", f"in_features of {name!r}", layer.in_features)
    factors = smooth.get(name)
    made = Int8Linear.from_linear(layer, threshold, rotate=rotate, smooth=factors, x_scale=x_scale.get(name))
    if factors is None:
        first = weights.setdefault(layer.weight, made)
        made.weight, made.weight_scale = first.weight, first.weight_scale
    return made


# What makes the replacement of a layer, by the number of bits.
_MAKERS: dict[int, Callable[..., nn.Module]] = {4: _int4, 8: _int8}


def _bytes(model: nn.Module) -> int:
    """Of all parameters and buffers, shared memory counted once."""
    tensors: Iterator[Tensor] = itertools.chain(model.parameters(), model.buffers())
    return sum({t.untyped_storage()._cdata: t.nbytes for t in tensors}.values())


def _size(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
