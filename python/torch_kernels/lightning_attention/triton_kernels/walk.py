# SPDX-License-Identifier: Apache-2.0
"""The walk over a sequence that all kernels of the family share.

With a decay a_t = exp(-slope) or exp(g_t), and a state S of K rows and V columns,

    forward    S_t = a_t S_{t-1} + k_t^T v_t                     out_t = scale * q_t S_t
    reverse    E_t = scale * k_t^T v_t + a_{t+1} E_{t+1}         out_t = q_t E_t

The reverse is what gradients need: dv is the reverse walk of (k, q, grad), dk that of (v, grad, q), and dq is the
forward walk of (grad, v, k). So one function serves them all, and no product is ever transposed.

A program keeps the state, or a block of its columns, in registers and takes a chunk of tokens at a time: what the state
gives to the chunk's queries, what its keys give to its queries, and what the chunk adds to the state. Exponents are
differences that are at most zero.
"""

import triton
import triton.language as tl

from torch_kernels._triton_jit import LOG2E


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, to float32 accuracy: a state that decays slowly must not drift."""
    near = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))))))
    return tl.where(x > -0.5, near, tl.exp2(x * LOG2E) - 1)


@triton.jit
def _power(slope, n):
    """exp(-slope * n) for n >= 0."""
    return tl.exp2(-slope * LOG2E * n.to(tl.float32))


@triton.jit
def _chunk_decay(slope, gates, gate_token, row, exists, count, REVERSE: tl.constexpr):
    """Decay between the chunk's queries (rows) and keys (columns), which of these pairs there are, decay from the
    state to each query and from each key to the state, and the state's own change."""
    # What looks different in each chunk is computed again and not kept in registers.
    column = row + tl.where(count > 0, 0, 1)
    if REVERSE:
        distance = column[None, :] - row[:, None]
    else:
        distance = row[:, None] - column[None, :]
    visible = distance >= 0
    if gates is None:
        # An infinite slope times a distance of 0 would be NaN.
        slope = tl.minimum(slope, 1e30)
        inner = _power(slope, distance)
        head = _power(slope, row + 1)
        tail = _power(slope, tl.maximum(count - 1 - row, 0))
        change = expm1(-slope * count.to(tl.float32))
    else:
        g = tl.load(gates + row * gate_token, mask=exists, other=0.0)
        # exp(-128) is 0, and so a reset's decay. With sums of multiples of 1/1024, which are exact, and of the small
        # rest, no difference of sums loses digits.
        g = tl.where(g < -128.0, -128.0, g)
        coarse = tl.floor(g * 1024.0) / 1024.0
        fine = g - coarse
        coarse_sum, fine_sum = tl.cumsum(coarse, axis=0), tl.cumsum(fine, axis=0)
        coarse_total, fine_total = tl.sum(coarse, axis=0), tl.sum(fine, axis=0)
        if REVERSE:
            difference = (coarse_sum[None, :] - coarse_sum[:, None]) + (fine_sum[None, :] - fine_sum[:, None])
        else:
            difference = (coarse_sum[:, None] - coarse_sum[None, :]) + (fine_sum[:, None] - fine_sum[None, :])
        inner = tl.exp2(difference * LOG2E)
        head = tl.exp2((coarse_sum + fine_sum) * LOG2E)
        tail = tl.exp2(((coarse_total - coarse_sum) + (fine_total - fine_sum)) * LOG2E)
        change = expm1(coarse_total + fine_total)
    if REVERSE:
        to_query, to_state = tail, head
    else:
        to_query, to_state = head, tail
    return inner, visible, to_query, to_state, change


