# SPDX-License-Identifier: Apache-2.0
"""TorchKernelsConfig: transformers quantises, saves and loads by its own functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_kernels
from safetensors import safe_open
from torch import nn
from torch_kernels.nn import Int4Linear, Int8Linear
from torch_kernels.transformers import TorchKernelsConfig  # noqa: E402  (without transformers skipped before)

from ..tolerance import assert_bitwise
from .tiny import DEVICE, greedy, model_of, tokens_of, transformers

TOKENS = tokens_of(2, 7)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "int4": ("llama", {"attention_bias": True}, {"group_size": 16}),
    "int4 asymmetric, tied": ("llama", {"tie_word_embeddings": True}, {"symmetric": False, "group_size": 32}),
    "int4 bfloat16": ("llama", {"dtype": torch.bfloat16}, {"group_size": -1, "mode": "a8"}),
    "int4 mixture": ("mixtral", {}, {"group_size": 16, "skip": ["lm_head", "*.k_proj"]}),
    "int8": ("llama", {}, {"bits": 8, "threshold": 6.0, "skip": []}),
    "int8 rotated mixture": ("mixtral", {"intermediate_size": 64}, {"bits": 8, "rotate": True}),
}


def load(path: Path, **options: Any) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.to(DEVICE)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("case", CASES)
def test_from_dense_to_disk_and_back(case: str, tmp_path: Path) -> None:
    kind, options, given = CASES[case]
    dtype = options.get("dtype", torch.float32)
    model_of(kind, **options).to(dtype).save_pretrained(tmp_path / "dense")
    quantised = load(tmp_path / "dense", quantization_config=TorchKernelsConfig(**given))
    by_hand = load(tmp_path / "dense")
    skip = given.get("skip", ["lm_head"])
    torch_kernels.quantize_(by_hand, **({"skip": skip} | {k: v for k, v in given.items() if k != "skip"}))
    expected = logits_of(by_hand)
    assert expected.dtype == dtype
    assert_bitwise("quantised while loaded", logits_of(quantised), expected)

    quantised.save_pretrained(tmp_path / "quantised")
    loaded = load(tmp_path / "quantised")
    assert_bitwise("loaded", logits_of(loaded), expected)
    assert greedy(loaded, TOKENS, 5).tolist() == greedy(by_hand, TOKENS, 5).tolist()
    state, again = quantised.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    for name, tensor in state.items():
        assert_bitwise(name, again[name], tensor)
    assert {name: type(m) for name, m in loaded.named_modules()} == {n: type(m) for n, m in by_hand.named_modules()}
    linear = {name for name, module in loaded.named_modules() if type(module) is nn.Linear}
    assert ("lm_head" in linear) == ("lm_head" in skip) and any(name.endswith("k_proj") for name in linear) == (
        "*.k_proj" in skip
    )
    assert any(isinstance(m, Int8Linear if given.get("bits") == 8 else Int4Linear) for m in loaded.modules())

    with safe_open(tmp_path / "quantised" / "model.safetensors", "pt") as file:
        assert not any("q_proj.weight" in k and file.get_tensor(k).is_floating_point() and "scale" not in k
                       for k in file.keys())  # fmt: skip
    size, dense_size = ((tmp_path / kind / "model.safetensors").stat().st_size for kind in ("quantised", "dense"))
    assert size < dense_size
    config = json.loads((tmp_path / "quantised" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "torch_kernels" and config["bits"] == given.get("bits", 4)


def test_wrong_arguments() -> None:
    for options, message in (
        ({"bits": 3}, "TorchKernelsConfig: bits must be 4 or 8, got 3"),
        ({"group_size": 33}, "TorchKernelsConfig: group_size must be -1 or 16"),
        ({"rotate": True}, "TorchKernelsConfig: rotate must be left out with bits=4"),
        ({"bits": 8, "rotate": True, "threshold": 6.0}, "TorchKernelsConfig: rotate must be False with a threshold"),
        ({"mode": "a4"}, "TorchKernelsConfig: mode must be 'exact' or"),
    ):
        with pytest.raises(ValueError, match=message):
            TorchKernelsConfig(**options)
