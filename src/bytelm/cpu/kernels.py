"""Kernels of decoding steps, compiled by ``numba``; imported only where that is installed.

A step of a few rows is bound by reading weights and by the overhead of calls. These kernels read
each matrix once, in the order in which it is stored, and do most of a block in one call. All are in
one file: what is compiled is kept on disk, and compiled again when its file changes.

Matrices are ``[outputs, inputs]``, stored by rows or by columns, or a pair ``(tiles, scale)`` of
8-bit weights (:mod:`bytelm.cpu.int8`). Without annotations: ``numba`` compiles the functions
themselves, not ones that check types.
"""
# ruff: noqa: ANN001, ANN201, ANN202
# pyright: basic

import numpy as np
from numba import types
from numba.extending import overload

from bytelm.cpu.compiling import compiled
from bytelm.cpu.int8 import TILE


@compiled
def add_by_columns(x, columns, out):
    """Add ``x @ columns`` to ``out``."""
    rows, inputs = x.shape
    outputs = columns.shape[1]
    whole = inputs // 4 * 4
    # Four columns times two rows fit into the registers.
    for k in range(0, whole, 4):
        for row in range(0, rows - 1, 2):
            a0, a1, a2, a3 = x[row, k], x[row, k + 1], x[row, k + 2], x[row, k + 3]
            b0, b1 = x[row + 1, k], x[row + 1, k + 1]
            b2, b3 = x[row + 1, k + 2], x[row + 1, k + 3]
            for n in range(outputs):
                w0, w1 = columns[k, n], columns[k + 1, n]
                w2, w3 = columns[k + 2, n], columns[k + 3, n]
                out[row, n] += a0 * w0 + a1 * w1 + a2 * w2 + a3 * w3
                out[row + 1, n] += b0 * w0 + b1 * w1 + b2 * w2 + b3 * w3
        if rows % 2:
            row = rows - 1
            a0, a1, a2, a3 = x[row, k], x[row, k + 1], x[row, k + 2], x[row, k + 3]
            for n in range(outputs):
                w0, w1 = columns[k, n], columns[k + 1, n]
                w2, w3 = columns[k + 2, n], columns[k + 3, n]
                out[row, n] += a0 * w0 + a1 * w1 + a2 * w2 + a3 * w3
    for k in range(whole, inputs):
        for row in range(rows):
            for n in range(outputs):
                out[row, n] += x[row, k] * columns[k, n]


@compiled
def add_by_rows(x, weight, out):
    """Add ``x @ weight.T`` to ``out``."""
    rows, inputs = x.shape
    zero = np.float32(0)
    for n in range(len(weight)):
        row = 0
        while row + 4 <= rows:
            a, b, c, d = zero, zero, zero, zero
            for k in range(inputs):
                w = weight[n, k]
                a += w * x[row, k]
                b += w * x[row + 1, k]
                c += w * x[row + 2, k]
                d += w * x[row + 3, k]
            out[row, n] += a
            out[row + 1, n] += b
            out[row + 2, n] += c
            out[row + 3, n] += d
            row += 4
        while row < rows:
            a = zero
            for k in range(inputs):
                a += weight[n, k] * x[row, k]
            out[row, n] += a
            row += 1


@compiled
def _sum_one(x, weights, a):
    """Write the product of a row with a tile of integers to ``a``."""
    inputs = len(x)
    whole = inputs // 4 * 4
    a[:] = 0
    for k in range(0, whole, 4):
        a0, a1, a2, a3 = x[k], x[k + 1], x[k + 2], x[k + 3]
        for n in range(TILE):
            v0, v1 = np.float32(weights[k, n]), np.float32(weights[k + 1, n])
            v2, v3 = np.float32(weights[k + 2, n]), np.float32(weights[k + 3, n])
            a[n] += a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
    for k in range(whole, inputs):
        for n in range(TILE):
            a[n] += x[k] * np.float32(weights[k, n])


