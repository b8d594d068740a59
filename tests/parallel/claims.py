"""What is claimed of meshes, a function each: `python -m tests.parallel.claims NAMES ARGUMENT...` in a process of its
own, whose CPU has eight devices (`tests.parallel.test_mesh`)."""

import collections
import dataclasses
import functools
import json
import re
import sys
import tempfile
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import vecinfer_jax as vj
from tests import small
from tests.evaluation.stand_in import StandIn
from vecinfer_jax import cli, specs
from vecinfer_jax.caches import METHODS
from vecinfer_jax.caches.base import NO_AXES, Chunk
from vecinfer_jax.caches.stripes import MERGES, prompt_pieces, prompt_share, stripes, whole_prompt
from vecinfer_jax.calibration.collect import calibrate, collect
from vecinfer_jax.calibration.distil import refine_model
from vecinfer_jax.errors import InputError
from vecinfer_jax.models import random_model
from vecinfer_jax.models.decoder import Decoder, layer_shape
from vecinfer_jax.models.folding import fold_values
from vecinfer_jax.models.layerwise import Layerwise
from vecinfer_jax.models.network import Network
from vecinfer_jax.parallel import Layout, SplitNetwork, make_mesh, parse_mesh, place_model, place_params
from vecinfer_jax.parallel.shardings import NonEmpty, cache_shardings, cache_specs, device_share

CONFIG = dataclasses.replace(small.CONFIG, num_query_heads=16, num_kv_heads=8, num_layers=2)
# No length is a multiple of what an axis or a stripe wants; one prompt fits into the window.
LENGTHS = (301, 70, 11)
CAPACITY = 345
TWO_PROCESSES = "vecinfer:bits=2,residual=16"


@functools.cache
def model():
    return dataclasses.replace(random_model(CONFIG, 0, "float32"), tokenizer=small.letter_tokenizer())


@functools.cache
def method_and_calibration(text):
    method = specs.parse(text, METHODS, "method")
    if not method.needs_calibration:
        return method, vj.resolve_calibration(model(), method)
    return method, calibrate(model(), method, small.texts(), passages=6, passage_length=64, batch=2, progress=False)


def layout_of(shape, **settings):
    return Layout(make_mesh(*map(int, shape.split("x"))), **{"split_from": 0} | settings)


def the_tokens_of_one_device(text, *shapes):
    """Prompts that do not divide, more rows than a data axis takes, a prompt in chunks."""
    method, calibration = method_and_calibration(text)
    prompts = small.prompts(LENGTHS)
    for settings in ({}, {"prefill_chunk": 100}):
        how = {"method": method, "calibration": calibration, "max_new_tokens": 20, "capacity": CAPACITY} | settings
        alone = vj.generate(model(), prompts, **how)
        for shape in shapes:
            out = vj.generate(model(), prompts, **how, mesh=layout_of(shape))
            assert out.tokens == alone.tokens, (text, shape, settings)


def the_distribution_of_one_device(text, *shapes):
    """Teacher-forced: KL at every step, after a prompt that is read exactly or from codes."""
    method, calibration = method_and_calibration(text)
    for read in ("exact", "coded"):
        want = forced_logprobs(Network(Decoder(CONFIG, method, "float32")), model().params, calibration, read)
        for shape in shapes:
            layout = layout_of(shape)
            network = SplitNetwork(Decoder(CONFIG, method, "float32", layout.axes(8, CAPACITY)), layout)
            got = forced_logprobs(network, place_params(model().params, CONFIG, layout), calibration, read)
            kl = np.sum(np.exp(want) * (want - got), axis=-1)
            assert kl.max() <= 1e-4, (text, shape, read, kl.max())


