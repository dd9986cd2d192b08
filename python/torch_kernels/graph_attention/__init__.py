# SPDX-License-Identifier: Apache-2.0
"""Graph-KV attention: text segments that attend to the cached keys of the segments which a graph names.

:class:`SegmentGraph` makes the index tensors of a graph; :func:`graph_attention` is the attention of all segments at
once; :func:`rope_shift` moves cached keys to other positions, where something else than this op reads them.
"""

from __future__ import annotations

from torch import Tensor

from torch_kernels.graph_attention import autograd
from torch_kernels.graph_attention.graph import SegmentGraph

__all__ = ["SegmentGraph", "graph_attention", "rope_shift"]


def graph_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    edge_offsets: Tensor,
    edge_sources: Tensor,
    own_segment: Tensor,
    *,
    scale: float | None = None,
    block_table: Tensor | None = None,
    inv_freq: Tensor | None = None,
    q_start: Tensor | None = None,
    edge_start: Tensor | None = None,
    own_start: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Attention over a graph of segments: no mask, no gathered keys, and positions that are given to keys for free.

    Query segment :math:`a` sees, in one softmax, all tokens of its source segments
    :math:`N(a)` = ``edge_sources[edge_offsets[a]:edge_offsets[a + 1]]``, and causally those of its own key segment:

    .. math::
        V(a, t) = \{(s, n) : s \in N(a)\} \cup \{(\mathrm{own}_a, n) : n \le t + L_{\mathrm{own}} - L_a\}, \quad
        \mathrm{out}_{a,t} = \sum_{(s,n) \in V(a,t)} e^{\sigma_{sn} - \mathrm{lse}_{a,t}}\, v_{sn}

    Scores are :math:`\sigma_{sn} = \mathrm{scale} \cdot q_{a,t}^\top k_{sn}`. With ``inv_freq``, queries come
    unrotated and keys rotated by their place in their segment (0, 1, ..), whatever the positions that this call gives
    them, and rotations R meet in the query:

    .. math::
        \sigma_{sn} = \mathrm{scale} \cdot (R(\mathrm{q\_start}_a + t - \mathrm{start}_s)\, q_{a,t})^\top k_{sn}

    so that one cached copy of a segment serves every target at the position which that target wants. Query head h uses
    key/value head ``h // (Hq / Hk)``.

    Args:
        q: queries ``[Tq, Hq, D]``, float32, float16 or bfloat16 (float64 on the CPU), the segments one after the other;
            D a multiple of 8 up to 256.
        k: keys ``[Tk, Hk, D]`` in q's dtype, or pages ``[P, page, Hk, D]`` with ``block_table``.
        v: values, the same with Dv.
        q_offsets: where query segments begin and end ``[Nq + 1]``, int32 or int64 as all that follow: from 0 to Tq.
        kv_offsets: where key segments begin and end ``[Nk + 1]``. Of pages, only the differences matter.
        edge_offsets: where the sources of each query segment begin and end in ``edge_sources`` ``[Nq + 1]``.
        edge_sources: the source of each edge, a key segment ``[E]``. No source twice for one target, and never its own
            segment.
        own_segment: the key segment that a query segment itself is the end of ``[Nq]``; -1 for none.
        scale: multiplies the scores; None means ``1 / sqrt(D)``.
        block_table: the pages of each key segment ``[Nk, pages]``; entries past ``ceil(length / page)`` are ignored.
        inv_freq: the frequencies of rotary embedding ``[D / 2]``, float32 or float64; with ``q_start`` and
            ``edge_start``.
        q_start: the position of each query segment's first token ``[Nq]``.
        edge_start: the position that each edge gives to its source's first key ``[E]``.
        own_start: the position of the own segment's first key ``[Nq]``; None means ``q_start + Lq - Lk``, where the
            last query and the last key meet.
        interleaved: rotary pairs are channels ``(2i, 2i + 1)``; otherwise ``(i, i + D / 2)``.

    Returns:
        out ``[Tq, Hq, Dv]`` in q's dtype, and lse ``[Hq, Tq]``, float32, natural logarithm. A token that sees nothing
        gets 0 and -inf.

    Raises:
        ValueError, TypeError: an argument has a wrong device, dtype, shape or value. Index values are checked on the
            CPU, and on CUDA under :func:`torch_kernels.set_validation`.

    Differentiable in q, k and v where these are not paged; lse is not differentiable.

    Softmax and sums are float32 (float64 for float64), angles float64. A segment's bits do not depend on the other
    segments of the call nor on how keys are paged, so several requests pack into one call. Query segments of one token
    are decoding, at the speed of memory.

    Wang et al., *Graph-KV: Breaking Sequence via Injecting Structural Biases into Large Language Models*, arXiv
    2506.07334.
    """
    graph = (q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment)
    rotation = (inv_freq, q_start, edge_start, own_start, interleaved)
    return autograd.graph_attention(q, k, v, graph, scale, block_table, rotation)


def rope_shift(k: Tensor, offsets: Tensor, delta: Tensor, inv_freq: Tensor, *, interleaved: bool = False) -> Tensor:
    """Moves cached keys to other positions: rotates those of segment s by ``delta[s]`` positions more.

    :func:`graph_attention` needs no such copy. This is for what reads the keys afterwards as one plain sequence.

    Args:
        k: rotated keys ``[Tk, Hk, D]``, float32, float16 or bfloat16 (float64 on the CPU).
        offsets: where segments begin and end ``[N + 1]``, int32 or int64. Tokens of no segment are copied.
        delta: positions to move each segment by, negative ones too ``[N]``, int32 or int64.
        inv_freq: the frequencies of rotary embedding ``[D / 2]``, float32 or float64.
        interleaved: rotary pairs are channels ``(2i, 2i + 1)``; otherwise ``(i, i + D / 2)``.

    Returns:
        ``[Tk, Hk, D]`` in k's dtype, from angles in float64 and products in float32, rounded once.

    Raises:
        ValueError, TypeError: an argument has a wrong device, dtype, shape or value. Offsets are checked on the CPU,
            and on CUDA under :func:`torch_kernels.set_validation`.

    Differentiable in k.
    """
    return autograd.rope_shift(k, offsets, delta, inv_freq, interleaved)