@triton.jit
def load_rows(x, stride, row, exists, column, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """x[row, column]; zero where a row does not exist and from column SIZE on."""
    mask = exists[:, None]
    if MASKED:
        mask = mask & (column < SIZE)[None, :]
    return tl.load(x + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def state_part(state, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEAD: tl.constexpr):
    """Pointers to part of a state and a mask. It lies row by row, or column by column at a distance of LEAD."""
    mask = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    if LEAD:
        pointers = state + row[:, None] + column[None, :] * LEAD
    else:
        pointers = state + row[:, None] * COLUMNS + column[None, :]
    return pointers, mask


@triton.jit
def load_state(state, column, K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V: tl.constexpr, LEAD: tl.constexpr):
    """The state's first K0 rows and the K1 rows after them; zeros where there is no state."""
    if state is None:
        low = tl.zeros((K0, column.shape[0]), tl.float32)
    else:
        pointers, mask = state_part(state, tl.arange(0, K0), column, K, V, LEAD)
        low = tl.load(pointers, mask=mask, other=0.0)
    high = low
    if K1 > 0:
        if state is None:
            high = tl.zeros((K1, column.shape[0]), tl.float32)
        else:
            pointers, mask = state_part(state, K0 + tl.arange(0, K1), column, K, V, LEAD)
            high = tl.load(pointers, mask=mask, other=0.0)
    return low, high


@triton.jit
def store_state(
    state, low, high, column, K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V: tl.constexpr,
    LEAD: tl.constexpr,
):  # fmt: skip
    pointers, mask = state_part(state, tl.arange(0, K0), column, K, V, LEAD)
    tl.store(pointers, low, mask=mask)
    if K1 > 0:
        pointers, mask = state_part(state, K0 + tl.arange(0, K1), column, K, V, LEAD)
        tl.store(pointers, high, mask=mask)


@triton.jit
def _store_mark(
    marks, mark_step, low, high, column, position, stop,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V: tl.constexpr, LEAD: tl.constexpr, MARK: tl.constexpr,
):  # fmt: skip
    """Keeps the state between the tokens before `position` and those after it, where an interval of MARK tokens ends.
    Nothing with a negative `stop`."""
    if ((position % MARK == 0) & (position < stop)) | (position == stop):
        target = marks + ((position - 1) // MARK).to(tl.int64) * mark_step
        store_state(target, low, high, column, K, K0, K1, V, LEAD)


@triton.jit
def store_sum(target, value, mask, part, ADD: tl.constexpr):
    """Stores a value, or adds it to what earlier parts gave."""
    if ADD:
        value += tl.load(target, mask=mask & (part > 0), other=0.0)
    tl.store(target, value.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _add_keys(
    q0, q1, k, v, result, low, high, inner, visible, to_state, key_scale, row, exists, k_token, v_token, column,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds a chunk's keys and values to the results of its queries, unless q0 is None, and to the state."""
    k0 = load_rows(k, k_token, row, exists, tl.arange(0, K0), K, K0 > K)
    values = load_rows(v, v_token, row, exists, column, V, V % BLOCK > 0)
    if K1 > 0:
        k1 = load_rows(k, k_token, row, exists, K0 + tl.arange(0, K1), K, K0 + K1 > K)
    if q0 is not None:
        scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if K1 > 0:
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision="ieee")
        scores = tl.where(visible, scores * (inner * key_scale), 0.0)
        result = tl.dot(scores.to(values.dtype), values, result, input_precision="ieee")
    weighted = (values * (to_state * key_scale)[:, None]).to(values.dtype)
    low = tl.dot(tl.trans(k0), weighted, low, input_precision="ieee")
    if K1 > 0:
        high = tl.dot(tl.trans(k1), weighted, high, input_precision="ieee")
    return result, low, high


@triton.jit
def _walk_part(
    out, dots, q, k, v, other, slope, gates, state, final, marks, scale, part, begin, end, stop, keep,
    out_token, q_token, k_token, k_member, v_token, v_member, other_token, gate_token, mark_step, column,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    ADD: tl.constexpr, REVERSE: tl.constexpr, MEMBERS: tl.constexpr, LEAD: tl.constexpr, MARK: tl.constexpr,
):  # fmt: skip
    """See `walk`. Returns what is infinite or NaN if an output or a state is."""
    row = tl.arange(0, C)
    column0 = tl.arange(0, K0)
    column1 = K0 + tl.arange(0, max(K1, 1))
    low, high = load_state(state, column, K, K0, K1, V, LEAD)
    # Sums along rows stay inside a warp.
    alarm = tl.zeros((C,), tl.float32)
    state_alarm = tl.zeros((K0,), tl.float32)
    out_scale = 1.0 if REVERSE else scale
    key_scale = scale if REVERSE else 1.0
    chunks = tl.cdiv(end - begin, C)
    # What is hoisted out of a loop takes registers that the loop needs.
    for step in tl.range(0, chunks, disable_licm=True):
        chunk = chunks - 1 - step if REVERSE else step
        first = begin + chunk * C
        count = tl.minimum(end - first, C)
        exists = row < count
        if marks is not None and REVERSE:
            _store_mark(marks, mark_step, low, high, column, first + count, stop, K, K0, K1, V, LEAD, MARK)
        at = first.to(tl.int64)
        gates_at = None if gates is None else gates + at * gate_token
        inner, visible, to_query, to_state, change = _chunk_decay(
            slope, gates_at, gate_token, row, exists, count, REVERSE
        )

        q0, q1, result = None, None, alarm
        if q is not None:
            q0 = load_rows(q + at * q_token, q_token, row, exists, column0, K, K0 > K)
            result = tl.dot(q0, low.to(q0.dtype), input_precision="ieee")
            if K1 > 0:
                q1 = load_rows(q + at * q_token, q_token, row, exists, column1, K, K0 + K1 > K)
                result = tl.dot(q1, high.to(q1.dtype), result, input_precision="ieee")
            result *= to_query[:, None]
        low += low * change
        if K1 > 0:
            high += high * change
        if MEMBERS == 1:
            result, low, high = _add_keys(
                q0, q1, k + at * k_token, v + at * v_token, result, low, high, inner, visible, to_state, key_scale,
                row, exists, k_token, v_token, column, K, K0, K1, V, BLOCK,
            )  # fmt: skip
        else:
            for member in range(MEMBERS):
                result, low, high = _add_keys(
                    q0, q1, k + at * k_token + member * k_member, v + at * v_token + member * v_member, result, low,
                    high, inner, visible, to_state, key_scale, row, exists,
                    k_token, v_token, column, K, K0, K1, V, BLOCK,
                )  # fmt: skip

        if q is not None:
            result *= out_scale
            alarm += tl.sum(tl.abs(result), axis=1)
            if other is not None:
                partner = load_rows(other + at * other_token, other_token, row, exists, column, V, V % BLOCK > 0)
                store_sum(dots + at + row, tl.sum(result * partner, axis=1), exists, part, ADD)
            target = out + at * out_token + row[:, None] * out_token + column[None, :]
            inside = exists[:, None]
            if V % BLOCK > 0:
                inside = inside & (column < V)[None, :]
            store_sum(target, result, inside, part, ADD)
        else:
            state_alarm += tl.sum(tl.abs(low), axis=1)
        if marks is not None and not REVERSE:
            _store_mark(marks, mark_step, low, high, column, first + count, stop, K, K0, K1, V, LEAD, MARK)

    state_alarm += tl.sum(tl.abs(low), axis=1)
    worst = tl.sum(alarm, axis=0) + tl.sum(state_alarm, axis=0)
    if K1 > 0:
        worst += tl.sum(tl.sum(tl.abs(high), axis=1), axis=0)
    if final is not None:
        if keep:
            store_state(final, low, high, column, K, K0, K1, V, LEAD)
    return worst


@triton.jit
def load_row(x, column, SIZE: tl.constexpr):
    return tl.load(x + column, mask=column < SIZE, other=0.0).to(tl.float32)


@triton.jit
def _outer(k, values, column, SIZE: tl.constexpr, MASKED: tl.constexpr):
    product = k[:, None] * values[None, :]
    if MASKED:
        product = tl.where((column < SIZE)[:, None], product, 0.0)
    return product


@triton.jit
def _decayed(state, change, reset):
    return tl.where(reset, 0.0, state + state * change)


@triton.jit
def _token(
    out, dots, q, k, v, other, slope, gates, marks, scale, low, high, part, position, stop,
    out_token, q_token, k_token, k_member, v_token, v_member, other_token, gate_token, mark_step, column,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V: tl.constexpr,
    ADD: tl.constexpr, REVERSE: tl.constexpr, MEMBERS: tl.constexpr, LEAD: tl.constexpr, MARK: tl.constexpr,
):  # fmt: skip
    """One token of a walk, as the formula says. Returns the state after it."""
    column0 = tl.arange(0, K0)
    column1 = K0 + tl.arange(0, max(K1, 1))
    at = position.to(tl.int64)
    log_decay = -slope if gates is None else tl.load(gates + at * gate_token)
    change, reset = expm1(log_decay), log_decay == -float("inf")
    if marks is not None and REVERSE:
        _store_mark(marks, mark_step, low, high, column, position + 1, stop, K, K0, K1, V, LEAD, MARK)
    if not REVERSE:
        low = _decayed(low, change, reset)
        if K1 > 0:
            high = _decayed(high, change, reset)
    for member in range(MEMBERS):
        values = load_row(v + at * v_token + member * v_member, column, V) * (scale if REVERSE else 1.0)
        k_at = k + at * k_token + member * k_member
        low += _outer(load_row(k_at, column0, K), values, column0, K, K0 > K)
        if K1 > 0:
            high += _outer(load_row(k_at, column1, K), values, column1, K, K0 + K1 > K)
    if q is not None:
        result = tl.sum(load_row(q + at * q_token, column0, K)[:, None] * low, axis=0)
        if K1 > 0:
            result += tl.sum(load_row(q + at * q_token, column1, K)[:, None] * high, axis=0)
        result *= 1.0 if REVERSE else scale
        if other is not None:
            partner = load_row(other + at * other_token, column, V)
            store_sum(dots + at, tl.sum(result * partner, axis=0), part >= 0, part, ADD)
        store_sum(out + at * out_token + column, result, column < V, part, ADD)
    if marks is not None and not REVERSE:
        _store_mark(marks, mark_step, low, high, column, position + 1, stop, K, K0, K1, V, LEAD, MARK)
    if REVERSE:
        low = _decayed(low, change, reset)
        if K1 > 0:
            high = _decayed(high, change, reset)
    return low, high


@triton.jit
def _walk_tokens(
    out, dots, q, k, v, other, slope, gates, state, final, marks, scale, part, begin, end, stop, keep,
    out_token, q_token, k_token, k_member, v_token, v_member, other_token, gate_token, mark_step, column,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V: tl.constexpr, ADD: tl.constexpr, REVERSE: tl.constexpr,
    MEMBERS: tl.constexpr, LEAD: tl.constexpr, MARK: tl.constexpr,
):  # fmt: skip
    """What `_walk_part` does, token by token."""
    low, high = load_state(state, column, K, K0, K1, V, LEAD)
    for step in tl.range(0, end - begin, num_stages=1, disable_licm=True):
        low, high = _token(
            out, dots, q, k, v, other, slope, gates, marks, scale, low, high, part,
            end - 1 - step if REVERSE else begin + step, stop,
            out_token, q_token, k_token, k_member, v_token, v_member, other_token, gate_token, mark_step, column,
            K, K0, K1, V, ADD, REVERSE, MEMBERS, LEAD, MARK,
        )  # fmt: skip
    if final is not None:
        if keep:
            store_state(final, low, high, column, K, K0, K1, V, LEAD)


@triton.jit
def _rows_from(x, rows, WIDTH: tl.constexpr):
    """x from a row on; None remains None."""
    if x is None:
        y = x
    else:
        y = x + rows * WIDTH
    return y


@triton.jit
def walk(
    out, dots, q, k, v, other, slope, gates, state, final, marks, scale, begin, end, stop, keep,
    out_token, q_token, k_token, k_member, v_token, v_member, other_token, gate_token, mark_step, column,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, PARTS: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    C: tl.constexpr, REVERSE: tl.constexpr, MEMBERS: tl.constexpr, TRANSPOSED: tl.constexpr, MARK: tl.constexpr,
):  # fmt: skip
    """Walks tokens begin .. end of a sequence, to whose first token all pointers but those to states point.

    out, q: for each token, its output and query; None to compute states only.
    k, v: MEMBERS heads of keys and values that share the state.
    other, dots: where not None, the products of `other`, a row for each token, with the output before it is rounded.
    state, final: the state to begin with, and where to leave the last one if `keep`; either may be None. They lie as
    [K, V], or [V, K] if TRANSPOSED.
    marks: None, or where to leave states at the ends of intervals of MARK tokens and of the `stop` tokens of all.
    column: the state's columns that this program computes.

    The state's rows are walked in PARTS, of which each adds to the output, and has two blocks of K0 and K1 rows.
    """
    ADD: tl.constexpr = PARTS > 1
    SIZE: tl.constexpr = K // PARTS
    LEAD: tl.constexpr = K if TRANSPOSED else 0
    STEP: tl.constexpr = SIZE if TRANSPOSED else SIZE * V
    worst = 0.0
    for part in tl.range(0, PARTS, num_stages=1):
        if ADD:
            tl.debug_barrier()  # another thread may add to what this one has stored
        worst += _walk_part(
            out, dots, _rows_from(q, part, SIZE), k + part * SIZE, v, other, slope, gates,
            _rows_from(state, part, STEP), _rows_from(final, part, STEP), _rows_from(marks, part, STEP),
            scale, part, begin, end, stop, keep,
            out_token, q_token, k_token, k_member, v_token, v_member, other_token, gate_token, mark_step, column,
            SIZE, K0, K1, V, BLOCK, C, ADD, REVERSE, MEMBERS, LEAD, MARK,
        )  # fmt: skip
    # Zero times a NaN or an infinity is NaN, so in products of tiles these reach rows that do not see them, and large
    # numbers overflow in float16. Then all is done again, token by token, with selection and in float32.
    if not (worst < float("inf")):
        tl.debug_barrier()
        for part in tl.range(0, PARTS, num_stages=1):
            _walk_tokens(
                out, dots, _rows_from(q, part, SIZE), k + part * SIZE, v, other, slope, gates,
                _rows_from(state, part, STEP), _rows_from(final, part, STEP), _rows_from(marks, part, STEP),
                scale, part, begin, end, stop, keep,
                out_token, q_token, k_token, k_member, v_token, v_member, other_token, gate_token, mark_step, column,
                SIZE, K0, K1, V, ADD, REVERSE, MEMBERS, LEAD, MARK,
            )  # fmt: skip
            tl.debug_barrier()
