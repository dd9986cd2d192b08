# SPDX-License-Identifier: Apache-2.0
"""Distils a language model's attention into SEA, whose time and memory grow linearly, and shows what it learned.

A small model over bytes learns the text of Python's own help topics with ordinary attention. Three copies of it then
train on: one as it is, one whose attention is replaced by SEA layers, which estimate each row's attention and compute
it for the likeliest keys alone, and one with plain linear attention (a Performer). All of them learn from the text and
from the first model's predictions; SEA learns to estimate its attention, too.

    pip install tqdm matplotlib
    python examples/sea_distill.py            a few minutes on two cores
    python examples/sea_distill.py --quick    seconds: nothing is learned well

Read `sea_of`, `distil` and `draw_maps` to see the library in use; text and optimizer are those of
speculative_decoding.py.
"""

import argparse
import copy
import dataclasses
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torch_kernels
from speculative_decoding import VALIDATION, Muon, as_bytes, topic, training_text
from torch import Tensor, nn
from torch_kernels.nn import SEAttention, sea_distillation_loss
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 3
    width: int = 192
    heads: int = 6
    hidden: int = 512
    window: int = 256
    batch: int = 8
    steps: int = 400
    student_steps: int = 80
    learning_rate: float = 1e-2
    num_cells: int = 64
    k: int = 16
    seed: int = 0


class Mixed(NamedTuple):
    """What a token mixer gives: its output, and what of its attention can be compared, where it has that."""

    y: Tensor
    attention: Tensor | None = None  # of all pairs of tokens [B, H, T, T]
    map: Tensor | None = None  # SEA's estimate [B, H, T, K]


class Attention(nn.Module):
    """Softmax attention; attention probabilities are computed only where they are asked for."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, compare: bool) -> Mixed:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attention = None
        if compare:
            scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            attention = scores.masked_fill(later, -torch.inf).softmax(-1)
        return Mixed(self.out_proj(out.transpose(1, 2).flatten(-2)), attention)


class Sea(nn.Module):
    def __init__(self, layer: SEAttention):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, compare: bool) -> Mixed:
        if not compare:
            return Mixed(self.layer(x))
        y, estimate = self.layer(x, return_map=True)
        return Mixed(y, self.layer.dense_attention(x), estimate)


class LinearAttention(nn.Module):
    """A Performer, with features as SEA's estimator has them, but more."""

    def __init__(self, like: Attention):
        super().__init__()
        self.heads, self.qkv_proj, self.out_proj = like.heads, like.qkv_proj, like.out_proj
        size = like.out_proj.in_features // like.heads
        features = 8 * round(size * math.log(size) / 8)
        orthogonal = torch.linalg.qr(torch.randn(features // size + 1, size, size))[0].flatten(0, 1)[:features]
        self.register_buffer("projection", orthogonal * size**0.5)

    def forward(self, x: Tensor, compare: bool) -> Mixed:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = (torch_kernels.favor_features(y, self.projection, kind="relu", eps=1e-3) for y in (q, k))
        out, _, _ = torch_kernels.linear_attention(q, k, v)
        return Mixed(self.out_proj(out.flatten(-2)))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.mixer: nn.Module = Attention(config.width, config.heads)
        self.mlp_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.gate_up = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor, places: Tensor, compare: bool) -> tuple[Tensor, Mixed]:
        mixed = self.mixer(self.mixer_norm(x) + places, compare)
        x = x + mixed.y
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up), mixed


