"""Weights come in whole and in the right place, or are refused by name, in one line."""

import json
import shutil
import struct

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QuantType
from safetensors.numpy import load_file, save_file

from tests.conftest import GOLDENS
from tests.models.gguf_writing import write_gguf
from vecinfer_jax.errors import InputError, VecInferError, WeightsError
from vecinfer_jax.models import gguf_file, load, random_model
from vecinfer_jax.models.checkpoint_map import flatten
from vecinfer_jax.models.gguf_file import GgufFile

FAMILIES = ("llama", "smollm2", "mistral", "qwen2", "qwen3")
TINY = GOLDENS / "tiny"
NORM = "model.layers.1.input_layernorm.weight"


def load_tiny(path, dtype="float32"):
    return load(path, dtype, progress=False)


@pytest.fixture
def directory(tmp_path):
    """A copy of a tiny Llama that a test may damage."""
    return shutil.copytree(TINY / "llama", tmp_path / "model")


def refused(path) -> str:
    """The one line that loading `path` fails with."""
    with pytest.raises(WeightsError) as error:
        load_tiny(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(directory, change):
    """Rewrites model.safetensors after `change(tensors)`."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_equals_its_hugging_face_directory(family, tmp_path, score):
    path = write_gguf(TINY / family, tmp_path / "tiny.gguf")
    from_gguf, from_hf = load_tiny_without_tokenizer(path), load_tiny(TINY / family)
    ids = np.load(TINY / family / "logits.npz")["ids"]
    np.testing.assert_allclose(score(from_gguf, ids), score(from_hf, ids), atol=1e-4)
    for path_, leaf in flatten(from_hf.params).items():
        np.testing.assert_array_equal(flatten(from_gguf.params)[path_], leaf, err_msg=path_)
    if family != "llama":  # whose scaling GGUF stores as factors: another configuration, if an equivalent one
        assert from_gguf.fingerprint == from_hf.fingerprint


def load_tiny_without_tokenizer(path):
    """These GGUF files have no tokenizer: put one beside them."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(path.parent / "tokenizer.json"))
    return load_tiny(path)


def test_fingerprint_identifies_weights_whatever_the_dtype(directory, tmp_path):
    original = load_tiny(directory).fingerprint
    assert load_tiny(directory, "bfloat16").fingerprint == original

    def to_bfloat16(tensors):
        for name, values in tensors.items():
            tensors[name] = values.astype(ml_dtypes.bfloat16)

    def to_float32(tensors):
        for name, values in tensors.items():
            tensors[name] = values.astype(np.float32)

    edit(directory, to_bfloat16)
    rounded = load_tiny(directory).fingerprint
    assert rounded != original
    edit(directory, to_float32)
    assert load_tiny(directory).fingerprint == rounded


def test_fingerprint_notices_one_weight(directory):
    original = load_tiny(directory).fingerprint

    def nudge(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][13, 7] += 1e-6

    edit(directory, nudge)
    assert load_tiny(directory).fingerprint != original


def test_fingerprint_notices_the_configuration(directory):
    original = load_tiny(directory).fingerprint
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1e4
    (directory / "config.json").write_text(json.dumps(config))
    assert load_tiny(directory).fingerprint != original


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_parameters_have_the_dtype_asked_for(dtype):
    lm = load_tiny(TINY / "qwen3", dtype)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(lm.params)} == {dtype}
    assert lm.dtype.name == dtype


def test_unknown_dtype_is_refused():
    with pytest.raises(InputError, match="float32, bfloat16, float16"):
        load(TINY / "llama", "int8")


