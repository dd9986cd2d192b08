# SPDX-License-Identifier: Apache-2.0
"""A recurrent language model: trained in parallel, then read and written with at constant memory.

A small model over bytes learns the text of Python's own help topics. Its token mixers are lightning attention, so that
a sequence is trained on all at once, and yet what the model remembers of it is a state of fixed size. To show that, it
reads a million bytes in pieces and goes on writing where they end, at the speed and in the memory it began with.

    pip install tqdm matplotlib
    python examples/lightning_lm.py            trains for a few minutes on two cores, once
    python examples/lightning_lm.py --quick    seconds: the text is gibberish, the rest is the same

Read `Block`, `compare` and `stream` to see the library in use; text and optimizer are those of speculative_decoding.py.
"""

import argparse
import dataclasses
import hashlib
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from speculative_decoding import VALIDATION, Muon, as_bytes, topic, training_text
from torch import Tensor, nn
from torch_kernels.nn import LightningAttention, LightningState
from tqdm import tqdm

PIECE = 2048  # bytes read at once


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 4
    width: int = 256
    heads: int = 4
    hidden: int = 704
    window: int = 512  # of training; what is read and written later is thousands of times as long
    batch: int = 8
    steps: int = 300
    learning_rate: float = 1e-2
    seed: int = 0


class Block(nn.Module):
    """Lightning attention, then a gated MLP. The first layer's has positions, as in TransNormerLLM."""

    def __init__(self, config: Config, first: bool):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.mixer = LightningAttention(config.width, config.heads, lrpe=first)
        self.mlp_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.gate_up = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor, state: LightningState | None = None) -> tuple[Tensor, LightningState | None]:
        """x [B, T, width]. Without a state all of a text; with one what follows, and one byte is a decoding step."""
        normed = self.mixer_norm(x)
        if state is None:
            mixed = self.mixer(normed)
        elif x.shape[1] == 1:
            mixed, state = self.mixer.step(normed, state)
        else:
            mixed, state = self.mixer(normed, state)
        x = x + mixed
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up), state


