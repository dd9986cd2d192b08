# SPDX-License-Identifier: Apache-2.0
"""Quantising the linear layers of a whole model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from torch_kernels import _checks
from torch_kernels.calibrate import Calibration
from torch_kernels.int4_linear import Int4Weight
from torch_kernels.int8_linear import rotation
from torch_kernels.nn import Int4Linear, Int8Linear
from torch_kernels.nn.quantized_experts import QuantizedExperts


def quantize_(
    model: nn.Module,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    mode: str = "exact",
    filter: Callable[[str, nn.Module], bool] | None = None,
    *,
    skip: str | Iterable[str] = (),
    threshold: float = 0.0,
    rotate: bool = False,
    smooth: Calibration | Mapping[str, Tensor] | None = None,
    x_scale: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Replaces every ``torch.nn.Linear`` of a model by its quantised form, in place.

    >>> quantize_(model, bits=8, filter=lambda name, layer: name.endswith("down_proj"))    # doctest: +SKIP
    >>> quantize_(model, bits=4, skip=["lm_head", "*.gate"])                               # all others

    Subclasses of ``Linear`` are left alone: they have a meaning of their own. A module that occurs several times is
    quantised once and stays shared, and so does a weight that several layers share.

    Models of transformers keep the experts of a mixture in tensors of three dimensions. Here each expert is two linear
    layers, ``<experts>.up_layers.<i>`` and ``<experts>.down_layers.<i>``, and
    :class:`torch_kernels.nn.QuantizedExperts` takes their place if any of them is quantised. Routers, which are no
    ``Linear`` there, stay as they are.

    Args:
        model: the model.
        bits: 4 gives :class:`torch_kernels.nn.Int4Linear`, 8 gives :class:`torch_kernels.nn.Int8Linear`.
        group_size: of 4 bits; see :meth:`torch_kernels.Int4Weight.quantize`.
        symmetric: of 4 bits; see there.
        mode: of 4 bits; see :func:`torch_kernels.int4_linear`.
        filter: ``filter(name, module)`` says of each linear layer whether to quantise it, such as
            ``lambda name, module: name != "lm_head"``.
        skip: names of layers to leave as they are, or patterns of names such as ``"*.gate"``, where ``*`` is anything.
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

    Prints what that saved and which matrices it left as they are, and shows a progress bar on a terminal.
    """
    if bits not in _MAKERS:
        _checks.fail("quantize_", "bits", " or ".join(map(str, _MAKERS)), bits)
    places = LinearLayers(model)
    layers = places.chosen(filter, skip)
    if isinstance(smooth, Calibration):
        if smooth.rotate != rotate:
            _checks.fail("quantize_", "smooth", f"calibrated with rotate={rotate}", f"rotate={smooth.rotate}")
        smooth = smooth.smooth
    options = {"threshold": threshold, "rotate": rotate, "smooth": smooth or {}, "x_scale": x_scale or {}}
    for argument, value in options.items():
        if bits != 8 and value:
            _checks.fail("quantize_", argument, f"left out with bits={bits}", value)
    for argument, names in (("smooth", smooth or {}), ("x_scale", x_scale or {})):
        if unknown := [name for name in names if name not in places.layers]:
            _checks.fail("quantize_", argument, "a mapping from names of linear layers", f"{unknown[0]!r}")
    options |= {"group_size": group_size, "symmetric": symmetric, "mode": mode}
    before = _bytes(model)
    weights: dict[Tensor, Any] = {}  # quantised ones by the dense ones: layers may share a weight
    model = places.replace(layers, lambda name, layer: _MAKERS[bits](name, layer, weights, **options))
    after = _bytes(model)
    saved = f"{_size(before)} to {_size(after)}, {1 - after / before:.0%} saved" if before else "nothing to save"
    print(f"quantize_: {len(layers)} linear layers to {bits} bits; the model went from {saved}")
    if dense := _matrices(model):
        print(f"quantize_: left as they are: {dense}")
    return model


class LinearLayers:
    """The linear layers of a model, by name, and what replaces them; those of fused experts are among them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, nn.Linear] = {}
        self._experts: dict[nn.Module, QuantizedExperts] = {}  # by the fused ones
        for name, module in model.named_modules():
            if type(module) is nn.Linear:
                self.layers[name] = module
            elif QuantizedExperts.accepts(module):
                self._experts[module] = experts = QuantizedExperts.from_experts(module)
                self.layers |= {
                    f"{name}.{inner}" if name else inner: layer
                    for inner, layer in experts.named_modules()
                    if type(layer) is nn.Linear
                }

    def chosen(
        self, filter: Callable[[str, nn.Module], bool] | None, skip: str | Iterable[str]
    ) -> dict[str, nn.Linear]:
        patterns = [skip] if isinstance(skip, str) else list(skip)
        return {
            name: layer
            for name, layer in self.layers.items()
            if not any(fnmatchcase(name, pattern) for pattern in patterns) and (filter is None or filter(name, layer))
        }

    def replace(self, layers: Mapping[str, nn.Linear], make: Callable[[str, nn.Linear], nn.Module]) -> nn.Module:
        """Puts ``make(name, layer)`` in the place of each of these layers, after all of them were made. Returns the
        model, or what takes its place."""
        from tqdm import tqdm  # here, so that the package imports without it

        made: dict[nn.Module, nn.Module] = {}
        for name, layer in tqdm(layers.items(), desc="quantize_", unit="layer", disable=None):
            made[layer] = make(name, layer).train(layer.training)
        for fused, experts in self._experts.items():
            if any(layer in made for layer in experts.modules()):
                _substitute(experts, made)
                made[fused] = experts
        return _substitute(self.model, made)


def _substitute(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> nn.Module:
    # Parents are looked up by module, not by name: a shared module has only one name but several parents.
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in made:
                setattr(parent, name, made[child])
    return made.get(model, model)


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
    storages = (t.untyped_storage() for t in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _matrices(model: nn.Module) -> str:
    """The parameters with rows and columns, those of numbered layers together, the largest first."""
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            name = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)
            sizes[name] = sizes.get(name, 0) + parameter.nbytes
    return ", ".join(f"{name} ({_size(size)})" for name, size in sorted(sizes.items(), key=lambda item: -item[1]))


def _size(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
