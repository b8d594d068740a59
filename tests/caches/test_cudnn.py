"""What cuDNN does for prompts: the same as plain JAX, here with a stand-in for its kernel, on a GPU with the kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as private
from jax.sharding import AbstractDevice, AbstractMesh

from tests import small
from tests.caches import harness
from vecinfer_jax.bench import random_calibration
from vecinfer_jax.caches import (
    KIVI,
    FullPrecision,
    KVQuant,
    TailorKV,
    VecInfer,
    attention,
    cudnn,
    full_precision,
    windowed,
)

SPARSE = TailorKV(roles=("sparse",), residual=64).for_layer(0, 1)
METHODS = [
    FullPrecision(),
    VecInfer(bits=2, residual=8, sink=3, transform="smooth-hadamard"),
    VecInfer(bits=2, residual=0, sink=1),
    KIVI(bits=2, group=16, residual=16),
    KVQuant(bits=3, residual=4, sink=1),
    SPARSE,
]
NAMES = ["full", "vecinfer", "vecinfer-metric-no-window", "kivi", "kvquant", "tailorkv-sparse"]


def kernel(query, key, value, *, q_seqlen, kv_seqlen, scale, mask_type, return_residual):
    """cuDNN's by its definition; what it leaves undefined is NaN."""
    assert return_residual and q_seqlen.dtype == kv_seqlen.dtype == jnp.int32
    rows, columns = jnp.arange(query.shape[1]), jnp.arange(key.shape[1])
    counts = columns[None, None] < kv_seqlen[:, None, None]
    if mask_type == private.MaskType.PADDING_CAUSAL:
        counts = counts & (columns[None, None] <= rows[None, :, None])
    s = jnp.where(counts[:, None, None], attention.scores(query, key.swapaxes(1, 2), scale), -jnp.inf)
    lse = jax.nn.logsumexp(s, axis=-1)
    out = attention.combine(jnp.exp(s - lse[..., None]), value.swapaxes(1, 2)).astype(query.dtype)
    padding = rows[None] >= q_seqlen[:, None]
    lse = jnp.where(padding[:, None], jnp.nan, lse.reshape(len(lse), -1, lse.shape[-1]))
    return jnp.where(padding[:, :, None, None], jnp.nan, out), lse


@pytest.fixture
def with_kernel(monkeypatch):
    monkeypatch.setattr(private, "dot_product_attention", kernel)
    for module in (windowed, full_precision):
        monkeypatch.setattr(module, "cudnn_serves", lambda q: True)
    monkeypatch.setattr(full_precision, "cudnn_attention", None)  # decoding is not what is tested here


def chunks(method, lengths, size, dtype=jnp.float32):
    """The outputs of a ragged prompt read in chunks into a cache of just its size, and where they count."""
    capacity = max(lengths) + 3
    layer = dataclasses.replace(harness.LAYER, dtype=jnp.dtype(dtype))
    calibration = random_calibration(small.CONFIG, method, 0, dtype) or None
    q, k, v = (x.astype(dtype) for x in harness.random_qkv(len(lengths), max(lengths)))
    cache = method.init(layer, len(lengths), capacity, calibration)
    harness.prefill.clear_cache()  # what serves is chosen where it is traced
    out, _ = harness.prefill_in_chunks(method, cache, q, k, v, lengths, size, "exact")
    return np.asarray(out, np.float32), np.arange(max(lengths)) < np.asarray(lengths)[:, None]


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, id=name, marks=() if name in ("full", "vecinfer", "tailorkv-sparse") else pytest.mark.slow)
        for method, name in zip(METHODS, NAMES, strict=True)
    ],
)
@pytest.mark.parametrize("blocks", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_later_chunks_read_what_they_read_in_plain_jax(method, blocks, request, monkeypatch):
    """The second of two blocks starts early: the slots are no multiple of it."""
    lengths, size, block = ((440, 300, 9, 80), 110, 192) if method is SPARSE else ((150, 141, 9, 100), 30, 80)
    want, counts = chunks(method, lengths, size)
    request.getfixturevalue("with_kernel")
    monkeypatch.setattr(attention, "LATER_BLOCK", block if blocks == 2 else 10**6)
    got, _ = chunks(method, lengths, size)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[counts], want[counts], atol=2e-5)


def test_a_split_prompt_reads_what_a_whole_one_does(with_kernel):
    q, k, v = harness.random_qkv(2, 32)
    lengths = jnp.array([32, 13])
    whole = attention.causal_attention(q, k, v, lengths, 0.25)
    for first in (0, 8, 24):
        piece = attention._cudnn_piece(q[:, first : first + 8], k, v, lengths, jnp.int32(first), 0.25)
        counts = np.arange(first, first + 8) < np.asarray(lengths)[:, None]
        np.testing.assert_allclose(piece[counts], whole[:, first : first + 8][counts], atol=1e-5)
        assert np.isfinite(piece).all()


def test_the_log_sum_exp_lowers_in_float32(monkeypatch):
    """In the queries' 16 bits a part's weight would be off by a few percent."""
    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(private, "check_compute_capability", lambda version: True)
    monkeypatch.setattr(private, "is_cuda_compute_capability_equal", lambda version: False)
    q = jax.ShapeDtypeStruct((1, 64, 4, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
        traced = jax.jit(lambda *x: cudnn.partial_cudnn_attention(*x, 0.125, causal=True)).trace(q, k, k, lengths)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    call = next(line for line in text.splitlines() if "__cudnn$fmha" in line)
    assert "tensor<1x4x64xf32>" in call.split("->")[-1] and "xbf16>" in call.split("->")[-1]
    assert not any("xf32>" in line and "xbf16>" in line for line in text.splitlines() if "stablehlo.convert" in line)
    assert traced.out_info[1].dtype == jnp.float32


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_later_chunks_read_what_they_read_in_plain_jax_on_a_device(method, monkeypatch):
    monkeypatch.setattr(attention, "LATER_BLOCK", 384)
    got, counts = chunks(method, (700, 411, 9), 175, jnp.bfloat16)
    for module in (windowed, full_precision, attention):
        monkeypatch.setattr(module, "cudnn_serves", lambda q: False)
    want, _ = chunks(method, (700, 411, 9), 175, jnp.bfloat16)
    assert np.isfinite(got).all()
    error = np.linalg.norm(got[counts] - want[counts]) / np.linalg.norm(want[counts])
    assert error < 1e-2


@pytest.mark.gpu
def test_parts_merge_to_the_whole_on_a_device():
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        4 * jax.random.normal(key, (2, 512, heads, 64), jnp.bfloat16)
        for key, heads in zip(keys, (8, 2, 2), strict=True)
    )
    lengths = jnp.array([512, 300])
    whole = np.asarray(cudnn.cudnn_attention(q, k, v, lengths, 0.125, causal=True), np.float32)
    for first in (0, 128, 384):
        piece = attention._cudnn_piece(q[:, first : first + 128], k, v, lengths, jnp.int32(first), 0.125)
        counts = np.arange(first, first + 128) < np.asarray(lengths)[:, None]
        got, want = np.asarray(piece, np.float32)[counts], whole[:, first : first + 128][counts]
        assert np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-9) < 6e-3
