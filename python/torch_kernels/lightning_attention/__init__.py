# SPDX-License-Identifier: Apache-2.0
"""Linear attention with a scalar decay: lightning attention, retention, and simple gated linear attention.

Every key/value head carries a state ``[K, V]``, whatever the length of the sequence:

    S_t = e^(-slope) S_(t-1) + k_t^T v_t        o_t = scale * q_t S_t

A token's own key and value count undecayed. ``scale`` is 1 unless given. Query heads may be a multiple of the key/value
heads, to which slopes, gates and states belong: query head h uses key/value head ``h // (Hq / H)``.

States are float32 (float64 for float64 inputs), and products are summed in float32. Prefill, decoding steps, any split
of the two, and packed sequences give the recurrence's result; packed sequences give the bits of separate calls. What is
masked has no influence, NaN and infinities included: no token of another sequence, no later token, and nothing before a
decay of zero (a slope of +inf, a gate of -inf), which resets the state.
"""

from __future__ import annotations

from torch import Tensor

from torch_kernels.lightning_attention import autograd as _autograd
from torch_kernels.lightning_attention import op as _op
from torch_kernels.lightning_attention.slopes import lightning_slopes as lightning_slopes


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Causal linear attention with a constant decay per head, over whole sequences.

    .. math::
        S_t = e^{-\mathrm{slope}} S_{t-1} + k_t^\top v_t, \qquad o_t = \mathrm{scale} \cdot q_t S_t

    from the initial state, or zero; equally
    :math:`o_t = \mathrm{scale} \sum_{j \le t} e^{-\mathrm{slope} (t - j)} (q_t \cdot k_j) v_j` without one. Time and
    memory are linear in T. Differentiable in q, k, v, slopes and initial_state.

    Args:
        q: queries ``[B, T, Hq, K]``, float32, float16 or bfloat16 (float64 on the CPU); K and V multiples of 8 up to
            256, Hq a multiple of H.
        k: keys ``[B, T, H, K]``, in q's dtype.
        v: values ``[B, T, H, V]``, in q's dtype.
        slopes: decay rates ``[H]``, float32 (float64 too with float64 inputs), at least 0. 0 never forgets; +inf
            forgets everything before a token, and has the gradient 0. See :func:`lightning_slopes`.
        initial_state: ``[N, H, K, V]``, float32 (float64 with float64 inputs); the first token sees it decayed once.
            N = B, or the number of packed sequences.
        cu_seqlens: where packed sequences begin and end ``[N+1]``, int32 or int64, from 0 to T and never descending;
            B must be 1. Sequences may be empty.
        scale: multiplies the output; None means 1.
        output_final_state: whether to return the state after the last token.

    Returns:
        out ``[B, T, Hq, V]`` in q's dtype, and the final state ``[N, H, K, V]`` in the states' dtype, ``[0, H, K, V]``
        unless asked for. float16 outputs overflow to infinity where sums leave their range.

    Raises:
        ValueError, TypeError: an argument has a wrong device, dtype, shape or value. cu_seqlens is checked on the CPU,
            and on CUDA under :func:`torch_kernels.set_validation`.

    Qin et al., *Lightning Attention-2*, arXiv 2401.04658; *TransNormerLLM*, arXiv 2307.14995; MiniMax, *MiniMax-01*,
    arXiv 2501.08313. With RetNet's slopes it is retention: Sun et al., arXiv 2307.08621.
    """
    return _autograd.whole_sequences("slopes", q, k, v, slopes, initial_state, cu_seqlens, scale, output_final_state)


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Causal linear attention whose decay is a gate of each token and head.

    .. math::
        S_t = e^{g_t} S_{t-1} + k_t^\top v_t, \qquad o_t = \mathrm{scale} \cdot q_t S_t

    Differentiable in q, k, v, g and initial_state.

    Args:
        q: queries ``[B, T, Hq, K]``, float32, float16 or bfloat16 (float64 on the CPU); K and V multiples of 8 up to
            256, Hq a multiple of H.
        k: keys ``[B, T, H, K]``, in q's dtype.
        v: values ``[B, T, H, V]``, in q's dtype.
        g: logarithms of the decays ``[B, T, H]``, float32 (float64 too with float64 inputs), at most 0. -inf resets the
            state before the token is added, by selection, and has the gradient 0.
        initial_state: ``[N, H, K, V]``, float32 (float64 with float64 inputs).
        cu_seqlens: where packed sequences begin and end ``[N+1]``, int32 or int64; B must be 1.
        scale: multiplies the output; None means 1.
        output_final_state: whether to return the state after the last token.

    Returns:
        out ``[B, T, Hq, V]`` in q's dtype, and the final state ``[N, H, K, V]``, ``[0, H, K, V]`` unless asked for.

    Raises:
        ValueError, TypeError: as :func:`lightning_attention`.

    Yang et al., *Gated Linear Attention*, arXiv 2312.06635; Dao and Gu, *Mamba-2*, arXiv 2405.21060.
    """
    return _autograd.whole_sequences("g", q, k, v, g, initial_state, cu_seqlens, scale, output_final_state)


