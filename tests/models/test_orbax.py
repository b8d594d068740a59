"""Orbax directories: what is saved comes back, whole or not at all."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.conftest import GOLDENS
from vecinfer_jax.errors import InputError, WeightsError
from vecinfer_jax.models import load, save_orbax

QWEN3 = GOLDENS / "tiny" / "qwen3"


@pytest.fixture
def saved(tmp_path):
    """-> (model, the directory it was saved to)."""
    lm = load(QWEN3, "float32", progress=False)
    return lm, lm.save(tmp_path / "model")


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_round_trip(saved):
    lm, directory = saved
    again = load(directory, "float32", progress=False)
    same(again.params, lm.params)
    assert again.config == lm.config
    assert again.fingerprint == lm.fingerprint
    assert again.name == lm.name


def test_round_trip_of_a_real_tokenizer(smollm2, tmp_path):
    lm = load(QWEN3, "float32", progress=False)
    save_orbax(lm.params, lm.config, tmp_path / "model", tokenizer=smollm2.tokenizer)
    again = load(tmp_path / "model", progress=False)
    text = "Numbers 1234, naïve café, <|im_start|>"
    assert again.tokenizer.encode(text) == smollm2.tokenizer.encode(text)
    messages = [{"role": "user", "content": "Hello"}]
    assert again.tokenizer.apply_chat_template(messages) == smollm2.tokenizer.apply_chat_template(messages)
    assert again.tokenizer.special_tokens == smollm2.tokenizer.special_tokens
    assert set(smollm2.tokenizer.eos_token_ids) <= set(again.tokenizer.eos_token_ids)


def test_saved_in_bfloat16_the_fingerprint_stays(tmp_path):
    lm = load(QWEN3, "bfloat16", progress=False)
    again = load(lm.save(tmp_path / "model"), "bfloat16", progress=False)
    same(again.params, lm.params)
    assert again.fingerprint == lm.fingerprint == load(QWEN3, "float32", progress=False).fingerprint


def test_loading_casts(saved):
    lm, directory = saved
    narrow = load(directory, "bfloat16", progress=False)
    same(narrow.params, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), lm.params))


def test_sharding_is_followed(saved):
    _, directory = saved
    asked = []
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    load(directory, progress=False, sharding=lambda path: asked.append(path) or place)
    assert "layers_1/feed_forward/down_proj/kernel" in asked


def test_hugging_face_config_serves(saved):
    lm, directory = saved
    shutil.copy(QWEN3 / "config.json", directory / "config.json")
    again = load(directory, "bfloat16", progress=False)
    assert again.config == lm.config
    assert again.fingerprint == lm.fingerprint


def test_nothing_is_overwritten(saved):
    lm, directory = saved
    with pytest.raises(InputError, match="exists already"):
        lm.save(directory)


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    lm = load(QWEN3, "float32", progress=False)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        lm.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def refused(directory) -> str:
    with pytest.raises(WeightsError) as error:
        load(directory, progress=False)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_other_weights_than_the_configuration_says(saved):
    _, directory = saved
    description = json.loads((directory / "config.json").read_text())
    description["model"].update(num_layers=3, qkv_bias=True, intermediate_size=80)
    (directory / "config.json").write_text(json.dumps(description))
    message = refused(directory)
    assert "missing:" in message and "layers_2/attention/q_proj/kernel" in message
    assert "layers_0/attention/q_proj/bias" in message
    assert "misshapen: layers_0/feed_forward/down_proj/kernel is [96, 48], not [80, 48]" in message


def test_damaged_weights(saved):
    _, directory = saved
    files = [path for path in (directory / "params").rglob("*") if path.is_file() and path.stat().st_size > 4000]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "incomplete or damaged" in refused(directory)


def test_missing_metadata(saved):
    _, directory = saved
    for path in (directory / "params").iterdir():
        if path.is_file():
            path.unlink()
    assert "incomplete or damaged" in refused(directory)


def test_unknown_format(saved):
    _, directory = saved
    (directory / "config.json").write_text('{"format": "vecinfer_jax 99"}')
    assert "convert the model again" in refused(directory)


def test_weights_that_are_not_finite(saved, tmp_path):
    lm, _ = saved
    params = {**lm.params, "final_norm": {"scale": lm.params["final_norm"]["scale"].at[0].set(np.inf)}}
    save_orbax(params, lm.config, tmp_path / "infinite")
    assert "not finite" in refused(tmp_path / "infinite")
