"""What the kernels compute, in float64 numpy, written from the definitions and not from the reference."""

import math

import jax
import jax.numpy as jnp
import numpy as np

EMPTY = -1e30


def float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def hadamard_matrix(size: int) -> np.ndarray:
    """Sylvester's doubling, normalised."""
    matrix = np.ones((1, 1))
    while matrix.shape[0] < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(size)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Each token's codes as a string of bits, lowest first, filled up to whole bytes."""
    string = (codes[..., None] >> np.arange(bits)) & 1
    string = string.reshape(*codes.shape[:-1], codes.shape[-1] * bits)
    return np.packbits(string.astype(np.uint8), axis=-1, bitorder="little")


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    string = np.unpackbits(packed, axis=-1, count=count * bits, bitorder="little").astype(np.int64)
    return (string.reshape(*packed.shape[:-1], count, bits) << np.arange(bits)).sum(-1)


def rotate(x, cos, sin) -> np.ndarray:
    """Rotary embedding, a head's first half against its second, in float32, rounded to x's dtype."""
    x = np.asarray(x)
    wide = x.astype(np.float32)
    half = x.shape[-1] // 2
    turned = np.concatenate([-wide[..., half:], wide[..., :half]], axis=-1)
    both = lambda angles: np.concatenate([np.asarray(angles, np.float32)] * 2, axis=-1)[:, :, None]  # noqa: E731
    return (wide * both(cos) + turned * both(sin)).astype(x.dtype)


def transform(x, mean=None, scale=None, matrix=None, hadamard=False) -> np.ndarray:
    y = float64(x)
    if mean is not None:
        y = y - float64(mean)
    if scale is not None:
        y = y * float64(scale)
    if matrix is not None:
        y = np.einsum("bshi,hij->bshj", y, float64(matrix))
    return y @ hadamard_matrix(y.shape[-1]) if hadamard else y


