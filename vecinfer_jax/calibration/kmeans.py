"""k-means on the accelerator: greedy k-means++ start, Lloyd's iterations, deterministic by seed."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

# Rows of the [points, centroids] distance block that exist at one time.
BLOCK = 8192


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
    weights = jnp.ones(points.shape[:2], jnp.float32) if weights is None else weights.astype(jnp.float32)
    keys = jax.random.split(jax.random.key(seed), points.shape[0])

    def one(args: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        x, w, key = args
        start = _plus_plus(x, w, key, clusters, trials)
        return _lloyd(x, w, start, iterations)

    return jax.lax.map(one, (points, weights, keys))


def _plus_plus(
    x: Float[Array, "N d"], w: Float[Array, "N"], key: Array, clusters: int, trials: int
) -> Float[Array, "clusters d"]:
    """k-means++: each centroid drawn with probability proportional to its weighted squared distance."""
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

    return jax.lax.fori_loop(1, clusters, step, (centroids, distance))[0]


def _draw(key: Array, mass: Float[Array, "N"], count: int) -> Int[Array, "count"]:
    """`count` indices drawn with probability proportional to `mass` (uniformly where all mass is 0)."""
    cumulative = jnp.cumsum(jnp.where(jnp.sum(mass) > 0, mass, 1.0))
    target = jax.random.uniform(key, (count,)) * cumulative[-1]
    return jnp.clip(jnp.searchsorted(cumulative, target), 0, mass.shape[0] - 1)


def _lloyd(
    x: Float[Array, "N d"], w: Float[Array, "N"], start: Float[Array, "K d"], iterations: int
) -> tuple[Float[Array, "K d"], Float[Array, ""]]:
    k = start.shape[0]

    def body(carry: tuple) -> tuple:
        i, centroids, assigned, _ = carry
        now = _nearest(x, centroids)
        mass = jax.ops.segment_sum(w, now, k)
        total = jax.ops.segment_sum(w[:, None] * x, now, k)
        # A centroid that lost all its points stays where it is.
        moved = jnp.where(mass[:, None] > 0, total / jnp.maximum(mass, 1e-30)[:, None], centroids)
        return i + 1, moved, now, jnp.any(now != assigned)

    def unfinished(carry: tuple) -> Array:
        return (carry[0] < iterations) & carry[3]

    initial = (jnp.int32(0), start, jnp.full((x.shape[0],), -1, jnp.int32), jnp.bool_(True))
    centroids = jax.lax.while_loop(unfinished, body, initial)[1]
    error = jnp.sum((x - centroids[_nearest(x, centroids)]) ** 2, axis=-1)
    return centroids, jnp.sum(w * error) / jnp.maximum(jnp.sum(w), 1e-30)


def _nearest(x: Float[Array, "N d"], centroids: Float[Array, "K d"]) -> Int[Array, "N"]:
    half_norm = 0.5 * jnp.sum(centroids**2, axis=-1)

    def block(rows: Array) -> Array:
        products = jnp.matmul(rows, centroids.T, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmin(half_norm - products, axis=-1).astype(jnp.int32)

    n = x.shape[0]
    if n <= BLOCK:
        return block(x)
    padded = jnp.pad(x, ((0, -n % BLOCK), (0, 0)))
    return jax.lax.map(block, padded.reshape(-1, BLOCK, x.shape[1])).reshape(-1)[:n]