def forced_logprobs(network, params, calibration, read, steps=6):
    tokens = np.zeros((8, max(LENGTHS)), np.int32)
    lengths = np.asarray([*LENGTHS, 65, 64, 1, 128, 200], np.int32)
    rng = np.random.default_rng(3)
    for row, length in enumerate(lengths):
        tokens[row, :length] = rng.integers(0, CONFIG.vocab_size, length)
    init, placed = network.init_caches(calibration.layers, 8, CAPACITY)
    caches = jax.jit(init, out_shardings=placed)(calibration.layers)
    prefill = jax.jit(network.prefill, static_argnums=(5, 6))
    step = jax.jit(network.step)
    logits, caches = prefill(params, tokens, 0, caches, lengths, True, read)
    found = [logits]
    for i in range(steps):
        logits, caches = step(params, rng.integers(0, CONFIG.vocab_size, 8).astype(np.int32), lengths + i, caches)
        found.append(logits)
    return np.asarray(jax.nn.log_softmax(jnp.stack(found)))


def the_codes_of_one_device(text, *shapes):
    """From identical queries, keys and values: a prompt in two chunks, and decoded tokens."""
    method, calibration = method_and_calibration(text)
    method = method.for_layer(1, CONFIG.num_layers)
    batch, width, first, steps = 8, 232, 200, 70
    lengths = np.asarray([232, 64, 131, 5, 200, 1, 199, 33])
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(batch, width + steps, h, CONFIG.head_dim)).astype(np.float32) for h in (16, 8, 8))
    layer = layer_shape(CONFIG, 1, jnp.float32)
    run = functools.partial(feed, method, width=width, first=first, steps=steps)

    def start(layer):
        return method.init(layer, batch, 400, calibration.layers[1] or None)

    def alone(q, k, v, lengths):
        return run(layer, start(layer), q=q, k=k, v=v, lengths=lengths)

    want_outs, want_cache = jax.jit(alone)(q, k, v, lengths)
    for shape in shapes:
        layout = layout_of(shape)
        split = dataclasses.replace(layer, axes=layout.axes(batch, 400))
        shapes_of_cache = jax.eval_shape(lambda split=split: start(split))
        spec = cache_specs(shapes_of_cache, lambda axis, a=split.axes: getattr(a, axis) is not None)
        rows, heads = PartitionSpec("data"), PartitionSpec("data", None, "model")
        of_device = dataclasses.replace(
            split, num_query_heads=16 // layout.size("model"), num_kv_heads=8 // layout.size("model")
        )

        sizes = layout.mesh.shape
        everywhere, here = NonEmpty(shapes_of_cache), NonEmpty(device_share(shapes_of_cache, spec, sizes))

        def mapped(q, k, v, lengths, held, of_device=of_device, here=here):
            outs, cache = run(of_device, here.whole(held), q=q, k=k, v=v, lengths=lengths)
            return outs, here.held(cache)

        program = jax.shard_map(
            mapped,
            mesh=layout.mesh,
            in_specs=(heads, heads, heads, rows, everywhere.held(spec)),
            out_specs=(heads, everywhere.held(spec)),
            check_vma=False,
        )
        place = cache_shardings(shapes_of_cache, spec, layout.mesh)
        cache = jax.jit(lambda split=split: start(split), out_shardings=place)()
        outs, held = jax.jit(program)(q, k, v, lengths, everywhere.held(cache))
        cache = everywhere.whole(held)
        valid = np.arange(width)[None] < lengths[:, None]
        valid = np.concatenate([valid, np.ones((batch, steps), bool)], 1)
        np.testing.assert_allclose(np.asarray(outs)[valid], np.asarray(want_outs)[valid], atol=2e-5)
        dealt = stripes(split.axes, getattr(method, "token_group", 1))
        for s, p, got, want in zip(*map(jax.tree.leaves, (spec, place, cache, want_cache)), strict=True):
            assert got.sharding.memory_kind == want.sharding.memory_kind == p.memory_kind
            got, want = np.asarray(got), np.asarray(want)
            if got.ndim == 3 and got.shape[:2] == (batch, 8):  # outliers without a slot, counted on every device
                got, want = got.sum(2), want.sum(2)
            elif "context" in s:
                axis = s.index("context")
                got = in_order(got, axis, dealt, 400 if method.name == "full" else shapes_of_cache.slots)
                if p.memory_kind == "pinned_host":
                    got = held_slots(got, axis, method, want_cache)
                assert not np.any(np.take(got, range(want.shape[axis], got.shape[axis]), axis)), "written past the end"
                got = np.take(got, range(want.shape[axis]), axis)
            if p.memory_kind == "pinned_host":
                got, want = (held_slots(x, x.shape.index(want_cache.slots), method, want_cache) for x in (got, want))
            np.testing.assert_array_equal(got, want, err_msg=f"{text} {shape} {s}")