class Model(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(256, config.width)
        self.blocks = nn.ModuleList(Block(config, first=layer == 0) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.unembed = nn.Linear(config.width, 256, bias=False)
        for name, weight in self.named_parameters():
            if name.endswith(("out_proj.weight", "down.weight", "unembed.weight")):
                nn.init.zeros_(weight)  # every layer starts as the identity
            elif weight.dim() == 2 and not name.endswith(("embed.weight", "theta")):
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def init_state(self, batch: int) -> list[LightningState]:
        return [block.mixer.init_state(batch) for block in self.blocks]

    def forward(self, tokens: Tensor, states: list[LightningState] | None = None) -> Tensor:
        """tokens [B, T] -> logits of the next bytes [B, T, 256]. States, if given, are replaced by those after."""
        x = self.embed(tokens)
        for layer, block in enumerate(self.blocks):
            if states is None:
                x, _ = block(x)
            else:
                x, states[layer] = block(x, states[layer])
        return self.unembed(self.norm(x))


def loss_of(model: Model, crops: Tensor) -> Tensor:
    """Bits per byte of crops [B, T + 1]."""
    return F.cross_entropy(model(crops[:, :-1]).float().flatten(0, 1), crops[:, 1:].flatten()) / 0.6931471805599453


def train(model: Model, text: Tensor, held_out: Tensor, device: torch.device) -> list[tuple[int, float, float]]:
    """Returns (step, training loss, held-out loss) along the way, in bits per byte."""
    config = model.config
    bf16 = device.type == "cuda" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    matrices = [p for name, p in model.blocks.named_parameters() if p.dim() == 2 and not name.endswith("theta")]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [
        Muon(matrices, config.learning_rate, torch.bfloat16 if bf16 else torch.float32),
        torch.optim.AdamW(others, config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    generator = torch.Generator().manual_seed(config.seed)
    unseen = held_out.unfold(0, config.window + 1, config.window)[: config.batch].to(device)
    history, recent = [], []
    progress = tqdm(range(config.steps), desc="training", unit="step")
    for step in progress:
        rate = min(1.0, (step + 1) / 20, 2.0 * (config.steps - step) / config.steps)  # warm up, hold, decay
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = config.learning_rate * rate
            optimizer.zero_grad()
        starts = torch.randint(len(text) - config.window - 1, (config.batch, 1), generator=generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = loss_of(model, text[starts + torch.arange(config.window + 1)].to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        recent.append(loss.item())
        if (step + 1) % max(1, config.steps // 30) == 0 or step == config.steps - 1:
            with torch.no_grad():
                history.append((step + 1, sum(recent) / len(recent), loss_of(model, unseen).item()))
            recent = []
            progress.set_postfix_str("bits per byte {:.2f}, held out {:.2f}".format(*history[-1][1:]))
    return history


def trained_model(config: Config, device: torch.device) -> tuple[Model, list[tuple[int, float, float]]]:
    """Trains, or loads what an earlier run with the same configuration and text has trained."""
    text, held_out = training_text(), topic(VALIDATION)
    key = hashlib.sha256(f"{config}{text}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_kernels"
    path = cache / f"lightning_lm-{key}.pt"
    torch.manual_seed(config.seed)
    model = Model(config).to(device)
    if path.exists():
        kept = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(kept["model"])
        print(f"weights from {path}")
        return model.eval(), kept["history"]
    history = train(model, as_bytes(text), as_bytes(held_out), device)
    cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save({"model": model.state_dict(), "history": history}, partial)
    partial.replace(path)
    print(f"weights kept in {path}")
    return model.eval(), history


@torch.inference_mode()
def compare(model: Model, text: Tensor) -> float:
    """The largest difference in log probabilities between all bytes at once, and half of them then one by one."""
    whole = model(text).log_softmax(-1)
    states, half = model.init_state(len(text)), text.shape[1] // 2
    parts = [model(text[:, :half], states)]
    parts += [model(text[:, t : t + 1], states) for t in range(half, text.shape[1])]
    return (torch.cat(parts, dim=1).log_softmax(-1) - whole).abs().max().item()


def memory_in_use(device: torch.device) -> float:
    """In MB: on a GPU torch's, else the process's, or the most it ever had where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e6
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


@torch.inference_mode()
def write(
    model: Model, logits: Tensor, states: list[LightningState], count: int, seconds: float
) -> tuple[bytes, float]:
    """Samples up to so many bytes, one step each, for at most so long: the bytes, and how many per second."""
    generator = torch.Generator(logits.device).manual_seed(model.config.seed)
    written, start = [], time.perf_counter()
    with tqdm(total=count, desc="writing", unit="B", unit_scale=True) as progress:
        while len(written) < count and time.perf_counter() - start < seconds:
            token = torch.multinomial((logits[:, -1] / 0.8).softmax(-1), 1, generator=generator)
            written.append(token.item())
            logits = model(token, states)
            progress.update()
    return bytes(written), len(written) / (time.perf_counter() - start)


@torch.inference_mode()
def stream(model: Model, text: Tensor, length: int, seconds: float) -> bytes:
    """Reads the text over and over up to a length, writing a little at its beginning and at its end."""
    device = text.device
    state_bytes = sum(state.kv.nbytes for state in model.init_state(1))
    rows = []
    states = model.init_state(1)
    logits = model(text[None, :PIECE], states)
    written, rate = write(model, logits, [LightningState(*map(Tensor.clone, s)) for s in states], length, seconds / 2)
    rows.append((min(PIECE, len(text)), rate, memory_in_use(device)))
    position = rows[0][0]
    with tqdm(total=length, initial=position, desc="reading", unit="B", unit_scale=True) as progress:
        while position < length:
            start = position % len(text)
            piece = text[None, start : start + min(PIECE, length - position)]
            logits = model(piece, states)
            position += piece.shape[1]
            progress.update(piece.shape[1])
    written, rate = write(model, logits, states, length, seconds / 2)
    rows.append((position, rate, memory_in_use(device)))
    print(f"\nwhat the model remembers: {state_bytes / 1e3:.0f} kB, at every length")
    print(f"{'bytes read':>14}{'then written':>20}{'memory in use':>18}")
    for place, rate, memory in rows:
        print(f"{place:14,}{rate:15.0f} B/s{memory:15.0f} MB")
    return written


def plot(history: list[tuple[int, float, float]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    steps, trained, held_out = zip(*history)
    axes.plot(steps, trained, label="training")
    axes.plot(steps, held_out, label="held out")
    axes.set(xlabel="step", ylabel="bits per byte", title="A recurrent model learns Python's help topics")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=Config.seed)
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--length", type=int, default=1_000_000, help="bytes to read before the model writes")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to write at most")
    parser.add_argument("--plot", default="lightning_lm.svg", help="where to draw the loss; empty: nowhere")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    args = parser.parse_args()

    config = Config(seed=args.seed)
    if args.quick:
        config = dataclasses.replace(config, layers=2, width=64, heads=2, hidden=176, window=128, batch=4, steps=30)
    if args.steps is not None:
        config = dataclasses.replace(config, steps=args.steps)
    device = torch.device(args.device)
    model, history = trained_model(config, device)
    print(f"held out: {history[-1][2]:.2f} bits per byte after {history[-1][0]} steps")
    if args.plot and find_spec("matplotlib"):
        plot(history, args.plot)
        print(f"plot: {args.plot}")

    difference = compare(model, as_bytes(topic(VALIDATION))[None, :512].to(device))
    print(f"prefill and decoding steps differ by at most {difference:.1e} in log probability")
    text = as_bytes(training_text()).to(device)
    written = stream(model, text, args.length, args.seconds)
    print(f"\nwritten after {args.length:,} bytes:\n{written[:600].decode(errors='replace')}")


if __name__ == "__main__":
    main()
