"""A token enters the ring, and the group that leaves the window lies encoded where the definition says, and only it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import group_int_append
from pallas_kernels.group_int import Layout
from tests.kernels import cases, lane_simulator
from tests.kernels.test_dispatch import lower_for_cuda

# layout, residual, sink, dtype
CASES = [
    (Layout(64, 2, 32, 32), 0, 0, "bfloat16"),
    (Layout(128, 1, 64, 96), 5, 3, "float16"),
    (Layout(64, 4, 32, 64), 1, 1, "float32"),
]
ON_DEVICE = [
    *CASES,
    *(
        (Layout(dim, bits, tokens, min(tokens, dim)), residual, 1, dtype)
        for dim in (64, 128)
        for bits in (1, 2, 4)
        for tokens, residual, dtype in ((32, 0, "bfloat16"), (64, 128, "bfloat16"), (128, 40, "float32"))
    ),
]
# Whose tiles have their tokens' own order: what only the reference serves.
OTHERS = [
    (Layout(16, 3, 6, 6), 2, 0, "float32"),
    (Layout(16, 2, 1, 16), 0, 2, "float32"),
]
HOW = [{"implementation": "xla"}, cases.MOSAIC_GPU]


@pytest.fixture(autouse=True)
def simulated(request, monkeypatch):
    """Mosaic GPU kernels run in a simulator where there is no GPU."""
    if "gpu" not in request.keywords:
        lane_simulator.install(monkeypatch)


def arguments(layout, residual, sink, dtype, positions, heads=2):
    rng = np.random.default_rng(0)
    rows, window, tokens = (len(positions), heads), residual + layout.token_group - 1, 2 * layout.token_group

    def random(*shape):
        return jnp.asarray(3 * rng.normal(size=(*rows, *shape)), dtype)

    coded = []
    for codes, scales in (layout.key_shapes(tokens), layout.value_shapes(tokens)):
        coded.append(jnp.asarray(rng.integers(0, 256, (*rows, *codes)), jnp.uint8))
        coded.append(jnp.asarray(rng.normal(size=(*rows, *scales)), jnp.float16))
    arrays = random(layout.dim), random(layout.dim), jnp.array(positions, jnp.int32)
    arrays += random(window, layout.dim), random(window, layout.dim)
    sinks = random(sink, layout.dim), random(sink, layout.dim)
    return (*arrays, *coded), {"layout": layout, "sink": sink, "sinks": sinks}


@functools.partial(jax.jit, static_argnums=(0, 1))
def coded_group(layout, which, tokens):
    return layout.encode_values(tokens) if which else layout.encode_keys(tokens)


def expected(k, v, positions, ring_keys, ring_values, *coded, layout, sink, sinks):
    """Row by row: which tokens the window lets go of, and what becomes of them."""
    g, window = layout.token_group, ring_keys.shape[2]
    residual = window - g + 1
    rings, coded, sinks = (
        [np.asarray(x).copy() for x in arrays] for arrays in ((ring_keys, ring_values), coded, sinks)
    )
    for b, position in enumerate(np.asarray(positions)):
        left = position + 1 - residual - sink
        for which, new in enumerate((k, v)):
            new = np.asarray(new[b])
            if left > 0 and left % g == 0 and left <= coded[0].shape[2] * layout.tile:
                of_group = range(position - residual - g + 1, position - residual + 1)
                tokens = [new if q == position else rings[which][b, :, q % window] for q in of_group]
                made = coded_group(layout, which, jnp.asarray(np.stack(tokens, axis=1)))
                for held, part in zip(coded[2 * which : 2 * which + 2], made, strict=True):
                    count, first = part.shape[1], (left - g) // g * part.shape[1]
                    held[b, :, first : first + count] = part
            if window:
                rings[which][b, :, position % window] = new
            if position < sink:
                sinks[which][b, :, position] = new
    return *rings, *coded, *sinks


def positions_of(layout, residual, sink):
    """Before, at and after a whole group, the last one that there is room for, and one that there is none for."""
    first = residual + sink + layout.token_group - 1
    return [0, first - 1, first, first + 1, first + layout.token_group, first + 2 * layout.token_group]


def check(case, **how):
    arrays, options = arguments(*case, positions_of(*case[:3]))
    got = jax.jit(lambda *a: group_int_append(*a, **options, **how))(*arrays)
    want = expected(*arrays, **options)
    assert [x.dtype for x in got] == [x.dtype for x in want]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)
    changed = [(np.asarray(a) != np.asarray(b)).any() for a, b in zip(got[2:6], arrays[5:], strict=True)]
    assert all(changed)


@pytest.mark.parametrize(
    ("case", "how"),
    [
        *((case, cases.MOSAIC_GPU) for case in CASES),
        (CASES[2], HOW[0]),
        *(pytest.param(case, HOW[0], marks=pytest.mark.slow) for case in CASES[:2]),
    ],
    ids=str,
)
def test_the_new_token_enters_the_ring_and_the_group_it_pushes_out_is_encoded(case, how):
    check(case, **how)


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_the_reference_does_with_any_layout(case):
    check(case, **HOW[0])
    with pytest.raises(NotImplementedError, match="mosaic_gpu kernel serves") as error:
        check(case, **cases.MOSAIC_GPU)
    assert "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_DEVICE, ids=str)
def test_it_does_on_a_device(case):
    check(case, **cases.MOSAIC_GPU)


def test_equal_and_huge_elements_are_encoded_as_in_plain_jax():
    arrays, options = arguments(Layout(64, 2, 32, 32), 1, 0, "float32", [32])
    rings = [x.at[:, :, :, 0].set(2.5).at[:, 0].set(-1.0).at[:, 1, 5].set(3e38) for x in arrays[3:5]]
    given = (*arrays[:3], *rings, *arrays[5:])
    for a, b in zip(
        *(jax.jit(lambda *a, how=how: group_int_append(*a, **options, **how))(*given) for how in HOW), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("case", [CASES[0], ON_DEVICE[-2]], ids=str)
def test_it_lowers_for_cuda_in_place(case, monkeypatch):
    monkeypatch.undo()
    arrays, options = arguments(*case, [7, 9])
    sinks = options.pop("sinks") if case[2] else None
    text = lower_for_cuda(
        lambda a, s: group_int_append(*a, **options | {"sinks": s}, **cases.MOSAIC_GPU), arrays, sinks
    )
    assert text.count("output_operand_alias<") == (8 if case[2] else 6)


@pytest.mark.gpu
def test_it_works_in_place_in_a_compiled_loop_on_a_device():
    arrays, options = arguments(*CASES[0], [30, 0])
    options.pop("sinks")

    def step(i, state, how=cases.MOSAIC_GPU):
        return group_int_append(*arrays[:2], arrays[2] + i, *state, **options, **how)

    state = arrays[3:]
    for i in range(3):
        state = step(i, state, HOW[0])
    loop = jax.jit(lambda state: jax.lax.fori_loop(0, 3, step, state), donate_argnums=0)
    for a, b in zip(loop(arrays[3:]), state, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_arguments_that_do_not_belong_together_are_refused():
    arrays, options = arguments(*CASES[1], [7, 9])
    refused = [
        ("k must be", 0, lambda k: k[..., :60]),
        ("v must be", 1, lambda v: v[:1]),
        ("positions must be", 2, lambda p: p[:1]),
        ("do not hold whole groups", 3, lambda ring: ring[:, :, :62]),
        ("ring_values must be", 4, lambda ring: ring.astype("float32")),
        ("key_codes must be", 5, lambda codes: codes[..., :16]),
        ("do not hold whole groups", 5, lambda codes: codes[:, :, :3]),
        ("key_scale_zero must be", 6, lambda x: x[:, :, :1]),
        ("value_codes must be", 7, lambda codes: codes.astype("int32")),
        ("value_scale_zero must be", 8, lambda x: x[..., :5]),
    ]
    for message, index, change in refused:
        bad = [change(array) if i == index else array for i, array in enumerate(arrays)]
        with pytest.raises((ValueError, TypeError), match=rf"{message}|Type-check"):
            group_int_append(*bad, **options)
    for wrong in ({"sink": -1}, {"sink": 1}):
        with pytest.raises((ValueError, TypeError), match=r"group_int_append: |Type-check"):
            group_int_append(*arrays, **options | wrong)