def feed(method, layer, cache, q, k, v, lengths, width, first, steps):
    """-> outputs of all tokens, in order, and the cache; on every device of a mesh, or on one."""

    def chunk_of(begin, size):
        pieces = prompt_pieces(layer.axes)
        padded = -(-size // pieces) * pieces
        offsets = prompt_share(jnp.arange(padded)[None], layer.axes)
        positions = jnp.broadcast_to(begin + offsets, (q.shape[0], offsets.shape[1]))
        parts = [
            prompt_share(jnp.pad(x[:, begin : begin + size], ((0, 0), (0, padded - size), (0, 0), (0, 0))), layer.axes)
            for x in (q, k, v)
        ]
        cos, sin = layer.rope.cos_sin(positions)
        here = jnp.clip(lengths - begin, 0, size).astype(jnp.int32)
        return parts, Chunk(positions, here, cos, sin, layer=layer, first=begin == 0)

    outs = []
    for begin, size in ((0, first), (first, width - first)):
        parts, chunk = chunk_of(begin, size)
        out, cache = method.prefill(*parts, chunk, cache)
        outs.append(whole_prompt(out, layer.axes)[:, :size])

    def step(carry, i):
        cache = carry
        at = lengths + i
        token = [
            jnp.take_along_axis(x, (width + i) * jnp.ones((x.shape[0], 1, 1, 1), jnp.int32), axis=1)[:, 0]
            for x in (q, k, v)
        ]
        cos, sin = layer.rope.cos_sin(at[:, None])
        ones = jnp.ones_like(at)
        out, cache = method.decode(*token, Chunk(at[:, None], ones, cos, sin, layer=layer, first=False), cache)
        return cache, out

    cache, decoded = jax.lax.scan(step, cache, jnp.arange(steps, dtype=jnp.int32))
    return jnp.concatenate([*outs, jnp.moveaxis(decoded, 0, 1)], axis=1), cache


def in_order(x, axis, dealt, slots):
    """A cache's array in the order of slots, from the shares of all devices side by side."""
    slots = dealt.whole_turns(slots)
    blocks = slots // dealt.shards // dealt.block
    shape = [*x.shape[:axis], dealt.shards, blocks, -1, *x.shape[axis + 1 :]]
    return np.swapaxes(x.reshape(shape), axis, axis + 1).reshape(x.shape)


def held_slots(x, axis, method, cache):
    """An array of the host with zeros beyond the slots that each row holds: they are written before they count."""
    there = np.arange(x.shape[axis]) < np.asarray(method.coded_count(cache.lengths))[:, None]
    return np.where(there.reshape(len(x), *(-1 if i == axis else 1 for i in range(1, x.ndim))), x, 0)


def lm_on(shape):
    return place_model(model(), layout_of(shape))


def activations_are_those_of_one_device(*shapes):
    """All that methods are calibrated with, of a last batch that is not full."""
    how = {"passages": 5, "passage_length": 61, "batch": 4, "samples": 100, "progress": False}
    wanted = frozenset({"weights", "windows", "gradients", "shares"})
    alone = collect(model(), small.texts(), wanted=wanted, **how)
    for shape in shapes:
        found = collect(lm_on(shape), small.texts(), wanted=wanted, **how)
        assert found.metadata == alone.metadata and found.passages == alone.passages
        for index, layers in enumerate(zip(found.statistics, alone.statistics, strict=True)):
            for (name, got), (_, want) in zip(*map(jax.tree_util.tree_leaves_with_path, layers), strict=True):
                exact = want.dtype == np.int32 or "priority" in str(name)
                close = 2**-6 if "gradients" in str(name) else 1e-4  # gradients are bfloat16
                far = {} if exact else {"rtol": close, "atol": 1e-5 * np.abs(want.astype(np.float32)).max()}
                compare = np.testing.assert_array_equal if exact else np.testing.assert_allclose
                got, want = (x if exact else x.astype(np.float32) for x in (got, want))
                compare(got, want, err_msg=f"{shape} layer {index} {name}", **far)


def evaluation_is_that_of_one_device(text, *shapes):
    """Perplexity of windows that no axis divides, errors of codes, and what a task's cases are answered."""
    method, calibration = method_and_calibration(text)
    document, windows = "".join(small.texts()), np.asarray(small.prompts((101, 101)))
    how = {"length": 101, "windows": 3, "batch": 2, "progress": False}

    def measured(lm):
        return (
            [vj.evaluate.perplexity(lm, method, calibration, document, prefill=p, **how) for p in ("coded", "exact")],
            vj.evaluate.code_error(lm, method, calibration, windows, progress=False),
            vj.evaluate.answer(lm, StandIn(), method, calibration, batch=2, progress=False),
        )

    alone = measured(model())
    for shape in shapes:
        same_results(measured(lm_on(shape)), alone, f"{text} {shape}")


def perplexity_is_that_of_one_device(text, *shapes):
    method, document = specs.parse(text, METHODS, "method"), "".join(small.texts())
    how = {"text": document, "length": 64, "windows": 2, "progress": False}
    alone = vj.evaluate.perplexity(model(), method, batch=2, **how)
    for shape in shapes:
        same_results(vj.evaluate.perplexity(lm_on(shape), method, **how), alone, f"{text} {shape}")


def same_results(got, want, said):
    """Results of evaluations, but for rounding."""
    found = fields(want), fields(got)
    for (name, one), (_, other) in zip(*map(jax.tree_util.tree_leaves_with_path, found), strict=True):
        if isinstance(one, str):
            assert one == other, (said, name)
        else:  # one prediction of 300 may tip
            least = 1 / 300 if "top1_agreement" in str(name) else 0
            np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-5 + least, err_msg=f"{said} {name}")