@compiled
def _sum_four(x, weights, a, b, c, d):
    """Write the products of four rows with a tile, each of whose integers is widened once."""
    inputs = x.shape[1]
    whole = inputs // 4 * 4
    a[:], b[:], c[:], d[:] = 0, 0, 0, 0
    for k in range(0, whole, 4):
        a0, a1, a2, a3 = x[0, k], x[0, k + 1], x[0, k + 2], x[0, k + 3]
        b0, b1, b2, b3 = x[1, k], x[1, k + 1], x[1, k + 2], x[1, k + 3]
        c0, c1, c2, c3 = x[2, k], x[2, k + 1], x[2, k + 2], x[2, k + 3]
        d0, d1, d2, d3 = x[3, k], x[3, k + 1], x[3, k + 2], x[3, k + 3]
        for n in range(TILE):
            v0, v1 = np.float32(weights[k, n]), np.float32(weights[k + 1, n])
            v2, v3 = np.float32(weights[k + 2, n]), np.float32(weights[k + 3, n])
            a[n] += a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
            b[n] += b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3
            c[n] += c0 * v0 + c1 * v1 + c2 * v2 + c3 * v3
            d[n] += d0 * v0 + d1 * v1 + d2 * v2 + d3 * v3
    for k in range(whole, inputs):
        for n in range(TILE):
            weight = np.float32(weights[k, n])
            a[n] += x[0, k] * weight
            b[n] += x[1, k] * weight
            c[n] += x[2, k] * weight
            d[n] += x[3, k] * weight


@compiled
def add_int8(x, tiles, scale, out):
    """Add the product with an 8-bit matrix to ``out``; a row's sums do not depend on the others."""
    rows, outputs = len(x), len(scale)
    sums = (
        np.empty(TILE, np.float32),
        np.empty(TILE, np.float32),
        np.empty(TILE, np.float32),
        np.empty(TILE, np.float32),
    )
    for tile in range(len(tiles)):
        begin = tile * TILE
        size = min(TILE, outputs - begin)
        row = 0
        while row < rows:
            count = 4 if row + 4 <= rows else 1
            if count == 4:
                _sum_four(x[row : row + 4], tiles[tile], sums[0], sums[1], sums[2], sums[3])
            else:
                _sum_one(x[row], tiles[tile], sums[0])
            for r in range(count):
                for n in range(size):
                    out[row + r, begin + n] += sums[r][n] * scale[begin + n]
            row += count


def add_product(x, weight, out):
    """Add ``x @ weight.T`` to ``out``, whatever a matrix is stored like."""
    if isinstance(weight, tuple):
        tiles, scale = weight
        integers = tiles.transpose(0, 2, 1).reshape(-1, x.shape[1])[: len(scale)]
        weight = integers * scale[:, None]
    out += x @ weight.T


@overload(add_product)
def _add_product(x, weight, out):
    """Choose what kernels call instead, for the type of a matrix."""
    if isinstance(weight, types.BaseTuple):
        return lambda x, weight, out: add_int8(x, weight[0], weight[1], out)
    if weight.layout == "F":
        return lambda x, weight, out: add_by_columns(x, weight.T, out)
    return lambda x, weight, out: add_by_rows(x, weight, out)


@compiled
def exp_in_place(x):
    """Replace ``x`` by ``exp(x)``, to 5e-7 of it; below -87 by ``exp(-87)``.

    ``exp(x) = 2**n exp(r)`` with ``n = round(x / ln 2)`` and a Taylor polynomial in ``r``, whose
    error is below ``(ln 2 / 2)**7 / 7!``: unlike a call of the C library it is vectorised.
    """
    for i in range(len(x)):
        at = min(max(x[i], np.float32(-87)), np.float32(88))
        n = np.floor(at * np.float32(1.44269504) + np.float32(0.5))
        r = at - n * np.float32(0.693147181)
        power = np.float32(1 / 720)
        power = power * r + np.float32(1 / 120)
        power = power * r + np.float32(1 / 24)
        power = power * r + np.float32(1 / 6)
        power = power * r + np.float32(0.5)
        power = power * r + np.float32(1)
        power = power * r + np.float32(1)
        x[i] = power * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled
