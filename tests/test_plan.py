"""A plan counts what is then allocated, and the most tokens it names are the most that fit."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import vecinfer_jax as vj
from tests import small
from vecinfer_jax import plan as planning
from vecinfer_jax import specs
from vecinfer_jax.bench import SHAPES, StepBench
from vecinfer_jax.cli import main
from vecinfer_jax.devices import Device, Reading, devices
from vecinfer_jax.errors import InputError
from vecinfer_jax.plan import RESERVE, bytes_read, cache_bytes, milliseconds, plan

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"

CONFIG = dataclasses.replace(small.CONFIG, num_layers=2)
METHODS = [
    vj.FullPrecision(),
    vj.VecInfer(bits=2, residual=8, transform="smooth-hadamard"),
    vj.KIVI(residual=4),
    vj.KVQuant(residual=4),
]


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


HOSTED = vj.TailorKV(roles=("quantised", "sparse"), residual=8, recent=5, block=8)


def test_what_lies_on_the_host_is_counted_apart_and_limited_apart():
    counted = of(HOSTED)
    elements = 2 * 2 * (1024 - 8 - 5) // 8 * 8 * 16  # batch, heads, slots in whole blocks, channels
    assert abs(counted.cache_bytes["host"] - 3 * 4 * elements) < 4 * 3 * 2 * 2 * 8 * 16
    assert counted.cache_bytes["host"] > 5 * counted.cache_bytes["total"] and counted.fits
    host = 2**22
    both = plan(CONFIG, HOSTED, batch=2, tokens=1000, memory=2**33, host_memory=host, dtype=jnp.float32)
    sizes = [cache_bytes(CONFIG, HOSTED, 2, both.most_tokens + more, jnp.float32)["host"] for more in (0, 256)]
    assert sizes[0] <= host < sizes[1]
    assert not plan(CONFIG, HOSTED, batch=2, tokens=1000, memory=2**33, host_memory=2**10, dtype=jnp.float32).fits
    hosted = vj.TailorKV(roles=("sparse", "sparse"), recent=5, block=8)  # nothing grows on the device
    assert of(hosted, memory=2**33).most_tokens == CONFIG.max_position


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


def test_a_step_takes_its_weights_its_layers_and_its_cache(monkeypatch):
    method = vj.VecInfer(bits=2, residual=8, transform="smooth-hadamard")
    monkeypatch.setattr(planning, "MEASURED_HEAD_DIMS", (CONFIG.head_dim,))
    device = Device("x", 2**40, 1.0, 100.0, {"vecinfer d4b8/d4b8": Reading(2.0, 50.0), "full": Reading(4.0, 0.0)})
    ms = milliseconds(CONFIG, method, 2, 1000, device)
    weights = 2 * sum(x.size for x in jax.tree.leaves(vj.models.decoder.param_shapes(CONFIG)))
    looked_up = 0 if CONFIG.tie_embeddings else 2 * CONFIG.vocab_size * CONFIG.hidden_size
    assert ms == pytest.approx((weights - looked_up) / 1e6 + 2 * 0.15 + bytes_read(CONFIG, method, 2, 1000) / 2e6)
    mixed = milliseconds(CONFIG, vj.PerLayer(method, ((0, vj.FullPrecision()),)), 2, 1000, device)
    full = milliseconds(CONFIG, vj.FullPrecision(), 2, 1000, device)
    assert mixed == pytest.approx((ms + full) / 2)


def test_over_two_gpus_each_holds_half_of_the_codes_and_all_of_the_rest():
    arguments = {"batch": 1, "tokens": 2**20, "memory": 2**34}
    for method in (
        vj.FullPrecision(),
        vj.VecInfer(bits=2, transform="smooth-hadamard"),
        vj.KVQuant(bits=3),
        vj.KIVI(bits=2, group=32),
    ):
        one, two = (plan(CONFIG, method, **arguments, gpus=gpus) for gpus in (1, 2))
        assert two.cache_bytes["codes"] == pytest.approx(one.cache_bytes["codes"] / 2, rel=1e-3)
        assert two.cache_bytes["window"] == one.cache_bytes["window"] and two.weights_bytes == one.weights_bytes
        assert two.most_tokens == pytest.approx(2 * one.most_tokens, rel=1e-3)


def test_a_step_over_gpus_reads_a_share_and_merges_and_is_not_guessed(monkeypatch, capsys):
    monkeypatch.setattr(planning, "MEASURED_HEAD_DIMS", (CONFIG.head_dim,))
    device = Device("x", 2**40, 1.0, 100.0, {"full": Reading(4.0, 0.0)}, {2: 7.0})
    one, two, four = (milliseconds(CONFIG, vj.FullPrecision(), 1, 2**20, device, gpus) for gpus in (1, 2, 4))
    read = [bytes_read(CONFIG, vj.FullPrecision(), 1, 2**20, gpus) for gpus in (1, 2)]
    assert read[0] == 2 * read[1]
    assert two == pytest.approx(one - (read[0] - read[1]) / 4e6 + CONFIG.num_layers * 7.0 / 1e3)
    assert four is None
    assert main(["plan", "full", "--gpu", "h100", "--gpus", "3"]) == 0
    assert "a step over 3 GPUs was not measured" in capsys.readouterr().out


def test_gpus_of_one_host_share_its_memory():
    method = vj.TailorKV(roles=("sparse*2",), recent=8, sink=2)
    one, two = (
        plan(CONFIG, method, batch=1, tokens=2**16, memory=2**34, host_memory=2**30, gpus=gpus) for gpus in (1, 2)
    )
    assert two.cache_bytes["host"] == pytest.approx(one.cache_bytes["host"], rel=1e-2)
    assert two.cache_bytes["state"] == one.cache_bytes["state"]
    assert two.most_tokens == pytest.approx(one.most_tokens, rel=1e-2)


def test_copies_of_folded_weights_are_counted():
    plain, folded = (
        of(vj.VecInfer(bits=2, rotate_values=r, transform="smooth-hadamard")).weights_bytes for r in (False, True)
    )
    copied = plan_folded_leaves()
    assert folded - plain == 2 * copied


def plan_folded_leaves():
    """Bytes of W_v and W_o of a layer, in float32."""
    attention = vj.models.decoder.param_shapes(CONFIG)["layers_0"]["attention"]
    return 4 * sum(x.size for name in ("v_proj", "o_proj") for x in jax.tree.leaves(attention[name]))


def test_how_a_cache_is_read_depends_on_what_the_kernels_fuse():
    usual = vj.VecInfer(bits=2, transform="smooth-hadamard").reading()
    assert usual == vj.VecInfer(bits=2, residual=0, transform="none", implementation="mosaic_gpu").reading()
    assert usual == vj.VecInfer(bits=2, transform="metric").reading()
    others = ({"transform": "hadamard-smooth"}, {"implementation": "xla"}, {"bits": 4})
    readings = {vj.VecInfer(**{"bits": 2, **settings}).reading() for settings in others}
    assert len(readings) == 3 and usual not in readings


def test_what_was_not_measured_is_not_predicted(monkeypatch):
    device = Device("x", 2**40, 1.0, 1.0, {"full": Reading(1.0, 0.0)})
    assert milliseconds(CONFIG, vj.FullPrecision(), 1, 100, device) is None  # heads of 16
    monkeypatch.setattr(planning, "MEASURED_HEAD_DIMS", (CONFIG.head_dim,))
    arguments = {"batch": 1, "tokens": 100, "memory": 2**40}
    assert plan(CONFIG, vj.KIVI(), **arguments, device=device).ms_per_step is None
    assert plan(CONFIG, vj.FullPrecision(), **arguments).ms_per_step is None
    assert plan(CONFIG, vj.FullPrecision(), **arguments, device=device, dtype=jnp.float32).ms_per_step is None
    assert plan(CONFIG, vj.FullPrecision(), **arguments, device=device).ms_per_step > 0
    assert plan(CONFIG, vj.FullPrecision(), **arguments | {"memory": 1}, device=device).ms_per_step is None


@pytest.mark.parametrize("device", devices().values(), ids=devices())
@pytest.mark.parametrize("every", [pytest.param(True, marks=pytest.mark.slow), False], ids=["all", "some"])
def test_measured_steps_are_predicted_within_15_percent(device, every):
    """Those of the model that the predictions are fitted to, and those of others."""
    from benchmarks.results import folder_of

    checked = set()
    for path in (RESULTS / folder_of(device.name)).glob("step-*.json"):
        model = path.stem.removeprefix("step-")
        for row in json.loads(path.read_text())["rows"]:
            method = specs.parse(row["name"], vj.caches.METHODS, "method")
            shown = every or row["name"] in ("full", "kivi:bits=2", "vecinfer:bits=2,transform=smooth-hadamard")
            if not shown or "ms_per_step" not in row or method.reading() not in device.caches:
                continue
            ms = milliseconds(SHAPES[model], method, row["batch"], row["tokens"], device)
            assert ms == pytest.approx(row["ms_per_step"], rel=0.15), (model, row["name"], row["batch"], row["tokens"])
            checked.add(model)
    assert len(checked) > 1


def test_the_command_predicts_for_a_measured_gpu(capsys):
    assert main(["plan", "full", "vecinfer", "plain-vq", "--gpu", "h100", "--tokens", "100000"]) == 0
    full, vecinfer, other = capsys.readouterr().out.splitlines()
    assert "ms a step" in full and "ms a step" in vecinfer and "ms a step" not in other
    assert main(["plan", "full", "--gpu", "abacus"]) == 1
    assert "no measurements of a GPU 'abacus'; there are those of h100" in capsys.readouterr().err