def lightning_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    grad_final_state: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    decay_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""The gradients of :func:`lightning_attention`, which autograd calls; for custom backward passes.

    With the gradient of the state after a token
    :math:`dS_t = \mathrm{scale} \cdot q_t^\top do_t + e^{-\mathrm{slope}} dS_{t+1}`, from the final state's:

    .. math::
        dq_t = \mathrm{scale} \cdot do_t S_t^\top, \quad dk_t = v_t dS_t^\top, \quad dv_t = k_t dS_t, \quad
        d\,\mathrm{slope} = -\sum_t e^{-\mathrm{slope}} \langle S_{t-1}, dS_t \rangle

    Args:
        grad_out: the gradient of out ``[B, T, Hq, V]``, in q's dtype.
        q: as in the forward pass, and so k, v, slopes, initial_state, cu_seqlens and scale.
        k: ``[B, T, H, K]``.
        v: ``[B, T, H, V]``.
        slopes: ``[H]``.
        grad_final_state: the gradient of the final state ``[N, H, K, V]``; None means zero.
        initial_state: ``[N, H, K, V]``.
        cu_seqlens: ``[N+1]``.
        scale: None means 1.
        decay_gradient: False leaves grad_slopes out: it comes back empty.

    Returns:
        grad_q, grad_k, grad_v and grad_slopes, each as what it belongs to (of slopes summed over batch and tokens), and
        grad_initial_state ``[N, H, K, V]``, ``[0, H, K, V]`` when there was no initial state.

    Raises:
        ValueError, TypeError: as :func:`lightning_attention`.
    """
    return _op.lightning_attention_backward(
        grad_out, q, k, v, slopes, grad_final_state=grad_final_state, initial_state=initial_state,
        cu_seqlens=cu_seqlens, scale=scale, decay_gradient=decay_gradient,
    )  # fmt: skip


def simple_gla_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    grad_final_state: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    decay_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""The gradients of :func:`simple_gla`, which autograd calls; for custom backward passes.

    As :func:`lightning_attention_backward`, with :math:`dg_t = e^{g_t} \langle S_{t-1}, dS_t \rangle` for each token.

    Args:
        grad_out: the gradient of out ``[B, T, Hq, V]``, in q's dtype.
        q: as in the forward pass, and so k, v, g, initial_state, cu_seqlens and scale.
        k: ``[B, T, H, K]``.
        v: ``[B, T, H, V]``.
        g: ``[B, T, H]``.
        grad_final_state: the gradient of the final state ``[N, H, K, V]``; None means zero.
        initial_state: ``[N, H, K, V]``.
        cu_seqlens: ``[N+1]``.
        scale: None means 1.
        decay_gradient: False leaves grad_g out: it comes back empty.

    Returns:
        grad_q, grad_k, grad_v and grad_g, each as what it belongs to, and grad_initial_state ``[N, H, K, V]``,
        ``[0, H, K, V]`` when there was no initial state.

    Raises:
        ValueError, TypeError: as :func:`simple_gla`.
    """
    return _op.simple_gla_backward(
        grad_out, q, k, v, g, grad_final_state=grad_final_state, initial_state=initial_state, cu_seqlens=cu_seqlens,
        scale=scale, decay_gradient=decay_gradient,
    )  # fmt: skip


