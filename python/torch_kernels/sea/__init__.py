# SPDX-License-Identifier: Apache-2.0
"""SEA: estimate an attention map with linear attention, select from it, attend to what was selected.

Every query row has K scores per head, whatever the length of the sequence. Row i sees the keys ``0 .. w - 1`` with
``w = widths[b, i]``: all unpadded keys, or in causal attention ``i + 1 + Tk - Tq``. Its cell m owns the columns from
:math:`v_m` up to :math:`v_{m+1}`,

    v_m = (2 m w + K) // (2 K)

in exact integers, so that K cells always cover what the row sees, and no more: :func:`sea_select` needs no causal mask.
A row of width w <= 0 (padding) sees nothing.

Selected cells are a bitset ``[B, Tq, ceil(H * K / 32)]`` of int32 words, in which bit ``h * K + m`` (least significant
first) is cell m of head h.

Lee, Kim, Willette and Hwang, *SEA: Sparse Linear Attention with Estimated Attention Mask*, arXiv 2310.01777.
"""

from __future__ import annotations

from torch import Tensor

from torch_kernels.sea import autograd as _autograd
from torch_kernels.sea import op as _op


def favor_features(x: Tensor, proj: Tensor, *, kind: str, eps: float, shift: Tensor | None = None) -> Tensor:
    r"""Random features of softmax kernels (FAVOR+) or their rectified kin, the feature maps of Performers.

    With :math:`a = D^{-1/4}` and the rows of W = proj:

    .. math::
        \mathrm{relu}: \quad & \max(a W x, 0) + \mathrm{eps} \\
        \mathrm{exp}: \quad & m^{-1/2} \left(e^{a W x - a^2 |x|^2 / 2 - \mathrm{shift}} + \mathrm{eps}\right)

    Differentiable in x, proj and shift.

    Args:
        x: queries or keys ``[B, T, H, D]``, float32, float16 or bfloat16 (float64 on the CPU).
        proj: the random projection ``[m, D]``, in x's dtype or float32.
        kind: ``"relu"`` or ``"exp"``.
        eps: added to every feature, which keeps denominators of attention away from 0.
        shift: for kind "exp" a stabiliser that broadcasts to ``[B, T, H, 1]``, in x's dtype or float32. Attention does
            not depend on one that is shared by all features of a query, or by all keys of a head, except through eps.
            None is 0.

    Returns:
        Features ``[B, T, H, m]`` in x's dtype.

    Raises:
        ValueError, TypeError: an argument has a wrong device, dtype, shape or value.

    Choromanski et al., *Rethinking Attention with Performers*, arXiv 2009.14794.
    """
    return _autograd.favor_features(x, proj, kind, eps, shift)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    initial_state: Tensor | None = None,
    initial_norm: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Attention whose weights are products of features, normalised.

    .. math::
        S_t = S_{t-1} + k_t^\top v_t, \quad z_t = z_{t-1} + k_t, \quad
        o_t = \frac{q_t S_t}{q_t \cdot z_t + \mathrm{eps}}

    from the initial state and norm, or zero; without ``causal`` every token reads the last state. A denominator of
    exactly 0 gives 0, and no gradient. Differentiable in q, k, v, initial_state and initial_norm, through state and
    norm too.

    Args:
        q: features of queries ``[B, T, H, m]``, float32, float16 or bfloat16 (float64 on the CPU), any m and Dv.
        k: features of keys ``[B, T, H, m]``, in q's dtype.
        v: values ``[B, T, H, Dv]``, in q's dtype.
        causal: whether a token sees itself and what came before it only.
        initial_state: ``[B, H, m, Dv]``, float32 (float64 with float64 inputs); given together with initial_norm.
        initial_norm: ``[B, H, m]``, in initial_state's dtype.
        eps: added to denominators.

    Returns:
        out ``[B, T, H, Dv]`` in q's dtype, and the state ``[B, H, m, Dv]`` and norm ``[B, H, m]`` after the last
        token, float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: an argument has a wrong device, dtype, shape or value.

    Katharopoulos et al., *Transformers are RNNs*, arXiv 2006.16236.
    """
    return _autograd.linear_attention(q, k, v, causal, initial_state, initial_norm, eps)


def linear_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grad_state: Tensor | None = None,
    grad_norm: Tensor | None = None,
    causal: bool = True,
    initial_state: Tensor | None = None,
    initial_norm: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""The gradients of :func:`linear_attention`, which autograd calls; for custom backward passes.

    With the denominators :math:`n_t = q_t \cdot z_t + \mathrm{eps}`, :math:`du_t = do_t / n_t` and
    :math:`dn_t = -du_t \cdot o_t`:

    .. math::
        dq_t = du_t S_t^\top + dn_t z_t, \quad dk_t = v_t dS_t^\top + dz_t, \quad dv_t = k_t dS_t, \quad
        dS_t = \sum_{i \ge t} q_i^\top du_i, \quad dz_t = \sum_{i \ge t} dn_i q_i

    to which the gradients of the last state and norm are added.

    Args:
        grad_out: the gradient of out ``[B, T, H, Dv]``, in q's dtype.
        q: as in the forward pass, and so k, v, causal, initial_state, initial_norm and eps.
        k: ``[B, T, H, m]``.
        v: ``[B, T, H, Dv]``.
        grad_state: the gradient of the last state ``[B, H, m, Dv]``; None means zero.
        grad_norm: the gradient of the last norm ``[B, H, m]``; None means zero.
        causal: as in the forward pass.
        initial_state: ``[B, H, m, Dv]``.
        initial_norm: ``[B, H, m]``.
        eps: as in the forward pass.

    Returns:
        grad_q, grad_k and grad_v, each as what it belongs to, and grad_initial_state ``[B, H, m, Dv]`` and
        grad_initial_norm ``[B, H, m]``, of B = 0 when there was no initial state.

    Raises:
        ValueError, TypeError: as :func:`linear_attention`.
    """
    return _op.linear_attention_backward(
        grad_out, q, k, v, grad_state=grad_state, grad_norm=grad_norm, causal=causal, initial_state=initial_state,
        initial_norm=initial_norm, eps=eps,
    )  # fmt: skip


