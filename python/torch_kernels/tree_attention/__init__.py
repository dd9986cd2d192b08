# SPDX-License-Identifier: Apache-2.0
"""Verification of speculative token trees: attention, acceptance, and the cache update that follows.

A tree is a tensor ``parents`` ``[B, T]``: each node's parent, an earlier node; -1 for a root; -2 for padding. Node i
sees itself, its ancestors and the whole prefix, and stands at position ``prefix_lens[b] + depth[i]``.
One step of speculative decoding: :func:`tree_attention` in every layer, one of the ``tree_verify_*`` functions on the
model's output, :func:`tree_commit_kv_` in every layer.
"""

from __future__ import annotations

from torch import Tensor

from torch_kernels.tree_attention import op as _op


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix_lens: Tensor,
    parents: Tensor,
    *,
    k_tree: Tensor | None = None,
    v_tree: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Attention of all nodes of a token tree to the cached prefix and to their own ancestors, in one pass.

    For node :math:`i` of sequence :math:`b`, with the keys :math:`V(i)` of the prefix, its ancestors and itself:

    .. math::
        s_k = c \tanh(\mathrm{scale} \cdot q_i^\top k_k / c), \quad
        \mathrm{lse}_i = \ln\Big(\sum_{k \in V(i)} e^{s_k} + e^{\mathrm{sink}}\Big), \quad
        \mathrm{out}_i = \sum_{k \in V(i)} e^{s_k - \mathrm{lse}_i} v_k

    (no cap for ``softcap=0``, no sink term without ``sinks``). Query head h uses key/value head ``h // (Hq / Hk)``.

    Args:
        q: queries ``[B, T, Hq, D]``, float32, float16 or bfloat16 (float64 on the CPU); D a multiple of 8 up to 256,
            T up to 1024 nodes.
        k_cache: keys ``[B, S, Hk, D]``, or pages ``[P, page, Hk, D]`` with ``block_table``; in q's dtype, or
            float8_e4m3fn or int8 with ``k_scale`` and ``v_scale``.
        v_cache: values, the same with Dv.
        prefix_lens: committed tokens of each sequence ``[B]``, int32 or int64.
        parents: the trees ``[B, T]``, int32 or int64; each sequence has its own.
        k_tree: the nodes' own keys ``[B, T, Hk, D]`` in q's dtype. Without it node i is read from cache slot
            ``prefix_lens[b] + i``, which must exist.
        v_tree: their values ``[B, T, Hk, Dv]``.
        block_table: the page of every ``page`` slots ``[B, pages]``; entries past the used pages are ignored.
        scale: multiplies the scores; None means ``1 / sqrt(D)``.
        softcap: c above, a normal float32; 0 for none.
        window: keeps keys with ``position(q) - position(k) < window``; 0 keeps all. Positions, not slots: siblings
            stand at the same one.
        sinks: one logit per query head ``[Hq]``, float32, that takes part in the softmax without a value.
        k_scale: ``[1]`` or ``[Hk]``, float32: a cached key is stored times scale. Not applied to ``k_tree``.
        v_scale: the same for values.

    Returns:
        out ``[B, T, Hq, Dv]`` in q's dtype, and lse ``[B, Hq, T]``, float32, natural logarithm. Padding nodes give 0
        and -inf.

    Raises:
        ValueError, TypeError: an argument has a wrong device, dtype, shape or value. Index values are checked on the
            CPU, and on CUDA under :func:`torch_kernels.set_validation`. Inputs that require grad are refused.

    Softmax and sums are float32 (float64 for float64). A row's bits depend neither on the other rows of the batch nor
    on how the cache is paged.

    Tree attention: Cai et al., *Medusa*, arXiv 2401.10774; Li et al., *EAGLE-2*, arXiv 2406.16858; Miao et al.,
    *SpecInfer*, arXiv 2305.09781.
    """
    return _op.tree_attention(
        q, k_cache, v_cache, prefix_lens, parents, k_tree=k_tree, v_tree=v_tree, block_table=block_table, scale=scale,
        softcap=softcap, window=window, sinks=sinks, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


def tree_mask(parents: Tensor) -> Tensor:
    """Which nodes a node sees: ``mask[b, i, j]`` is true iff j is i or an ancestor of i.

    Args:
        parents: the trees ``[B, T]``, int32 or int64.

    Returns:
        bool ``[B, T, T]``; rows and columns of padding nodes are false.

    Raises:
        ValueError, TypeError: an argument has a wrong device, dtype, shape or value. Trees are checked on the CPU, and
            on CUDA under :func:`torch_kernels.set_validation`.
    """
    return _op.tree_mask(parents)


def tree_positions(parents: Tensor, prefix_lens: Tensor) -> Tensor:
    """Where nodes stand in their sequence: ``prefix_lens[b] + depth[i]``, for rotary embeddings and the like.

    Args:
        parents: the trees ``[B, T]``, int32 or int64.
        prefix_lens: committed tokens ``[B]``, int32 or int64.

    Returns:
        int32 ``[B, T]``; 0 for padding nodes.

    Raises:
        ValueError, TypeError: an argument has a wrong device, dtype, shape or value. Trees are checked on the CPU, and
            on CUDA under :func:`torch_kernels.set_validation`.
    """
    return _op.tree_positions(parents, prefix_lens)


def tree_verify_greedy(draft_tokens: Tensor, target_tokens: Tensor, parents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Accepts the longest path of drafted tokens that the target model would have chosen itself.

    A node is accepted if its parent is and its token equals the target's token after the parent. Node 0 is the root:
    the last committed token, always accepted. Among equally long paths the lowest index of the last node wins. With
    ``target_tokens`` freshly sampled at each node, the output is distributed as the target's own samples.

    Args:
        draft_tokens: the nodes' tokens ``[B, T]``, int32 or int64.
        target_tokens: the target's next token after each node ``[B, T]``, int32 or int64.
        parents: the trees ``[B, T]`` with one root, node 0.

    Returns:
        Three tensors.

        - path ``[B, T]`` int32: accepted node ids from the root on, -1 padded;
        - num_accepted ``[B]`` int32: how many drafted tokens were accepted, the root not counted;
        - tokens ``[B, T]`` in draft_tokens' dtype: the accepted tokens, then the target's next one, -1 padded
            (``num_accepted + 1`` are valid).

        A row without a root gives -1, 0 and -1.

    Raises:
        ValueError, TypeError: an argument has a wrong device, dtype, shape or value. Trees are checked on the CPU, and
            on CUDA under :func:`torch_kernels.set_validation`.
    """
    return _op.tree_verify_greedy(draft_tokens, target_tokens, parents)