def selection_is_that_of_one_device(text, *shapes):
    """What layers in the host's memory would read."""
    method, calibration = method_and_calibration(text)
    windows = np.asarray(small.prompts((101,)))
    alone = vj.evaluate.selection_recall(model(), method, calibration, windows, progress=False)
    for shape in shapes:
        found = vj.evaluate.selection_recall(lm_on(shape), method, calibration, windows, progress=False)
        same_results(found, alone, f"{text} {shape}")


def calibrations_of_a_mesh_serve_as_well(text, *shapes):
    """What rounding tips in k-means leaves other codebooks, and no worse ones."""
    method, calibration = method_and_calibration(text)
    how = {"text": "".join(small.texts()), "length": 64, "windows": 2, "progress": False}
    alone = vj.evaluate.perplexity(model(), method, calibration, **how).kl
    for shape in shapes:
        made = calibrate(lm_on(shape), method, small.texts(), passages=6, passage_length=64, batch=2, progress=False)
        assert vj.evaluate.perplexity(model(), method, made, **how).kl < 1.2 * alone


def descent_is_that_of_one_device(text, *shapes):
    """Two steps through the whole model, from the same codebooks."""
    method, calibration = method_and_calibration(text)
    passages = small.prompts((40, 40))
    found = []
    for lm in (model(), *map(lm_on, shapes)):
        params = fold_values(lm, method, calibration)
        layers = calibration.layers
        found.append(refine_model(lm, params, layers, [0] * len(layers), passages, seed=0, steps=2))
    for got, shape in zip(found[1:], shapes, strict=True):
        for index, want in enumerate(found[0]):
            for name, array in want.items():
                far = {"rtol": 1e-3, "atol": 1e-4 * np.abs(array).max()}
                np.testing.assert_allclose(got[index][name], array, err_msg=f"{shape} {index} {name}", **far)
            assert any(np.abs(array - calibration.layers[index][name]).max() > 1e-3 for name, array in want.items())


