# SPDX-License-Identifier: Apache-2.0
"""Quantising the linear layers of a whole model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from torch_kernels import _checks
from torch_kernels.int4_linear import Int4Weight
from torch_kernels.nn import Int4Linear


def quantize_(
    model: nn.Module,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    mode: str = "exact",
    filter: Callable[[str, nn.Module], bool] | None = None,
) -> nn.Module:
    """Replaces every ``torch.nn.Linear`` of a model by its quantised form, in place.

    Subclasses of ``Linear`` are left alone: they have a meaning of their own. A module that occurs several times is
    quantised once and stays shared, and so does a weight that several layers share.

    Args:
        model: the model.
        bits: 4 gives :class:`torch_kernels.nn.Int4Linear`.
        group_size: see :meth:`torch_kernels.Int4Weight.quantize`.
        symmetric: see there.
        mode: see :func:`torch_kernels.int4_linear`.
        filter: ``filter(name, module)`` says of each linear layer whether to quantise it, such as
            ``lambda name, module: name != "lm_head"``.

    Returns:
        The model; if it is itself a linear layer, the module that takes its place.

    Prints what that saved, and shows a progress bar on a terminal.
    """
    from tqdm import tqdm  # here, so that the package imports without it

    if bits not in _MAKERS:
        _checks.fail("quantize_", "bits", " or ".join(map(str, _MAKERS)), bits)
    make = _MAKERS[bits]
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and (filter is None or filter(name, module))
    }
    before = _bytes(model)
    weights: dict[Tensor, Any] = {}  # quantised ones by the dense ones: layers may share a weight
    replacements: dict[nn.Module, nn.Module] = {}
    for layer in tqdm(layers.values(), desc="quantize_", unit="layer", disable=None):
        replacements[layer] = make(layer, weights, group_size=group_size, symmetric=symmetric, mode=mode)
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
    layer: nn.Linear, weights: dict[Tensor, Int4Weight], *, group_size: int, symmetric: bool, mode: str
) -> Int4Linear:
    if layer.weight not in weights:
        weights[layer.weight] = Int4Weight.quantize(layer.weight, group_size, symmetric)
    return Int4Linear(weights[layer.weight], layer.bias, mode).train(layer.training)


# What makes the replacement of a layer, by the number of bits.
_MAKERS: dict[int, Callable[..., nn.Module]] = {4: _int4}


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