def tree_verify_typical(
    draft_tokens: Tensor,
    target_logits: Tensor,
    parents: Tensor,
    *,
    temperature: float,
    epsilon: float,
    delta: float,
    uniforms: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Accepts drafted tokens that are typical of the target's distribution (Medusa's rule; not lossless).

    With :math:`p = \mathrm{softmax}(\mathrm{logits} / \mathrm{temperature})` after the parent, a node is accepted if
    its parent is and :math:`p(\mathrm{token}) > \min(\epsilon, \delta e^{-H})`, where
    :math:`H = -\sum p \ln(p + 10^{-5})` is Medusa's entropy in nats. The longest path wins, then the lowest index of
    its last node.

    Args:
        draft_tokens: the nodes' tokens ``[B, T]``, int32 or int64. One outside the vocabulary is never accepted.
        target_logits: the target's logits after each node ``[B, T, V]``, any float dtype.
        parents: the trees ``[B, T]`` with one root, node 0.
        temperature: above 0.
        epsilon: the threshold's upper bound.
        delta: the threshold's factor.
        uniforms: numbers in [0, 1) ``[B, T + 1]``, float32: the last one draws the next token from p at the path's end.
            None: the next token is the argmax.

    Returns:
        path, num_accepted and tokens as :func:`tree_verify_greedy`.

    Raises:
        ValueError, TypeError: an argument has a wrong device, dtype, shape or value. Trees are checked on the CPU, and
            on CUDA under :func:`torch_kernels.set_validation`.

    Cai et al., *Medusa*, arXiv 2401.10774, section 2.3.1.
    """
    return _op.tree_verify_typical(
        draft_tokens, target_logits, parents, temperature=temperature, epsilon=epsilon, delta=delta, uniforms=uniforms
    )


def tree_verify_sampling(
    draft_tokens: Tensor,
    target_probs: Tensor,
    parents: Tensor,
    uniforms: Tensor,
    *,
    draft_probs: Tensor | None = None,
    replacement: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lossless verification: what is emitted is distributed as if sampled from the target token by token.

    From the root, with r the target's distribution after the current node, its children are tried in ascending index.
    Child c with token x and ``u = uniforms[b, c]``:

    - without ``draft_probs`` (deterministic drafts, such as the top k): accepted if ``u < r(x)``; else x is removed
      from r and r renormalised;
    - with ``draft_probs`` q (children drawn from q in this order): accepted if ``u q(x) < r(x)``; else
      ``r = max(r - q, 0)`` renormalised. ``replacement=False``: x is then removed from q as well.

    When no child is left, the next token is drawn from r with ``uniforms[b, T]``, by the inverse of its cumulative sum
    over ascending ids. A token of probability zero is never emitted.

    Args:
        draft_tokens: the nodes' tokens ``[B, T]``, int32 or int64. One outside the vocabulary is never accepted.
        target_probs: the target's probabilities after each node ``[B, T, V]``, any float dtype.
        parents: the trees ``[B, T]`` with one root, node 0.
        uniforms: numbers in [0, 1) ``[B, T + 1]``, float32.
        draft_probs: per node, the distribution its children were drawn from ``[B, T, V]``.
        replacement: whether siblings were drawn with replacement.

    Returns:
        path, num_accepted and tokens as :func:`tree_verify_greedy`.

    Raises:
        ValueError, TypeError: an argument has a wrong device, dtype, shape or value. Trees are checked on the CPU, and
            on CUDA under :func:`torch_kernels.set_validation`.

    Miao et al., *SpecInfer*, arXiv 2305.09781, algorithm 2; without replacement: Chen et al., *Sequoia*,
    arXiv 2402.12374.
    """
    return _op.tree_verify_sampling(
        draft_tokens, target_probs, parents, uniforms, draft_probs=draft_probs, replacement=replacement
    )