def the_command_takes_a_mesh():
    with tempfile.TemporaryDirectory() as directory:
        there = Path(directory)
        (there / "text.txt").write_text("\n\n".join(small.texts()))
        model().save(there / "model")
        common = ["--model", there / "model", "--bits", 2, "--text", there / "text.txt", "--quiet"]
        made = ["--passages", 4, "--passage-length", 64, "--output", there / "artefact", "--mesh", "data=2,model=2"]
        scored = [
            "--residual",
            0,
            "--calibration",
            there / "artefact",
            "--length",
            64,
            "--windows",
            2,
            "--json",
            there / "scores.json",
        ]
        for command in (
            ["calibrate", *common, *made],
            ["evaluate", "perplexity", *common, *scored, "--mesh", "context=2,model=4"],
        ):
            assert cli.main([str(word) for word in command]) == 0
        found = json.loads((there / "scores.json").read_text())["perplexity"]
        calibration = vj.load_calibration(there / "artefact", model())
        text = "\n\n".join(small.texts())
        alone = vj.evaluate.perplexity(
            model(), vj.VecInfer(bits=2, residual=0), calibration, text, length=64, windows=2, progress=False
        )
        assert abs(found / alone.perplexity - 1) < 1e-3


def fields(results):
    """What results hold, as a tree."""
    return jax.tree.map(dataclasses.asdict, results, is_leaf=lambda x: dataclasses.is_dataclass(x))


