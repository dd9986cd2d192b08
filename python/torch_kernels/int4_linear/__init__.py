# SPDX-License-Identifier: Apache-2.0
"""Linear layers with weights of 4 bits.

:class:`Int4Weight` quantises a weight or takes one from a checkpoint of GPTQ, AWQ, HQQ, tinygemm, ggml or MARLIN;
:func:`int4_linear` multiplies by it. :class:`torch_kernels.nn.Int4Linear` is the module, and
:func:`torch_kernels.quantize_` puts it into a model.
"""

from __future__ import annotations

from torch import Tensor

from torch_kernels import _checks
from torch_kernels.int4_linear import autograd, packing
from torch_kernels.int4_linear.weight import Int4Weight

__all__ = ["Int4Weight", "int4_linear"]


def int4_linear(x: Tensor, w: Int4Weight, bias: Tensor | None = None, mode: str = "exact") -> Tensor:
    r"""A linear layer whose weight has 4 bits.

    .. math::
        y_{m,n} = \sum_k x_{m,k} W_{n,k} + \mathrm{bias}_n, \qquad
        W_{n,k} = \mathrm{scales}_{\gamma(k), n} \, (q_{n,k} - \mathrm{zeros}_{\gamma(k), n})

    Scales and zero points are applied to the float32 sum of each group, so no weight is ever rounded, and nothing
    overflows before the result does. It is rounded once, to x's dtype.

    Args:
        x: ``[..., K]``, float32, float16 or bfloat16; under autocast it is cast as for ``torch.nn.functional.linear``.
        w: the weight, N x K, on x's device. What kernels read of it is packed on first use; inside ``torch.compile``
            call :meth:`Int4Weight.pack` before.
        bias: ``[N]``, in x's dtype or float32; added in float32.
        mode: ``"exact"`` leaves x as it is; ``"a8"`` rounds each row to 8 bits, with one scale for every 128 columns
            or fewer, and multiplies integers: faster where arithmetic is the limit; ``"fast"`` is exact, but the order
            of sums may depend on the number of rows. In the other two, a row's bits depend on that row alone.

    Returns:
        ``[..., N]`` in x's dtype. A row with a NaN or an infinity gives NaN or infinities in that row only.

    Raises:
        ValueError, TypeError: an argument has a wrong device, dtype, shape or value; float64 has no kernel.

    Differentiable in x (in mode "a8" as if nothing had been rounded) and bias; the dense weight never exists.

    Frantar et al., *MARLIN*, arXiv 2408.11743; *GPTQ*, arXiv 2210.17323; Lin et al., *AWQ*, arXiv 2306.00978.
    """
    _checks.is_tensor("int4_linear", x=x)
    if not isinstance(w, Int4Weight):
        _checks.fail("int4_linear", "w", "an Int4Weight", type(w).__name__, TypeError)
    if x.dim() and x.shape[-1] != w.in_features:
        _checks.fail("int4_linear", "x", f"[..., K={w.in_features}]", f"shape {list(x.shape)}")
    return autograd.linear(x, w.pack(packing.layout_for(x.device)), bias, mode)
