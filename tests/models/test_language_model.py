"""Where models may be loaded from, and what is said where they may not."""

import shutil
import sys

import jax.numpy as jnp
import pytest

from tests.conftest import GOLDENS
from vecinfer_jax import assets
from vecinfer_jax.errors import InputError, WeightsError
from vecinfer_jax.models import load, resolve_dtype

QWEN2 = GOLDENS / "tiny" / "qwen2"
REPOSITORY = "Qwen/Qwen2.5-Coder-0.5B-Instruct"


@pytest.fixture
def hub(monkeypatch):
    """Stands in for huggingface_hub; `hub.asked` is what was downloaded."""

    class Hub:
        asked: list[str] = []  # noqa: RUF012

        @classmethod
        def snapshot_download(cls, repository, **kwargs):
            cls.asked.append(repository)
            if repository != REPOSITORY:
                raise OSError("no network\nat all")
            return str(QWEN2)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    return Hub


def test_repository_names_go_to_the_hub(hub):
    lm = load(REPOSITORY, progress=False)
    assert hub.asked == [REPOSITORY]
    assert lm.name == REPOSITORY
    assert lm.fingerprint == load(QWEN2, progress=False).fingerprint


def test_an_unreachable_hub_is_one_line(hub):
    with pytest.raises(WeightsError, match="no network at all"):
        load("some/model", progress=False)


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"vecinfer-jax\[hub\]"):
        load(REPOSITORY, progress=False)


def test_assets_by_name(monkeypatch, tmp_path):
    fetched = []
    monkeypatch.setattr(assets, "fetch", lambda name, progress: fetched.append(name) or QWEN2)
    assert load("smollm2-135m-instruct", progress=False).name == "smollm2-135m-instruct"
    assert fetched == ["smollm2-135m-instruct"]


def test_texts_are_not_models(monkeypatch):
    monkeypatch.setattr(assets, "fetch", lambda name, progress: pytest.fail("fetched"))
    with pytest.raises(InputError, match="no model 'hotpotqa-paragraphs'"):
        load("hotpotqa-paragraphs")


def test_a_directory_is_named_after_itself(tmp_path):
    assert load(shutil.copytree(QWEN2, tmp_path / "mine"), progress=False).name == "mine"


def test_ends_of_text_come_from_every_file(tmp_path):
    directory = shutil.copytree(QWEN2, tmp_path / "mine")
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 2, 9]}')
    assert load(directory, progress=False).config.eos_token_ids == (2, 7, 9)


def test_dtype_by_default_suits_the_device(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    assert resolve_dtype() == jnp.float32
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert resolve_dtype() == jnp.bfloat16
    assert resolve_dtype("float16") == resolve_dtype(jnp.float16) == jnp.float16


def test_the_real_model(smollm2):
    assert smollm2.fingerprint == "f2a7400973fb1ab1"  # calibrations that ship with the project name it
    assert smollm2.config.group == 3
    assert smollm2.config.eos_token_ids == (2,)
    assert smollm2.config.tie_embeddings
