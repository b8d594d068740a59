"""Configurations: what is understood, and what is refused by name, in one line."""

import json

import gguf
import numpy as np
import pytest

from tests.conftest import GOLDENS
from vecinfer_jax.errors import UnsupportedModelError, WeightsError
from vecinfer_jax.models import ModelConfig, config_from_gguf, config_from_hf
from vecinfer_jax.models.gguf_file import GgufFile
from vecinfer_jax.rope import Llama3Scaling

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
MISTRAL = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
QWEN3 = {**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}


def test_llama_31_in_either_spelling():
    old = config_from_hf({**LLAMA, "rope_scaling": LLAMA3_SCALING})
    without_theta = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    new = config_from_hf({**without_theta, "rope_parameters": {**LLAMA3_SCALING, "rope_theta": 500000.0}})
    assert old == new
    assert old.rope.scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)
    assert old.rope.theta == 500000.0
    assert (old.head_dim, old.group) == (128, 4)
    assert old.eos_token_ids == (128001, 128008, 128009)
    assert not (old.qkv_bias or old.output_bias or old.mlp_bias or old.qk_norm or old.tie_embeddings)


def test_llama_1_leaves_much_to_defaults():
    data = {**LLAMA, "eos_token_id": 2}
    for key in ("rope_theta", "num_key_value_heads", "architectures", "hidden_act"):
        del data[key]
    config = config_from_hf(data)
    assert config.num_kv_heads == 32
    assert config.rope.theta == 10000.0
    assert config.eos_token_ids == (2,)


def test_family_flags():
    biased = config_from_hf({**LLAMA, "attention_bias": True, "mlp_bias": True})
    assert biased.qkv_bias and biased.output_bias and biased.mlp_bias
    qwen2 = config_from_hf(QWEN2)
    assert qwen2.qkv_bias and not qwen2.output_bias and not qwen2.qk_norm
    qwen3 = config_from_hf(QWEN3)
    assert qwen3.qk_norm and not qwen3.qkv_bias
    assert not config_from_hf(MISTRAL).qkv_bias


def test_tables_cover_long_caches():
    assert config_from_hf({**LLAMA, "max_position_embeddings": 2048}).rope.max_position == 131072
    assert config_from_hf({**LLAMA, "max_position_embeddings": 1 << 20}).rope.max_position == 1 << 20


