# SPDX-License-Identifier: Apache-2.0
"""Which sequence, and which part of it, a program works on.

Packed sequences lie one after another in T tokens; their lengths are on the GPU, and asking for them would wait for it.
So a grid has room for any lengths: part p of sequence n, which begins at token t, has number t // SPAN + n + p, where
a part has at least SPAN tokens. These numbers never collide, and there are at most T // SPAN + N of them. Garbage in
cu_seqlens gives sequences that overlap or are empty, inside the T tokens.
"""

import triton
import triton.language as tl


@triton.jit
def _boundary(cu_seqlens, index, tokens):
    return tl.minimum(tl.maximum(tl.load(cu_seqlens + index), 0), tokens).to(tl.int32)


@triton.jit
def bounds(cu_seqlens, sequence, tokens):
    """Begin and end of a packed sequence; 0 and `tokens` of one in a batch."""
    if cu_seqlens is None:
        start, stop = tokens * 0, tokens
    else:
        start = _boundary(cu_seqlens, sequence, tokens)
        stop = tl.maximum(_boundary(cu_seqlens, sequence + 1, tokens), start)
    return start, stop


@triton.jit
def first_part(cu_seqlens, sequence, start, parts, SPAN: tl.constexpr):
    """Number of the first part of a sequence; in a batch every sequence has `parts`."""
    if cu_seqlens is None:
        part = sequence * parts
    else:
        part = start // SPAN + sequence
    return part


@triton.jit
def find(cu_seqlens, item, tokens, sequences, parts, SPAN: tl.constexpr):
    """Sequence and part of a number."""
    if cu_seqlens is None:
        sequence = item // parts
        part = item % parts
    else:
        sequence = tokens * 0
        high = sequence + sequences - 1
        while sequence < high:
            middle = (sequence + high + 1) // 2
            before = _boundary(cu_seqlens, middle, tokens) // SPAN + middle <= item
            sequence = tl.where(before, middle, sequence)
            high = tl.where(before, high, middle - 1)
        part = item - (_boundary(cu_seqlens, sequence, tokens) // SPAN + sequence)
    return sequence, part


@triton.jit
def segment_size(length, segments, SPAN: tl.constexpr):
    """Tokens of a segment, a multiple of SPAN: there are at most `segments`."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, segments), SPAN), 1) * SPAN


@triton.jit
def locate(cu_seqlens, item, tokens, sequences, parts, segments, SPLIT: tl.constexpr, SPAN: tl.constexpr):
    """Of a segment's number: its sequence, that one's begin and length, the segment's begin and end in it, and whether
    there is such a segment. An empty sequence has an empty one. Without SPLIT sequences are segments."""
    if SPLIT:
        sequence, part = find(cu_seqlens, item, tokens, sequences, parts, SPAN)
    else:
        sequence, part = item, item * 0
    start, stop = bounds(cu_seqlens, sequence, tokens)
    length = stop - start
    size = segment_size(length, segments, SPAN) if SPLIT else length
    begin = part * size
    return sequence, start, length, begin, tl.minimum(begin + size, length), (begin < length) | (part == 0)


@triton.jit
def address(x, batch, token, head, batch_stride, token_stride, head_stride):
    """Of a row. Strides come as multiples of eight elements, so that the compiler knows how rows are aligned."""
    offset = tl.cast(batch, tl.int64) * batch_stride + tl.cast(token, tl.int64) * token_stride
    return x + (offset + tl.cast(head, tl.int64) * head_stride) * 8


def room(cu_seqlens, batch: int, tokens: int, segments: int, span: int) -> tuple[int, int]:
    """How many numbers a grid must have room for and, in a batch, how many there are for each sequence."""
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    if segments == 1:
        return sequences, 1
    if cu_seqlens is None:
        size = max(triton.cdiv(triton.cdiv(tokens, segments), span), 1) * span
        parts = max(triton.cdiv(tokens, size), 1)
        return batch * parts, parts
    return tokens // span + sequences, 0
