# SPDX-License-Identifier: Apache-2.0
"""Token trees with a model of transformers, which this module imports; it gives transformers the attention
``"torch_kernels_tree"``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_kernels import _checks
from torch_kernels.nn import _attention_interface
from torch_kernels.tree_attention import tree_attention, tree_commit_kv_, tree_positions

NAME = "torch_kernels_tree"
LAYER_TYPES = ("full_attention", "sliding_attention")
MAX_NODES = 1024  # of a tree; longer prompts go through the model in several passes

_attention_interface.register(NAME, "tree_kv", "TreeKVCache", supported=_attention_interface.OPTIONS)


@dataclass
class _Pass:
    """One pass of the model over trees, and what it leaves for the commit."""

    cache: TreeKVCache
    parents: Tensor
    nodes: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # keys and values of each layer [B, T, Hk, D]

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
    ) -> Tensor:
        self.nodes[layer] = k, v
        return tree_attention(
            q, *self.cache._room(layer, k, v), self.cache.prefix_lens, self.parents, k_tree=k, v_tree=v, scale=scale,
            window=sliding_window or 0, softcap=softcap or 0.0, sinks=None if s_aux is None else s_aux.float(),
        )[0]  # fmt: skip


class TreeKVCache:
    """Speculative decoding with a language model of transformers: it looks at a tree of drafted tokens in one pass.

    >>> cache = TreeKVCache(model, max_length=512)                             # doctest: +SKIP
    >>> token = cache.prefill(prompt).argmax(-1, keepdim=True)                 # [B, 1]
    >>> while not done:
    ...     drafts, parents = draft(token)                                     # [B, T] both; the root is the token
    ...     target = cache.verify(drafts, parents).logits.argmax(-1)
    ...     path, num_accepted, tokens = tree_verify_greedy(drafts, target, parents)
    ...     cache.commit(path, num_accepted)                                   # tokens: these and one more, -1 padded
    ...     token = tokens.gather(1, num_accepted[:, None].long())

    What that writes is what greedy decoding of the model writes, in fewer passes. Whoever samples uses
    ``tree_verify_sampling`` or ``tree_verify_typical`` in the same place.

    Args:
        model: a causal language model in evaluation mode all of whose layers are attention, full or with a sliding
            window: Llama, Mistral, Mixtral, Qwen, Gemma, gpt-oss and the like. Its attention implementation becomes
            ``"torch_kernels_tree"``, which in calls that do not come from a cache is ``"sdpa"``.
        max_length: the tokens S that a sequence may have. Keys and values ``[B, S, Hk, D]`` of each layer are
            allocated in the first pass and stay where they are.
        batch: the number of sequences B. Each has its own length and its own trees.

    Importing this class registers ``"torch_kernels_tree"``, so that ``attn_implementation`` may name it.

    Attributes:
        prefix_lens: the committed tokens of each sequence, int32 ``[B]``.

    Miao et al., *SpecInfer*, arXiv 2305.09781; Cai et al., *Medusa*, arXiv 2401.10774.
    """

    prefix_lens: Tensor

    def __init__(self, model: Any, max_length: int, batch: int = 1) -> None:
        config = model.config.get_text_config(decoder=True)
        for argument, value in (("max_length", max_length), ("batch", batch)):
            if value < 1:
                _checks.fail("TreeKVCache", argument, "at least 1", value)
        if other := set(getattr(config, "layer_types", None) or ()).difference(LAYER_TYPES):
            _checks.fail("TreeKVCache", "model", f"one whose layers are {' or '.join(LAYER_TYPES)}", other.pop())
        model.set_attn_implementation(NAME)
        self.model, self.max_length, self.batch = model, max_length, batch
        self.prefix_lens = torch.zeros(batch, dtype=torch.int32, device=model.device)
        self._num_layers: int = config.num_hidden_layers
        self._longest = 0  # no sequence is longer: known without asking the device
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._pass: _Pass | None = None

    @property
    def num_bytes(self) -> int:
        """Of the keys and values, used or not."""
        return sum(k.nbytes + v.nbytes for k, v in self._layers.values())

    def reset(self) -> None:
        """Forgets all tokens; what comes next are other sequences."""
        self.prefix_lens.zero_()
        self._longest, self._pass = 0, None

    @torch.no_grad()
    def prefill(self, tokens: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Commits what sequences begin with, or go on with.

        Args:
            tokens: ``[B, P]``, padded on the right with any tokens.
            lengths: how many of them each sequence has; None for all.

        Returns:
            The logits of what follows each sequence's last token ``[B, V]``.
        """
        name = "TreeKVCache.prefill"
        self._check_tokens(name, tokens)
        batch, longest = tokens.shape
        lengths = [longest] * batch if lengths is None else list(lengths)
        if len(lengths) != batch or not all(1 <= length <= longest for length in lengths):
            _checks.fail(name, "lengths", f"{batch} numbers from 1 to P={longest}", lengths)
        counts, logits = torch.tensor(lengths, device=tokens.device), None
        for start in range(0, longest, MAX_NODES):  # a prompt is a tree without branches
            piece = tokens[:, start : start + MAX_NODES]
            node = torch.arange(piece.shape[1], dtype=torch.int32, device=tokens.device)
            real = node < (counts - start)[:, None]
            ends = {row: length - 1 - start for row, length in enumerate(lengths) if 0 < length - start <= len(node)}
            kept = sorted(set(ends.values())) or [0]
            keep = torch.tensor(kept, device=tokens.device)
            last = self.verify(piece, (node - 1).where(real, -2), logits_to_keep=keep).logits
            self.commit(node.where(real, -1), real.sum(1, dtype=torch.int32).sub(1).clamp(min=0))
            logits = last.new_empty(batch, last.shape[-1]) if logits is None else logits
            logits[list(ends)] = last[list(ends), [kept.index(end) for end in ends.values()]]
        assert logits is not None
        return logits

    @torch.no_grad()
    def verify(self, tokens: Tensor, parents: Tensor, **options: Any) -> Any:
        """One pass of the model over trees that continue the sequences. The cache changes only with :meth:`commit`.

        Args:
            tokens: of the nodes ``[B, T]``; the root's is the last token of the text, which is not committed yet.
            parents: the trees ``[B, T]``, int32 or int64, T up to 1024.
            options: more arguments of the model, such as ``output_hidden_states=True``.

        Returns:
            The output of the model, whose ``.logits [B, T, V]`` are those of what follows each node.
        """
        name = "TreeKVCache.verify"
        self._check_tokens(name, tokens)
        _checks.is_tensor(name, parents=parents)
        _checks.shape(name, {"B": self.batch, "T": tokens.shape[1]}, parents=(parents, "B T"))
        self._pass = None
        call = _Pass(self, parents)
        output = self.model(
            input_ids=tokens,
            position_ids=tree_positions(parents, self.prefix_lens).long(),
            attention_mask=torch.empty(1, 1, 0, 0, device=tokens.device),  # nobody reads it: transformers makes none
            use_cache=False,
            tree_kv=call,
            **options,
        )
        if len(call.nodes) != self._num_layers:
            called = f"one of whose {self._num_layers} layers {len(call.nodes)} do"
            _checks.fail("TreeKVCache", "model", f"one whose layers all call {NAME!r}", called)
        self._pass = call
        return output

    @torch.no_grad()
    def commit(self, path: Tensor, num_accepted: Tensor) -> None:
        """Adds the accepted nodes of the last pass to the sequences.

        Args:
            path: the nodes from the root on ``[B, T]``, -1 padded, as the ``tree_verify_*`` functions return them. A
                row that begins with -1 adds nothing.
            num_accepted: how many there are behind the root ``[B]``.

        Raises:
            ValueError: there was no pass to commit, or a sequence would be longer than ``max_length``.
        """
        name = "TreeKVCache.commit"
        if self._pass is None:
            _checks.fail(name, "path", "of a pass of verify, each committed once", "none")
        _checks.is_tensor(name, path=path, num_accepted=num_accepted)
        nodes = self._pass.parents.shape[1]
        _checks.shape(name, {"B": self.batch, "T": nodes}, path=(path, "B T"), num_accepted=(num_accepted, "B"))
        after = self.prefix_lens + (num_accepted + 1).where(path[:, 0] >= 0, 0)
        longest = self._longest + nodes
        if longest > self.max_length:  # a bound; only near the end it is worth to wait for the device
            longest = int(after.max())
            if longest > self.max_length:
                _checks.fail(name, "num_accepted", f"within max_length={self.max_length}", f"{longest} tokens")
        for layer, (k, v) in self._pass.nodes.items():
            tree_commit_kv_(*self._layers[layer], k, v, self.prefix_lens, path, num_accepted)
        self.prefix_lens.copy_(after)
        self._longest, self._pass = longest, None

    def _check_tokens(self, name: str, tokens: Any) -> None:
        _checks.is_tensor(name, tokens=tokens)
        _checks.dtype(name, _checks.INDEX, tokens=tokens)
        _checks.shape(name, {"B": self.batch}, tokens=(tokens, "B T"))

    def _room(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer."""
        if layer not in self._layers:
            keys, values = (x.new_empty(self.batch, self.max_length, *x.shape[2:]) for x in (k, v))
            self._layers[layer] = keys, values
        return self._layers[layer]