def distances(y: np.ndarray, codebook) -> np.ndarray:
    """Squared distance of every sub-vector to every centroid: [B, H, S, M, K]."""
    codebook = float64(codebook)
    batch, tokens, heads, dim = y.shape
    length = codebook.shape[-1]
    parts = y.reshape(batch, tokens, heads, dim // length, length).transpose(0, 2, 1, 3, 4)
    codebook = np.broadcast_to(codebook, (heads, *codebook.shape[1:]))
    return ((parts[..., None, :] - codebook[None, :, None, None]) ** 2).sum(-1)


def largest_excess(vectors, codebook, codes) -> float:
    """How far the worst of many choices is above the least squared distance, relative to it: [n, d], [K, d], [n].

    Float64 like all here, but in JAX: there are more distances than numpy could hold or would finish.
    """
    with jax.enable_x64(True):
        table = jnp.asarray(float64(codebook))

        def one(pair):
            distance = jnp.sum((pair[0][:, None] - table) ** 2, axis=-1)
            chosen = jnp.take_along_axis(distance, pair[1][:, None], axis=1)[:, 0]
            least = distance.min(axis=-1)
            return jnp.max((chosen - least) / jnp.maximum(least, 1e-30))

        size = math.gcd(len(vectors), 2048)
        parts = float64(vectors).reshape(-1, size, table.shape[1]), np.asarray(codes).reshape(-1, size)
        return float(jnp.max(jax.jit(lambda *pair: jax.lax.map(one, pair))(*parts)))


def decode_attention(q, key_codes, value_codes, key_codebook, value_codebook, lengths, scale):
    """Softmax over each row's own tokens; output and log-sum-exp. Codebooks count as rounded to q's dtype."""
    dtype = np.asarray(q).dtype
    batch, query_heads, dim = q.shape
    kv_heads = key_codes.shape[1]
    group = query_heads // kv_heads
    output, lse = np.zeros(q.shape), np.full((batch, query_heads), EMPTY)
    tables = [float64(np.asarray(book).astype(dtype)) for book in (key_codebook, value_codebook)]
    bits = [int(math.log2(table.shape[1])) for table in tables]
    for b in range(batch):
        length = int(lengths[b])
        for h in range(kv_heads if length else 0):
            keys, values = (
                table[h % table.shape[0]][
                    unpack(np.asarray(codes)[b, h, :length], width, dim // table.shape[2])
                ].reshape(length, dim)
                for table, codes, width in zip(tables, (key_codes, value_codes), bits, strict=True)
            )
            heads = slice(h * group, (h + 1) * group)
            scores = scale * float64(q)[b, heads] @ keys.T
            top = scores.max(-1, keepdims=True)
            weights = np.exp(scores - top)
            total = weights.sum(-1, keepdims=True)
            output[b, heads] = weights / total @ values
            lse[b, heads] = (top + np.log(total))[:, 0]
    return output, lse


def attention(q, keys, values, valid, scale):
    """Softmax over the valid ones of keys and values [B, Hkv, W, D]; output and log-sum-exp."""
    batch, query_heads, _ = q.shape
    group = query_heads // keys.shape[1]
    output, lse = np.zeros(q.shape), np.full((batch, query_heads), EMPTY)
    for b in range(batch):
        for h in range(query_heads if valid[b].any() else 0):
            k, v = (float64(x)[b, h // group, valid[b]] for x in (keys, values))
            scores = scale * float64(q)[b, h] @ k.T
            weights = np.exp(scores - scores.max())
            output[b, h] = weights / weights.sum() @ v
            lse[b, h] = scores.max() + np.log(weights.sum())
    return output, lse


def merge(outputs, lses):
    """Attention over the union of disjoint sets of tokens."""
    outputs, lses = np.stack(outputs), np.stack(lses)
    top = lses.max(0)
    weights = np.where(lses > EMPTY / 2, np.exp(lses - top), 0.0)
    total = weights.sum(0)
    safe = np.where(total > 0, total, 1.0)
    return (weights[..., None] * outputs).sum(0) / safe[..., None], np.where(total > 0, top + np.log(safe), EMPTY)


def nuq_pair_order(dim: int) -> list[int]:
    """Channel at each place of a coded key: a quarter is an eighth of the channels, then their rotary partners."""
    eighth = dim // 8
    return [half * 4 * eighth + quarter * eighth + i for quarter in range(4) for half in (0, 1) for i in range(eighth)]


def nuq_outliers(words, dim: int) -> np.ndarray:
    """Pools of words [tiles, slots] as differences [tokens, D], word by word."""
    words = np.asarray(words)
    out = np.zeros((words.shape[0] * 64, dim))
    for tile, pool in enumerate(words):
        for word in pool:
            place = int(word) & 0xFFFF
            difference = np.array(int(word) >> 16, np.uint16).view(np.float16)
            if place < 64 * dim:
                out[tile * 64 + place // dim, place % dim] += float(difference)
    return out


def turned(x: np.ndarray, positions: np.ndarray, inverse_frequencies) -> np.ndarray:
    """RoPE of [tokens, D] with float64 angles."""
    angle = positions[:, None] * np.asarray(inverse_frequencies, np.float64)
    left, right = np.split(x, 2, axis=-1)
    return np.concatenate(
        [left * np.cos(angle) - right * np.sin(angle), right * np.cos(angle) + left * np.sin(angle)], axis=-1
    )


def nuq_decode_attention(
    q, key_codes, value_codes, key_scale, key_zero, key_codebook, value_codebook, value_scale_zero, key_outliers,
    value_outliers, lengths, scale, inverse_frequencies, first_position,
):  # fmt: skip
    """Softmax over each row's own tokens; output and log-sum-exp."""
    if q.dtype.itemsize == 2:
        value_codebook = value_codebook.astype("bfloat16")
    batch, query_heads, dim = q.shape
    kv_heads = key_codes.shape[1]
    group = query_heads // kv_heads
    output, lse = np.zeros(q.shape), np.full((batch, query_heads), EMPTY)
    bits = [int(math.log2(book.shape[0])) for book in (key_codebook, value_codebook)]
    natural = np.argsort(nuq_pair_order(dim))
    for b in range(batch):
        n = int(lengths[b])
        for h in range(kv_heads if n else 0):
            index = unpack(np.asarray(key_codes)[b, h, :n], bits[0], dim)[:, natural]
            keys = float64(key_codebook)[index] * float64(key_scale)[h] + float64(key_zero)[h]
            index = unpack(np.asarray(value_codes)[b, h, :n], bits[1], dim)
            of_token = float64(value_scale_zero)[b, :n]
            values = float64(value_codebook)[index] * of_token[:, :1] + of_token[:, 1:]
            if key_outliers is not None:
                keys = keys + nuq_outliers(key_outliers[b, h], dim)[:n]
            if value_outliers is not None:
                values = values + nuq_outliers(value_outliers[b, h], dim)[:n]
            if inverse_frequencies is not None:
                keys = turned(keys, first_position + np.arange(n), inverse_frequencies)
            heads = slice(h * group, (h + 1) * group)
            scores = scale * float64(q)[b, heads] @ keys.T
            top = scores.max(-1, keepdims=True)
            weights = np.exp(scores - top)
            total = weights.sum(-1, keepdims=True)
            output[b, heads] = weights / total @ values
            lse[b, heads] = (top + np.log(total))[:, 0]
    return output, lse


def group_int_codes(packed, layout, values: bool) -> np.ndarray:
    """Packed tiles [tiles, bytes] of a head's keys or values as codes [S, D], code by code, from the words of lanes."""
    if not layout.for_lanes:
        return unpack(np.asarray(packed), layout.bits, layout.tile * layout.dim).reshape(-1, layout.dim)
    words = np.ascontiguousarray(packed).view(np.uint32)
    bits, dim = layout.bits, layout.dim
    fields, of_lane = 16 // bits, dim * bits // 32
    at_once = min(4, of_lane)
    out = np.full((len(words), 32, dim), -1)
    for lane in range(32):
        r, j = divmod(lane, 4)
        for pair in range(dim // 2):
            word, field = divmod(pair, fields)
            word = words[:, word // at_once * 32 * at_once + lane * at_once + word % at_once]
            if values:  # tokens j and j + 4 of every eight, each in D / 16 pairs: two of every 32 channels
                run, pair_of_token = divmod(pair, dim // 16)
                token, channel = run // 2 * 8 + run % 2 * 4 + j, pair_of_token // 2 * 32 + r * 4 + pair_of_token % 2 * 2
            else:  # one of every eight tokens, a quarter of it in D / 8 pairs
                g, pair_of_token = divmod(pair, dim // 8)
                token, channel = 8 * g + r // 2 + r % 2 * 4, j * dim // 4 + 2 * pair_of_token
            for half in (0, 1):
                out[:, token, channel + half] = (word >> (16 * half + field * bits)) & (2**bits - 1)
    return out.reshape(-1, dim)


def group_int_dense(key_codes, key_scale_zero, value_codes, value_scale_zero, layout) -> tuple[np.ndarray, np.ndarray]:
    """What a head's tokens are read back as, [S, D] each."""
    dim, tokens = layout.dim, np.arange(len(key_codes) * layout.tile)
    place = channels = np.arange(dim)
    if layout.for_lanes:  # of a quarter's channels, those 4 i and 4 i + 1 first
        place = channels // (dim // 4) * (dim // 4) + channels % 4 // 2 * (dim // 8) + channels % (dim // 4) // 4 * 2
        place = place + channels % 2
    of_group = float64(key_scale_zero)[tokens // layout.token_group]
    keys = group_int_codes(key_codes, layout, False) * of_group[:, place] + of_group[:, dim:]
    within, parts = tokens % layout.tile, -(-dim // layout.channel_group)
    part = np.arange(dim) // layout.channel_group
    if layout.for_lanes:  # of each group of channels: row r has tokens r / 2 + 4 (r % 2) + 8 g
        t, g = within % 8, within // 8
        row = t % 4 * 2 + t // 4
        first = part[None] * 32 + (row * 4 + g)[:, None]
    else:
        first = within[:, None] * parts + part[None]
    of_tile = float64(value_scale_zero).reshape(len(value_codes), -1, 2)[tokens // layout.tile]
    scale, zero = (np.take_along_axis(of_tile[..., i], first, 1) for i in (0, 1))
    return keys, group_int_codes(value_codes, layout, True) * scale + zero


def group_int_decode_attention(
    q, key_codes, key_scale_zero, value_codes, value_scale_zero, lengths, layout, scale
):  # fmt: skip
    """Softmax over each row's own tokens; output and log-sum-exp."""
    held = [np.asarray(x) for x in (key_codes, key_scale_zero, value_codes, value_scale_zero)]
    rows = [[group_int_dense(*(x[b, h] for x in held), layout) for h in range(held[0].shape[1])] for b in range(len(q))]
    keys, values = (np.stack([np.stack([pair[i] for pair in row]) for row in rows]) for i in (0, 1))
    valid = np.arange(keys.shape[2])[None] < np.asarray(lengths)[:, None]
    return attention(q, keys, values, valid, scale)