def sea_select(scores: Tensor, widths: Tensor, *, k: float) -> Tensor:
    r"""Which cells every row keeps: the best of all its heads together, about as many as cover k keys per head.

    A row of width w keeps exactly

    .. math:: n = \min(\max(\mathrm{round}(H k K / w), 1), H K)

    cells (half to even, computed in float64 as ``H * k * K / w`` from left to right), none where w <= 0. Of equal
    scores the smaller ``h * K + m`` wins; -0 equals +0; -inf and NaN come last, as equals. A selection has no gradient.

    Args:
        scores: ``[B, H, Tq, K]``, float32, float16 or bfloat16 (float64 on the CPU).
        widths: how many keys each row sees ``[B, Tq]``, int32 or int64.
        k: keys to keep per row and head, at least 0; it need not be whole.

    Returns:
        cells, the bitset int32 ``[B, Tq, ceil(H * K / 32)]``.

    Raises:
        ValueError, TypeError: an argument has a wrong device, dtype, shape or value.
    """
    return _op.sea_select(scores.detach(), widths, k=k)


def sea_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cells: Tensor,
    widths: Tensor,
    *,
    num_cells: int,
    scale: float | None = None,
    max_columns_per_cell: int = 0,
    row_gain: Tensor | None = None,
    mix: Tensor | None = None,
    pooled: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Softmax attention of each row and head to the columns of its selected cells.

    .. math::
        p_{ij} = \mathrm{softmax}_j(\mathrm{scale} \cdot q_i \cdot k_j), \quad
        c_i = \mathrm{gain}_i \sum_j p_{ij} v_j, \quad
        o_i = \mathrm{mix}_i c_i + (1 - \mathrm{mix}_i) \, \mathrm{pooled}_i

    over the columns j that the row keeps in the head. A kept cell of n columns from v to v' keeps them all, or with
    ``max_columns_per_cell`` < n so many, spread evenly: ``v' - 1 - t * n // max_columns_per_cell``. A row and head
    that keeps nothing has the context 0. Time is linear in the number of kept columns, and no list of them is made.
    Differentiable in q, k, v, row_gain, mix and pooled.

    Args:
        q: queries ``[B, Tq, H, D]``, float32, float16 or bfloat16 (float64 on the CPU); D and Dv multiples of 8 up to
            256.
        k: keys ``[B, Tk, H, D]``, in q's dtype; for decoding a cache.
        v: values ``[B, Tk, H, Dv]``, in q's dtype.
        cells: the selected cells ``[B, Tq, ceil(H * num_cells / 32)]``, int32, from :func:`sea_select`.
        widths: how many keys each row sees ``[B, Tq]``, int32 or int64, at most Tk.
        num_cells: K.
        scale: multiplies q . k; None means ``1 / sqrt(D)``.
        max_columns_per_cell: 0 means no limit.
        row_gain: multiplies the context ``[B, H, Tq]``, in q's dtype or float32.
        mix: the context's share ``[B, H, Tq]``, in q's dtype or float32; given together with pooled.
        pooled: what the context is mixed with ``[B, Tq, H, Dv]`` or ``[B, 1, H, Dv]``, in q's dtype.

    Returns:
        out ``[B, Tq, H, Dv]`` in q's dtype, and lse ``[B, H, Tq]``, the natural logarithm of the sum of exponentials,
        float32, -inf for what keeps nothing; it is not differentiable.

    Raises:
        ValueError, TypeError: an argument has a wrong device, dtype, shape or value. widths are checked on the CPU, and
            on CUDA under :func:`torch_kernels.set_validation`.
    """
    return _autograd.sea_attention(
        q, k, v, cells, widths, num_cells, scale, max_columns_per_cell, row_gain, mix, pooled
    )


def sea_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cells: Tensor,
    widths: Tensor,
    *,
    num_cells: int,
    scale: float | None = None,
    max_columns_per_cell: int = 0,
    row_gain: Tensor | None = None,
    mix: Tensor | None = None,
    pooled: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""The gradients of :func:`sea_attention`, which autograd calls; for custom backward passes.

    With :math:`a_i = \sum_j p_{ij} \, do_i \cdot v_j`, :math:`dc_i = \mathrm{gain}_i \mathrm{mix}_i do_i` and
    :math:`ds_{ij} = \mathrm{scale} \cdot p_{ij} (dc_i \cdot v_j - \mathrm{gain}_i \mathrm{mix}_i a_i)`:

    .. math::
        dq_i = \sum_j ds_{ij} k_j, \quad dk_j = \sum_i ds_{ij} q_i, \quad dv_j = \sum_i p_{ij} dc_i, \\
        d\,\mathrm{gain}_i = \mathrm{mix}_i a_i, \quad
        d\,\mathrm{mix}_i = \mathrm{gain}_i a_i - do_i \cdot \mathrm{pooled}_i, \quad
        d\,\mathrm{pooled}_i = (1 - \mathrm{mix}_i) do_i

    Args:
        grad_out: the gradient of out ``[B, Tq, H, Dv]``, in q's dtype.
        q: as in the forward pass, and so k, v and all arguments from cells on.
        k: ``[B, Tk, H, D]``.
        v: ``[B, Tk, H, Dv]``.
        out: what the forward pass returned ``[B, Tq, H, Dv]``.
        lse: what the forward pass returned ``[B, H, Tq]``.
        cells: ``[B, Tq, ceil(H * num_cells / 32)]``.
        widths: ``[B, Tq]``.
        num_cells: K.
        scale: None means ``1 / sqrt(D)``.
        max_columns_per_cell: 0 means no limit.
        row_gain: ``[B, H, Tq]``.
        mix: ``[B, H, Tq]``.
        pooled: ``[B, Tq, H, Dv]`` or ``[B, 1, H, Dv]``.

    Returns:
        grad_q, grad_k, grad_v, grad_row_gain, grad_mix and grad_pooled, each as what it belongs to; those of absent
        arguments are empty (``[0]``).

    Raises:
        ValueError, TypeError: as :func:`sea_attention`.
    """
    return _op.sea_attention_backward(
        grad_out, q, k, v, out, lse, cells, widths, num_cells=num_cells, scale=scale,
        max_columns_per_cell=max_columns_per_cell, row_gain=row_gain, mix=mix, pooled=pooled,
    )  # fmt: skip


