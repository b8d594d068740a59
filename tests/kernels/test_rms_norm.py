"""The norm of a residual stream is its definition in float64, in every implementation, with and without an addition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import rms_norm
from tests.kernels import cases, lane_simulator
from tests.kernels.test_dispatch import lower_for_cuda

# rows, width, dtype: several turns of a block's threads, a part of one, an odd number of chunks
SHAPES = [((3, 1), 4096, "bfloat16"), ((2,), 576, "float16"), ((5,), 24, "bfloat16")]
HOW = [{"implementation": "xla"}, cases.MOSAIC_GPU]
every = pytest.mark.parametrize("how", HOW, ids=["xla", "mosaic-gpu"])


@pytest.fixture(autouse=True)
def simulated(request, monkeypatch):
    if "gpu" not in request.keywords:
        lane_simulator.install(monkeypatch)


def arguments(rows, width, dtype):
    rng = np.random.default_rng(0)
    x, delta = (jnp.asarray(rng.normal(size=(*rows, width)) * 3, dtype) for _ in range(2))
    return x, jnp.asarray(rng.uniform(0.5, 2, width), dtype), delta


def check(rows, width, dtype, adds, **how):
    x, weight, delta = arguments(rows, width, dtype)
    summed, normed = rms_norm(x, weight, epsilon=1e-2, delta=delta if adds else None, **how)
    want = x + delta if adds else x
    np.testing.assert_array_equal(np.asarray(summed), np.asarray(want))
    wide = np.asarray(want, np.float64)
    exact = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + 1e-2) * np.asarray(weight, np.float64)
    assert summed.dtype == normed.dtype == x.dtype
    # Two roundings to x's dtype.
    unit = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(normed, np.float64), exact, rtol=1.01 * unit, atol=1e-6)


@every
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_it_is_the_definition(case, adds, how):
    check(*case, adds, **how)


@pytest.mark.gpu
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("case", [*SHAPES, ((64, 1), 4096, "bfloat16"), ((7,), 18432, "float16")], ids=str)
def test_it_is_the_definition_on_a_gpu(case, adds):
    check(*case, adds, **cases.MOSAIC_GPU)


@pytest.mark.parametrize("adds", [False, True])
def test_it_lowers_for_cuda(adds, monkeypatch):
    monkeypatch.undo()
    x, weight, delta = arguments((4, 1), 4096, "bfloat16")

    def norm(x, weight, delta):
        return rms_norm(x, weight, epsilon=1e-5, delta=delta if adds else None, **cases.MOSAIC_GPU)

    lower_for_cuda(norm, x, weight, delta)


def test_what_the_kernel_does_not_serve_is_said():
    for rows, width, dtype in (((2,), 32, "float32"), ((2,), 30, "bfloat16"), ((600,), 32, "bfloat16")):
        x, weight, _ = arguments(rows, width, dtype)
        with pytest.raises(NotImplementedError, match="the mosaic_gpu kernel serves"):
            rms_norm(x, weight, epsilon=1e-5, **cases.MOSAIC_GPU)
        rms_norm(x, weight, epsilon=1e-5)


def test_what_does_not_belong_together_is_refused():
    x, weight, delta = arguments((2,), 32, "bfloat16")
    for arrays in ((x, weight[:-1], delta), (x, weight.astype(jnp.float32), delta), (x, weight, delta[:1])):
        with pytest.raises(ValueError, match="rms_norm: "):
            rms_norm(*arrays[:2], epsilon=1e-5, delta=arrays[2])


@pytest.mark.parametrize("adds", [False, True])
def test_the_kernels_gradient_is_that_of_plain_jax(adds):
    x, weight, delta = arguments((2,), 64, "bfloat16")

    def loss(x, weight, delta, **how):
        summed, normed = rms_norm(x, weight, epsilon=1e-5, delta=delta, **how)
        return jnp.sum(normed.astype(jnp.float32) ** 3) + jnp.sum(summed.astype(jnp.float32))

    arrays = (x, weight, delta if adds else None)
    ours, theirs = (jax.grad(loss, argnums=(0, 1))(*arrays, **how) for how in (cases.MOSAIC_GPU, HOW[0]))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0.02, atol=0.05)
