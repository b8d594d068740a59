"""Refinement of codebooks and of the queries' map by gradient descent.

k-means makes errors of keys and values small; what counts is what attention makes of them. Here the centroids and the
queries' map of one layer are moved to lessen the error of its attention's output. `distil` goes on from there with the
predictions of the whole model. Codes stay the index of the nearest
centroid, chosen anew at every step: a centroid's gradient is that of the tokens that read it, and the choice itself
has none (straight-through). The queries' map need not stay the inverse of the keys': it is fitted as the best linear
way to read the centroids. Shapes stay what they were, and so does decoding.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from pallas_kernels.exact import product
from vecinfer_jax.calibration.kmeans import nearest

# What is moved, by how much of its root mean square a step at most (Adam's rate), falling to 0 as a cosine; less where
# codes are finer than 2 bits (`rates_for`).
RATES = {"key_codebook": 5e-3, "value_codebook": 5e-3, "query_map": 2e-3}
STEPS = 320
MASKED = -1e30

Arrays = dict[str, Any]
# `vecinfer_jax.calibration.statistics.Windows`: caches use this module, and that one uses caches.
Windows = Any


def read_back(
    x: Float[Array, "B T H D"], codebook: Float[Array, "Hc K d"], *, through: bool = False
) -> Float[Array, "B T H D"]:
    """What codes of x read as, differentiable in the codebook; with `through` also in x, as if codes were x."""
    b, t, heads, dim = x.shape
    length = codebook.shape[2]
    parts = x.transpose(2, 0, 1, 3).reshape(heads, -1, length)
    codebook = jnp.broadcast_to(codebook, (heads, *codebook.shape[1:]))
    codes = nearest(jax.lax.stop_gradient(parts), jax.lax.stop_gradient(codebook))
    read = jnp.take_along_axis(codebook, codes[..., None], axis=1)
    if through:
        read = read + parts - jax.lax.stop_gradient(parts)
    return read.reshape(heads, b, t, dim).transpose(1, 2, 0, 3)


def coded_attention(
    q: Float[Array, "B N Hq D"],
    at: Int[Array, "B N"],
    k: Float[Array, "B T Hkv D"],
    v: Float[Array, "B T Hkv D"],
    arrays: Mapping[str, Any],
    sink: int,
    *,
    through: bool = False,
) -> Float[Array, "B N Hq D"]:
    """Attention of queries at positions `at` over keys (after RoPE) and values read from codes, but for the sinks.

    arrays: `mean`, `key_map`, `query_map` and the codebooks of a layer; without them everything is exact.
    """
    b, n, _, dim = q.shape
    heads, tokens = k.shape[2], k.shape[1]
    scale = dim**-0.5
    grouped = q.reshape(b, n, heads, -1, dim)
    if not arrays:
        s = product("bnhgd,bthd->bhgnt", grouped, k)
    else:
        k = k - arrays["mean"]
        mapped = product("bthi,hij->bthj", k, arrays["key_map"])
        read = read_back(mapped, arrays["key_codebook"], through=through)
        asked = product("bnhgi,hij->bnhgj", grouped, arrays["query_map"])
        s = product("bnhgd,bthd->bhgnt", asked, read)
        s = jnp.concatenate([product("bnhgd,bthd->bhgnt", grouped, k[:, :sink]), s[..., sink:]], axis=-1)
        coded = read_back(v, arrays["value_codebook"], through=through)
        v = jnp.concatenate([v[:, :sink], coded[:, sink:]], axis=1)
    seen = (jnp.arange(tokens) <= at[..., None])[:, None, None]
    p = jax.nn.softmax(jnp.where(seen, scale * s, MASKED), axis=-1)
    return product("bhgnt,bthd->bnhgd", p, v).reshape(q.shape)


def refine_layer(arrays: Mapping[str, np.ndarray], windows: Windows, sink: int, seed: int) -> dict[str, np.ndarray]:
    """Arrays of a layer with codebooks and the queries' map moved so that the attention's output errs less.

    The loss is the squared error of the output over the squared output, of one passage's queries a step; windows: whole
    passages, with values as they are encoded.
    """
    held = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    moved = {name: held[name] for name in RATES}
    order = jnp.asarray(passes(len(windows.keys), STEPS, seed))
    refined = _descend(moved, held, jax.tree.map(jnp.asarray, windows), order, sink)
    return {**arrays, **{name: np.asarray(array) for name, array in refined.items()}}


def passes(count: int, steps: int, seed: int) -> Int[np.ndarray, "steps"]:
    """Which of `count` passages each step takes: all in a random order, then all in another."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(count) for _ in range(-(-steps // count))])[:steps]


