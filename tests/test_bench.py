"""Timing steps: the caches are really full, the loop really runs, and what cannot be timed is refused in a line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vecinfer_jax as vj
from tests import small
from vecinfer_jax.bench import MANY, SHAPES, StepBench, step_profile
from vecinfer_jax.errors import InputError


@pytest.fixture(scope="module")
def bench() -> StepBench:
    return StepBench(dataclasses.replace(small.CONFIG, num_layers=2), dtype="float32")


def test_a_step_is_timed_over_a_full_cache(bench):
    row = bench.step(vj.VecInfer(bits=2, residual=8, sink=1, transform="smooth-hadamard"), 2, 150, repeats=1)
    assert row.ms_per_step > 0 and row.tokens_per_second == pytest.approx(2e3 / row.ms_per_step, rel=0.01)
    assert row.layers == 2 and row.weights_bytes > 0
    assert row.cache_bytes["codes"] > 0


@pytest.mark.slow
def test_random_outliers_are_finite_and_in_their_tile(bench):
    row = bench.step(vj.KVQuant(bits=2), 2, 100, repeats=1)
    assert row.ms_per_step > 0
    _, state = bench.prepare(vj.KVQuant(bits=2), 1, 100, 1)
    words = np.asarray(state.caches[0].store.key_outliers)
    assert len(np.unique(words)) > 10 and np.all((words & 0xFFFF) < 64 * 64)
    assert np.all(np.abs((words >> 16).astype(np.uint16).view(np.float16)) < 1)


def test_every_layer_attends_to_all_tokens(bench):
    """A step's output depends on what the far end of every layer's cache holds."""
    engine, state = bench.prepare(vj.VecInfer(bits=2, residual=8, transform="smooth-hadamard"), 1, 200, MANY)
    assert all((np.asarray(cache.lengths) == 200).all() for cache in state.caches)
    codes = [np.asarray(cache.store.key_codes) for cache in state.caches]
    assert all(len(np.unique(layer[:, :, :190])) > 100 for layer in codes)

    @jax.jit
    def logits(caches):
        one = jnp.zeros((1, 1), jnp.int32)
        return engine.decoder.apply({"params": bench.params}, one, one + 200, caches, decode=True)[0]

    whole = logits(state.caches)
    for index in range(len(codes)):
        cut = list(state.caches)
        store = cut[index].store
        cut[index] = cut[index].replace(store=jax.tree.map(lambda x: x, store).replace(
            value_codes=store.value_codes.at[:, :, 150:].set(0)
        ))  # fmt: skip
        assert not np.allclose(logits(tuple(cut)), whole)


@pytest.mark.slow
def test_caches_on_the_host_are_filled_there(bench):
    method = vj.TailorKV(roles=("quantised", "sparse"), residual=8, recent=5, block=8)
    _, state = bench.prepare(method, 2, 150, 1)
    store = state.caches[1].store
    for held in (store.keys, store.values, store.keys_by_channel):
        assert held.sharding.memory_kind == "pinned_host" and jax.typeof(held).memory_space == jax.memory.Space.Host
        assert len(np.unique(np.asarray(held))) > 1000


@pytest.mark.slow
def test_a_step_with_a_layer_on_the_host_is_timed(bench):
    method = vj.TailorKV(roles=("quantised", "sparse"), residual=8, recent=5, block=8)
    row = bench.step(method, 2, 150, repeats=1)
    assert row.ms_per_step > 0 and row.cache_bytes["host"] > 0


def test_what_cannot_be_timed_is_refused(bench):
    for batch, tokens in ((0, 10), (1, 0)):
        with pytest.raises(InputError, match="must be 1 or more"):
            bench.step(vj.FullPrecision(), batch, tokens)


def test_the_named_architectures_have_their_published_sizes():
    from vecinfer_jax.models.decoder import param_shapes

    sizes = {name: sum(x.size for x in jax.tree.leaves(param_shapes(c))) for name, c in SHAPES.items()}
    assert sizes["smollm2-135m"] == 134_515_008
    assert sizes["llama-3.1-8b"] == 8_030_261_248
    assert sizes["llama-2-7b"] == 6_738_415_616
    assert sizes["mistral-7b"] == 7_248_023_552
    assert sizes["qwen2.5-14b"] == 14_770_033_664


def test_a_profile_counts_events_a_step_and_what_lies_between_them():
    events = [
        ("gemm_1", 0, 40, "main"),
        ("gemm_2", 50, 40, "main"),
        ("copy", 60, 40, "copies"),
        ("gemm_1", 200, 40, "main"),
        ("gemm_2", 230, 70, "main"),  # started while the one before was still running
    ]
    profile = step_profile([(name, 1e3 * start, 1e3 * time, stream) for name, start, time, stream in events], 2)
    assert profile.us_per_step == 150
    assert profile.idle_us == (10 + 100) / 2
    assert profile.overlapped_us == 30 / 2
    assert profile.events == {"gemm": {"count": 2, "us": 95}, "copy": {"count": 0.5, "us": 20}}


@pytest.mark.gpu
def test_a_step_is_profiled(bench):
    profile = bench.profile(vj.VecInfer(bits=2, residual=8, transform="smooth-hadamard"), 1, 200)
    assert profile.us_per_step > profile.idle_us >= 0
    assert sum(event["us"] for event in profile.events.values()) > 0
