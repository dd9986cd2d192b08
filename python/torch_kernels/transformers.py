# SPDX-License-Identifier: Apache-2.0
"""Models of transformers with int4 and int8 weights, loaded and saved by transformers itself.

Importing this module makes the quantisation method ``"torch_kernels"`` known to transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_kernels import _checks
from torch_kernels.int4_linear import Int4Weight
from torch_kernels.int4_linear.op import MODES
from torch_kernels.int4_linear.weight import GROUP_SIZES, number_of_groups
from torch_kernels.nn import Int4Linear, Int8Linear
from torch_kernels.quantize import LinearLayers, quantize_

try:
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError("torch_kernels.transformers needs transformers: pip install transformers") from error

METHOD = "torch_kernels"


@register_quantization_config(METHOD)
class TorchKernelsConfig(QuantizationConfigMixin):
    """What :func:`torch_kernels.quantize_` does with a model of transformers that is loaded.

    >>> config = TorchKernelsConfig(bits=4, group_size=64)                                       # doctest: +SKIP
    >>> model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)
    >>> model.save_pretrained("quantised")
    >>> model = AutoModelForCausalLM.from_pretrained("quantised")

    A dense checkpoint is loaded as it is, then its layers are quantised one after the other. A saved one holds the
    quantised weights and no others; whoever loads it imports ``torch_kernels.transformers`` first.

    Args:
        bits: 4 or 8.
        group_size: of 4 bits; see :meth:`torch_kernels.Int4Weight.quantize`.
        symmetric: of 4 bits; see there.
        mode: of 4 bits; see :func:`torch_kernels.int4_linear`.
        threshold: of 8 bits; see :func:`torch_kernels.int8_linear`.
        rotate: of 8 bits; see :func:`torch_kernels.quantize_`.
        skip: names of layers, or patterns of names, to leave as they are, as in :func:`torch_kernels.quantize_`. None
            leaves out what transformers proposes: the layer that makes the logits.
        quant_method: given by transformers.

    Raises:
        ValueError: an argument has a wrong value.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 128,
        symmetric: bool = True,
        mode: str = "exact",
        threshold: float = 0.0,
        rotate: bool = False,
        skip: Sequence[str] | str | None = None,
        quant_method: str = METHOD,
    ) -> None:
        for name, value, allowed in (("bits", bits, (4, 8)), ("group_size", group_size, GROUP_SIZES),
                                     ("mode", mode, MODES), ("quant_method", quant_method, (METHOD,))):  # fmt: skip
            if value not in allowed:
                _checks.fail("TorchKernelsConfig", name, " or ".join(map(repr, allowed)), repr(value))
        for name, given in (("threshold", threshold), ("rotate", rotate)):
            if given and bits != 8:
                _checks.fail("TorchKernelsConfig", name, f"left out with bits={bits}", given)
        if rotate and threshold > 0:
            _checks.fail("TorchKernelsConfig", "rotate", "False with a threshold", rotate)
        self.quant_method: Any = quant_method
        self.bits, self.group_size, self.symmetric, self.mode = bits, group_size, symmetric, mode
        self.threshold, self.rotate = threshold, rotate
        self.skip = [skip] if isinstance(skip, str) else None if skip is None else list(skip)


@register_quantizer(METHOD)
class TorchKernelsQuantizer(HfQuantizer):
    """Called by transformers around the loading of weights."""

    quantization_config: TorchKernelsConfig

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        """The layers that the checkpoint's tensors go into; so far they have no memory."""
        config = self.quantization_config
        if config.skip is None:
            config.skip = sorted(self.get_modules_to_not_convert(model))
        if self.pre_quantized:
            places = LinearLayers(model)
            places.replace(places.chosen(None, config.skip), lambda _, layer: self._empty(layer))
        return model

    def _empty(self, layer: nn.Linear) -> nn.Module:
        config = self.quantization_config
        if config.bits == 8:
            return Int8Linear.from_linear(layer, config.threshold, rotate=config.rotate)
        return _PortableInt4(layer, config)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        config = self.quantization_config
        if not self.pre_quantized:
            return quantize_(
                model, config.bits, config.group_size, config.symmetric, config.mode, skip=config.skip or (),
                threshold=config.threshold, rotate=config.rotate,
            )  # fmt: skip
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, _PortableInt4):
                    setattr(parent, name, child.packed(model.dtype).train(child.training))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class _PortableInt4(nn.Module):
    """The tensors of an :class:`Int4Linear` as a checkpoint has them, one by one."""

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear, config: TorchKernelsConfig) -> None:
        super().__init__()
        self.in_features, self.config = layer.in_features, config
        groups = number_of_groups(layer.in_features, config.group_size), layer.out_features
        columns = -(-layer.in_features // 2)
        self.register_buffer("qweight", torch.empty(layer.out_features, columns, dtype=torch.uint8, device="meta"))
        self.register_buffer("scales", torch.empty(groups, dtype=torch.float32, device="meta"))
        zeros = None if config.symmetric else torch.empty(groups, dtype=torch.uint8, device="meta")
        self.register_buffer("zeros", zeros)
        self.register_parameter("bias", layer.bias)

    def packed(self, dtype: torch.dtype) -> Int4Linear:
        # transformers loads scales in float32; where the model's dtype holds them all they were saved in that.
        short = self.scales.to(dtype)
        scales = short if torch.equal(short.float(), self.scales) else self.scales
        weight = Int4Weight(
            self.qweight, scales, self.zeros, in_features=self.in_features, group_size=self.config.group_size
        )
        return Int4Linear(weight, self.bias, self.config.mode)
