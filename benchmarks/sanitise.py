"""Small cases of every Mosaic GPU kernel, checked against plain JAX; to be run under NVIDIA's compute-sanitizer.

compute-sanitizer --tool memcheck python benchmarks/sanitise.py
compute-sanitizer --tool racecheck python benchmarks/sanitise.py
"""

import jax
import jax.numpy as jnp

from pallas_kernels import ExactTokens, packing, vq_append, vq_decode_attention, vq_encode

BATCH, HEADS, GROUP, DIM, TOKENS, WINDOW = 3, 2, 3, 64, 200, 16


def main() -> None:
    keys = iter(jax.random.split(jax.random.key(0), 64))

    def random(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.bfloat16)

    for length, bits in ((4, 8), (2, 8), (8, 8), (4, 10), (4, 12), (8, 12)):
        books = [random(HEADS, 2**bits, length) for _ in range(2)]
        size = packing.num_bytes(DIM // length, bits)
        codes = [jax.random.bits(next(keys), (BATCH, HEADS, TOKENS, size), jnp.uint8) for _ in range(2)]
        q = random(BATCH, HEADS * GROUP, DIM)
        held = ExactTokens(
            random(BATCH, HEADS, WINDOW, DIM), random(BATCH, HEADS, WINDOW, DIM), jnp.ones((BATCH, WINDOW), bool)
        )
        lengths = jnp.array([0, 77, TOKENS], jnp.int32)
        options = {"scale": DIM**-0.5, "query_hadamard": True, "query_scale": jnp.ones((HEADS, DIM))}
        options |= {"exact": [held], "exact_q": q}
        outputs = [
            vq_decode_attention(q, *codes, *books, lengths, **options, implementation=which)[0]
            for which in ("mosaic_gpu", "xla")
        ]
        worst = float(jnp.max(jnp.abs(outputs[0] - outputs[1])))
        assert worst < 2e-2, (length, bits, worst)

        x = random(BATCH, 1, HEADS, DIM)
        encoded = [vq_encode(x, books[0], hadamard=True, implementation=which) for which in ("mosaic_gpu", "xla")]
        same = float(
            jnp.mean(packing.unpack(encoded[0], bits, DIM // length) == packing.unpack(encoded[1], bits, DIM // length))
        )
        assert same > 0.95, (length, bits, same)

        ring = [random(BATCH, HEADS, WINDOW, DIM) for _ in range(2)]
        k, v = random(BATCH, HEADS, DIM), random(BATCH, HEADS, DIM)
        at = jnp.array([3, 90, 150], jnp.int32)
        appended = [
            vq_append(k, v, at, *ring, *codes, *books, sink=0, hadamard=True, implementation=which)
            for which in ("mosaic_gpu", "xla")
        ]
        for ours, theirs in zip(*appended, strict=True):
            assert float(jnp.mean(ours == theirs)) > 0.95, (length, bits)
        print(f"d{length}b{bits}: attention differs by {worst:.1e}, {100 * same:.0f}% of codes are equal", flush=True)


if __name__ == "__main__":
    main()