def output_error(arrays: Mapping[str, Any], window: Windows, sink: int) -> Float[Array, ""]:
    """Squared error of the attention's output over the squared output; window: of one passage, no first axis."""
    q, at, k, v = (x[None] for x in (window.queries, window.at, window.keys, window.values))
    counts = (window.at >= sink)[:, None, None]
    exact = jnp.where(counts, coded_attention(q, at, k, v, {}, sink)[0], 0.0)
    error = jnp.where(counts, coded_attention(q, at, k, v, arrays, sink)[0] - exact, 0.0)
    if "value_scale" in arrays:  # heads count as they do without
        each = jnp.repeat(arrays["value_scale"], q.shape[2] // k.shape[2])[:, None]
        exact, error = exact / each, error / each
    return jnp.sum(error**2) / jnp.maximum(jnp.sum(exact**2), 1e-30)


@functools.partial(jax.jit, static_argnames="sink")
def _descend(moved: Arrays, held: Arrays, windows: Windows, order: Int[Array, "steps"], sink: int) -> Arrays:
    optimiser, size = optimiser_of(rates_for(RATES, moved), order.shape[0]), sizes_of(moved)

    def step(carry: tuple[Arrays, Any], index: Array) -> tuple[tuple[Arrays, Any], Array]:
        scaled, state = carry
        window = jax.tree.map(lambda x: x[index], windows)

        def loss(scaled: Arrays) -> Array:
            return output_error({**held, **unscaled(scaled, size)}, window, sink)

        value, gradient = jax.value_and_grad(loss)(scaled)
        updates, state = optimiser.update(gradient, state, scaled)
        return (optax.apply_updates(scaled, updates), state), value  # type: ignore[return-value]

    start = {name: array / size[name] for name, array in moved.items()}
    (scaled, _), _ = jax.lax.scan(step, (start, optimiser.init(start)), order)
    return unscaled(scaled, size)


def rates_for(rates: Mapping[str, float], arrays: Arrays) -> dict[str, float]:
    """The rates of arrays whose centroids lie half as far apart for every bit above 2: half as large for each of them.

    The queries' map goes with the keys' codebook. At the full rate codebooks of 4 bits end worse than they began.
    """

    def share(name: str) -> float:
        entries, length = arrays["value_codebook" if name == "value_codebook" else "key_codebook"].shape[1:]
        return min(1.0, 2.0 ** (2 - math.log2(entries) / length))

    return {name: rate * share(name) for name, rate in rates.items()}


def optimiser_of(rates: Mapping[str, float], steps: int) -> optax.GradientTransformation:
    """Adam with a rate for each array, on arrays of unit root mean square."""
    each = {name: optax.adam(optax.cosine_decay_schedule(rate, steps)) for name, rate in rates.items()}
    return optax.multi_transform(each, lambda arrays: {name: name for name in arrays})


def sizes_of(arrays: Arrays) -> Arrays:
    return {name: jnp.maximum(jnp.sqrt(jnp.mean(array**2)), 1e-12) for name, array in arrays.items()}


def unscaled(arrays: Arrays, size: Arrays) -> Arrays:
    return {name: array * size[name] for name, array in arrays.items()}
