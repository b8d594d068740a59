"""Calibration is deterministic, streams, and its artefacts are refused when anything is wrong with them."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from tests import small
from vecinfer_jax.caches import FullPrecision, PerLayer, TailorKV, VecInfer
from vecinfer_jax.caches.vecinfer import smoothing_factors
from vecinfer_jax.calibration.artefact import Calibration
from vecinfer_jax.calibration.collect import calibrate, collect_statistics, passages_of, text_of
from vecinfer_jax.calibration.store import load_calibration, resolve_calibration
from vecinfer_jax.errors import AssetError, CalibrationError, CalibrationWarning, InputError
from vecinfer_jax.models.decoder import Decoder, layer_shape

METHOD = VecInfer(bits=2, transform="smooth-hadamard")


@pytest.fixture
def saved(tmp_path):
    return small.calibration_of(METHOD).save(tmp_path / "artefact")


def test_statistics_are_those_of_the_models_keys():
    lm = small.model()
    passages = list(passages_of(lm, small.texts(), 64))
    count, statistics = collect_statistics(lm, passages, passages=4, samples=8192, batch=2, seed=0, progress=False)
    assert count == 4
    peak = np.zeros((lm.config.num_layers, 2, 16))
    for row in passages[:4]:
        tokens = jnp.asarray(row)[None]
        positions = jnp.arange(len(row))[None]
        caches = tuple(FullPrecision().init(layer_shape(lm.config, i, lm.dtype), 1, 64) for i in range(3))
        _, caches = Decoder(lm.config, FullPrecision()).apply({"params": lm.params}, tokens, positions, caches)
        peak = np.maximum(peak, [np.abs(np.asarray(c.keys)[0, : len(row)]).max(0) for c in caches])
    for layer in range(3):
        np.testing.assert_allclose(statistics[layer].key_abs_max, peak[layer], rtol=1e-5)
        assert int(statistics[layer].count) == 4 * 64
        assert statistics[layer].keys.shape == (256, 2, 16)  # all fit the sample


def test_a_sample_is_uniform_bounded_and_the_same_tokens_in_every_layer():
    from vecinfer_jax.calibration.statistics import Statistics

    lm = small.model()
    method = Statistics(samples=100, seed=1)
    layer = layer_shape(lm.config, 0, lm.dtype)
    cache = method.init(layer, 2, 0)
    rng = np.random.default_rng(0)
    seen = []
    from vecinfer_jax.caches.base import Chunk

    for step in range(20):
        k = jnp.asarray(rng.normal(size=(2, 32, 2, 16)), jnp.float32).at[..., 0].set(step)
        q = jnp.asarray(rng.normal(size=(2, 32, 6, 16)), jnp.float32)
        positions = jnp.broadcast_to(jnp.arange(32), (2, 32))
        cos, sin = jnp.ones((2, 32, 8)), jnp.zeros((2, 32, 8))
        _, cache = method.prefill(q, k, k, Chunk(positions, jnp.array([32, 20]), cos, sin, layer=layer), cache)
        seen.append(52)
    assert int(cache.count) == sum(seen)
    assert cache.keys.shape[0] == 100
    steps = np.asarray(cache.keys)[:, 0, 0]
    assert len(set(steps.tolist())) >= 15  # early and late chunks are both in it
    assert np.all(np.asarray(cache.positions) < 32)


def test_smoothing_factors_are_the_papers():
    peak = np.array([[4.0, 9.0, 0.0]])
    factors = smoothing_factors(peak)
    np.testing.assert_allclose(factors[0, :2], [2.0, 3.0])
    assert 0 < factors[0, 2] <= 0.01


def test_the_same_seed_gives_the_same_calibration():
    again = calibrate(small.model(), METHOD, small.texts(), passages=6, passage_length=64, batch=2, progress=False)
    first = small.calibration_of(METHOD)
    for a, b in zip(first.layers, again.layers, strict=True):
        for field in a:
            np.testing.assert_array_equal(a[field], b[field])


def test_an_artefact_reads_back_as_it_was(saved):
    read = load_calibration(saved, small.model(), METHOD)
    for a, b in zip(small.calibration_of(METHOD).layers, read.layers, strict=True):
        assert set(a) == set(b) == {"smooth", "key_codebook", "value_codebook"}
        for field in a:
            np.testing.assert_array_equal(a[field], b[field])
    assert read.metadata["text"]["name"] == "given"


def test_layers_that_need_nothing_read_back_as_such(tmp_path):
    method = PerLayer(METHOD, ((0, FullPrecision()), (2, FullPrecision())))
    saved = small.calibration_of(method).save(tmp_path / "mixed")
    read = load_calibration(saved, small.model(), method)
    assert [set(layer) for layer in read.layers] == [set(), {"smooth", "key_codebook", "value_codebook"}, set()]


def test_saving_again_replaces_the_whole_artefact_and_leaves_nothing_else(saved):
    small.calibration_of(METHOD).save(saved)
    assert [p.name for p in saved.parent.iterdir()] == ["artefact"]
    load_calibration(saved, small.model(), METHOD)


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_models_artefact_is_refused(saved):
    metadata = json.loads((saved / "metadata.json").read_text())
    metadata["model"] |= {"fingerprint": "0123456789abcdef", "name": "other"}
    (saved / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(CalibrationError, match="'other'") as error:
        load_calibration(saved, small.model())
    one_line(error)


def test_another_methods_artefact_is_refused(saved):
    with pytest.raises(CalibrationError, match="d8b8") as error:
        load_calibration(saved, small.model(), VecInfer(bits=1, transform="smooth-hadamard"))
    one_line(error)


def test_a_truncated_artefact_is_refused(saved):
    for path in [p for p in (saved / "arrays").rglob("*") if p.is_file() and p.parent.name == "d"]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CalibrationError) as error:
        load_calibration(saved, small.model(), METHOD)
    assert str(saved) in one_line(error)


def test_an_artefact_without_arrays_is_refused(saved):
    shutil.rmtree(saved / "arrays")
    with pytest.raises(CalibrationError) as error:
        load_calibration(saved, small.model(), METHOD)
    one_line(error)


def test_an_altered_artefact_is_refused(tmp_path, saved):
    calibration = small.calibration_of(METHOD)
    layers = [dict(layer) for layer in calibration.layers]
    layers[1]["smooth"] = layers[1]["smooth"] * 2
    other = Calibration(tuple(layers), calibration.metadata).save(tmp_path / "other")
    shutil.rmtree(saved / "arrays")
    shutil.copytree(other / "arrays", saved / "arrays")
    with pytest.raises(CalibrationError, match="layer_001/smooth") as error:
        load_calibration(saved, small.model(), METHOD)
    one_line(error)


def test_an_artefact_with_nan_is_refused(tmp_path):
    calibration = small.calibration_of(METHOD)
    layers = [dict(layer) for layer in calibration.layers]
    layers[2]["key_codebook"] = np.where(layers[2]["key_codebook"] > 0.1, np.nan, layers[2]["key_codebook"])
    path = Calibration(tuple(layers), calibration.metadata).save(tmp_path / "nan")
    with pytest.raises(CalibrationError, match="key_codebook") as error:
        load_calibration(path, small.model(), METHOD)
    one_line(error)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": 99}', "not json"])
def test_damaged_metadata_is_refused(saved, content):
    (saved / "metadata.json").write_text(content)
    with pytest.raises(CalibrationError) as error:
        load_calibration(saved, small.model(), METHOD)
    one_line(error)


def test_what_is_no_artefact_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "odd" / "metadata.json").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "file", tmp_path / "odd", tmp_path / "missing"):
        with pytest.raises(CalibrationError, match="holds no calibration") as error:
            load_calibration(path, small.model())
        one_line(error)


@pytest.mark.parametrize("arrays", [[], {"layer_000/smooth": {}}, {"layer_000/smooth": 3}])
def test_metadata_without_its_arrays_is_refused(saved, arrays):
    metadata = json.loads((saved / "metadata.json").read_text())
    (saved / "metadata.json").write_text(json.dumps(metadata | {"arrays": arrays}))
    with pytest.raises(CalibrationError) as error:
        load_calibration(saved, small.model(), METHOD)
    one_line(error)


def test_a_given_calibration_is_checked_before_use():
    with pytest.raises(CalibrationError):
        resolve_calibration(small.model(), VecInfer(bits=1, transform="smooth-hadamard"), small.calibration_of(METHOD))


def test_the_first_use_calibrates_says_so_and_keeps_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VECINFER_CACHE", str(tmp_path))
    monkeypatch.setattr("vecinfer_jax.calibration.collect.default_texts", lambda seed: iter(small.texts()))
    method = VecInfer(bits=4, transform="smooth-hadamard")
    made = resolve_calibration(small.model(), method, None)
    assert "calibrating once" in capsys.readouterr().err
    again = resolve_calibration(small.model(), method, None)
    assert capsys.readouterr().err == ""
    np.testing.assert_array_equal(made.layers[0]["key_codebook"], again.layers[0]["key_codebook"])


def test_empty_text_is_refused():
    with pytest.raises(CalibrationError, match="empty"):
        calibrate(small.model(), METHOD, ["", "  \n"], progress=False)


def test_one_string_is_not_taken_for_many_documents():
    with pytest.raises(InputError, match="iterable"):
        calibrate(small.model(), METHOD, "a text", progress=False)


def test_passages_join_documents_and_keep_the_rest():
    passages = list(passages_of(small.model(), ["abc", "", "de"], 4))
    text = "".join(chr(i) for row in passages for i in row)
    assert text == "abc\n\nde"
    assert [len(row) for row in passages] == [4, 3]


def test_repeated_passages_say_the_same_documents_twice():
    lm, length = small.model(), 20

    def read(repeated, seed=1):
        rows = passages_of(lm, ["abcd", "", "ef", "hijk", "lm", "nop", "qrs", "tuvw", "xyzAB"], length, repeated, seed)
        return ["".join(map(chr, row)) for row in rows]

    whole, half, every = read(0.0)[0] + read(0.0)[1] + read(0.0)[2], read(0.5), read(1.0)
    assert half[0] == whole[:20]  # every second one
    assert [row[:10] for row in every[:-1]] == [whole[i : i + 10] for i in range(0, 10 * len(every) - 10, 10)]
    assert "".join([half[0], half[1][:10], half[2]]).startswith(whole[:50])
    for row in (half[1], *every[:-1]):
        assert len(row) == length and sorted(row[:10]) == sorted(row[10:])
        assert all(document in row[10:] for document in row[:10].split("\n\n"))
    assert any(row[:10] != row[10:] for row in every[:-1])  # in another order
    assert every == read(1.0) != read(1.0, seed=2)


def test_text_is_repeated_where_the_method_asks_for_it():
    lm, descends = small.model(), VecInfer(bits=1, refine="kl")
    assert (descends.calibration_repeated, VecInfer(bits=1, refine="attention").calibration_repeated) == (0.5, 0.0)
    assert PerLayer(descends).calibration_repeated == 0.5 and descends.calibration_text == (64, 2048)
    settings = {"passages": 4, "passage_length": 64, "progress": False}
    method = VecInfer(bits=1)
    plain, repeated = (calibrate(lm, method, small.texts(), repeated=r, **settings) for r in (None, 0.5))
    assert (plain.metadata["repeated"], repeated.metadata["repeated"]) == (0.0, 0.5)
    assert plain.digest != repeated.digest
    with pytest.raises(InputError, match="must be a share"):
        calibrate(lm, method, small.texts(), repeated=1.5, **settings)


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_saving_never_replaces_what_is_no_artefact(tmp_path, kind):
    target = tmp_path / "mine"
    if kind == "directory":
        target.mkdir()
        (target / "precious.txt").write_text("kept")
    else:
        target.write_text("kept")
    with pytest.raises(InputError, match="is no calibration"):
        small.calibration_of(METHOD).save(target)
    assert (target / "precious.txt" if kind == "directory" else target).read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_an_interrupted_replacement_keeps_the_old_artefact(saved, monkeypatch):
    import os

    rename = os.replace
    calls = []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr("vecinfer_jax.calibration.artefact.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small.calibration_of(METHOD).save(saved)
    monkeypatch.undo()
    assert [p.name for p in saved.parent.iterdir()] == ["artefact"]
    load_calibration(saved, small.model(), METHOD)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError) as error:
        small.calibration_of(METHOD).save(tmp_path / "file" / "below")
    assert "\n" not in str(error.value)


def test_a_damaged_kept_calibration_is_passed_over_and_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VECINFER_CACHE", str(tmp_path))
    monkeypatch.setattr("vecinfer_jax.calibration.collect.default_texts", lambda seed: iter(small.texts()))
    method = VecInfer(bits=1, residual=0, transform="smooth-hadamard")
    resolve_calibration(small.model(), method)
    from vecinfer_jax.calibration.store import kept_directory

    (kept_directory(small.model(), method) / "metadata.json").unlink()
    capsys.readouterr()
    resolve_calibration(small.model(), method)
    said = capsys.readouterr().err
    assert "passed over" in said and "calibrating once" in said
    resolve_calibration(small.model(), method)
    assert capsys.readouterr().err == ""


def test_long_sequences_are_calibrated_for_and_short_calibrations_say_so(tmp_path, monkeypatch, capsys):
    """Of methods whose maps are of the positions they were calibrated on."""
    monkeypatch.setenv("VECINFER_CACHE", str(tmp_path))
    monkeypatch.setattr("vecinfer_jax.calibration.collect.default_texts", lambda seed: iter(small.texts()))
    monkeypatch.setattr("vecinfer_jax.caches.vecinfer.CENTRED_TEXT", (8, 64))
    lm, method = small.model(), VecInfer(bits=1, residual=0)

    def resolved(tokens, method=method):
        made = resolve_calibration(lm, method, tokens=tokens, progress=False)
        return made.metadata["passages"], made.metadata["passage_length"]

    assert [resolved(n) for n in (None, 64, 65, 100)] == [(8, 64), (8, 64), (4, 128), (4, 128)]
    assert resolved(64) == (8, 64) and text_of(lm, method, 200) == (2, 256)
    short = resolve_calibration(lm, method, tokens=50)
    with pytest.warns(CalibrationWarning, match="passages of 64 tokens, .* passages=2, passage_length=256") as warned:
        assert resolve_calibration(lm, method, short, tokens=129) is short
    assert "\n" not in str(warned[0].message)
    resolve_calibration(lm, method, short, tokens=64)
    paper = VecInfer(bits=1, residual=0, transform="smooth-hadamard")
    resolve_calibration(lm, paper, small.calibration_of(paper), tokens=500)  # as the paper has it
    assert text_of(lm, method, 1000) == (2, 1024) == text_of(lm, method, 5000)
    assert text_of(lm, VecInfer(bits=1, refine="attention"), 1000) == (2, 1024)
    monkeypatch.setattr("vecinfer_jax.calibration.collect.LONGEST_DESCENT", 128)
    assert text_of(lm, VecInfer(bits=1, refine="attention"), 1000) == (4, 128)
    assert text_of(lm, VecInfer(bits=1, refine="kl"), 1000) == (64, 1024)
    other = VecInfer(bits=2, residual=0)
    assert text_of(lm, TailorKV(roles=("sparse*3",), basis="principal")) == (64, 1024)
    assert PerLayer(other).bound_to_positions and not PerLayer(paper).bound_to_positions
    assert not TailorKV(roles=("sparse*3",)).bound_to_positions and TailorKV(quantised=other).bound_to_positions


def test_sequences_longer_than_any_calibration_are_calibrated_for_once_and_said_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VECINFER_CACHE", str(tmp_path))
    monkeypatch.setattr("vecinfer_jax.calibration.collect.default_texts", lambda seed: iter(small.texts()))
    monkeypatch.setattr("vecinfer_jax.calibration.collect.LONGEST", 128)
    monkeypatch.setattr("vecinfer_jax.caches.vecinfer.CENTRED_TEXT", (8, 64))
    made = []
    for _ in range(2):
        with pytest.warns(CalibrationWarning, match="passages of 128 tokens, but 200"):
            made.append(resolve_calibration(small.model(), VecInfer(bits=1, residual=0), tokens=200))
    assert made[0].digest == made[1].digest
    assert capsys.readouterr().err.count("calibrating once") == 1


def test_where_none_can_be_made_a_shorter_one_serves_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("VECINFER_CACHE", str(tmp_path))
    monkeypatch.setattr("vecinfer_jax.calibration.collect.default_texts", lambda seed: iter(small.texts()))
    monkeypatch.setattr("vecinfer_jax.caches.vecinfer.CENTRED_TEXT", (8, 64))
    lm, method = small.model(), VecInfer(bits=1, residual=0)

    def offline(seed):
        raise AssetError("no network")

    def used():
        return resolve_calibration(lm, method, tokens=200, progress=False)

    with monkeypatch.context() as without_text:
        without_text.setattr("vecinfer_jax.calibration.collect.default_texts", offline)
        with pytest.raises(AssetError):
            used()
    short = resolve_calibration(lm, method, progress=False)
    monkeypatch.setattr("vecinfer_jax.calibration.collect.default_texts", offline)
    with pytest.warns(CalibrationWarning, match="passages of 64 tokens"):
        assert used().digest == short.digest
    monkeypatch.setattr("vecinfer_jax.calibration.collect.default_texts", lambda seed: iter(small.texts()))
    monkeypatch.setattr("vecinfer_jax.calibration.store._several_processes", lambda: True)
    with pytest.warns(CalibrationWarning, match="passages of 64 tokens"):
        assert used().digest == short.digest


def test_a_text_shorter_than_a_passage_reaches_no_farther_than_it_goes():
    lm, method = small.model(), VecInfer(bits=1)
    made = calibrate(lm, method, small.texts(), passages=1, passage_length=1024, progress=False)
    assert made.metadata["longest_passage"] < 1024
    with pytest.warns(CalibrationWarning, match=f"passages of {made.metadata['longest_passage']} tokens"):
        resolve_calibration(lm, method, made, tokens=1000)


@pytest.mark.parametrize(
    "options",
    [
        {"passages": 0},
        {"passage_length": 1},
        {"passage_length": 5000},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_settings_that_make_no_sense_are_refused(options):
    with pytest.raises(InputError) as error:
        calibrate(small.model(), METHOD, small.texts(), progress=False, **options)
    assert "\n" not in str(error.value)


def test_a_text_too_short_for_the_codebook_is_refused():
    with pytest.raises(CalibrationError, match="more text"):
        calibrate(small.model(), METHOD, ["hi there"], progress=False)


def test_large_seeds_are_fine():
    made = calibrate(
        small.model(), METHOD, small.texts(), passages=4, passage_length=64, seed=4_000_000_000, progress=False
    )
    assert made.metadata["seed"] == 4_000_000_000
    assert made.digest != small.calibration_of(METHOD).digest
