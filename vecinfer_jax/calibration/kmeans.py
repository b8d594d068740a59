"""k-means on the accelerator: greedy k-means++ start, Lloyd's iterations, deterministic by seed."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import packing, vq_encode

# Elements of the long vectors that an accelerator's points are laid side by side into.
ENCODED_AT_ONCE = 128
# Where centroids are put that pad a codebook to a power of two.
FAR = 1e18
# Groups an accelerator starts at the same time; a CPU gains nothing from it.
GROUPS_AT_ONCE = 16
# k-means++: this many centroids are drawn one by one, later ones in batches of a 32nd of those drawn already.
ONE_BY_ONE = 256
DRAW_ROUNDS = 32
# Points per centroid that k-means++ draws from, where there are more.
DRAW_POINTS = 8
DRAW_POINTS_AT_LEAST = 32768
# Centroids a CPU compares with in one go.
UNROLL = 16


@functools.partial(jax.jit, static_argnames=("clusters", "iterations", "trials"))
def kmeans(
    points: Float[Array, "groups N d"],
    weights: Float[Array, "groups N"] | None = None,
    *,
    clusters: int,
    seed: Int[Array, ""] | int = 0,
    iterations: int = 30,
    trials: int = 2,
) -> tuple[Float32[Array, "groups clusters d"], Float32[Array, "groups"]]:
    """Minimises sum_n w_n min_c |x_n - c|^2 in each group by itself.

    Args:
        points: samples; groups are independent problems (KV heads, say).
        weights: of the samples, 0 or more; default 1.
        clusters: centroids per group.
        seed: of the start; the same seed gives the same centroids.
        iterations: of Lloyd's algorithm at most; fewer when no assignment changes.
        trials: candidates per k-means++ draw, of which the best is taken (greedy k-means++).

    Returns: the centroids, and the weighted mean squared error of each group.
    """
    points = points.astype(jnp.float32)
    if weights is None:  # behind a barrier, or the compiler spends seconds on the sums of a constant
        weights = jax.lax.optimization_barrier(jnp.ones(points.shape[:2], jnp.float32))
    weights = weights.astype(jnp.float32)
    keys = jax.random.split(jax.random.key(seed), points.shape[0])

    def start(args: tuple[Array, Array, Array]) -> Array:
        x, w, key = args
        thinned = slice(None, None, max(x.shape[0] // max(DRAW_POINTS * clusters, DRAW_POINTS_AT_LEAST), 1))
        return _plus_plus(x[thinned], w[thinned], key, clusters, trials)

    if jax.default_backend() == "cpu":

        def one(args: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            x, w, _ = args
            centroids, error = _lloyd(x[None], w[None], start(args)[None], iterations)
            return centroids[0], error[0]

        return jax.lax.map(one, (points, weights, keys))
    starts = jax.lax.map(start, (points, weights, keys), batch_size=min(GROUPS_AT_ONCE, points.shape[0]))
    return _lloyd(points, weights, starts, iterations)


def _plus_plus(
    x: Float[Array, "N d"], w: Float[Array, "N"], key: Array, clusters: int, trials: int
) -> Float[Array, "clusters d"]:
    """k-means++: each centroid drawn with probability proportional to its weighted squared distance.

    From the 256th on, centroids are drawn in batches, a 32nd of those already there at a time: all of a batch by the
    distances to those before it. So 4,096 centroids take 384 rounds, and end as good.
    """
    first_key, key = jax.random.split(key)
    first = x[_draw(first_key, w, 1)[0]]
    distance = jnp.sum((x - first) ** 2, axis=-1)
    centroids = jnp.zeros((clusters, x.shape[1]), jnp.float32).at[0].set(first)

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        centroids, distance = carry
        chosen = x[_draw(jax.random.fold_in(key, i), w * distance, trials)]
        candidates = jnp.minimum(distance, jnp.sum((x[None] - chosen[:, None]) ** 2, axis=-1))
        best = jnp.argmin(candidates @ w)
        return centroids.at[i].set(chosen[best]), candidates[best]

    carry = jax.lax.fori_loop(1, min(clusters, ONE_BY_ONE), step, (centroids, distance))
    drawn = ONE_BY_ONE
    while drawn < clusters:
        batch = max(drawn // DRAW_ROUNDS, 1)
        until = min(2 * drawn, clusters)
        carry = _plus_plus_batches(x, w, key, carry, drawn, until, batch, trials)
        drawn = until
    return carry[0]


def _plus_plus_batches(
    x: Float[Array, "N d"],
    w: Float[Array, "N"],
    key: Array,
    carry: tuple[Array, Array],
    drawn: int,
    until: int,
    batch: int,
    trials: int,
) -> tuple[Array, Array]:
    """Centroids drawn .. until - 1, `batch` at a time; the last batch may draw some of the one before anew."""

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        centroids, distance = carry
        at = jnp.minimum(drawn + i * batch, until - batch)
        chosen = x[_draw(jax.random.fold_in(key, at), w * distance, trials * batch)].reshape(batch, trials, -1)

        def gain(candidate: Array) -> Array:
            return jnp.sum(w * jnp.maximum(distance - jnp.sum((x - candidate) ** 2, axis=-1), 0.0))

        gains = jax.lax.map(jax.vmap(gain), chosen)
        best = jnp.take_along_axis(chosen, jnp.argmax(gains, axis=1)[:, None, None], axis=1)[:, 0]

        def nearer(j: Array, distance: Array) -> Array:
            return jnp.minimum(distance, jnp.sum((x - best[j]) ** 2, axis=-1))

        distance = jax.lax.fori_loop(0, batch, nearer, distance)
        return jax.lax.dynamic_update_slice_in_dim(centroids, best, at, axis=0), distance

    return jax.lax.fori_loop(0, -(-(until - drawn) // batch), step, carry)


def _draw(key: Array, mass: Float[Array, "N"], count: int) -> Int[Array, "count"]:
    """`count` indices drawn with probability proportional to `mass` (uniformly where all mass is 0)."""
    cumulative = jnp.cumsum(jnp.where(jnp.sum(mass) > 0, mass, 1.0))
    target = jax.random.uniform(key, (count,)) * cumulative[-1]
    return jnp.clip(jnp.searchsorted(cumulative, target), 0, mass.shape[0] - 1)


def _lloyd(
    x: Float[Array, "G N d"], w: Float[Array, "G N"], start: Float[Array, "G K d"], iterations: int
) -> tuple[Float[Array, "G K d"], Float[Array, "G"]]:
    """Iterations for all groups until none changes; a group that is done stays as it is."""
    k = start.shape[1]

    def body(carry: tuple) -> tuple:
        i, centroids, assigned, _ = carry
        now = nearest(x, centroids)
        mass = jax.vmap(lambda w, now: jax.ops.segment_sum(w, now, k))(w, now)
        total = jax.vmap(lambda x, now: jax.ops.segment_sum(x, now, k))(w[..., None] * x, now)
        # A centroid that lost all its points stays where it is.
        moved = jnp.where(mass[..., None] > 0, total / jnp.maximum(mass, 1e-30)[..., None], centroids)
        return i + 1, moved, now, jnp.any(now != assigned)

    def unfinished(carry: tuple) -> Array:
        return (carry[0] < iterations) & carry[3]

    initial = (jnp.int32(0), start, jnp.full(x.shape[:2], -1, jnp.int32), jnp.bool_(True))
    centroids = jax.lax.while_loop(unfinished, body, initial)[1]
    chosen = jnp.take_along_axis(centroids, nearest(x, centroids)[..., None], axis=1)
    error = jnp.sum((x - chosen) ** 2, axis=-1)
    return centroids, jnp.sum(w * error, axis=1) / jnp.maximum(jnp.sum(w, axis=1), 1e-30)


def nearest(x: Float[Array, "G N d"], centroids: Float[Array, "G K d"]) -> Int[Array, "G N"]:
    """The nearest centroid of every point, never holding all distances."""
    if jax.default_backend() == "cpu":
        return jax.vmap(_nearest_by_walk)(x, centroids)
    return nearest_by_encoding(x, centroids)


def nearest_by_encoding(x: Float[Array, "G N d"], centroids: Float[Array, "G K d"]) -> Int[Array, "G N"]:
    """The same by the cache's encoder: points side by side are sub-vectors of one long vector, groups its heads."""
    (groups, n, length), entries = x.shape, centroids.shape[1]
    bits = max((entries - 1).bit_length(), 1)
    far = jnp.pad(centroids, ((0, 0), (0, 2**bits - entries), (0, 0)), constant_values=FAR)
    count = ENCODED_AT_ONCE // length
    padded = jnp.pad(x, ((0, 0), (0, -n % count), (0, 0))).reshape(groups, -1, count * length)
    packed = vq_encode(padded.swapaxes(0, 1)[None], far)
    return packing.unpack(packed[0], bits, count).reshape(groups, -1)[:, :n]


def _nearest_by_walk(x: Float[Array, "N d"], centroids: Float[Array, "K d"]) -> Int[Array, "N"]:
    """The same for a CPU: its vector units and caches like a walk over the centroids 25 times better."""
    far = jnp.pad(centroids, ((0, -centroids.shape[0] % UNROLL), (0, 0)), constant_values=FAR)
    elements = x.T

    def visit(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        best, index = carry
        block = jax.lax.dynamic_slice_in_dim(far, i * UNROLL, UNROLL)
        for k in range(UNROLL):
            distance = jnp.square(elements[0] - block[k, 0])
            for r in range(1, x.shape[1]):
                distance += jnp.square(elements[r] - block[k, r])
            closer = distance < best  # strict: a tie stays with the lower index
            best, index = jnp.where(closer, distance, best), jnp.where(closer, i * UNROLL + k, index)
        return best, index

    start = jnp.full(x.shape[0], jnp.inf), jnp.zeros(x.shape[0], jnp.int32)
    return jax.lax.fori_loop(0, far.shape[0] // UNROLL, visit, start)[1]