def sea_stretch(x: Tensor, widths: Tensor, *, length: int, fill: float = 0.0) -> Tensor:
    """A map of cells as a map of columns: ``out[b, h, i, j]`` is ``x[b, h, i, m]`` of the cell m that owns column j.

    Columns from the row's width on get ``fill``. For distillation and pictures: its memory is quadratic in the length.
    Differentiable in x.

    Args:
        x: ``[B, H, Tq, K]``, float32, float16 or bfloat16 (float64 on the CPU).
        widths: how many keys each row sees ``[B, Tq]``, int32 or int64, at most ``length``.
        length: columns of the result.
        fill: what columns get that a row does not see.

    Returns:
        ``[B, H, Tq, length]`` in x's dtype.

    Raises:
        ValueError, TypeError: as :func:`sea_attention`.
    """
    return _autograd.sea_stretch(x, widths, length, fill)


def sea_stretch_backward(grad_out: Tensor, widths: Tensor, *, num_cells: int) -> Tensor:
    """The gradient of :func:`sea_stretch`, which autograd calls: each cell's sum over the columns that it owns.

    Args:
        grad_out: ``[B, H, Tq, length]``, float32, float16 or bfloat16 (float64 on the CPU).
        widths: ``[B, Tq]``, int32 or int64, at most ``length``.
        num_cells: K.

    Returns:
        ``[B, H, Tq, K]`` in grad_out's dtype.

    Raises:
        ValueError, TypeError: as :func:`sea_stretch`.
    """
    return _op.sea_stretch_backward(grad_out, widths, num_cells=num_cells)