def tree_commit_kv_(
    k_cache: Tensor,
    v_cache: Tensor,
    k_tree: Tensor,
    v_tree: Tensor,
    prefix_lens: Tensor,
    path: Tensor,
    num_accepted: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Writes the accepted path's keys and values into the cache: slot ``prefix_lens[b] + j`` gets node ``path[b, j]``.

    Args:
        k_cache: keys ``[B, S, Hk, D]`` or pages ``[P, page, Hk, D]``, changed in place; nothing but the slots
            ``prefix_lens[b] .. prefix_lens[b] + num_accepted[b]`` is written.
        v_cache: values, the same with Dv.
        k_tree: the nodes' keys ``[B, T, Hk, D]``.
        v_tree: their values ``[B, T, Hk, Dv]``.
        prefix_lens: committed tokens before this step ``[B]``.
        path: node ids from the root ``[B, T]``, as the ``tree_verify_*`` functions return them.
        num_accepted: ``[B]``; a row whose path starts with -1 is skipped.
        block_table: pages of each sequence ``[B, pages]``.
        k_scale: ``[1]`` or ``[Hk]``, float32, for int8 and float8_e4m3fn caches: ``key / scale`` is stored, rounded to
            nearest and saturated at ±127 or ±448.
        v_scale: the same for values.

    Raises:
        ValueError, TypeError: bad arguments, before anything is written.
    """
    _op.tree_commit_kv_(
        k_cache, v_cache, k_tree, v_tree, prefix_lens, path, num_accepted, block_table=block_table, k_scale=k_scale,
        v_scale=v_scale,
    )  # fmt: skip


def tree_compact_kv_(
    k_cache: Tensor,
    v_cache: Tensor,
    prefix_lens: Tensor,
    path: Tensor,
    num_accepted: Tensor,
    *,
    block_table: Tensor | None = None,
) -> None:
    """Moves the accepted path's keys and values to the front: slot ``prefix + j`` gets slot ``prefix + path[b, j]``.

    For trees whose nodes were written to the cache itself (node i in slot ``prefix_lens[b] + i``). Moves may overlap.
    The slots of the tree behind the path are unspecified afterwards; nothing else changes. No key needs rotating: a
    node of depth j was computed for position ``prefix + j``, where it ends up.

    Args:
        k_cache: keys ``[B, S, Hk, D]`` or pages ``[P, page, Hk, D]`` of any dtype, changed in place.
        v_cache: values, the same with Dv.
        prefix_lens: committed tokens before this step ``[B]``.
        path: node ids from the root ``[B, T]``, as the ``tree_verify_*`` functions return them.
        num_accepted: ``[B]``; a row whose path starts with -1 is skipped.
        block_table: pages of each sequence ``[B, pages]``.

    Raises:
        ValueError, TypeError: bad arguments, before anything is written.
    """
    _op.tree_compact_kv_(k_cache, v_cache, prefix_lens, path, num_accepted, block_table=block_table)


def merge_attention_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    r"""Joins attention over two disjoint sets of keys:
    :math:`\mathrm{lse} = \ln(e^{\mathrm{lse}_a} + e^{\mathrm{lse}_b})`,
    :math:`\mathrm{out} = e^{\mathrm{lse}_a - \mathrm{lse}} \mathrm{out}_a +
    e^{\mathrm{lse}_b - \mathrm{lse}} \mathrm{out}_b`.

    Args:
        out_a: ``[.., T, H, Dv]``, any float dtype (packed ``[N, H, Dv]`` too).
        lse_a: ``[.., H, T]``, float32, natural logarithm. Where it is -inf, ``out_a`` is ignored, whatever it holds.
        out_b: the other state.
        lse_b: its log-sum-exp.

    Returns:
        out in out_a's dtype, and lse, float32.

    Raises:
        ValueError, TypeError: an argument has a wrong device, dtype or shape.
    """
    return _op.merge_attention_states(out_a, lse_a, out_b, lse_b)
