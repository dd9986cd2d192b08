# SPDX-License-Identifier: Apache-2.0
"""Linear attention over features, and its gradients, from the states between spans of SPAN tokens.

With S_t and z_t the sums of k_j v_j^T and of k_j, out_i = q_i S_i / n_i with n_i = q_i z_i + eps. Let g_i be the
gradient of out_i, divided by n_i, and d_i = -g_i out_i that of n_i. Then, with R_t and r_t the sums of q_i g_i^T and of
d_i q_i over the tokens from t on,

    dq_i = S_i g_i + d_i z_i        dk_j = R_j v_j + r_j        dv_j = k_j R_j

so that all are rows a times a state, plus the products (a b^T) c with the rows b, c of the token's own span. A state of
R rows lies as [R, V], as [V, R] where the product needs its transpose.
"""

import math

import torch
import triton
import triton.language as tl

from torch_kernels._triton import architecture, contiguous, in_batches, on_device

from ..heuristics import SPAN, linear_tile

SCAN_BLOCK = 1024


@triton.jit
def _load(x, stride, row, exists, column, size):
    """x[row, column] of rows that exist and columns below `size`, else zero."""
    mask = exists[:, None] & (column < size)[None, :]
    return tl.load(x + row[:, None].to(tl.int64) * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _vector(x, row, exists):
    return tl.load(x + row, mask=exists, other=0.0)


@triton.jit(do_not_specialize=["tokens", "spans"])
def states_kernel(
    states, norms, k, v, factor, weight, tokens, spans, heads, features, columns,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    SPAN: tl.constexpr, T: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """states [B, H, spans, features, columns]: the sums of k_t factor_t v_t^T over a span; norms [B, H, spans,
    features]: those of k_t weight_t. Grid (feature tiles * column tiles, spans, B * H)."""
    tiles = tl.cdiv(columns, V)
    head, batch = tl.program_id(2) % heads, (tl.program_id(2) // heads).to(tl.int64)
    span = tl.program_id(1)
    feature = tl.program_id(0) // tiles * F + tl.arange(0, F)
    column = tl.program_id(0) % tiles * V + tl.arange(0, V)
    k += batch * k_stride_b + head.to(tl.int64) * k_stride_h
    v += batch * v_stride_b + head.to(tl.int64) * v_stride_h
    of_head = tl.program_id(2).to(tl.int64)
    end = tl.minimum(span * SPAN + SPAN, tokens)
    state = tl.zeros((F, V), tl.float32)
    norm = tl.zeros((F,), tl.float32)
    for first in tl.range(span * SPAN, end, T, disable_licm=True):
        row = first + tl.arange(0, T)
        exists = row < end
        keys = _load(k, k_stride_t, row, exists, feature, features)
        values = _load(v, v_stride_t, row, exists, column, columns)
        if factor is None:
            norm += tl.sum(keys.to(tl.float32), axis=0)
        else:
            values = (values * _vector(factor + of_head * tokens, row, exists)[:, None]).to(values.dtype)
            norm += tl.sum(keys * _vector(weight + of_head * tokens, row, exists)[:, None], axis=0)
        state = tl.dot(tl.trans(keys), values, state, input_precision="ieee")
    at = (of_head * spans + span) * features + feature
    inside = (feature < features)[:, None] & (column < columns)[None, :]
    tl.store(states + at[:, None] * columns + column[None, :], state, mask=inside)
    if tl.program_id(0) % tiles == 0:
        tl.store(norms + at, norm, mask=feature < features)


@triton.jit(do_not_specialize=["spans", "size"])
def scan_kernel(
    states, final, initial, spans, size, INCLUDING: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Replaces what each span adds by the state before it (REVERSE: after it), or, INCLUDING, that of all. final: the
    state of all. Grid (blocks of a state, B * H)."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    of_head = tl.program_id(1).to(tl.int64)
    states += of_head * spans * size + element
    state = tl.zeros((BLOCK,), tl.float32)
    if initial is not None:
        state = tl.load(initial + of_head * size + element, mask=inside, other=0.0)
    for step in range(spans):
        at = tl.cast(spans - 1 - step if REVERSE else step, tl.int64) * size
        added = tl.load(states + at, mask=inside, other=0.0)
        if not INCLUDING:
            tl.store(states + at, state, mask=inside)
        state += added
    if final is not None:
        tl.store(final + of_head * size + element, state, mask=inside)


@triton.jit
def _weights(products, row_factor, row_weight, column_factor, column_weight):
    """What the rows c are weighed by: products of a and b, times factors and plus weights of either's tokens."""
    if row_factor is not None:
        products = products * row_factor[:, None] + row_weight[:, None]
    if column_factor is not None:
        products = products * column_factor[None, :]
        if column_weight is not None:
            products += column_weight[None, :]
    return products


@triton.jit
def _within_span(
    acc, total, a, b, c, row, exists, begin, end, column, row_factor, row_weight, column_factor, column_weight,
    size, columns, a_stride, b_stride, c_stride, REVERSE: tl.constexpr, T: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Adds what tokens begin .. end of the rows' own span give. EXACT: one by one, and tokens that a row does not see
    are selected away instead of getting a weight of zero, as NaN and infinities ask for."""
    if EXACT:
        for token in range(begin, end):
            product = tl.zeros((T,), tl.float32)
            for first in range(0, size, 16):
                at = first + tl.arange(0, 16)
                other = tl.load(b + tl.cast(token, tl.int64) * b_stride + at, mask=at < size, other=0.0)
                rows = _load(a, a_stride, row, exists, at, size).to(tl.float32)
                product += tl.sum(rows * other.to(tl.float32)[None, :], axis=1)
            if row_factor is not None:
                product = product * row_factor + row_weight
            if column_factor is not None:
                product *= tl.load(column_factor + token)
                if column_weight is not None:
                    product += tl.load(column_weight + token)
            seen = token >= row if REVERSE else token <= row
            value = tl.load(c + tl.cast(token, tl.int64) * c_stride + column, mask=column < columns, other=0.0)
            acc += tl.where(seen[:, None], product[:, None] * value.to(tl.float32)[None, :], 0.0)
            total += tl.where(seen, product, 0.0)
    else:
        for first in tl.range(begin, end, T, disable_licm=True):
            token = first + tl.arange(0, T)
            present = token < end
            products = tl.zeros((T, T), tl.float32)
            for start in tl.range(0, size, 32, disable_licm=True):
                at = start + tl.arange(0, 32)
                rows = _load(a, a_stride, row, exists, at, size)
                others = _load(b, b_stride, token, present, at, size)
                products = tl.dot(rows, tl.trans(others), products, input_precision="ieee")
            factor = None if column_factor is None else _vector(column_factor, token, present)
            weight = None if column_weight is None else _vector(column_weight, token, present)
            products = _weights(products, row_factor, row_weight, factor, weight)
            distance = token[None, :] - row[:, None] if REVERSE else row[:, None] - token[None, :]
            products = tl.where((distance >= 0) & present[None, :], products, 0.0)
            values = _load(c, c_stride, token, present, column, columns)
            acc = tl.dot(products.to(values.dtype), values, acc, input_precision="ieee")
            total += tl.sum(products, axis=1)
    return acc, total


@triton.jit
def _times_state(
    a, a_stride, row, exists, state, norm, column, size, columns,
    TRANSPOSED: tl.constexpr, T: tl.constexpr, V: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """a times the state, and, NORM, a times the norm."""
    acc = tl.zeros((T, V), tl.float32)
    total = tl.zeros((T,), tl.float32)
    for first in tl.range(0, size, 32, disable_licm=True):
        at = first + tl.arange(0, 32)
        rows = _load(a, a_stride, row, exists, at, size)
        inside = (at < size)[:, None] & (column < columns)[None, :]
        if TRANSPOSED:
            pointers = state + column[None, :] * size + at[:, None]
        else:
            pointers = state + at[:, None] * columns + column[None, :]
        part = tl.load(pointers, mask=inside, other=0.0)
        acc = tl.dot(rows, part.to(rows.dtype), acc, input_precision="ieee")
        if NORM:
            total += tl.sum(rows * tl.load(norm + at, mask=at < size, other=0.0)[None, :], axis=1)
    return acc, total


@triton.jit
def _rows(
    a, b, c, state, norm, row, exists, begin, end, column, row_factor, row_weight, column_factor, column_weight,
    size, columns, a_stride, b_stride, c_stride,
    DIVIDE: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, CAUSAL: tl.constexpr, T: tl.constexpr,
    V: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Rows of the output, and of the divisor, before they are divided."""
    acc, total = _times_state(
        a, a_stride, row, exists, state, norm, column, size, columns, TRANSPOSED, T, V, DIVIDE
    )  # fmt: skip
    if TRANSPOSED:
        shared = tl.load(norm + column, mask=column < columns, other=0.0)[None, :]
        if row_factor is not None:
            acc = acc * row_factor[:, None] + shared * row_weight[:, None]
        else:
            acc += shared
    if CAUSAL:
        acc, total = _within_span(
            acc, total, a, b, c, row, exists, begin, end, column, row_factor, row_weight, column_factor, column_weight,
            size, columns, a_stride, b_stride, c_stride, REVERSE, T, EXACT,
        )  # fmt: skip
    return acc, total


@triton.jit(do_not_specialize=["tokens", "spans"])
def attend_kernel(
    out, inverses, dots, alarms, a, b, c, partner, state, norm, row_factor, row_weight, column_factor, column_weight,
    eps, tokens, spans, heads, size, columns,
    a_stride_b, a_stride_t, a_stride_h, b_stride_b, b_stride_t, b_stride_h, c_stride_b, c_stride_t, c_stride_h,
    partner_stride_b, partner_stride_t, partner_stride_h,
    DIVIDE: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, CAUSAL: tl.constexpr,
    REPAIR: tl.constexpr, SPAN: tl.constexpr, T: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """out = a state + (a b^T) c over the rows' own span, see above. Grid (column tiles, row tiles, B * H).

    DIVIDE: the forward pass; out is divided by a norm + eps. With `partner`, the gradient of out, it instead leaves
    inverses of the divisors and, for each column tile, the products of partner and out.
    row_factor, row_weight, column_factor, column_weight [B, H, T]: of the tokens of a and of b, where they are given.
    state, norm: one for each span, without CAUSAL one for all.

    Zero times a NaN or an infinity is NaN, which would reach tokens that do not see it. So a program whose result is
    not finite raises an alarm, and a second launch, to REPAIR, computes its rows again.
    """
    program = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0)
    program += tl.program_id(0)
    if REPAIR:  # noqa: SIM102 (known at compile time, unlike the next)
        if tl.load(alarms + program) == 0:
            return
    of_head = tl.program_id(2).to(tl.int64)
    head, batch = tl.program_id(2) % heads, (tl.program_id(2) // heads).to(tl.int64)
    first = tl.program_id(1) * T
    row = first + tl.arange(0, T)
    exists = row < tokens
    column = tl.program_id(0) * V + tl.arange(0, V)
    a += batch * a_stride_b + head.to(tl.int64) * a_stride_h
    span = first // SPAN
    at = of_head * spans + span if CAUSAL else of_head
    state += at * size * columns
    if norm is not None:
        norm += at * (columns if TRANSPOSED else size)
    if row_factor is not None:
        row_factor = _vector(row_factor + of_head * tokens, row, exists)
        row_weight = _vector(row_weight + of_head * tokens, row, exists)
    if column_factor is not None:
        column_factor += of_head * tokens
    if column_weight is not None:
        column_weight += of_head * tokens

    b += batch * b_stride_b + head.to(tl.int64) * b_stride_h
    c += batch * c_stride_b + head.to(tl.int64) * c_stride_h
    begin = first if REVERSE else span * SPAN
    end = tl.minimum(span * SPAN + SPAN if REVERSE else first + T, tokens)
    acc, total = _rows(
        a, b, c, state, norm, row, exists, begin, end, column, row_factor, row_weight, column_factor, column_weight,
        size, columns, a_stride_t, b_stride_t, c_stride_t, DIVIDE, REVERSE, TRANSPOSED, CAUSAL, T, V, REPAIR,
    )  # fmt: skip
    if CAUSAL and not REPAIR:
        finite = tl.sum(tl.sum(tl.abs(acc), axis=1), axis=0) < float("inf")
        tl.store(alarms + program, (~finite).to(tl.int32))

    at = of_head * tokens + row
    inside = exists[:, None] & (column < columns)[None, :]
    if DIVIDE:
        total += eps
        acc = tl.where((total == 0)[:, None], 0.0, acc / tl.where(total == 0, 1.0, total)[:, None])
    if partner is not None:
        partner += batch * partner_stride_b + head.to(tl.int64) * partner_stride_h
        grad = _load(partner, partner_stride_t, row, exists, column, columns)
        inverse = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))
        tl.store(inverses + at, inverse, mask=exists)
        rows = tl.num_programs(2).to(tl.int64) * tokens
        tl.store(dots + tl.program_id(0) * rows + at, -inverse * tl.sum(grad * acc, axis=1), mask=exists)
    else:
        target = out + ((batch * tokens + row) * heads + head)[:, None] * columns + column[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=inside)


def _strides(x):
    return (0, 0, 0) if x is None else x.stride()[:3]


def _states(k, v, factor, weight, initial, final, causal, reverse=False):
    """States and norms before each span (after each, if reverse), or of all spans; `final` gets those of all."""
    batch, tokens, heads, features = k.shape
    columns, spans = v.shape[3], triton.cdiv(tokens, SPAN)
    tile = linear_tile(k.element_size(), columns, architecture(k.device))
    kept = [torch.empty(batch, heads, spans, features, n, dtype=torch.float32, device=k.device) for n in (columns, 1)]
    blocks = triton.cdiv(features, tile.rows) * triton.cdiv(columns, tile.columns)
    if spans:
        states_kernel[(blocks, spans, batch * heads)](
            *kept, k, v, factor, weight, tokens, spans, heads, features, columns, *_strides(k), *_strides(v),
            SPAN=SPAN, T=tile.rows, F=tile.rows, V=tile.columns, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    for states, last, first, size in zip(kept, final, initial, (features * columns, features)):
        scan_kernel[(triton.cdiv(size, SCAN_BLOCK), batch * heads)](
            states, last, first, spans, size, INCLUDING=not causal, REVERSE=reverse, BLOCK=SCAN_BLOCK
        )
    return kept if causal else final


def _attend(
    out, a, b, c, state, norm, causal, rows=(None, None), columns=(None, None), eps=0.0, divide=False, reverse=False,
    transposed=False, partner=None, inverses=None, dots=None,
):  # fmt: skip
    batch, tokens, heads, size = a.shape
    wanted = c.shape[3]
    tile = linear_tile(a.element_size(), wanted, architecture(a.device))
    grid = triton.cdiv(wanted, tile.columns), triton.cdiv(tokens, tile.rows), batch * heads
    alarms = torch.empty(math.prod(grid), dtype=torch.int32, device=a.device)
    for repair in (False, True) if causal else (False,):
        attend_kernel[grid](
            out, inverses, dots, alarms, a, b, c, partner, state, norm, *rows, *columns, float(eps), tokens,
            triton.cdiv(tokens, SPAN), heads, size, wanted,
            *_strides(a), *_strides(b), *_strides(c), *_strides(partner),
            DIVIDE=divide, REVERSE=reverse, TRANSPOSED=transposed, CAUSAL=causal, REPAIR=repair, SPAN=SPAN,
            T=tile.rows, V=tile.columns, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


@in_batches(heads=2)
def linear_attention(out, state, norm, q, k, v, causal, initial_state, initial_norm, eps):
    if norm.numel() == 0:
        return
    with on_device(q):
        initial = tuple(contiguous(initial_state, initial_norm))
        states, norms = _states(k, v, None, None, initial, (state, norm), causal)
        if out.numel():
            _attend(out, q, k, v, states, norms, causal, eps=eps, divide=True)


@in_batches(heads=2)
def linear_attention_backward(
    grad_q, grad_k, grad_v, grad_initial_state, grad_initial_norm,
    grad_out, q, k, v, grad_state, grad_norm, causal, initial_state, initial_norm, eps,
):  # fmt: skip
    batch, tokens, heads, features = q.shape
    columns = v.shape[3]
    if batch * heads == 0:
        return

    def empty(*shape):
        return torch.empty(batch, heads, *shape, dtype=torch.float32, device=q.device)

    with on_device(q):
        final = empty(features, columns), empty(features)
        initial = tuple(contiguous(initial_state, initial_norm))
        states, norms = _states(k, v, None, None, initial, final, causal)
        tiles = triton.cdiv(columns, linear_tile(q.element_size(), columns, architecture(q.device)).columns)
        inverses, dots = empty(tokens), torch.empty(tiles, batch, heads, tokens, dtype=torch.float32, device=q.device)
        if tokens:
            _attend(
                None, q, k, v, states, norms, causal, eps=eps, divide=True, partner=grad_out, inverses=inverses,
                dots=dots,
            )  # fmt: skip
        along = dots.sum(0)
        given = (grad_initial_state, grad_initial_norm) if initial_state is not None else (None, None)
        if not causal:
            given = tuple(x if x is not None else y for x, y in zip(given, (empty(features, columns), empty(features))))
        grad_states, grad_norms = _states(
            q, grad_out, inverses, along, contiguous(grad_state, grad_norm), given, causal, reverse=True
        )
        if tokens:
            of_rows, of_columns = (inverses, along), (inverses, None)
            _attend(grad_q, grad_out, v, k, states, norms, causal, rows=of_rows, transposed=True)
            _attend(
                grad_k, v, grad_out, q, grad_states, grad_norms, causal, columns=of_rows, reverse=True, transposed=True
            )
            _attend(grad_v, k, q, grad_out, grad_states, None, causal, columns=of_columns, reverse=True)
