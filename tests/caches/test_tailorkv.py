"""TailorKV: what a query reads, where it lies, and which layers are what."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vecinfer_jax as vj
from tests import small
from tests.caches.harness import LAYER, chunk_at, decode_all, prefill_in_chunks, random_qkv, rotated
from vecinfer_jax.caches.host_tier import CodedSparseLayer, SparseLayer, on_host, write_slots
from vecinfer_jax.caches.kivi import KIVI
from vecinfer_jax.caches.tailorkv import TailorKV
from vecinfer_jax.errors import CalibrationError, CapacityError, InputError
from vecinfer_jax.generation.engine import Engine
from vecinfer_jax.models.decoder import Decoder

FEW = SparseLayer(tokens=4, channels=3, block=4, residual=3, sink=2)
IN_BASIS = dataclasses.replace(FEW, basis="principal")
BY_EACH = dataclasses.replace(FEW, heads="each")
EVERYTHING = SparseLayer(tokens=1000, channels=1, block=4, residual=3, sink=2)
ALL_SPARSE = TailorKV(roles=("sparse*3",), tokens=1000, channels=2, sink=2, recent=3, block=4)


def some_basis():
    """Maps whose product is the identity, and a mean."""
    rng = np.random.default_rng(11)
    key_map = rng.normal(size=(2, 16, 16))
    maps = {"key_map": key_map, "query_map": np.linalg.inv(key_map).swapaxes(1, 2), "mean": rng.normal(size=(2, 16))}
    return {name: x.astype(np.float32) for name, x in maps.items()}


BASIS = some_basis()


def expected(method, q, k, v, predicted):
    """What decoding one sequence [T, H, D] should give: the definition, in a float64 loop over queries."""
    queries, keys, values, guesses = rotated(q), rotated(k), np.asarray(v, np.float64), rotated(predicted)
    group, dim = q.shape[1] // k.shape[1], q.shape[2]
    index, asked, guessed = keys, queries, guesses
    if method.basis == "principal":
        index = np.einsum("thi,hij->thj", keys - BASIS["mean"], BASIS["key_map"])
        of_heads = np.repeat(BASIS["query_map"], group, axis=0)
        asked, guessed = (np.einsum("thi,hij->thj", x, of_heads) for x in (queries, guesses))
    out = np.zeros(q.shape)
    for t in range(len(q)):
        held = max(t + 1 - method.residual - method.sink, 0) // method.block * method.block
        host = np.arange(method.sink, method.sink + held)
        near = np.array([s for s in range(t + 1) if s < method.sink or s >= method.sink + held])
        for h in range(k.shape[1]):
            mine = slice(h * group, (h + 1) * group)
            peak = np.abs(index[host, h]).max(0, initial=0)
            guess, asks = guessed[t, mine], asked[t, mine]
            size = np.abs(guess.mean(0)) if method.heads == "mean" else np.sqrt((guess**2).mean(0))
            critical = np.argsort(-size * peak, kind="stable")[: method.channels]
            by_head = index[host, h][:, critical] @ asks[:, critical].T
            scores = by_head.mean(1)
            if method.heads == "each" and held:
                weights = np.exp(by_head / np.sqrt(dim))
                scores = (weights / weights.sum(0)).sum(1)
            read = np.concatenate([near, host[np.argsort(-scores, kind="stable")[: method.tokens]]]).astype(int)
            for head in range(mine.start, mine.stop):
                s = keys[read, h] @ queries[t, head] / np.sqrt(dim)
                weights = np.exp(s - s.max())
                out[t, head] = weights @ values[read, h] / weights.sum()
    return out


def empty(method, batch, capacity):
    calibration = BASIS if method.needs_calibration else None
    return jax.jit(lambda: method.init(LAYER, batch, capacity, calibration))()


def memory_kinds(cache):
    return {name: getattr(cache.store, name).sharding.memory_kind for name in ("keys", "values", "keys_by_channel")}


PINNED = dict.fromkeys(("keys", "values", "keys_by_channel"), "pinned_host")


@pytest.fixture(scope="module")
def qkv():
    return random_qkv(2, 38)


@pytest.mark.parametrize("method", [FEW, IN_BASIS, BY_EACH], ids=["channels", "principal", "by-each-head"])
def test_decoding_reads_what_the_definition_says(qkv, method):
    q, k, v = qkv
    out, cache = decode_all(method, empty(method, 2, 40), q, k, v, [0, 0], 38)
    for b in range(2):
        np.testing.assert_allclose(out[b], expected(method, q[b], k[b], v[b], q[b]), atol=1e-5)
    assert memory_kinds(cache) == PINNED


@pytest.mark.parametrize("method", [FEW, IN_BASIS, BY_EACH], ids=["channels", "principal", "by-each-head"])
@pytest.mark.parametrize("size", [38, pytest.param(10, marks=pytest.mark.slow)])
def test_every_query_of_a_prompt_reads_what_decoding_would(qkv, method, size):
    q, k, v = qkv
    out, _ = prefill_in_chunks(method, empty(method, 2, 40), q, k, v, [38, 38], size, "coded")
    for b in range(2):
        np.testing.assert_allclose(out[b], expected(method, q[b], k[b], v[b], q[b]), atol=1e-5)


def test_channels_are_chosen_by_the_predicted_query_and_tokens_by_the_true_one(qkv):
    """In decoding and in a prompt alike; the prediction is forgotten after it was used."""
    q, k, v = qkv
    other = random_qkv(2, 38, seed=5)[0]
    hidden = jnp.zeros((2, 38, 1))

    @jax.jit
    def prompt(cache, chunk):
        return FEW.prefill(q, k, v, chunk, FEW.prefetch(hidden, lambda h: other, chunk, cache))

    out, cache = prompt(empty(FEW, 2, 40), chunk_at([0, 0], [38, 38], 38, True, "coded"))
    assert cache.store.predicted is None
    for b in range(2):
        np.testing.assert_allclose(out[b], expected(FEW, q[b], k[b], v[b], other[b]), atol=1e-5)
    assert np.abs(np.asarray(out[0]) - expected(FEW, q[0], k[0], v[0], q[0])).max() > 1e-2

    @jax.jit
    def step(cache, chunk):
        cache = FEW.prefetch(hidden[:, :1], lambda h: other[:, 37:], chunk, cache)
        return FEW.decode(q[:, 37], k[:, 37], v[:, 37], chunk, cache)

    _, cache = prefill_in_chunks(FEW, empty(FEW, 2, 40), q[:, :37], k[:, :37], v[:, :37], [37, 37], 37, "exact")
    out, cache = step(cache, chunk_at([37, 37], [1, 1], 1, False))
    assert cache.store.predicted is None
    for b in range(2):
        np.testing.assert_allclose(out[b], expected(FEW, q[b], k[b], v[b], other[b])[37], atol=1e-5)


@pytest.mark.slow
def test_a_budget_beyond_the_context_is_exact_attention(qkv):
    q, k, v = qkv
    out, _ = decode_all(EVERYTHING, empty(EVERYTHING, 2, 40), q, k, v, [0, 0], 38)
    exact = jax.jit(lambda: vj.FullPrecision().init(LAYER, 2, 40))()
    want, _ = decode_all(vj.FullPrecision(), exact, q, k, v, [0, 0], 38)
    np.testing.assert_allclose(out, want, atol=1e-5)


def test_a_prompt_in_chunks_is_read_exactly_from_the_host_too(qkv):
    q, k, v = qkv
    exact = jax.jit(lambda: vj.FullPrecision().init(LAYER, 2, 40))()
    want, _ = prefill_in_chunks(vj.FullPrecision(), exact, q, k, v, [38, 25], 38, "exact")
    out, _ = prefill_in_chunks(FEW, empty(FEW, 2, 40), q, k, v, [38, 25], 10, "exact")
    for b, n in enumerate((38, 25)):
        np.testing.assert_allclose(out[b, :n], want[b, :n], atol=1e-5)


@pytest.mark.parametrize("size", [pytest.param(24, marks=pytest.mark.slow), 7])
def test_a_ragged_batch_leaves_what_each_row_leaves_alone(size):
    """Bulk and chunks of it, then tokens one by one: same tokens on the host, same answers."""
    lengths, steps = [24, 5, 13], 9
    q, k, v = random_qkv(3, 40, seed=1)
    pad = slice(0, 24)
    cache = empty(FEW, 3, 40)
    _, cache = prefill_in_chunks(FEW, cache, q[:, pad], k[:, pad], v[:, pad], lengths, size, "exact")
    out, cache = decode_all(FEW, cache, q, k, v, lengths, steps)
    for b, n in enumerate(lengths):
        alone, one = decode_all(FEW, empty(FEW, 1, 40), q[b : b + 1], k[b : b + 1], v[b : b + 1], [0], n + steps)
        np.testing.assert_allclose(out[b], alone[0, n:], atol=1e-5)
        held = int(FEW.coded_count(jnp.asarray(n + steps)))
        for name in ("keys", "values"):
            here, there = getattr(cache.store, name)[b, :, :held], getattr(one.store, name)[0, :, :held]
            np.testing.assert_allclose(here, there, atol=1e-6)
        np.testing.assert_array_equal(
            cache.store.keys_by_channel[b, :, :, :held], cache.store.keys[b, :, :held].swapaxes(1, 2)
        )
        np.testing.assert_allclose(cache.store.key_abs_max[b], np.abs(one.store.keys[0, :, :held]).max(1, initial=0))
    assert memory_kinds(cache) == PINNED


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize(
    ("start", "count"), [([0, 3], [5, 5]), ([7, 0], [5, 1]), ([9, 2], [3, 0]), ([12, 11], [0, 1]), ([2, 2], [1, 5])]
)
def test_slots_are_written_up_to_the_last_and_no_others_are_lost(start, count, axis):
    rng = np.random.default_rng(0)
    shape = [2, 3, 4, 4]
    shape[axis] = 12
    held = rng.normal(size=shape).astype(np.float32)
    shape[axis] = 5
    new = rng.normal(size=shape).astype(np.float32)

    @jax.jit
    def write(held):
        return write_slots(on_host(held), jnp.asarray(new), jnp.asarray(start), jnp.asarray(count), axis=axis)

    out = write(held)
    assert out.sharding.memory_kind == "pinned_host"
    out, held, new = (np.moveaxis(np.asarray(x), axis, 1) for x in (out, held, new))
    inside = all(c and s + 5 <= 12 for s, c in zip(start, count, strict=True))
    for b in range(2):
        end = start[b] + count[b]
        np.testing.assert_array_equal(out[b, : start[b]], held[b, : start[b]])
        np.testing.assert_array_equal(out[b, start[b] : end], new[b, : count[b]])
        after = start[b] + 5 if inside else end  # nobody reads between
        np.testing.assert_array_equal(out[b, after:], held[b, after:])


def test_the_decode_loop_leaves_the_hosts_arrays_where_they_are():
    lm = small.model()
    engine = Engine(Decoder(lm.config, ALL_SPARSE, lm.dtype))
    caches = engine.init_caches([{}] * 3, 1, 64)
    assert [memory_kinds(cache) for cache in caches] == [PINNED] * 3
    tokens = np.asarray(small.prompts([20]), np.int32)
    logits, caches = engine.prefill(lm.params, caches, tokens, np.array([20]))
    assert [memory_kinds(cache) for cache in caches] == [PINNED] * 3
    keys = jax.random.split(jax.random.key(0), 1)
    settings, stops = vj.Sampling().settings(), jnp.zeros((0,), jnp.int32)
    state = engine.start(logits, caches, np.array([20]), keys, np.array([True]), 16, settings, stops)
    before = state.caches[1].store
    state = engine.decode(lm.params, state, 12, settings, stops)
    assert [memory_kinds(cache) for cache in state.caches] == [PINNED] * 3
    assert before.keys.is_deleted()  # given away: written in place


@pytest.mark.parametrize("basis", ["channels", pytest.param("principal", marks=pytest.mark.slow)])
def test_with_every_layer_on_the_host_and_the_whole_budget_tokens_are_those_of_full_precision(basis):
    prompts, method = small.prompts([20, 45, 7]), dataclasses.replace(ALL_SPARSE, basis=basis)
    calibration = small.calibration_of(method) if basis == "principal" else None
    exact = vj.generate(small.model(), prompts, method=vj.FullPrecision(), max_new_tokens=20)
    ours = vj.generate(small.model(), prompts, method=method, calibration=calibration, max_new_tokens=20)
    assert ours.tokens == exact.tokens
    np.testing.assert_allclose(np.asarray(ours.logprobs), np.asarray(exact.logprobs), atol=1e-5)
    assert ours.stats.cache_bytes["host"] > 10 * ours.stats.cache_bytes["total"]


@pytest.mark.slow
def test_a_text_scored_at_once_is_what_decoding_gives():
    """Through the model, so that every layer but the first has a predicted query."""
    from vecinfer_jax.evaluation.perplexity import rescoring_kls

    method = dataclasses.replace(ALL_SPARSE, tokens=3)
    calibration = vj.resolve_calibration(small.model(), method)
    assert max(rescoring_kls(small.model(), method, calibration, small.prompts([30])[0])) < 1e-5


# -- roles


def test_layers_have_the_methods_of_their_roles():
    method = TailorKV(bits=2, roles=("quantised", "sparse*2"), recent=5, sink=1, block=7)
    assert method.roles == ("quantised", "sparse", "sparse")
    assert method.for_layer(0, 3) == KIVI(bits=2, group=64, residual=128)
    assert method.for_layer(2, 3) == SparseLayer(tokens=128, channels=8, block=7, residual=5, sink=1)
    assert dataclasses.replace(method, quantised=vj.VecInfer(transform="smooth-hadamard")).for_layer(
        0, 3
    ) == vj.VecInfer(transform="smooth-hadamard")
    paper = TailorKV.long_context(bits=2)
    assert (paper.tokens, paper.sink, paper.recent, paper.channels, paper.bits) == (896, 64, 64, 12, 2)


def test_roles_come_from_the_calibration_and_are_fixed_for_every_use(tmp_path):
    lm, method = small.model(), TailorKV(threshold=0.79, tokens=4, channels=2, sink=1, recent=3, block=4, residual=8)
    made = small.calibration_of(method)
    scores = [float(layer["dense_preference"]) for layer in made.layers]
    assert all(0 < score < 1 for score in scores)
    roles = method.resolved(made.layers).roles
    assert roles == tuple("quantised" if score > 0.79 else "sparse" for score in scores)
    assert made.metadata["findings"]["role"] == list(roles)
    kept = vj.load_calibration(made.save(tmp_path / "artefact"), lm, method)
    np.testing.assert_allclose(kept.metadata["findings"]["dense_preference"], scores, atol=1e-4)
    # The scores serve every threshold and width.
    other = dataclasses.replace(method, threshold=1.0, bits=2)
    assert other.calibration_key() == method.calibration_key()
    assert other.resolved(kept.layers).roles == ("sparse",) * 3
    by_hand = dataclasses.replace(method, roles=roles)
    assert method.resolved(kept.layers) == by_hand


@pytest.mark.slow
def test_generation_and_evaluation_take_the_calibrations_roles():
    lm, method = small.model(), TailorKV(threshold=0.79, tokens=4, channels=2, sink=1, recent=3, block=4, residual=8)
    kept = small.calibration_of(method)
    by_hand = method.resolved(kept.layers)
    prompts = small.prompts([30])
    ours = vj.generate(lm, prompts, method=method, calibration=kept, max_new_tokens=6)
    assert ours.tokens == vj.generate(lm, prompts, method=by_hand, max_new_tokens=6).tokens
    text = "".join(small.texts())
    scored = [
        vj.evaluate.perplexity(lm, m, c, text, length=40, windows=1, progress=False)
        for m, c in ((method, kept), (by_hand, None))
    ]
    assert scored[0] == scored[1]


@pytest.mark.slow
def test_codebooks_are_fitted_for_the_layers_that_take_them():
    method = TailorKV(threshold=0.0, quantised=vj.VecInfer(bits=4, residual=4, transform="smooth-hadamard"), recent=3)
    made = small.calibration_of(dataclasses.replace(method, roles=("quantised", "sparse*2")))
    assert "key_codebook" in made.layers[0] and made.layers[1] == {}
    assert method.calibration_key() != dataclasses.replace(method, threshold=0.5).calibration_key()
    nested = vj.PerLayer(TailorKV(), ((0, vj.FullPrecision()),))
    layers = [{"dense_preference": np.float32(score)} for score in (0.1, 0.3, 0.1)]
    resolved = nested.resolved(layers)
    assert [resolved.for_layer(i, 3).name for i in range(3)] == ["full", "kivi", "sparse"]
    with pytest.raises(CalibrationError, match="no dense preference"):
        TailorKV().resolved([{}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": -1}, "tokens=-1"),
        ({"tokens": 0}, "tokens=0"),
        ({"channels": 0}, "channels=0"),
        ({"block": 0}, "block=0"),
        ({"recent": 0}, "recent=0"),
        ({"sink": -3}, "sink=-3"),
        ({"residual": -1}, "residual=-1"),
        ({"bits": 7}, "bits=7"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"top": -0.1}, "top=-0.1"),
        ({"host": "attic"}, "host='attic'"),
        ({"basis": "skewed"}, "basis='skewed'"),
        ({"heads": "some"}, "heads='some'"),
        ({"roles": ("sparse", "lazy")}, "'lazy' is no role"),
        ({"roles": "sparse"}, "must be a tuple"),
        ({"roles": ("sparse*0",)}, "is no role"),
        ({"quantised": "vecinfer"}, "quantised='vecinfer'"),
        ({"quantised": TailorKV()}, "must be one method"),
        ({"quantised": vj.VecInfer.refined()}, "use refine='attention'"),
        ({"implementation": "magic"}, "implementation='magic'"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused_in_a_line(settings, message):
    with pytest.raises(InputError, match=message) as error:
        TailorKV(**settings)
    assert "\n" not in str(error.value)


def test_layers_and_heads_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="have no roles yet"):
        TailorKV().for_layer(0, 3)
    with pytest.raises(InputError, match="of 2 layers, but the model has 3"):
        vj.generate(small.model(), small.prompts([5]), method=TailorKV(roles=("sparse",) * 2))
    with pytest.raises(InputError, match="channels=17: this model's heads have 16"):
        SparseLayer(channels=17).init(LAYER, 1, 10)


def test_a_host_that_is_too_small_is_a_capacity_error(monkeypatch):
    lm = small.model()
    engine = Engine(Decoder(lm.config, ALL_SPARSE, lm.dtype))

    def exhausted(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of host memory while trying to allocate")

    monkeypatch.setattr(engine, "_call", exhausted)
    with pytest.raises(CapacityError, match=r"or the host's pinned memory \(.* GiB\)") as error:
        engine.init_caches([{}] * 3, 64, 10**6)
    assert "\n" not in str(error.value)


# -- codes on the host


@pytest.fixture(scope="module")
def coded():
    """A coded layer, its calibration, and what its codes read back as, from VecInfer itself."""
    method = CodedSparseLayer(tokens=4, channels=2, block=4, residual=3, sink=2)
    rng = np.random.default_rng(0)
    books = {f"{name}_codebook": rng.normal(size=(2, 256, 2)).astype(np.float32) for name in ("key", "value")}
    return method, {"smooth": rng.uniform(0.5, 2, size=(2, 16)).astype(np.float32)} | books


def test_pairs_of_the_principal_basis_stay_unequal():
    """Channels are chosen by the size of their pairs, which would all be alike if they were mixed."""
    assert CodedSparseLayer(basis="principal").codes.mixes == "none"


@pytest.mark.slow
def test_the_host_holds_vecinfers_codes_twice_for_keys(coded, qkv):
    method, calibration = coded
    q, k, v = qkv
    cache = jax.jit(lambda: method.init(LAYER, 2, 40, calibration))()
    _, cache = prefill_in_chunks(method, cache, q, k, v, [38, 30], 38, "exact")
    assert cache.store.keys.dtype == jnp.uint8 and memory_kinds(cache) == PINNED
    codes = method.codes.init(LAYER, 2, 40, calibration)
    _, codes = prefill_in_chunks(method.codes, codes, q, k, v, [38, 30], 38, "exact")
    for b, held in enumerate((32, 24)):
        np.testing.assert_array_equal(cache.store.keys[b, :, :held], codes.store.key_codes[b, :, :held])
        np.testing.assert_array_equal(cache.store.values[b, :, :held], codes.store.value_codes[b, :, :held])
        by_pair = cache.store.keys_by_channel[b, :, :, :held]
        np.testing.assert_array_equal(by_pair, cache.store.keys[b, :, :held].swapaxes(1, 2))


def test_what_runs_on_the_second_stream_calls_no_function(coded, qkv):
    """XLA gives a call within a call on a second stream no stream at all, and does not compile."""
    method, calibration = coded
    metric = dataclasses.replace(method, basis="principal")
    layers = (method, calibration), (FEW, None), (BY_EACH, None), (IN_BASIS, BASIS), (metric, calibration | BASIS)
    for layer, fitted in layers:
        store = layer.init(LAYER, 2, 40, fitted).store
        fetched = jax.make_jaxpr(lambda q, layer=layer, store=store: layer.fetched(store, q, LAYER))(qkv[0][:, 0])
        assert not {"jit", "pjit"}.intersection(equation.primitive.name for equation in fetched.eqns)


def test_coded_layers_in_the_basis_read_what_vecinfer_does_where_they_read_everything(coded, qkv):
    """Decoding, and a prompt as decoding reads it; the mean is taken off codes and exact keys alike."""
    method = dataclasses.replace(coded[0], basis="principal", tokens=1000)
    calibration, (q, k, v) = coded[1] | BASIS, qkv
    want, _ = decode_all(method.codes, method.codes.init(LAYER, 2, 40, calibration), q, k, v, [0, 0], 38)
    cache = jax.jit(lambda: method.init(LAYER, 2, 40, calibration))()
    out, _ = decode_all(method, cache, q, k, v, [0, 0], 38)
    scored, _ = prefill_in_chunks(method, cache, q, k, v, [38, 38], 38, "coded")
    np.testing.assert_allclose(out, scored, atol=2e-5)
    whole = np.arange(8, 38, 4)  # where a block is whole, as many tokens are on the host as there are codes
    np.testing.assert_allclose(out[:, whole], want[:, whole], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["mean", "each"])
def test_coded_layers_choose_pairs_and_read_codes(coded, heads):
    """Decoding against the definition, with keys and values as codes read back."""
    method, calibration = dataclasses.replace(coded[0], heads=heads), coded[1]
    q, k, v = random_qkv(1, 30, seed=3)
    out, cache = decode_all(method, jax.jit(lambda: method.init(LAYER, 1, 40, calibration))(), q, k, v, [0], 30)
    at_once = jax.jit(lambda: method.init(LAYER, 1, 40, calibration))()
    scored, _ = prefill_in_chunks(method, at_once, q, k, v, [30], 30, "coded")
    np.testing.assert_allclose(out, scored, atol=2e-5)
    held = int(method.coded_count(jnp.asarray(30)))
    smooth = np.asarray(calibration["smooth"], np.float64)
    keys, values = (np.asarray(x[0], np.float64) for x in method.read(cache.store, jnp.int32(0), held, LAYER))
    queries, exact_keys = rotated(q[0])[29], rotated(k[0])
    near = np.r_[0:2, 2 + held : 30]
    for h in range(2):
        coded_keys, mine = keys[h] / smooth[h], queries[3 * h : 3 * h + 3]
        asked = mine * smooth[h]
        size = np.abs(asked.mean(0)) if heads == "mean" else np.sqrt((asked**2).mean(0))
        weight = size * np.abs(coded_keys).max(0)
        pairs = np.argsort(-weight.reshape(-1, 2).sum(1))[:2]
        critical = np.r_[2 * pairs, 2 * pairs + 1]
        by_head = coded_keys[:, critical] @ asked[:, critical].T
        scores = by_head.mean(1)
        if heads == "each":
            weights = np.exp(by_head / 4)
            scores = (weights / weights.sum(0)).sum(1)
        rows = np.argsort(-scores)[:4]
        all_keys = np.concatenate([exact_keys[near, h], keys[h][rows]])
        all_values = np.concatenate([np.asarray(v[0, near, h], np.float64), values[h][rows]])
        for g in range(3):
            s = all_keys @ mine[g] / 4
            weights = np.exp(s - s.max())
            np.testing.assert_allclose(out[0, 29, 3 * h + g], weights @ all_values / weights.sum(), atol=2e-5)


@pytest.mark.slow
def test_coded_hosts_generate_and_take_a_quarter(coded):
    settings = {"roles": ("sparse*3",), "tokens": 1000, "channels": 2, "sink": 2, "recent": 3, "block": 4}
    method = TailorKV(**settings, host="vecinfer-4")
    prompts, calibration = small.prompts([20, 45, 7]), small.calibration_of(method)
    ours = vj.generate(small.model(), prompts, method=method, calibration=calibration, max_new_tokens=6)
    held = vj.generate(small.model(), prompts, method=TailorKV(**settings), max_new_tokens=6).stats.cache_bytes
    assert ours.stats.cache_bytes["host"] * 8 == held["host"]  # of float32
    assert all(len(row) == 6 for row in ours.tokens)
    with pytest.raises(InputError, match="8 pairs"):
        CodedSparseLayer(channels=9).init(LAYER, 1, 10)