def every_merge_is_one_softmax():
    """All collectives give what a softmax over all parts gives, also where parts hold nothing."""
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(8, 2, 4, 16)).astype(np.float32)
    lses = rng.normal(size=(8, 2, 4)).astype(np.float32) * 5
    lses[1:3, 0], lses[0, 1] = -1e30, -1e30
    outputs[1:3, 0] = np.nan
    weights = np.exp(lses.astype(np.float64))
    want = np.nansum(outputs * weights[..., None], 0) / weights.sum(0)[..., None]
    layout = layout_of("1x8x1")
    for merge in MERGES:

        def part(output, lse, merge=merge):
            return MERGES[merge](output[0], lse[0], "context", 8)[None]

        spec = PartitionSpec("context")
        run = jax.shard_map(part, mesh=layout.mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
        got = np.asarray(jax.jit(run)(outputs, lses))
        assert (got == got[:1]).all(), merge  # the same bits everywhere
        np.testing.assert_allclose(got[0], want, atol=2e-2 if merge == "gather-16" else 1e-5, err_msg=merge)


def a_step_sends_what_the_design_says():
    """The collectives of a compiled step, by kind and bytes: nothing of the cache is sent."""
    batch, dim, hidden, vocabulary, layers = (
        2,
        CONFIG.head_dim,
        CONFIG.hidden_size,
        CONFIG.vocab_size,
        CONFIG.num_layers,
    )
    method, calibration = method_and_calibration("vecinfer:bits=2,residual=16")
    for shape, merge in (("1x4x1", "gather"), ("1x2x4", "gather"), ("2x2x2", "sum"), ("2x1x4", "gather")):
        data, context, models = map(int, shape.split("x"))
        layout = layout_of(shape, merge=merge)
        network = SplitNetwork(Decoder(CONFIG, method, "float32", layout.axes(batch, CAPACITY)), layout)
        params = place_params(model().params, CONFIG, layout)
        init, placed = network.init_caches(calibration.layers, batch, CAPACITY)
        caches = jax.jit(init, out_shardings=placed)(calibration.layers)
        ids = jax.device_put(np.zeros((batch,), np.int32), layout.sharding("data"))
        sent = collectives(jax.jit(network.step).lower(params, ids, ids, caches).compile().as_text())
        rows = batch // data
        part = 4 * rows * 16 // models * (dim + 1) * context  # outputs and log-sum-exps of all devices
        want = collections.Counter()
        if context > 1:
            want["all-gather" if merge == "gather" else "all-reduce", part] += layers
        if models > 1:
            want["all-reduce", 4 * rows * hidden] += 1 + 2 * layers  # the embedding; after attention, feed-forward
            want["all-gather", 4 * rows * vocabulary] += 1  # logits
        assert sent == want, (shape, sent, want)


def collectives(text):
    """Of a compiled program: how often each kind of so many bytes."""
    found = collections.Counter()
    for line in text.splitlines():
        match = re.search(
            r"= (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(-start)?\(", line
        )
        if match:
            sizes = re.findall(r"\b([a-z]+)(\d+)\[([\d,]*)\]", match[1])
            size = sum(int(bits) // 8 * int(np.prod([int(n) for n in dims.split(",") if n])) for _, bits, dims in sizes)
            found[match[2], size] += 1
    return found


def weights_are_where_they_belong():
    """Loaded for a mesh, every device holds its share only, and nothing moves when generation begins."""
    layout = layout_of("1x2x4")
    placed = place_params(model().params, CONFIG, layout)
    kernel = placed["layers_0"]["attention"]["q_proj"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(CONFIG.hidden_size, 4, CONFIG.head_dim)}
    again = place_params(placed, CONFIG, layout)
    for a, b in zip(*map(jax.tree.leaves, (placed, again)), strict=True):
        pointers = {x.addressable_data(0).unsafe_buffer_pointer() for x in (a, b)}
        assert len(pointers) == 1


def biases_count_once():
    """A model with biases in every projection."""
    config = dataclasses.replace(CONFIG, qkv_bias=True, output_bias=True, mlp_bias=True, tie_embeddings=False)
    lm = random_model(config, 1, "float32")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32) * 0.3 * (x.ndim < 3), lm.params)
    lm = dataclasses.replace(lm, params=params)
    alone = vj.generate(lm, small.prompts((40,)), max_new_tokens=12)
    for shape in ("1x2x4", "1x1x8"):
        out = vj.generate(lm, small.prompts((40,)), max_new_tokens=12, mesh=layout_of(shape))
        np.testing.assert_allclose(out.logprobs, alone.logprobs, atol=1e-4)


def short_caches_are_not_split():
    mesh = make_mesh(context=4)
    assert Layout(mesh).axes(1, 4096).context is None and Layout(mesh).axes(1, 4096).shards == 1
    assert Layout(mesh).axes(1, 2**20).context == "context" and Layout(mesh).axes(16, 65536).shards == 4
    assert Layout(make_mesh()).axes(1, 2**20) == dataclasses.replace(NO_AXES, merge="gather")


def what_does_not_fit_is_said_in_one_line():
    lm, several = model(), types.SimpleNamespace(mesh=types.SimpleNamespace(is_multi_process=True))
    for action, words in (
        (lambda: Layerwise(dataclasses.replace(lm, layout=several)), "in one process"),
        (lambda: make_mesh(context=9), "9 devices, there are 8"),
        (lambda: parse_mesh("contexts=2"), "no axis 'contexts'"),
        (lambda: parse_mesh("context=two"), "context=2"),
        (lambda: Layout(jax.make_mesh((8,), ("x",))), "no axis 'x'"),
        (lambda: Layout(make_mesh(), merge="shout"), "choose from gather"),
        (lambda: vj.generate(lm, ["a"], mesh=make_mesh(model=3)), "8 KV heads"),
        (lambda: vj.generate(lm, ["a"], mesh="context=2"), "is no mesh"),
    ):
        try:
            action()
        except InputError as error:
            assert words in str(error) and "\n" not in str(error), error
        else:
            raise AssertionError(f"not refused: {words}")


if __name__ == "__main__":
    assert jax.device_count() == 8
    names, *arguments = sys.argv[1:]
    for name in names.split(","):
        globals()[name](*arguments)