def sea_csr(
    cells: Tensor, widths: Tensor, *, num_heads: int, num_cells: int, max_columns_per_cell: int = 0
) -> tuple[Tensor, Tensor]:
    """The columns that :func:`sea_attention` attends to, as a matrix in CSR format: for other libraries, and for tests.

    The row of batch b, query i and head h is ``(b * Tq + i) * H + h``; its columns are
    ``col[crow[row] : crow[row + 1]]``, ascending. The size of col depends on values, so on CUDA this synchronises.

    Args:
        cells: ``[B, Tq, ceil(H * K / 32)]``, int32.
        widths: how many keys each row sees ``[B, Tq]``, int32 or int64.
        num_heads: H.
        num_cells: K.
        max_columns_per_cell: as in :func:`sea_attention`.

    Returns:
        crow int32 ``[B * Tq * H + 1]`` and col int32.

    Raises:
        ValueError, TypeError: an argument has a wrong device, dtype, shape or value, or there are 2**31 columns.
    """
    return _op.sea_csr(
        cells, widths, num_heads=num_heads, num_cells=num_cells, max_columns_per_cell=max_columns_per_cell
    )


def running_mean(v: Tensor, *, sum: Tensor | None = None, count: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    r"""The mean of all values up to each token, the global context of causal SEA:
    :math:`\mathrm{mean}_t = (\mathrm{sum} + \sum_{j \le t} v_j) / (\mathrm{count} + t + 1)`, t counted from 0.

    Sums are float64, so results stay right however long the sequence, and one that goes on from a call's sum and count
    gives the same as one call. Differentiable in v and sum.

    Args:
        v: ``[B, T, H, Dv]``, float32, float16 or bfloat16 (float64 on the CPU).
        sum: of the tokens before ``[B, H, Dv]``, float64; given together with count. None means none.
        count: how many there were ``[B]``, int64.

    Returns:
        mean ``[B, T, H, Dv]`` in v's dtype, and sum and count after the last token.

    Raises:
        ValueError, TypeError: an argument has a wrong device, dtype or shape.
    """
    return _autograd.running_mean(v, sum, count)
