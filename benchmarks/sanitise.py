"""Small cases of every Mosaic GPU kernel, checked against plain JAX; to be run under NVIDIA's compute-sanitizer.

compute-sanitizer --tool memcheck python benchmarks/sanitise.py
compute-sanitizer --tool racecheck python benchmarks/sanitise.py
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import (
    ExactTokens,
    group_int_decode_attention,
    nuq,
    nuq_decode_attention,
    packing,
    rms_norm,
    vq_append,
    vq_decode_attention,
    vq_encode,
)
from pallas_kernels.group_int import Layout

BATCH, HEADS, GROUP, DIM, TOKENS, WINDOW = 3, 2, 3, 64, 200, 16
FORMATS = ((4, 8), (2, 8), (8, 8), (4, 10), (4, 12), (8, 12))
# Tokens of a cache in groups or tiles.
WHOLE = 256


def both(operation, *arrays, **options):
    """What the kernel on the GPU and plain JAX on the CPU give; nothing else runs on the GPU."""
    ours = operation(*arrays, **options, implementation="mosaic_gpu")
    with jax.default_device(jax.devices("cpu")[0]):
        arrays, options = jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, (arrays, options))
        arrays, options = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, (arrays, options))
        theirs = operation(*arrays, **options, implementation="xla")
    return (np.asarray(x) for x in jax.tree.leaves(ours)), (np.asarray(x) for x in jax.tree.leaves(theirs))


def main() -> None:
    rng = np.random.default_rng(0)

    def random(*shape: int) -> jax.Array:
        return jax.device_put(rng.normal(size=shape).astype(jnp.bfloat16))

    lengths = jax.device_put(np.array([0, 77, TOKENS], np.int32))
    valid = jax.device_put(np.arange(WINDOW)[None] < np.array([[WINDOW], [1], [5]]))
    for length, bits in FORMATS:
        books = [random(HEADS, 2**bits, length) for _ in range(2)]
        shape = BATCH, HEADS, TOKENS, packing.num_bytes(DIM // length, bits)
        codes = [jax.device_put(rng.integers(0, 256, shape, np.uint8)) for _ in range(2)]
        window = [random(BATCH, HEADS, WINDOW, DIM) for _ in range(2)]
        q = random(BATCH, HEADS * GROUP, DIM)
        options = {"scale": DIM**-0.5, "query_hadamard": True, "exact_q": q, "exact": [ExactTokens(*window, valid)]}
        ours, theirs = both(vq_decode_attention, q, *codes, *books, lengths, **options)
        worst = max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))
        assert worst < 3e-2, (length, bits, worst)

        at = jax.device_put(np.array([3, 90, 150], np.int32))
        k, v = random(BATCH, HEADS, DIM), random(BATCH, HEADS, DIM)
        pairs = [*zip(*both(vq_append, k, v, at, *window, *codes, *books, hadamard=True), strict=True)]
        mapped = {"matrix": random(HEADS, DIM, DIM), "sink": 2, "sinks": (random(BATCH, HEADS, 2, DIM),) * 2}
        pairs += zip(*both(vq_append, k, v, at, *window, *codes, *books, **mapped), strict=True)
        pairs += zip(*both(vq_encode, random(BATCH, 1, HEADS, DIM), books[0], hadamard=True), strict=True)
        same = min(np.mean(a == b) for a, b in pairs)
        assert same > 0.95, (length, bits, same)
        print(f"d{length}b{bits}: attention differs by {worst:.1e}, {100 * same:.1f}% of codes are equal", flush=True)

    q = random(BATCH, HEADS * GROUP, DIM)
    exact = {"exact_q": q, "exact": [ExactTokens(*(random(BATCH, HEADS, WINDOW, DIM) for _ in range(2)), valid)]}
    for bits in (1, 2, 4):
        layout = Layout(DIM, bits, 64, 64)
        coded = []
        for codes, scales in (layout.key_shapes(WHOLE), layout.value_shapes(WHOLE)):
            coded.append(jax.device_put(rng.integers(0, 256, (BATCH, HEADS, *codes), np.uint8)))
            coded.append(jax.device_put(rng.uniform(size=(BATCH, HEADS, *scales)).astype(np.float16)))
        options = exact | {"layout": layout, "scale": DIM**-0.5}
        ours, theirs = both(group_int_decode_attention, q, *coded, lengths, **options)
        worst = max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))
        assert worst < 3e-2, (bits, worst)
        print(f"integers of {bits} bits: attention differs by {worst:.1e}", flush=True)

    for bits, slots in ((2, 0), (3, 40), (4, 24)):
        shape = BATCH, HEADS, WHOLE, DIM * bits // 8
        codes = [jax.device_put(rng.integers(0, 256, shape, np.uint8)) for _ in range(2)]
        of_channels = [jax.device_put(rng.uniform(0.3, 2.0, (HEADS, DIM)).astype(np.float32)) for _ in range(2)]
        books = [jax.device_put(np.sort(rng.uniform(-1, 1, 2**bits)).astype(np.float32)) for _ in range(2)]
        of_tokens = jax.device_put(rng.uniform(0.3, 2.0, (BATCH, WHOLE, 2)).astype(np.float16))
        pools = [_pool(rng, slots) if slots else None for _ in range(2)]
        options = exact | {"scale": DIM**-0.5, "inverse_frequencies": tuple(1e4 ** -np.linspace(0, 1, DIM // 2))}
        ours, theirs = both(
            nuq_decode_attention, q, *codes, *of_channels, *books, of_tokens, *pools, lengths, **options
        )
        worst = max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))
        assert worst < 3e-2, (bits, slots, worst)
        print(f"nuq{bits}, {slots} outliers a tile: attention differs by {worst:.1e}", flush=True)

    rows = random(BATCH, 576), random(576)
    for delta in (None, random(BATCH, 576)):
        pairs = list(zip(*both(rms_norm, *rows, epsilon=1e-5, delta=delta), strict=True))
        worst = max(np.abs(np.float32(a) - np.float32(b)).max() for a, b in pairs)
        assert worst < 1e-1, worst
    print(f"rms_norm differs by {worst:.1e}")


def _pool(rng: np.random.Generator, slots: int) -> jax.Array:
    """Outliers at places that are all different."""
    shape = BATCH, HEADS, WHOLE // nuq.TILE
    place = rng.permuted(np.broadcast_to(np.arange(nuq.TILE * DIM), (*shape, nuq.TILE * DIM)), axis=-1)
    difference = rng.normal(size=(*shape, slots)).astype(np.float16).view(np.uint16)
    return jax.device_put(place[..., :slots].astype(np.uint32) | difference.astype(np.uint32) << 16)


if __name__ == "__main__":
    main()
