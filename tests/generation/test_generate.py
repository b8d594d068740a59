"""Generation: batches equal singles, streams equal batches, seeds repeat, limits are errors, nothing recompiles."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vecinfer_jax as vj
from tests import small
from vecinfer_jax.caches import METHODS as ALL
from vecinfer_jax.errors import CapacityError, InputError
from vecinfer_jax.generation.engine import bucket, engine_for
from vecinfer_jax.models.decoder import Decoder

METHODS = [
    vj.FullPrecision(),
    vj.VecInfer(bits=2, residual=8, sink=2),
    vj.VecInfer(bits=4, residual=0, transform="smooth-hadamard"),
]
SOME = [*METHODS[:2], pytest.param(METHODS[2], marks=pytest.mark.slow)]


def generate(prompts, method=METHODS[0], **options):
    calibration = small.calibration_of(method) if method.needs_calibration else None
    return vj.generate(small.model(), prompts, method=method, calibration=calibration, **options)


@pytest.mark.parametrize("method", SOME, ids=lambda m: f"{m.name}-{getattr(m, 'residual', '')}")
def test_a_ragged_batch_gives_what_each_prompt_gives_alone(method):
    prompts = small.prompts([3, 17, 40, 1])
    together = generate(prompts, method, max_new_tokens=20)
    for i, prompt in enumerate(prompts):
        alone = generate([prompt], method, max_new_tokens=20)
        assert alone.tokens[0] == together.tokens[i]
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[i], atol=1e-4)
    assert together.finish_reasons == ["length"] * 4


def test_sampled_tokens_depend_on_the_seed_and_not_on_the_batch():
    prompts = small.prompts([5, 9, 30])
    sampling = vj.Sampling(temperature=1.0, top_p=0.9, top_k=50)
    first = generate(prompts, sampling=sampling, seed=3, max_new_tokens=12)
    assert first.tokens == generate(prompts, sampling=sampling, seed=3, max_new_tokens=12).tokens
    assert first.tokens != generate(prompts, sampling=sampling, seed=4, max_new_tokens=12).tokens
    alone = generate([prompts[2]], sampling=sampling, seed=3, seeds=[2], max_new_tokens=12)
    assert alone.tokens[0] == first.tokens[2]


def test_logprobs_are_the_models():
    prompt = small.prompts([6])[0]
    out = generate([prompt], max_new_tokens=5)
    lm = small.model()
    method = vj.FullPrecision()
    decoder = Decoder(lm.config, method, lm.dtype)
    tokens = jnp.asarray(prompt + out.tokens[0])[None]
    caches = tuple(method.init(decoder.layer_shape(i), 1, 16) for i in range(lm.config.num_layers))
    logits, _ = decoder.apply({"params": lm.params}, tokens, jnp.arange(tokens.shape[1])[None], caches)
    want = jax.nn.log_softmax(logits[0])[jnp.arange(5, 10), jnp.asarray(out.tokens[0])]
    np.testing.assert_allclose(out.logprobs[0], want, atol=1e-4)


def test_each_sequence_stops_at_its_own_stop_token():
    prompts = small.prompts([5, 9, 30])
    free = generate(prompts, max_new_tokens=16)
    stop = free.tokens[1][4]
    out = generate(prompts, max_new_tokens=16, stop_token_ids=[stop])
    for got, all_tokens, reason in zip(out.tokens, free.tokens, out.finish_reasons, strict=True):
        if stop in all_tokens:
            assert got == all_tokens[: all_tokens.index(stop) + 1]
            assert reason == "stop"
        else:
            assert got == all_tokens
            assert reason == "length"
    assert out.finish_reasons[1] == "stop"
    assert [len(x) for x in out.logprobs] == [len(x) for x in out.tokens]


def test_stop_texts_are_left_out_and_end_the_sequence():
    prompt = small.prompts([12])
    free = generate(prompt, max_new_tokens=40)
    stop = free.texts[0][10:13]
    out = generate(prompt, max_new_tokens=40, stop=[stop])
    at = free.texts[0].find(stop)
    assert out.texts[0] == free.texts[0][:at]
    assert out.finish_reasons == ["stop"]
    assert len(out.tokens[0]) == at + 3


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow), 8])
def test_streamed_pieces_add_up_to_the_text(chunk, smollm2):
    prompt = "Once upon a time"
    whole = vj.generate(smollm2, [prompt], max_new_tokens=12).texts[0]
    pieces = list(vj.stream(smollm2, prompt, max_new_tokens=12, chunk=chunk))
    assert "".join(pieces) == whole
    if chunk == 1:
        assert len(pieces) > 4


def test_a_stream_ends_before_its_stop_text(smollm2):
    prompt = "Once upon a time"
    whole = vj.generate(smollm2, [prompt], max_new_tokens=12).texts[0]
    stop = whole[6:9]
    pieces = list(vj.stream(smollm2, prompt, max_new_tokens=12, chunk=2, stop=[stop]))
    assert "".join(pieces) == whole[: whole.find(stop)]


def test_unknown_stream_options_are_refused():
    with pytest.raises(InputError, match="colour"):
        list(vj.stream(small.model(), [1, 2], colour="red"))


@pytest.mark.parametrize("method", SOME, ids=lambda m: f"{m.name}-{getattr(m, 'residual', '')}")
def test_a_prompt_in_chunks_gives_full_precision_tokens_or_near_ones(method):
    prompts = small.prompts([70, 33])
    whole = generate(prompts, method, max_new_tokens=8)
    chunked = generate(prompts, method, max_new_tokens=8, prefill_chunk=32)
    if isinstance(method, vj.FullPrecision):
        assert chunked.tokens == whole.tokens
    else:  # later chunks read codes: close, not equal
        assert [len(t) for t in chunked.tokens] == [8, 8]
        assert np.all(np.isfinite(chunked.logprobs))


def test_nothing_recompiles_within_a_bucket():
    method = vj.VecInfer(bits=2, residual=8, sink=2, transform="smooth-hadamard")
    generate(small.prompts([33]), method, max_new_tokens=9)
    lm = small.model()
    engine = engine_for(Decoder(lm.config, method, lm.dtype))
    before = engine.compile_seconds
    for length, new in ((34, 9), (40, 9), (48, 9), (47, 3)):
        generate(small.prompts([length]), method, max_new_tokens=new)
    assert engine.compile_seconds == before


def test_buckets_grow_by_at_most_a_half():
    sizes = sorted({bucket(n) for n in range(1, 5000)})
    assert sizes[0] == 32
    assert all(b <= 1.51 * a for a, b in itertools.pairwise(sizes))
    assert all(bucket(n) >= n for n in range(1, 5000))


def test_a_batch_may_be_padded_with_rows_that_nobody_wants():
    prompts = small.prompts([5, 9])
    padded = generate(prompts, batch_size=4, max_new_tokens=6)
    assert padded.tokens == generate(prompts, max_new_tokens=6).tokens
    assert len(padded.texts) == 2


def test_chat_messages_go_through_the_template(smollm2):
    messages = [{"role": "user", "content": "Say hello."}]
    out = vj.generate(smollm2, messages, max_new_tokens=1)
    text = smollm2.tokenizer.apply_chat_template(messages)
    assert out.prompt_tokens[0] == smollm2.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("prompts", "options", "error"),
    [
        ([""], {}, InputError),
        ([[]], {}, InputError),
        ([], {}, InputError),
        ([[1, 2, 500]], {}, InputError),
        ([[-1]], {}, InputError),
        (["abc"], {"max_new_tokens": 0}, InputError),
        (["abc" * 400], {}, CapacityError),
        (["abc"], {"max_new_tokens": 1023}, CapacityError),
        (["abc" * 10], {"capacity": 32, "max_new_tokens": 8}, CapacityError),
        (["abc"], {"prefill_chunk": 0}, InputError),
        (["abc"], {"max_new_tokens": 2.5}, InputError),
        (["abc"], {"stop": ""}, InputError),
        (["abc"], {"stop": ["x", ""]}, InputError),
        (["abc"], {"stop_token_ids": [500]}, InputError),
        (["abc"], {"seeds": [1, 2]}, InputError),
        (["abc"], {"seeds": [-1]}, InputError),
        (["abc"], {"seed": 10**20}, InputError),
        ([[1, 2.5]], {}, InputError),
        ([[True]], {}, InputError),
        ([3.5], {}, InputError),
        (["\ud800"], {}, InputError),
    ],
)
def test_what_cannot_be_done_is_one_line(prompts, options, error):
    with pytest.raises(error) as raised:
        generate(prompts, **options)
    assert "\n" not in str(raised.value)


def test_a_prompt_may_fill_the_capacity_to_the_last_token():
    prompts = small.prompts([24])
    out = generate(prompts, capacity=32, max_new_tokens=8)
    assert out.stats.capacity == 32
    assert out.tokens == generate(prompts, max_new_tokens=8).tokens
    method = METHODS[1]
    tight = generate(prompts, method, capacity=32, max_new_tokens=8)
    assert tight.tokens == generate(prompts, method, max_new_tokens=8).tokens


def test_stats_count_what_was_allocated():
    method = vj.VecInfer(bits=2, residual=8, sink=2, transform="smooth-hadamard")
    out = generate(small.prompts([20, 30]), method, max_new_tokens=10)
    c = small.CONFIG
    slots = out.stats.capacity - 10
    assert out.stats.cache_bytes["codes"] == c.num_layers * 2 * c.num_kv_heads * slots * 2 * c.head_dim * 2 // 8
    assert out.stats.cache_bytes["window"] == c.num_layers * 2 * c.num_kv_heads * 10 * 2 * c.head_dim * 4
    assert out.stats.new_tokens == 20
    assert out.stats.tokens_per_second > 0


def test_an_engine_is_kept_for_a_model_and_method():
    lm = small.model()
    decoder = Decoder(lm.config, vj.FullPrecision(), lm.dtype)
    assert engine_for(decoder) is engine_for(Decoder(lm.config, vj.FullPrecision(), lm.dtype))
    other = dataclasses.replace(lm.config, num_layers=2)
    assert engine_for(decoder) is not engine_for(Decoder(other, vj.FullPrecision(), lm.dtype))


def test_one_stop_text_may_be_given_as_it_is():
    prompt = small.prompts([12])
    free = generate(prompt, max_new_tokens=40).texts[0]
    assert generate(prompt, max_new_tokens=40, stop=free[10:13]).texts[0] == free[: free.find(free[10:13])]


def test_the_stop_that_is_complete_first_ends_the_text_however_it_is_cut_into_chunks():
    prompt = small.prompts([12])
    free = generate(prompt, max_new_tokens=40).texts[0]
    # The second text begins earlier and is complete later.
    stops = [free[8:10], free[6:14]]
    assert free.find(stops[0]) == 8 and free.find(stops[1]) == 6
    want = generate(prompt, max_new_tokens=40, stop=stops).texts[0]
    assert want == free[:8]
    for chunk in (1, 3, 8, 40):
        pieces = vj.stream(small.model(), prompt[0], max_new_tokens=40, chunk=chunk, stop=stops)
        assert "".join(pieces) == want


def test_tokens_per_second_counts_decoded_tokens_only():
    prompts = small.prompts([5, 9, 30])
    free = generate(prompts, max_new_tokens=16)
    assert free.stats.sequences == 3
    assert free.stats.tokens_per_second == pytest.approx((48 - 3) / free.stats.decode_seconds)


def test_prompts_may_be_arrays():
    prompts = small.prompts([5, 9])
    want = generate(prompts, max_new_tokens=4).tokens
    assert generate([np.asarray(p) for p in prompts], max_new_tokens=4).tokens == want
    assert generate(jnp.asarray(prompts[0]), max_new_tokens=4).tokens == want[:1]


def test_finite_temperatures_only():
    with pytest.raises(InputError):
        vj.Sampling(temperature=float("inf"))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ALL))
def test_a_ragged_batch_in_bfloat16(name):
    lm = small.model()
    half = dataclasses.replace(
        lm, params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), lm.params), dtype=jnp.dtype("bfloat16")
    )
    method = ALL[name]() if name == "full" else ALL[name](residual=4)
    out = vj.generate(
        half, small.prompts([50, 3]), method=method, calibration=small.calibration_of(method), max_new_tokens=4
    )
    assert [len(tokens) for tokens in out.tokens] == [4, 4]
    assert all(np.isfinite(logprobs).all() for logprobs in out.logprobs)
