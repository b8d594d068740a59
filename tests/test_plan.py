"""A plan counts what is then allocated, and the most tokens it names are the most that fit."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import vecinfer_jax as vj
from tests import small
from vecinfer_jax.bench import StepBench
from vecinfer_jax.cli import main
from vecinfer_jax.errors import InputError
from vecinfer_jax.plan import RESERVE, cache_bytes, plan

CONFIG = dataclasses.replace(small.CONFIG, num_layers=2)
METHODS = [vj.FullPrecision(), vj.VecInfer(bits=2, residual=8), vj.KIVI(residual=4)]


def of(method, tokens=1000, memory=RESERVE + 2**24):
    return plan(CONFIG, method, batch=2, tokens=tokens, memory=memory, dtype=jnp.float32)


@pytest.mark.parametrize("method", METHODS[:2], ids=lambda m: m.name)
def test_it_counts_what_is_allocated(method):
    bench = StepBench(CONFIG, dtype="float32")
    _, state = bench.prepare(method, 2, 1000, 1)
    counted = of(method, tokens=1001)
    assert counted.cache_bytes == vj.caches.allocated_bytes(state.caches)
    assert counted.weights_bytes == sum(x.nbytes for x in jax.tree.leaves(bench.params))


@pytest.mark.parametrize("memory", [RESERVE + 2**23, RESERVE + 2**30], ids=["short", "long"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_the_most_tokens_are_the_most_that_fit(method, memory):
    counted = of(method, memory=memory)
    most, free = counted.most_tokens, memory - RESERVE - counted.weights_bytes
    fits = [cache_bytes(CONFIG, method, 2, most + more, jnp.float32)["total"] <= free for more in (0, 256)]
    assert fits == [True, False]
    assert counted.fits == (most >= 1000)


def test_weights_that_do_not_fit_leave_no_tokens():
    counted = of(vj.FullPrecision(), memory=RESERVE)
    assert not counted.fits and counted.most_tokens == 0


def test_nonsense_is_refused(capsys):
    with pytest.raises(InputError, match="tokens=0"):
        of(vj.FullPrecision(), tokens=0)
    assert main(["plan", "full"]) == 1
    assert "give --memory" in capsys.readouterr().err


def test_the_command_prints_a_line_a_method(capsys):
    assert main(["plan", "full", "kivi", "--memory", "80", "--tokens", "196608"]) == 0
    full, kivi = capsys.readouterr().out.splitlines()
    assert full.startswith("full") and "24.00 GiB" in full and "fits" in full
    assert kivi.startswith("kivi")