def attend(heads, all_keys, all_values, place, mixed):
    """Store new keys and values, and attend; ``heads`` are queries, keys and values of each row."""
    starts, block, new, counts, head_positions, kv_heads = place
    rows, num_heads, dim = heads.shape[0], heads.shape[1] - 2 * kv_heads, heads.shape[2]
    group = num_heads // kv_heads
    scale = np.float32(1.0 / np.sqrt(dim))
    scores = np.empty(counts.max(), np.float32)
    for row in range(rows):
        count = counts[row]
        for head in range(num_heads):
            kv = head // group
            offset = kv * head_positions
            if head % group == 0:
                at = (starts[row, new[row] // block] + offset + new[row] % block) * dim
                all_keys[at : at + dim] = heads[row, num_heads + kv]
                all_values[at : at + dim] = heads[row, num_heads + kv_heads + kv]
            query, out = heads[row, head], mixed[row, head * dim : (head + 1) * dim]
            highest = np.float32(-np.inf)
            for begin in range(0, count, block):
                at = (starts[row, begin // block] + offset) * dim
                for entry in range(begin, min(begin + block, count)):
                    key = all_keys[at : at + dim]
                    score = np.float32(0)
                    for n in range(dim):
                        score += query[n] * key[n]
                    scores[entry] = score * scale
                    highest = max(highest, score * scale)
                    at += dim
            for entry in range(count):
                scores[entry] -= highest
            exp_in_place(scores[:count])
            total = np.float32(0)
            for entry in range(count):
                total += scores[entry]
            out[:] = 0
            for begin in range(0, count, block):
                at = (starts[row, begin // block] + offset) * dim
                for entry in range(begin, min(begin + block, count)):
                    value = all_values[at : at + dim]
                    weight = scores[entry]
                    for n in range(dim):
                        out[n] += weight * value[n]
                    at += dim
            for n in range(dim):
                out[n] /= total


@compiled
def norm(x, weight, eps, out):
    """Write the RMSNorm of each row to ``out``."""
    rows, dim = x.shape
    for row in range(rows):
        square = np.float32(0)
        for n in range(dim):
            square += x[row, n] * x[row, n]
        scale = np.float32(1) / np.sqrt(square / np.float32(dim) + np.float32(eps))
        for n in range(dim):
            out[row, n] = x[row, n] * scale * weight[n]


@compiled
def norm_linear(x, norm_weight, weight, eps, normed, out):
    """Write a projection of normalised rows to ``out``."""
    norm(x, norm_weight, eps, normed)
    out[:] = 0
    add_product(normed, weight, out)


@compiled
def decode_block(x, factors, cache, place, weights, eps, buffers, has_down, out, hidden):
    """Write a transformer block's output for one position of each row to ``out``.

    Args:
        x: residual stream, ``[rows, dim]``.
        factors: rotary factors, complex, ``[rows, half]``.
        cache: keys and values of the layer, flat.
        place: where the entries are; see :class:`bytelm.cpu.attending.Entries`.
        weights: of the attention's norm, the queries, keys and values, the attention's output, the
            feed-forward's norm, its gate and up projections, and its down projection.
        eps: of the two norms.
        buffers: ``[rows, dim]``, ``[rows, heads, head_dim]`` with those of keys and values,
            ``[rows, inner]`` of the attention, and ``[rows, 2 * hidden]``.
        has_down: also project down; otherwise only ``hidden`` is written.
        out: ``[rows, dim]``.
        hidden: ``[rows, hidden]``.
    """
    attention_norm, qkv, output, feed_forward_norm, gate_up, down = weights
    normed, heads, mixed, gates = buffers
    kv_heads = place[5]
    norm_linear(x, attention_norm, qkv, eps[0], normed, heads.reshape(len(x), -1))
    for row in range(len(x)):
        for head in range(heads.shape[1] - kv_heads):
            for pair in range(factors.shape[1]):
                factor = factors[row, pair]
                a, b = heads[row, head, 2 * pair], heads[row, head, 2 * pair + 1]
                heads[row, head, 2 * pair] = a * factor.real - b * factor.imag
                heads[row, head, 2 * pair + 1] = a * factor.imag + b * factor.real
    attend(heads, cache[0], cache[1], place, mixed)
    out[:] = x
    add_product(mixed, output, out)
    norm_linear(out, feed_forward_norm, gate_up, eps[1], normed, gates)
    size = hidden.shape[1]
    for row in range(len(x)):
        scale, gate, up = hidden[row], gates[row, :size], gates[row, size:]
        for n in range(size):
            scale[n] = -gate[n]
        exp_in_place(scale)
        for n in range(size):
            scale[n] = gate[n] / (np.float32(1) + scale[n]) * up[n]
    if has_down:
        add_product(hidden, down, out)


@compiled
def decode_cross(x, keys, values, weights, numbers, buffers, out):
    """Write the output of a decoder's cross-attention, whose rows each read one latent.

    Args:
        x: residual stream, ``[rows, dim]``.
        keys: of the latents' slots, ``[rows, slots, heads, head_dim]``.
        values: likewise.
        weights: of the norm, the queries, and the output.
        numbers: epsilon of the norm, and scale of the residual stream.
        buffers: ``[rows, dim]``, and two of ``[rows, heads * head_dim]``.
        out: ``[rows, dim]``.
    """
    query_norm, query, output = weights
    normed, queries, mixed = buffers
    norm_linear(x, query_norm, query, numbers[0], normed, queries)
    rows, slots, heads, dim = keys.shape
    scale = np.float32(1.0 / np.sqrt(dim))
    scores = np.empty(slots, np.float32)
    for row in range(rows):
        for head in range(heads):
            begin = head * dim
            for slot in range(slots):
                score = np.float32(0)
                for n in range(dim):
                    score += queries[row, begin + n] * keys[row, slot, head, n]
                scores[slot] = score * scale
            scores -= scores.max()
            exp_in_place(scores)
            scores /= scores.sum()
            for n in range(dim):
                mixed[row, begin + n] = 0
            for slot in range(slots):
                for n in range(dim):
                    mixed[row, begin + n] += scores[slot] * values[row, slot, head, n]
    for row in range(rows):
        for n in range(x.shape[1]):
            out[row, n] = x[row, n] * np.float32(numbers[1])
    add_product(mixed, output, out)


@compiled
def embed(ids, table, ngrams, primes, sizes, num_buckets, scale, out):
    """Write hash embeddings of the last id of each row to ``out``, the preceding ones given.

    See :class:`bytelm.model.embedding.HashEmbedding`; hashes are integers of 64 bits that wrap.
    """
    rows, length = ids.shape
    for row in range(rows):
        result = out[row]
        result[:] = table[ids[row, length - 1]]
        pair = 0
        for prime in primes:
            for size in sizes:
                hashed = np.int64(0)
                for n in range(1, size + 1):
                    hashed = ids[row, length - n] + hashed * prime
                result += ngrams[hashed % num_buckets + pair * num_buckets]
                pair += 1
        result *= np.float32(scale)


def warm_up(*, is_int8=False):
    """Compile what steps of an fp32 model with several rows call, or of one with 8-bit weights."""
    one, two, four = (np.ones(shape, np.float32) for shape in ((2,), (2, 2), (2, 4)))
    wide, qkv, square = (
        np.asfortranarray(np.ones((outputs, 2), np.float32)) for outputs in (4, 6, 2)
    )
    narrow = two
    if is_int8:
        wide, qkv, square = (
            (np.ones((1, 2, TILE), np.int8), np.ones(outputs, np.float32)) for outputs in (4, 6, 2)
        )
        narrow = square
    zeros = np.zeros(2, np.int64)
    place = np.zeros((2, 1), np.int64), 1, zeros, zeros + 1, 1, 1
    buffers = two.copy(), np.ones((2, 3, 2), np.float32), two.copy(), four
    weights = one, qkv, square, one, wide, narrow
    factors = np.ones((2, 1), np.complex64)
    caches = one.copy(), one.copy()
    decode_block(
        two, factors, caches, place, weights, (0.0, 0.0), buffers, True, two.copy(), two.copy()
    )
    keys = np.ones((2, 1, 1, 2), np.float32)
    buffers = two.copy(), two.copy(), two.copy()
    decode_cross(two, keys, keys, (one, square, square), (0.0, 1.0), buffers, two.copy())
    norm_linear(two, one, wide, 0.0, two.copy(), four)
    if is_int8:
        add_int8(two, *wide, four)
        return
    norm_linear(two, one, two, 0.0, two.copy(), two.copy())
    add_by_columns(two, two, two.copy())
    add_by_rows(two, two, two.copy())
    ids = np.zeros((2, 2), np.int64)
    embed(ids, two, two, ids[0] + 3, ids[0] + 1, 1, 1.0, two.copy())