def lightning_chunk_state(k: Tensor, v: Tensor, slopes: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    r"""The state that a sequence leaves behind, from zero, without its outputs:
    :math:`S = \sum_j e^{-\mathrm{slope} (T - 1 - j)} k_j^\top v_j`.

    With :func:`lightning_apply_state` it makes parallelism over a sequence: a part that is given the state S before it
    ends in ``exp(-slope * T) * S + lightning_chunk_state(k, v, slopes)``. Differentiable in k, v and slopes.

    Args:
        k: keys ``[B, T, H, K]``, float32, float16 or bfloat16 (float64 on the CPU).
        v: values ``[B, T, H, V]``, in k's dtype.
        slopes: decay rates ``[H]``, as in :func:`lightning_attention`.
        cu_seqlens: where packed sequences begin and end ``[N+1]``, int32 or int64; B must be 1.

    Returns:
        ``[N, H, K, V]``, float32 (float64 for float64 inputs), N = B or the number of packed sequences.

    Raises:
        ValueError, TypeError: as :func:`lightning_attention`.

    Sun et al., *LASP-2*, arXiv 2502.07563.
    """
    return _autograd.chunk_state(k, v, slopes, cu_seqlens)


def lightning_apply_state(
    q: Tensor,
    state: Tensor,
    slopes: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    r"""What the state before a sequence adds to its outputs:
    :math:`o_i = \mathrm{scale} \cdot e^{-\mathrm{slope} (i + 1)} q_i S`, i counted from 0 in each sequence.

    Differentiable in q, state and slopes.

    Args:
        q: queries ``[B, T, Hq, K]``, float32, float16 or bfloat16 (float64 on the CPU).
        state: ``[N, H, K, V]``, float32 (float64 with float64 inputs), N = B or the number of packed sequences.
        slopes: decay rates ``[H]``, as in :func:`lightning_attention`; +inf gives 0, whatever the state.
        cu_seqlens: where packed sequences begin and end ``[N+1]``, int32 or int64; B must be 1.
        scale: multiplies the output; None means 1.

    Returns:
        ``[B, T, Hq, V]`` in q's dtype.

    Raises:
        ValueError, TypeError: as :func:`lightning_attention`.
    """
    return _autograd.apply_state(q, state, slopes, cu_seqlens, scale)


def lightning_attention_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    slopes: Tensor,
    *,
    state_indices: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    r"""One decoding step of N sequences: updates their states in place and returns the new tokens' outputs.

    .. math::
        S \leftarrow S + \mathrm{expm1}(-\mathrm{slope}) S + k^\top v, \qquad o = \mathrm{scale} \cdot q S

    The form with expm1 keeps slow heads exact over long sequences, where :math:`e^{-\mathrm{slope}}` would round to 1.
    Not differentiable.

    Args:
        q: queries ``[N, Hq, K]``, float32, float16 or bfloat16 (float64 on the CPU).
        k: keys ``[N, H, K]``, in q's dtype.
        v: values ``[N, H, V]``, in q's dtype.
        state: the pool of states ``[P, H, K, V]``, float32 (float64 with float64 inputs), changed in place.
        slopes: decay rates ``[H]``, as in :func:`lightning_attention`.
        state_indices: the state of each row ``[N]``, int32 or int64, all different; -1 marks a row of padding, which
            gives 0 and changes no state. None: P = N and row n has state n.
        scale: multiplies the output; None means 1.

    Returns:
        ``[N, Hq, V]`` in q's dtype.

    Raises:
        ValueError, TypeError: bad arguments, before anything is written. Indices are checked on the CPU, and on CUDA
            under :func:`torch_kernels.set_validation`; inputs that require grad are refused.
    """
    return _op.lightning_attention_step_(q, k, v, state, slopes, state_indices=state_indices, scale=scale)


def lightning_attention_verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    slopes: Tensor,
    *,
    parents: Tensor | None = None,
    state_indices: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    r"""Outputs of all nodes of a draft tree over each sequence's state, which stays as it is.

    With the depth :math:`d_i` of node i, 0 for a root, and A(i) the node itself and its ancestors:

    .. math::
        o_i = \mathrm{scale} \Big( e^{-\mathrm{slope} (d_i + 1)} q_i S +
        \sum_{j \in A(i)} e^{-\mathrm{slope} (d_i - d_j)} (q_i \cdot k_j) v_j \Big)

    :func:`lightning_attention_commit_` then applies the accepted path. Not differentiable.

    Args:
        q: queries ``[N, T, Hq, K]``, float32, float16 or bfloat16 (float64 on the CPU); T up to 1024 nodes.
        k: keys ``[N, T, H, K]``, in q's dtype.
        v: values ``[N, T, H, V]``, in q's dtype.
        state: the pool of states ``[P, H, K, V]``, float32 (float64 with float64 inputs).
        slopes: decay rates ``[H]``, as in :func:`lightning_attention`.
        parents: the trees ``[N, T]``, int32 or int64: each node's parent, an earlier node; -1 for a root (there may be
            several); -2 for padding, which gives 0. None: a chain.
        state_indices: the state of each row ``[N]``, int32 or int64; -1 marks a row of padding, which gives 0.
            None: P = N and row n has state n.
        scale: multiplies the output; None means 1.

    Returns:
        ``[N, T, Hq, V]`` in q's dtype.

    Raises:
        ValueError, TypeError: as :func:`lightning_attention_step_`.
    """
    return _op.lightning_attention_verify(
        q, k, v, state, slopes, parents=parents, state_indices=state_indices, scale=scale
    )


def lightning_attention_commit_(
    k: Tensor,
    v: Tensor,
    state: Tensor,
    slopes: Tensor,
    path: Tensor,
    num_accepted: Tensor,
    *,
    state_indices: Tensor | None = None,
) -> None:
    """Applies the nodes ``path[n, 0 .. num_accepted[n]]`` of a verified draft tree to the states, in place.

    The root is one of them: its key and value are not in the state yet. Arguments are as the ``tree_verify_*``
    functions return them.

    Args:
        k: the nodes' keys ``[N, T, H, K]``, float32, float16 or bfloat16 (float64 on the CPU).
        v: their values ``[N, T, H, V]``, in k's dtype.
        state: the pool of states ``[P, H, K, V]``, float32 (float64 with float64 inputs), changed in place.
        slopes: decay rates ``[H]``, as in :func:`lightning_attention`.
        path: node ids from the root ``[N, T]``, int32 or int64, ascending; -1 ends the path.
        num_accepted: accepted nodes without the root ``[N]``, int32 or int64; a row whose path starts with -1 is
            skipped.
        state_indices: the state of each row ``[N]``, int32 or int64, all different; -1 marks a row of padding, whose
            nodes are applied to nothing. None: P = N and row n has state n.

    Raises:
        ValueError, TypeError: as :func:`lightning_attention_step_`, before anything is written.
    """
    _op.lightning_attention_commit_(k, v, state, slopes, path, num_accepted, state_indices=state_indices)