class Model(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.embed = nn.Embedding(256, config.width)
        angles = torch.arange(config.window)[:, None] * 0.5 ** torch.linspace(0, 9, config.width // 2)
        self.register_buffer("places", 0.5 * torch.cat([angles.sin(), angles.cos()], -1), persistent=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.unembed = nn.Linear(config.width, 256, bias=False)
        for name, weight in self.named_parameters():
            if name.endswith(("out_proj.weight", "down.weight", "unembed.weight")):
                nn.init.zeros_(weight)  # every layer starts as the identity
            elif weight.dim() == 2 and "embed" not in name:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, tokens: Tensor, compare: bool = False) -> tuple[Tensor, list[Mixed]]:
        """tokens [B, T] -> logits of the next bytes [B, T, 256], and what each layer's mixer gave."""
        x, places = self.embed(tokens), self.places[: tokens.shape[1]]
        mixed = []
        for block in self.blocks:
            x, of_layer = block(x, places, compare)
            mixed.append(of_layer)
        return self.unembed(self.norm(x)).float(), mixed


def sea_of(teacher: Model, config: Config) -> Model:
    """The model with SEA layers, whose projections of tokens are the attention's."""
    student = copy.deepcopy(teacher)
    for block in student.blocks:
        layer = SEAttention(config.width, config.heads, config.num_cells, config.k, bias=False)
        layer.qkv_proj, layer.out_proj = block.mixer.qkv_proj, block.mixer.out_proj
        block.mixer = Sea(layer)
    return student


def performer_of(teacher: Model) -> Model:
    student = copy.deepcopy(teacher)
    for block in student.blocks:
        block.mixer = LinearAttention(block.mixer)
    return student


def cross_entropy(logits: Tensor, crops: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), crops[:, 1:].flatten())


def distil(teacher: Model, student: Model, crops: Tensor) -> Tensor:
    """The loss on crops [B, T + 1]: the next byte, the teacher's predictions of it, and its attention."""
    with torch.no_grad():
        wanted, of_teacher = teacher(crops[:, :-1], compare=True)
    logits, of_student = student(crops[:, :-1], compare=True)
    loss = cross_entropy(logits, crops)
    loss = loss + F.kl_div(logits.log_softmax(-1), wanted.softmax(-1), reduction="none").sum(-1).mean()
    for ours, theirs in zip(of_student, of_teacher, strict=True):
        outputs = [(ours.y, theirs.y)]
        if ours.map is not None:
            loss = loss + sea_distillation_loss(ours.map, theirs.attention, student=ours.attention, outputs=outputs)
        else:
            loss = loss + F.mse_loss(*outputs[0])
    return loss


@torch.no_grad()
def bits_per_byte(model: Model, crops: Tensor) -> float:
    model.eval()
    losses = [cross_entropy(model(part[:, :-1])[0], part).item() * len(part) for part in crops.split(8)]
    return sum(losses) / len(crops) / math.log(2)


def optimizers_of(model: Model, learning_rate: float, for_estimators: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest; SEA's estimators begin from nothing, so they may learn
    faster than what the teacher knew."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        estimates = ".layer." in name and not name.endswith(("qkv_proj.weight", "out_proj.weight"))
        matrix = name.startswith("blocks") and parameter.dim() == 2 and min(parameter.shape) > 8
        groups.setdefault((matrix, estimates), []).append(parameter)
    made: list[torch.optim.Optimizer] = []
    for (matrix, estimates), parameters in groups.items():
        rate = for_estimators if estimates else learning_rate
        if matrix:
            made.append(Muon(parameters, rate, torch.float32))
        else:
            made.append(torch.optim.AdamW(parameters, rate, betas=(0.9, 0.95), weight_decay=0.0))
    return made


def train(
    model: Model, loss_of: Callable[[Tensor], Tensor], text: Tensor, unseen: Tensor, config: Config, name: str,
    steps: int, learning_rate: float,
) -> list[tuple[int, float]]:  # fmt: skip
    """Returns (step, held-out bits per byte) along the way."""
    optimizers = optimizers_of(model, learning_rate, config.learning_rate)
    generator = torch.Generator().manual_seed(config.seed)
    history = [(0, bits_per_byte(model, unseen))]
    progress = tqdm(range(1, steps + 1), desc=name, unit="step")
    for step in progress:
        rate = min(1.0, step / 20, 2.0 * (steps - step + 1) / steps)  # warm up, hold, decay
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * rate
            optimizer.zero_grad()
        starts = torch.randint(len(text) - config.window - 1, (config.batch, 1), generator=generator)
        loss = loss_of(text[starts + torch.arange(config.window + 1)].to(unseen.device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % -(-steps // 10) == 0 or step == steps:
            history.append((step, bits_per_byte(model, unseen)))
            progress.set_postfix_str(f"held out {history[-1][1]:.3f} bits per byte")
    return history


@torch.no_grad()
def draw_maps(teacher: Model, student: Model, tokens: Tensor, layer: int, path: str) -> None:
    """One layer's attention over a text: the teacher's, SEA's estimate of it, and the keys that SEA keeps."""
    from matplotlib import pyplot

    true = teacher(tokens, compare=True)[1][layer].attention[0]
    sea, estimate = student.blocks[layer].mixer.layer, student(tokens, compare=True)[1][layer].map
    widths = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)[None]
    stretched = torch_kernels.sea_stretch(estimate, widths, length=tokens.shape[1])
    cells = torch_kernels.sea_select(estimate, widths, k=sea.k)
    crow, col = torch_kernels.sea_csr(cells, widths, num_heads=len(true), num_cells=sea.num_cells)
    kept = torch.zeros_like(true).transpose(0, 1).flatten(0, 1)  # rows as in crow: token, then head
    kept[torch.arange(len(kept), device=col.device).repeat_interleave(crow.diff()), col.long()] = 1
    rows = {
        "teacher": true,
        "estimate": stretched[0] / stretched[0].sum(-1, keepdim=True),
        f"kept, k = {sea.k}": kept.unflatten(0, (-1, len(true))).transpose(0, 1),
    }
    figure, panels = pyplot.subplots(
        len(rows), len(true), figsize=(2 * len(true), 2.1 * len(rows)), layout="constrained", squeeze=False
    )
    for panel_row, (name, maps) in zip(panels, rows.items(), strict=True):
        panel_row[0].set_ylabel(name)
        for head, (panel, map) in enumerate(zip(panel_row, maps, strict=True)):
            panel.imshow(map.sqrt().cpu(), vmin=0, vmax=0.7, cmap="magma", interpolation="antialiased")
            panel.set(xticks=[], yticks=[])
            if panel_row is panels[0]:
                panel.set_title(f"head {head}", fontsize=9)
    figure.suptitle(
        f"Attention of layer {layer + 1}, {tokens.shape[1]} bytes\nrows see the columns before them", fontsize=9
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_losses(
    histories: dict[str, list[tuple[int, float]]], teacher: float, by_k: dict[int, float], k: int, path: str
) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    colors = dict(zip(histories, ("#8a8a8a", "#1f6f5c", "#d9822b"), strict=True))
    for name, history in histories.items():
        left.plot(*zip(*history), "o-", ms=3, color=colors[name], label=name)
    ends = [history[-1][1] for history in histories.values()]
    left.set(xlabel="step of distillation", ylabel="held-out bits per byte", ylim=(min(ends) - 0.1, max(ends) + 0.5))
    right.plot(by_k.keys(), by_k.values(), "o-", ms=4, color=colors["SEA"], label=f"SEA, trained with k = {k}")
    for name, history in histories.items():
        if name != "SEA":
            right.axhline(history[-1][1], color=colors[name], linewidth=1.2, label=name)
    right.set_xscale("log", base=2)
    right.set_xticks(list(by_k), [str(k) for k in by_k])
    right.set(xlabel="keys per row and head, set after training", ylabel="held-out bits per byte")
    for panel in (left, right):
        panel.axhline(teacher, color="black", linestyle="--", linewidth=1, label="teacher")
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=Config.seed)
    parser.add_argument("--steps", type=int, help="training steps of the teacher")
    parser.add_argument("--student-steps", type=int, help="training steps of each student")
    parser.add_argument(
        "--plot", default="sea_distill", help="where to draw: <this>.svg and <this>-maps.png; empty: nowhere"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    args = parser.parse_args()

    config = Config(seed=args.seed)
    if args.quick:
        tiny = {"layers": 2, "width": 64, "heads": 2, "hidden": 176, "window": 64, "batch": 4, "num_cells": 16, "k": 8}
        config = dataclasses.replace(config, **tiny, steps=30, student_steps=15)
    config = dataclasses.replace(
        config, steps=args.steps or config.steps, student_steps=args.student_steps or config.student_steps
    )
    device = torch.device(args.device)
    torch.manual_seed(config.seed)
    text, held_out = as_bytes(training_text()), as_bytes(topic(VALIDATION))
    unseen = held_out.unfold(0, config.window + 1, config.window).to(device)

    teacher = Model(config).to(device)
    train(teacher, lambda crops: cross_entropy(teacher(crops[:, :-1])[0], crops), text, unseen, config, "teacher",
          config.steps, config.learning_rate)  # fmt: skip
    students = {
        "attention": copy.deepcopy(teacher),
        "SEA": sea_of(teacher, config).to(device),
        "linear attention": performer_of(teacher).to(device),
    }
    histories = {
        name: train(student, lambda crops, student=student: distil(teacher, student, crops), text, unseen, config, name,
                    config.student_steps, config.learning_rate / 3)
        for name, student in students.items()
    }  # fmt: skip

    layers = [block.mixer.layer for block in students["SEA"].blocks]
    by_k = {}
    for k in (2**n for n in range(1, config.window.bit_length())):
        for layer in layers:
            layer.k = k
        by_k[k] = bits_per_byte(students["SEA"], unseen)
    for layer in layers:
        layer.k = config.k
    of_teacher = bits_per_byte(teacher, unseen)
    results = {"teacher": of_teacher} | {f"{name}, distilled": history[-1][1] for name, history in histories.items()}
    print(f"\n{'held-out text':32}{'bits per byte':>15}{'perplexity':>13}{'keys per row':>15}")
    for name, bits in results.items():
        keys = str(config.k) if name.startswith("SEA") else "none" if name.startswith("linear") else "all"
        print(f"{name:32}{bits:15.3f}{2**bits:13.3f}{keys:>15}")
    for k, bits in by_k.items():
        if k != config.k:
            print(f"{'SEA, k set after training':32}{bits:15.3f}{2**bits:13.3f}{k:15}")
    if args.plot and find_spec("matplotlib"):
        import matplotlib

        matplotlib.use("Agg")
        stem = Path(args.plot)
        paths = [str(stem.with_name(stem.name + end)) for end in (".svg", "-maps.png")]
        draw_losses(histories, of_teacher, by_k, config.k, paths[0])
        draw_maps(teacher, students["SEA"], unseen[:1, :-1], config.layers // 2, paths[1])
        print(f"plots: {', '.join(paths)}")


if __name__ == "__main__":
    main()
