"""Appending a token writes what it should where it should, and nothing anywhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import packing, vq_append, vq_encode
from tests.kernels import cases, lane_simulator
from tests.kernels.test_dispatch import lower_for_cuda

HEADS = 2
# dim, format of keys, of values, dtype, window, sink, transform of the keys
CASES = [
    (128, (4, 8), (4, 8), "bfloat16", 6, 0, "hadamard"),
    (64, (8, 8), (2, 8), "float32", 5, 2, "hadamard"),
    (64, (4, 10), (8, 12), "bfloat16", 0, 3, "matrix"),
    (128, (4, 12), (2, 8), "float16", 4, 1, ""),
]
# On a device, what serving models have.
ON_DEVICE = [
    *CASES,
    (128, (4, 8), (4, 8), "bfloat16", 128, 0, "hadamard"),
    (64, (8, 12), (4, 12), "bfloat16", 128, 4, ""),
]


@pytest.fixture(autouse=True)
def simulated(request, monkeypatch):
    if "gpu" not in request.keywords:
        lane_simulator.install(monkeypatch)


def arguments(dim, key, value, dtype, window, sink, transform, positions, slots=9):
    rng = np.random.default_rng(0)
    batch = len(positions)

    def random(*shape, kind=dtype):
        return jnp.asarray(rng.normal(size=shape), kind)

    rows = [random(batch, HEADS, dim) for _ in range(2)]
    rings = [random(batch, HEADS, window, dim) for _ in range(2)]
    codes = [
        jnp.asarray(rng.integers(0, 256, (batch, HEADS, slots, packing.num_bytes(dim // d, b))), jnp.uint8)
        for d, b in (key, value)
    ]
    books = [random(HEADS, 2**b, d) for d, b in (key, value)]
    options: dict = {"sink": sink, "sinks": tuple(random(batch, HEADS, sink, dim) for _ in range(2))}
    if transform == "hadamard":
        options |= {"hadamard": True, "scale": random(HEADS, dim, kind="float32")}
    if transform == "matrix":
        options |= {"matrix": random(HEADS, dim, dim, kind="float32"), "mean": random(HEADS, dim, kind="float32")}
    return (*rows, jnp.asarray(positions, jnp.int32), *rings, *codes, *books), options


def expected(
    k, v, positions, ring_keys, ring_values, key_codes, value_codes, key_book, value_book, *, sink, sinks, **maps
):
    out = [np.array(a) for a in (ring_keys, ring_values, key_codes, value_codes, *sinks)]
    window = ring_keys.shape[2]
    for b, position in enumerate(np.asarray(positions)):
        sides = ((k, key_book, maps), (v, value_book, {}))
        for i, (new, book, transform) in enumerate(sides):
            leaving = out[i][b, :, position % window].copy() if window else np.asarray(new[b])
            if window:
                out[i][b, :, position % window] = np.asarray(new[b])
            slot = position - window - sink
            if 0 <= slot < key_codes.shape[2]:
                coded = vq_encode(jnp.asarray(leaving)[None, None], book, **transform, implementation="xla")
                out[2 + i][b, :, slot] = np.asarray(coded)[0, :, 0]
            if position < sink:
                out[4 + i][b, :, position] = np.asarray(new[b])
    return out


def check(case, positions, **how):
    arrays, options = arguments(*case, positions)
    got = vq_append(*arrays, **options, **how)
    for a, b in zip(got, expected(*arrays, **options), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), b)


@pytest.mark.parametrize("how", [{"implementation": "xla"}, cases.MOSAIC_GPU], ids=["xla", "mosaic-gpu"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_new_token_enters_the_ring_and_what_it_pushes_out_is_encoded(case, how):
    window, sink = case[4:6]
    check(
        case, [0, window + sink - 1 if window + sink else 0, window + sink, window + sink + 5, 9 + window + sink], **how
    )


@pytest.mark.parametrize("how", [{"implementation": "xla"}, cases.MOSAIC_GPU], ids=["xla", "mosaic-gpu"])
def test_what_is_pushed_out_goes_to_the_slot_that_is_named(how):
    window, sink = CASES[0][4:6]
    positions, slots = [20, 21, 22, 23], [3, -1, 9, 8]  # of nine: the second and third are dropped
    arrays, options = arguments(*CASES[0], positions)
    got = vq_append(*arrays, **options, slots=jnp.asarray(slots, jnp.int32), **how)
    # The same rows at the positions that have these slots by themselves; the ring has the tokens of the real ones.
    named = [slot + window + sink if 0 <= slot < 9 else 1000 * window for slot in slots]
    shift = [(a - b) % window for a, b in zip(positions, named, strict=True)]
    rings = [jnp.stack([jnp.roll(row, -s, axis=1) for row, s in zip(ring, shift, strict=True)]) for ring in arrays[3:5]]
    want = expected(*arrays[:2], named, *rings, *arrays[5:], **options)
    for a, b in zip(got[2:4], want[2:4], strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)
    for a, b in zip(got[:2], want[:2], strict=True):
        turned = [np.roll(row, s, axis=1) for row, s in zip(b, shift, strict=True)]
        np.testing.assert_array_equal(np.asarray(a), np.stack(turned))


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_DEVICE, ids=str)
def test_it_does_on_a_device(case):
    window, sink = case[4:6]
    check(case, [0, window + sink, window + sink + 8, 9 + window + sink, window + sink + 1], **cases.MOSAIC_GPU)


def test_it_lowers_for_cuda_in_place(monkeypatch):
    monkeypatch.undo()
    arrays, options = arguments(*CASES[0], [7, 9])
    append = lambda *a: vq_append(*a, **options, **cases.MOSAIC_GPU)  # noqa: E731
    text = lower_for_cuda(append, *arrays)
    assert text.count("output_operand_alias<") == 4


def test_arguments_that_do_not_belong_together_are_refused():
    arrays, options = arguments(*CASES[0], [7, 9])
    refused = [
        ("v must", 1, lambda v: v[:1]),
        ("positions must", 2, lambda p: p[:1]),
        ("ring_values must", 4, lambda ring: ring.astype("float32")),
        ("key_codes must", 5, lambda codes: codes[..., :16]),
        ("value_codes must", 6, lambda codes: codes.astype("int32")),
        ("power of two", 7, lambda book: book[:, :200]),
        ("codebook must", 8, lambda book: jnp.concatenate([book, book])),
    ]
    for message, index, change in refused:
        bad = [change(array) if i == index else array for i, array in enumerate(arrays)]
        with pytest.raises((ValueError, TypeError), match=rf"{message}|Type-check"):
            vq_append(*bad, **options)
    for wrong in ({"sink": -1}, {"sink": 1}, {"scale": options["scale"][:, :3]}, {"matrix": jnp.zeros((2, 128, 128))}):
        with pytest.raises((ValueError, TypeError), match=r"vq_append: |Type-check"):
            vq_append(*arrays, **options | wrong)


@pytest.mark.parametrize("how", [{"implementation": "xla"}, cases.MOSAIC_GPU], ids=["xla", "mosaic-gpu"])
def test_one_codebook_may_serve_all_heads(how):
    arrays, options = arguments(*CASES[0], [7, 9])
    shared = [*arrays[:7], arrays[7][:1], arrays[8][:1]]
    for a, b in zip(vq_append(*shared, **options, **how), expected(*shared, **options), strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)


@pytest.mark.gpu
def test_it_works_in_place_in_a_compiled_loop_on_a_device():
    arrays, options = arguments(*CASES[0], [7, 9])

    def step(i, state):
        return vq_append(*arrays[:2], arrays[2] + i, *state, *arrays[7:], **options, **cases.MOSAIC_GPU)[:4]

    loop = jax.jit(lambda state: jax.lax.fori_loop(0, 3, step, state), donate_argnums=0)
    state = arrays[3:7]
    for i in range(3):
        state = expected(*arrays[:2], arrays[2] + i, *state, *arrays[7:], **options)[:4]
    for a, b in zip(loop(arrays[3:7]), state, strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)


def test_it_runs_in_a_compiled_loop():
    arrays, options = arguments(*CASES[0], [7, 9])

    def step(i, state):
        return vq_append(*arrays[:2], arrays[2] + i, *state, *arrays[7:], **options, implementation="xla")[:4]

    out = jax.jit(lambda state: jax.lax.fori_loop(0, 3, step, state))(arrays[3:7])
    state = arrays[3:7]
    for i in range(3):
        state = expected(*arrays[:2], arrays[2] + i, *state, *arrays[7:], **options)[:4]
    for a, b in zip(out, state, strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)
