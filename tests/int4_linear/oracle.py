# SPDX-License-Identifier: Apache-2.0
"""4-bit weights and checkpoint formats written out from their definitions, value by value, in numpy and plain Python.

Nothing here looks at the library: a packer of each format takes plain values, and the truth is a float64 product.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def groups_of(columns: int, group_size: int) -> np.ndarray:
    return np.arange(columns) // (max(columns, 1) if group_size == -1 else group_size)


def dense(q: Tensor, scales: Tensor, zeros: Tensor | None, groups: np.ndarray) -> np.ndarray:
    """``[N, K]`` float64 from values ``[N, K]`` and the group of each column."""
    weight = np.zeros(tuple(q.shape))
    for k, group in enumerate(groups):
        zero = 8.0 if zeros is None else array(zeros[group])
        weight[:, k] = array(scales[group]) * (array(q[:, k]) - zero)
    return weight


def linear(x: Tensor, weight: np.ndarray, bias: Tensor | None) -> Tensor:
    with np.errstate(invalid="ignore"):
        out = array(x) @ weight.T
    return torch.from_numpy(out if bias is None else out + array(bias))


def plain_formula(x: Tensor, weight: np.ndarray, bias: Tensor | None, backwards: bool) -> Tensor:
    """What a PyTorch user would write, in x's dtype; ``backwards`` sums the columns in the reverse order."""
    w = torch.from_numpy(weight).to(x.dtype)
    x = x.detach().cpu()
    out = x.flip(-1) @ w.flip(-1).T if backwards else x @ w.T
    return out if bias is None else out + bias.detach().cpu().to(x.dtype)


def round_to_int8(x: np.ndarray, size: int) -> np.ndarray:
    """Rows rounded to 127 steps of either sign in blocks of ``size`` columns."""
    rounded = np.zeros_like(x)
    for start in range(0, x.shape[-1], size):
        block = x[..., start : start + size]
        step = np.abs(block).max(-1, keepdims=True) / 127
        rounded[..., start : start + size] = np.rint(block / np.where(step == 0, 1, step)) * step
    return rounded


# ---- packers: nibble i of a word is its bits 4i to 4i + 3 ----


def word(nibbles: list[int]) -> int:
    value = sum(int(nibble) << (4 * i) for i, nibble in enumerate(nibbles))
    return value - 2**32 if value >= 2**31 else value


def words(shape: tuple[int, ...], nibbles: object) -> Tensor:
    """int32 of a shape; ``nibbles(*index)`` gives the eight of one word."""
    packed = torch.zeros(shape, dtype=torch.int32)
    for index in np.ndindex(*shape):
        packed[index] = word(nibbles(*index))
    return packed


def portable(q: Tensor) -> Tensor:
    """Column 2j in the low half of byte j, column 2j + 1 in the high one."""
    values = q.cpu().numpy()
    packed = np.zeros((values.shape[0], (values.shape[1] + 1) // 2), dtype=np.uint8)
    packed += values[:, 0::2]
    packed[:, : values.shape[1] // 2] += 16 * values[:, 1::2]
    return torch.from_numpy(packed)


def gptq_weight(q: Tensor) -> Tensor:
    out_features, in_features = q.shape
    return words((in_features // 8, out_features), lambda r, n: [q[n, 8 * r + i] for i in range(8)])


def gptq_zeros(zeros: Tensor, version: int) -> Tensor:
    groups, out_features = zeros.shape
    stored = (zeros.int() - 1) % 16 if version == 1 else zeros
    padded = torch.nn.functional.pad(stored.int(), (0, -out_features % 8))
    return words((groups, padded.shape[1] // 8), lambda g, c: [padded[g, 8 * c + i] for i in range(8)])


def awq(values: Tensor) -> Tensor:
    """Values ``[rows, N]``, along N."""
    rows, out_features = values.shape
    return words((rows, out_features // 8), lambda r, c: [values[r, 8 * c + AWQ_ORDER[i]] for i in range(8)])


def hqq(q: Tensor, group_size: int) -> Tensor:
    rows = q.reshape(-1, group_size)
    half = len(rows) // 2
    return (rows[:half] << 4) | rows[half:]


def tinygemm(q: Tensor, inner: int) -> Tensor:
    """Lane t of tile (a, b): row 8a + t / 4; two 16-column tiles a word, values 0 2 4 6 1 3 5 7 from low to high."""
    out_features, in_features = q.shape

    def nibbles(a: int, b: int, t: int, pair: int) -> list[int]:
        row, first = 8 * a + t // 4, (b * inner + 2 * pair) * 16 + 2 * (t % 4)
        values = [q[row, first + offset] for offset in (0, 1, 8, 9, 16, 17, 24, 25)]
        return [values[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]

    return words((out_features // 8, in_features // (16 * inner), 32, inner // 2), nibbles)


def ggml_q4_0(q: Tensor, scales: Tensor) -> Tensor:
    """scales float16 ``[G, N]``."""
    out_features, in_features = q.shape
    blocks = torch.zeros(out_features, in_features // 32, 18, dtype=torch.uint8)
    for n in range(out_features):
        for g in range(in_features // 32):
            blocks[n, g, :2] = torch.from_numpy(np.frombuffer(scales[g, n].numpy().tobytes(), dtype=np.uint8).copy())
            for j in range(16):
                blocks[n, g, 2 + j] = int(q[n, 32 * g + j]) | int(q[n, 32 * g + j + 16]) << 4
    return blocks.reshape(out_features, -1)


def marlin_weight(q: Tensor) -> Tensor:
    """Word w = 4 L + j of a tile of 16 columns and 64 rows, nibble b with e = [0 2 4 6 1 3 5 7][b]: column
    2 (L % 4) + [0 1 8 9][e % 4], row 16 j + L / 4 + 8 (e / 4)."""
    out_features, in_features = q.shape

    def nibbles(tile: int, column: int) -> list[int]:
        lane, j = divmod(column % 128, 4)
        rows, columns = 64 * (column // 128), 16 * tile
        return [
            q[rows + 16 * j + lane // 4 + 8 * (e // 4), columns + 2 * (lane % 4) + (0, 1, 8, 9)[e % 4]]
            for e in (0, 2, 4, 6, 1, 3, 5, 7)
        ]

    return words((in_features // 16, 2 * out_features), nibbles)


def marlin_scales(scales: Tensor) -> Tensor:
    groups, out_features = scales.shape
    permuted = torch.empty_like(scales)
    for n in range(out_features):
        if groups > 1:  # in every run of 64, new[8 i + j] = old[i + 8 j]
            i, j = divmod(n % 64, 8)
            old = n // 64 * 64 + i + 8 * j
        else:  # in every run of 32, for i = 0..3, old[2 i + (0 1 8 9 16 17 24 25)]
            i, j = divmod(n % 32, 8)
            old = n // 32 * 32 + 2 * i + (0, 1, 8, 9, 16, 17, 24, 25)[j]
        permuted[:, n] = scales[:, old]
    return permuted