@pytest.mark.parametrize("source", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files(directory, source):
    reference = {}

    def narrow(tensors):
        for name, values in tensors.items():
            tensors[name] = values.astype(source)
        reference["embed"] = tensors["model.embed_tokens.weight"].astype(np.float32)

    edit(directory, narrow)
    lm = load_tiny(directory)
    np.testing.assert_array_equal(lm.params["embed"], reference["embed"])


def test_sharded_directory(directory):
    whole = load_tiny(directory)
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, directory / file)
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_tiny(directory).fingerprint == whole.fingerprint
    (directory / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refused(directory)


def test_sharding_is_asked_for_every_weight():
    asked = []
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    lm = load(TINY / "llama", progress=False, sharding=lambda path: asked.append(path) or place)
    assert sorted(asked) == sorted(flatten(lm.params))
    assert "layers_0/attention/q_proj/kernel" in asked


def test_everything_wrong_is_reported_at_once(directory):
    def damage(tensors):
        del tensors[NORM]
        del tensors["model.norm.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        tensors["lm_head.weight"] = np.zeros((3, 5), np.float32)

    edit(directory, damage)
    message = refused(directory)
    assert f"missing: model.norm.weight, {NORM}" in message
    assert "unexpected: model.layers.7.mlp.up_proj.weight" in message
    assert "misshapen: lm_head.weight is [3, 5], not [128, 48]" in message


def test_harmless_extras_are_ignored(tmp_path):
    directory = shutil.copytree(TINY / "smollm2", tmp_path / "model")

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit(directory, add)
    assert load_tiny(directory).fingerprint == load_tiny(TINY / "smollm2").fingerprint


def test_a_weight_that_is_not_finite_is_refused(directory):
    def poison(tensors):
        tensors[NORM][5] = np.nan

    edit(directory, poison)
    message = refused(directory)
    assert "layers_1/input_norm/scale" in message and str(directory) in message


def test_integer_weights_are_refused(directory):
    def to_integers(tensors):
        tensors[NORM] = tensors[NORM].astype(np.int8)

    edit(directory, to_integers)
    assert f"{NORM} is stored as I8" in refused(directory)


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_truncated_safetensors(directory, keep):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in refused(directory)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_damaged_json(directory, name):
    (directory / name).write_text("{")
    assert name in refused(directory)


def test_no_weights(directory):
    (directory / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refused(directory)


def test_truncated_gguf_is_refused_wherever_it_breaks_off(tmp_path):
    whole = write_gguf(TINY / "qwen2", tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for keep in (0, 3, 4, 10, 30, 100, 500, 900, 2000, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:keep])
        assert str(path) in refused(path), keep


def test_damaged_gguf_header_is_one_line(tmp_path):
    whole = bytearray(write_gguf(TINY / "qwen2", tmp_path / "whole.gguf").read_bytes())
    path = tmp_path / "damaged.gguf"
    random = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[int(random.integers(4, 1500))] ^= int(random.integers(1, 256))
        path.write_bytes(damaged)
        try:
            load_tiny(path)
        except VecInferError as error:
            assert "\n" not in str(error)


def test_gguf_missing_tensor(tmp_path):
    path = write_gguf(TINY / "qwen2", tmp_path / "a.gguf", leave_out=("blk.1.attn_q.bias", "output_norm.weight"))
    with pytest.raises(WeightsError, match=r"missing: output_norm\.weight, blk\.1\.attn_q\.bias"):
        load_tiny_without_tokenizer(path)


def test_gguf_without_output_is_tied(tmp_path):
    path = write_gguf(TINY / "qwen3", tmp_path / "a.gguf", leave_out=("output.weight",))
    assert load_tiny_without_tokenizer(path).config.tie_embeddings


def gguf_of(path, values, kind=QuantType.F32, **options):
    """A GGUF file with one field and one tensor, "t"."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.add_tensor("t", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_refused(path) -> str:
    """The one line that opening `path` fails with."""
    with pytest.raises(WeightsError) as error:
        GgufFile(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "atol"),
    [(QuantType.F32, 0), (QuantType.F16, 1e-3), (QuantType.BF16, 1e-2), (QuantType.Q8_0, 2e-2), (QuantType.Q4_1, 0.2)],
)
def test_gguf_tensors_are_float32_in_their_shape(tmp_path, kind, atol):
    values = np.random.default_rng(0).normal(size=(2, 3, 64)).astype(np.float32)
    file = GgufFile(gguf_of(tmp_path / "a.gguf", values, kind))
    read = file.read("t")
    assert file.shapes == {"t": (2, 3, 64)} and "t" in file and "u" not in file
    assert type(read) is np.ndarray and read.dtype == np.float32 and read.base is None
    np.testing.assert_allclose(read, values, atol=atol)


def test_gguf_type_that_cannot_be_dequantised_is_named(tmp_path):
    path = gguf_of(tmp_path / "a.gguf", np.zeros(4, np.float32))
    data = path.read_bytes()
    before = b"t" + struct.pack("<IQ", 1, 4)
    path.write_bytes(data.replace(before + struct.pack("<I", QuantType.F32), before + struct.pack("<I", QuantType.I32)))
    with pytest.raises(WeightsError, match="'t' is I32"):
        GgufFile(path).read("t")


def test_gguf_weight_that_is_not_finite_is_refused(tmp_path):
    path = write_gguf(TINY / "qwen2", tmp_path / "a.gguf")
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="not finite") as error:
        load_tiny_without_tokenizer(path)
    assert str(path) in str(error.value)


def test_gguf_scale_that_is_not_finite_makes_no_noise(tmp_path):
    path = gguf_of(tmp_path / "a.gguf", np.ones((1, 32), np.float32), QuantType.Q8_0)
    data = bytearray(path.read_bytes())
    at = GgufFile(path)._tensors["t"].data_offset
    data[at : at + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(data)
    assert np.isnan(GgufFile(path).read("t")).all()


@pytest.mark.parametrize("count", [1 << 20, 1 << 40, (1 << 64) - 1])
@pytest.mark.parametrize("item", [0, 4, 8, 9])
def test_gguf_array_longer_than_its_file_is_refused_at_once(tmp_path, item, count):
    path = tmp_path / "a.gguf"
    field = struct.pack("<Q1sIIQ", 1, b"k", 9, item, count)
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + field + bytes(1000))
    assert "truncated or damaged" in gguf_refused(path) or item == 9


def test_gguf_header_of_too_many_parts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "_MAX_HEADER_PARTS", 1000)
    path = tmp_path / "a.gguf"
    field = struct.pack("<Q1sIIQ", 1, b"k", 9, 0, 2000)
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + field + bytes(4000))
    assert "more than 1000 parts" in gguf_refused(path)


@pytest.mark.parametrize("offset", [1 << 20, 1 << 63, (1 << 64) - 32])
def test_gguf_tensor_outside_the_data_is_refused(tmp_path, offset):
    path = gguf_of(tmp_path / "a.gguf", np.ones((1, 32), np.float32))
    data = bytearray(path.read_bytes())
    at = data.index(b"t" + struct.pack("<IQQ", 2, 32, 1)) + 1 + 20 + 4  # past the name, the dimensions and the type
    data[at : at + 8] = struct.pack("<Q", offset)
    path.write_bytes(data)
    gguf_refused(path)


@pytest.mark.parametrize(("name", "dimensions"), [(b"t", ()), (b"\n", (1,))])
def test_gguf_tensor_without_dimensions_or_name_is_refused(tmp_path, name, dimensions):
    header = struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + struct.pack("<Q1sI", 1, name, len(dimensions))
    header += b"".join(struct.pack("<Q", n) for n in dimensions) + struct.pack("<IQ", 0, 0)
    (tmp_path / "a.gguf").write_bytes(header + bytes(100))
    assert f"tensor {name.decode()!r} of shape" in gguf_refused(tmp_path / "a.gguf")


def test_gguf_of_another_version_or_byte_order_is_refused(tmp_path):
    values = np.ones((1, 32), np.float32)
    assert "other order" in gguf_refused(gguf_of(tmp_path / "a.gguf", values, endianess=gguf.GGUFEndian.BIG))
    path = gguf_of(tmp_path / "b.gguf", values)
    path.write_bytes(path.read_bytes().replace(b"GGUF\3", b"GGUF\7"))
    assert "version 7" in gguf_refused(path)


def test_what_is_no_gguf_file_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"<html>not found</html>" * 10)
    assert "not a GGUF file" in gguf_refused(tmp_path / "a.gguf")
    assert "cannot be read" in gguf_refused(tmp_path / "nothing.gguf")


@pytest.mark.parametrize("name", ["no-such-model", "./nowhere/at/all", "nothing.gguf"])
def test_unknown_name_says_what_would_work(name):
    with pytest.raises(InputError) as error:
        load(name)
    assert "smollm2-135m-instruct" in str(error.value) and "\n" not in str(error.value)


def test_directory_without_config(tmp_path):
    assert "no config.json" in refused(tmp_path)


def test_random_model_is_reproducible():
    config = load_tiny(TINY / "qwen2").config
    one, same, other = random_model(config, 0), random_model(config, 0), random_model(config, 1)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    np.testing.assert_array_equal(one.params["embed"], same.params["embed"])
    assert one.tokenizer is None
