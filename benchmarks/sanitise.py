"""Small cases of every Mosaic GPU kernel, checked against plain JAX; to be run under NVIDIA's compute-sanitizer.

compute-sanitizer --tool memcheck python benchmarks/sanitise.py
compute-sanitizer --tool racecheck python benchmarks/sanitise.py
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import ExactTokens, packing, rms_norm, vq_append, vq_decode_attention, vq_encode

BATCH, HEADS, GROUP, DIM, TOKENS, WINDOW = 3, 2, 3, 64, 200, 16
FORMATS = ((4, 8), (2, 8), (8, 8), (4, 10), (4, 12), (8, 12))


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

    for length, bits in FORMATS:
        books = [random(HEADS, 2**bits, length) for _ in range(2)]
        shape = BATCH, HEADS, TOKENS, packing.num_bytes(DIM // length, bits)
        codes = [jax.device_put(rng.integers(0, 256, shape, np.uint8)) for _ in range(2)]
        window = [random(BATCH, HEADS, WINDOW, DIM) for _ in range(2)]
        valid = jax.device_put(np.arange(WINDOW)[None] < np.array([[WINDOW], [1], [5]]))
        q = random(BATCH, HEADS * GROUP, DIM)
        options = {"scale": DIM**-0.5, "query_hadamard": True, "exact_q": q, "exact": [ExactTokens(*window, valid)]}
        lengths = jax.device_put(np.array([0, 77, TOKENS], np.int32))
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

    rows = random(BATCH, 576), random(576)
    for delta in (None, random(BATCH, 576)):
        pairs = list(zip(*both(rms_norm, *rows, epsilon=1e-5, delta=delta), strict=True))
        worst = max(np.abs(np.float32(a) - np.float32(b)).max() for a, b in pairs)
        assert worst < 1e-1, worst
    print(f"rms_norm differs by {worst:.1e}")


if __name__ == "__main__":
    main()