@pytest.mark.parametrize(
    "data",
    [
        {**MISTRAL, "sliding_window": 131072},
        {**QWEN2, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 16},
        {**QWEN2, "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 32},
        {**QWEN3, "layer_types": ["full_attention"] * 32, "sliding_window": 4096, "use_sliding_window": True},
        {**LLAMA, "rope_scaling": None},
        {**LLAMA, "rope_scaling": {"type": "default"}},
        {**LLAMA, "partial_rotary_factor": 1.0},
    ],
)
def test_what_is_not_active_is_accepted(data):
    config_from_hf(data)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({**LLAMA, "model_type": "gemma2"}, "'gemma2'"),
        ({**LLAMA, "model_type": None}, "None"),
        ({**LLAMA, "model_type": "mixtral", "num_local_experts": 8}, "mixture of experts"),
        ({**LLAMA, "num_experts": 8}, "num_experts 8"),
        ({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({**MISTRAL, "sliding_window": 4096}, "sliding_window 4096"),
        ({key: value for key, value in MISTRAL.items() if key != "sliding_window"}, "sliding_window 4096"),
        (
            {**QWEN2, "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 16},
            "sliding_window 4096",
        ),
        ({**QWEN3, "layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}}, "'linear'"),
        ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ({**LLAMA, "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope'"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (
            {**LLAMA, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({**LLAMA, "hidden_act": "gelu"}, "'gelu'"),
        ({**LLAMA, "quantization_config": {"quant_method": "awq"}}, "awq"),
        ({**LLAMA, "num_key_value_heads": 5}, "multiple of 5"),
        ({**LLAMA, "num_attention_heads": 0}, "num_attention_heads is 0"),
        ({**LLAMA, "hidden_size": "4096"}, "hidden_size is '4096'"),
        ({**LLAMA, "head_dim": 127}, "127"),
        (
            {key: LLAMA[key] for key in ("model_type", "hidden_size")},
            "intermediate_size, num_attention_heads, num_hidden_layers, num_key_value_heads, rms_norm_eps, vocab_size",
        ),
        ({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor"),
    ],
)
def test_refused_by_name(data, named):
    with pytest.raises(UnsupportedModelError) as error:
        config_from_hf(data)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_json_round_trip():
    config = config_from_hf({**LLAMA, "rope_scaling": LLAMA3_SCALING})
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(UnsupportedModelError, match="convert the model again"):
        ModelConfig.from_json({"rope": {}})


def test_every_golden_family_is_understood():
    for directory in sorted((GOLDENS / "tiny").iterdir()):
        config = config_from_hf(json.loads((directory / "config.json").read_text(encoding="utf-8")))
        assert config.num_layers == 2


GGUF_LLAMA = {
    "block_count": 2,
    "context_length": 512,
    "embedding_length": 48,
    "feed_forward_length": 96,
    "attention.head_count": 6,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 500000.0,
}


def write_header(path, arch, fields, tensors=()):
    """A GGUF file of metadata, an embedding [128, 48], one norm a layer and `tensors`."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in fields.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{arch}.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((128, 48), np.float32))
    for i in range(GGUF_LLAMA["block_count"]):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", np.ones(48, np.float32))
    for name, values in tensors:
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


def test_gguf_metadata(tmp_path):
    factors = np.linspace(1, 8, 4).astype(np.float32)
    file = write_header(tmp_path / "a.gguf", "llama", GGUF_LLAMA, [("rope_freqs.weight", factors)])
    config = config_from_gguf(file)
    assert (config.vocab_size, config.num_layers, config.head_dim, config.group) == (128, 2, 8, 3)
    assert config.rms_norm_eps == 1e-5  # not 9.99999974e-06
    assert config.rope.factors == tuple(factors.tolist())
    assert config.tie_embeddings  # there is no output.weight
    assert config.max_position == 512
    assert config_from_gguf(
        write_header(tmp_path / "b.gguf", "qwen3", {**GGUF_LLAMA, "attention.key_length": 16})
    ).qk_norm


@pytest.mark.parametrize(
    ("arch", "changed", "named"),
    [
        ("mistral3", {}, "'mistral3'"),
        ("gemma", {}, "'gemma'"),
        ("llama", {"attention.sliding_window": 256}, "llama.attention.sliding_window 256"),
        ("qwen2", {"rope.scaling.type": "yarn"}, "qwen2.rope.scaling.type 'yarn'"),
        ("llama", {"rope.scaling.type": "linear"}, "'linear'"),
        ("llama", {"rope.scale_linear": 2.0}, "llama.rope.scale_linear"),
        ("llama", {"expert_count": 8}, "llama.expert_count 8"),
        ("llama", {"block_count": 1 << 31}, "tensors for 2147483648 layers"),
        ("llama", {"attention.head_count": 0}, "llama.attention.head_count is 0"),
        ("llama", {"rope.dimension_count": 4}, "llama.rope.dimension_count 4"),
        ("llama", {"attention.value_length": 4}, "llama.attention.value_length 4"),
        ("llama", {"block_count": None, "context_length": None}, "llama.block_count, llama.context_length"),
    ],
)
def test_gguf_refused_by_name(tmp_path, arch, changed, named):
    fields = {key: value for key, value in {**GGUF_LLAMA, **changed}.items() if value is not None}
    file = write_header(tmp_path / "a.gguf", arch, fields)
    with pytest.raises(UnsupportedModelError) as error:
        config_from_gguf(file)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [np.nan, np.inf, 0])
def test_gguf_factors_must_be_factors(tmp_path, damage):
    tensors = [("rope_freqs.weight", np.asarray([1, 1, damage, 1], np.float32))]
    with pytest.raises(WeightsError, match=r"a\.gguf: rope_freqs\.weight holds values"):
        config_from_gguf(write_header(tmp_path / "a.gguf", "llama", GGUF_LLAMA, tensors))


def test_gguf_factors_must_fit(tmp_path):
    tensors = [("rope_freqs.weight", np.ones(5, np.float32))]
    with pytest.raises(UnsupportedModelError, match="5 factors for head_dim 8"):
        config_from_gguf(write_header(tmp_path / "a.gguf", "llama", GGUF_LLAMA, tensors))
