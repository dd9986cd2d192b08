# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding with a token tree: train a small language model, then let it write faster.

A Llama-style model over bytes learns the text of Python's own help topics. Beside the next byte, four Medusa heads
guess the bytes after it. Their likeliest guesses form a tree of continuations; one pass of the model checks all nodes
at once, and the longest path it would have written itself is kept. The greedy text is the same, in fewer passes.

    python examples/speculative_decoding.py            trains for about two minutes on two cores, once
    python examples/speculative_decoding.py --quick    seconds: the text is gibberish, the rest is the same

Read `Cache`, `write_plainly` and `write_with_tree` to see the library in use.
"""

import argparse
import dataclasses
import hashlib
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torch_kernels
from torch import Tensor, nn
from tqdm import tqdm

PROMPTS = ("import", "calls", "typesmapping")  # held-out topics; their first bytes are the prompts
VALIDATION = "debugger"  # held out too, to measure the heads
PROMPT_BYTES = 128
RANKS = 8  # guesses considered per head


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 4
    width: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    hidden: int = 704
    draft_heads: int = 4  # head d guesses the byte d places after the next one
    window: int = 256  # how far back a byte looks, in training and in generation
    batch: int = 8
    steps: int = 450
    learning_rate: float = 1e-2
    seed: int = 0


class Block(nn.Module):
    """Grouped-query attention, then a gated MLP. How q meets k and v is the caller's: see `attend`."""

    def __init__(self, config: Config):
        super().__init__()
        self.heads, self.kv_heads, self.head_size = config.heads, config.kv_heads, config.head_size
        width, hidden = config.width, config.hidden
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, (self.heads + 2 * self.kv_heads) * self.head_size, bias=False)
        self.project = nn.Linear(self.heads * self.head_size, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-5)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, attend: Callable) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, self.head_size))
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=-2)
        q, k = rotate(qk, rotation).split((self.heads, self.kv_heads), dim=-2)
        x = x + self.project(attend(q, k, v).flatten(-2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary embedding: pairs of features are complex numbers, turned by the angles of their position."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


class Model(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(256, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.unembed = nn.Linear(config.width, 256, bias=False)
        self.medusa = nn.ModuleList(nn.Linear(config.width, config.width, False) for _ in range(config.draft_heads))
        # The window is short, so the slowest pair turns once in about a thousand bytes.
        self.register_buffer("frequencies", 200.0 ** -torch.linspace(0, 1, config.head_size // 2), persistent=False)
        for name, weight in self.named_parameters():
            if name.endswith(("project.weight", "down.weight", "unembed.weight")) or "medusa" in name:
                nn.init.zeros_(weight)  # every layer starts as the identity
            elif weight.dim() == 2 and "embed" not in name:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Callable) -> Tensor:
        """tokens and positions [B, T] -> hidden [B, T, width]. `attend(layer, q, k, v)` is the attention to use."""
        angles = positions[..., None, None] * self.frequencies
        rotation = torch.polar(torch.ones_like(angles), angles)
        x = self.embed(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotation, lambda q, k, v, layer=layer: attend(layer, q, k, v))
        return self.norm(x)

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """Medusa: a residual layer per head before the shared output matrix. [..., width] -> [..., draft_heads, 256]"""
        return self.unembed(torch.stack([hidden + F.silu(head(hidden)) for head in self.medusa], dim=-2))


def as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def topic(name: str) -> str:
    """A topic without indentation, tables and rulers: a long run of one character is too easy to continue."""
    prose = re.sub(r"(?m)^ *[|+].*\n", "", topics[name])
    return re.sub(r"([^\w\s])\1{3,}", r"\1\1\1", re.sub(" +", " ", prose))


def training_text() -> str:
    """All topics but the held-out ones. Topics quote each other, so no paragraph is used twice or left in both."""
    held_out = {VALIDATION, *PROMPTS}
    seen = {paragraph for name in held_out for paragraph in topic(name).split("\n\n")}
    paragraphs = dict.fromkeys(p for name in sorted(topics.keys() - held_out) for p in topic(name).split("\n\n"))
    return "\n\n".join(p for p in paragraphs if p not in seen)


def teacher_forcing(model: Model, tokens: Tensor) -> Tensor:
    """tokens [B, T] -> logits [B, T, 1 + draft_heads, 256]: at each byte, the next byte's and then every head's."""

    def causal_attention(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    hidden = model(tokens, positions, causal_attention)
    return torch.cat([model.unembed(hidden).unsqueeze(-2), model.draft_logits(hidden)], dim=-2)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by five Newton-Schulz steps: matrices learn in far fewer steps."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, compute_dtype: torch.dtype):
        super().__init__(matrices, {"lr": lr})
        self.compute_dtype = compute_dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 0.05)
                x = weight.grad.lerp(momentum, 0.95)
                wide = x.shape[0] <= x.shape[1]
                x = (x if wide else x.mT).div(x.norm() + 1e-7).to(self.compute_dtype)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
                size = 0.2 * max(weight.shape) ** 0.5  # so that an update is as large as AdamW's
                weight.mul_(1 - 0.1 * group["lr"]).add_(x if wide else x.mT, alpha=-size * group["lr"])


def train(model: Model, text: Tensor, device: torch.device) -> None:
    config = model.config
    ahead = 1 + config.draft_heads
    bf16 = device.type == "cuda" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    matrices = [p for module in (model.blocks, model.medusa) for p in module.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [
        Muon(matrices, config.learning_rate, torch.bfloat16 if bf16 else torch.float32),
        torch.optim.AdamW(others, config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    generator = torch.Generator().manual_seed(config.seed)
    head_weights = 0.8 ** torch.arange(ahead, device=device)
    progress = tqdm(range(config.steps), desc="training", unit="step")
    for step in progress:
        rate = min(1.0, (step + 1) / 20, 2.0 * (config.steps - step) / config.steps)  # warm up, hold, decay
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = config.learning_rate * rate
            optimizer.zero_grad()
        starts = torch.randint(len(text) - config.window - ahead, (config.batch, 1), generator=generator)
        crops = text[starts + torch.arange(config.window + ahead)].to(device)
        targets = crops[:, 1:].unfold(1, ahead, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = teacher_forcing(model, crops[:, : config.window])
        losses = F.cross_entropy(logits.float().permute(0, 3, 1, 2), targets, reduction="none").mean((0, 1))
        (losses * head_weights).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        progress.set_postfix(loss=f"{losses[0].item():.3f}")


def trained_model(config: Config, device: torch.device) -> Model:
    """Trains, or loads what an earlier run with the same configuration and text has trained."""
    text = training_text()
    key = hashlib.sha256(f"{config}{text}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_kernels"
    path = cache / f"speculative_decoding-{key}.pt"
    torch.manual_seed(config.seed)
    model = Model(config).to(device)
    if path.exists():
        model.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        print(f"weights from {path}")
    else:
        train(model, as_bytes(text), device)
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save(model.state_dict(), partial)
        partial.replace(path)
        print(f"weights kept in {path}")
    for module in model.modules():
        if isinstance(module, nn.Linear):  # stored by columns, a CPU multiplies a few rows faster
            module.weight.data = module.weight.data.t().contiguous().t()
    return model.eval()


class Cache:
    """The keys and values of the text so far, and those of the tree under verification."""

    def __init__(self, model: Model, prompts: Tensor, count: int):
        config = model.config
        batch, length = prompts.shape
        slots = length + count + config.draft_heads  # the last step may overshoot
        self.model = model
        self.k = torch.zeros(config.layers, batch, slots, config.kv_heads, config.head_size, device=prompts.device)
        self.v = torch.zeros_like(self.k)
        self.prefix_lens = torch.zeros(batch, dtype=torch.int32, device=prompts.device)
        self.tree_kv: list[tuple[Tensor, Tensor]] = []

    def forward(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """One pass over the nodes of token trees that continue the texts: tokens, parents [B, T] -> hidden."""
        self.tree_kv = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.tree_kv.append((k, v))
            window = self.model.config.window
            out, _ = torch_kernels.tree_attention(
                q, self.k[layer], self.v[layer], self.prefix_lens, parents, k_tree=k, v_tree=v, window=window
            )
            return out

        positions = torch_kernels.tree_positions(parents, self.prefix_lens)
        return self.model(tokens, positions, attend)

    def commit(self, path: Tensor, num_accepted: Tensor) -> None:
        """Keeps the nodes of one path: the root and the accepted drafts behind it."""
        for k_cache, v_cache, (k, v) in zip(self.k, self.v, self.tree_kv, strict=True):
            torch_kernels.tree_commit_kv_(k_cache, v_cache, k, v, self.prefix_lens, path, num_accepted)
        self.prefix_lens += num_accepted + 1

    def prefill(self, prompts: Tensor) -> Tensor:
        """A prompt is a tree without branches. Returns the last byte's hidden state [B, 1, width]."""
        nodes = torch.arange(prompts.shape[1], dtype=torch.int32, device=prompts.device).expand_as(prompts)
        hidden = self.forward(prompts, nodes - 1)
        self.commit(nodes, nodes[:, -1])
        return hidden[:, -1:]


def next_token(model: Model, hidden: Tensor) -> Tensor:
    return model.unembed(hidden).argmax(-1)


@torch.inference_mode()
def write_plainly(model: Model, prompts: Tensor, count: int) -> Tensor:
    """One pass per byte, over trees of one node. prompts [B, P] -> [B, count]"""
    cache = Cache(model, prompts, count)
    root = torch.zeros_like(prompts[:, :1], dtype=torch.int32)
    written = [next_token(model, cache.prefill(prompts))]
    while len(written) < count:
        hidden = cache.forward(written[-1], root - 1)
        cache.commit(root, root[:, 0])
        written.append(next_token(model, hidden))
    return torch.cat(written, dim=1)


class Tree:
    """A fixed tree of draft tokens. Choice (2, 0) is the node that takes head 1's third guess, then head 2's first."""

    def __init__(self, choices: list[tuple[int, ...]], device: torch.device):
        choices = sorted(choices, key=lambda choice: (len(choice), choice))  # the order of from_choices: breadth first
        self.parents = torch_kernels.trees.from_choices(choices)[None].to(device)
        sources = [0] + [1 + RANKS * (len(choice) - 1) + choice[-1] for choice in choices]
        self.sources = torch.tensor(sources, device=device)

    def tokens(self, root: Tensor, draft_logits: Tensor) -> Tensor:
        guesses = draft_logits.topk(RANKS).indices.flatten(1)
        return torch.cat([root, guesses], dim=1)[:, self.sources]


@torch.inference_mode()
def choose_tree(model: Model, prompts: Tensor, nodes: int) -> tuple[list[tuple[int, ...]], float]:
    """The rank paths most often right about the model's own text, and how many drafts a step should accept."""
    length, heads = prompts.shape[1], model.config.draft_heads
    text = torch.cat([prompts, write_plainly(model, prompts, model.config.window - length)], dim=1)
    guesses = teacher_forcing(model, text)[:, length - 1 : -1 - heads, 1:]
    truth = text[:, length + 1 :].unfold(1, heads, 1)
    ranks = (guesses > guesses.gather(-1, truth[..., None])).sum(-1).flatten(0, 1).tolist()
    beginnings = (tuple(path[:depth]) for path in ranks for depth in range(1, heads + 1))
    counts = Counter(path for path in beginnings if max(path) < RANKS)  # never more of a path than of its beginnings
    best = counts.most_common(nodes - 1)
    return [path for path, _ in best], sum(count for _, count in best) / len(ranks)


class Step(NamedTuple):
    tokens: list[int]  # the accepted drafts, then the model's own next byte
    drafts: Tensor  # the tree's tokens
    path: Tensor  # the accepted nodes, from the root


@torch.inference_mode()
def write_with_tree(model: Model, prompt: Tensor, count: int, tree: Tree) -> list[Step]:
    """One pass per step, over a whole tree of drafts. prompt [1, P]"""
    cache = Cache(model, prompt, count)
    hidden = cache.prefill(prompt)
    token = next_token(model, hidden)
    steps = [Step(token[0].tolist(), token[0], token.new_zeros(1))]
    while sum(len(step.tokens) for step in steps) < count:
        drafts = tree.tokens(token, model.draft_logits(hidden))
        nodes = cache.forward(drafts, tree.parents)
        path, num_accepted, tokens = torch_kernels.tree_verify_greedy(drafts, next_token(model, nodes), tree.parents)
        cache.commit(path, num_accepted)
        steps.append(Step([t for t in tokens[0].tolist() if t >= 0], drafts[0], path[0]))
        last = num_accepted[:, None].long()  # the end of the path: the next drafts start there
        token = tokens.gather(1, last)
        hidden = nodes.take_along_dim(path.gather(1, last).long()[..., None], dim=1)
    return steps


def show(steps: list[Step], count: int) -> str:
    """The text; on a terminal, accepted drafts are green."""
    green, end = ("\33[32m", "\33[0m") if sys.stdout.isatty() else ("", "")
    drafted = [(token, i < len(step.tokens) - 1) for step in steps for i, token in enumerate(step.tokens)]
    return "".join(f"{green}{chr(token)}{end}" if draft else chr(token) for token, draft in drafted[:count])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=Config.seed)
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--tokens", type=int, default=256, help="bytes to write after each prompt")
    parser.add_argument("--nodes", type=int, default=16, help="nodes of the token tree")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    args = parser.parse_args()
    if args.tokens < 2 or args.nodes < 2:
        parser.error("--tokens and --nodes must be at least 2")

    config = Config(seed=args.seed)
    if args.quick:
        config = dataclasses.replace(config, layers=2, width=128, heads=2, kv_heads=1, hidden=352, batch=4, steps=30)
    if args.steps is not None:
        config = dataclasses.replace(config, steps=args.steps)
    device = torch.device(args.device)
    count = min(args.tokens, 64) if args.quick else args.tokens
    model = trained_model(config, device)

    validation = as_bytes(topic(VALIDATION)).to(device)
    choices, expected = choose_tree(model, validation.unfold(0, PROMPT_BYTES, len(validation) // 32)[:32], args.nodes)
    tree = Tree(choices, device)
    print(f"a tree of {len(choices) + 1} nodes; {expected:.2f} accepted drafts per step expected")

    rows, all_steps = [], []
    for name in PROMPTS:
        prompt = as_bytes(topic(name))[None, :PROMPT_BYTES].to(device)
        plain_time = tree_time = float("inf")
        for _ in range(3):  # the text is the same every time: the fastest run tells most about the method
            start = time.perf_counter()
            plain = write_plainly(model, prompt, count)[0].tolist()
            middle = time.perf_counter()
            steps = write_with_tree(model, prompt, count, tree)
            plain_time = min(plain_time, middle - start)
            tree_time = min(tree_time, time.perf_counter() - middle)
        sped_up = [token for step in steps for token in step.tokens][:count]
        print(f"\n=== {name}: prompt\n{topic(name)[:PROMPT_BYTES]}")
        print(f"\n=== {name}: plain\n{''.join(map(chr, plain))}")
        print(f"\n=== {name}: token tree\n{show(steps, count)}")
        accepted = sum(len(step.tokens) - 1 for step in steps) / max(1, len(steps) - 1)
        rows.append((name, accepted, count / plain_time, count / tree_time, plain == sped_up))
        all_steps += steps[1:]  # the first byte comes from the prompt's pass

    step = max(all_steps, key=lambda step: (len(step.tokens), len(set(step.tokens))))
    drawing = torch_kernels.trees.draw(tree.parents[0].cpu(), step.path.cpu())
    drafts = step.drafts.tolist()
    print(f"\none step's tree; the marked path and the model's own next byte wrote {bytes(step.tokens)!r}")
    print(re.sub(r"\d+", lambda node: repr(chr(drafts[int(node[0])])), drawing))
    print(f"\n{'prompt':14}{'drafts accepted per step':>26}{'plain':>12}{'token tree':>14}{'speedup':>10}   text")
    for name, accepted, plain_rate, tree_rate, same in rows:
        speedup, verdict = f"{tree_rate / plain_rate:.2f}x", "same" if same else "differs"
        print(f"{name:14}{accepted:26.2f}{plain_rate:8.0f}/s{tree_rate:12.0f}/s{speedup:>10}   {verdict}")


if __name__ == "__main__":
    main()
