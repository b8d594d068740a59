"""What is static about a model of the Llama family, and how Hugging Face and GGUF files say it.

Whatever a file asks for that the decoder does not do is refused by name, never approximated.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vecinfer_jax.errors import UnsupportedModelError, WeightsError
from vecinfer_jax.models.gguf_file import GgufFile
from vecinfer_jax.rope import Llama3Scaling, Rope

# Positions that the rotary tables cover at least: caches longer than a model's training context are measured.
MIN_ROPE_POSITIONS = 131072

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")

# What a configuration may leave out, as the family's first checkpoints did; everything else must be there.
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 10000.0, "max_position_embeddings": 2048},
    "mistral": {"rope_theta": 10000.0, "sliding_window": 4096},
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
}
_MOE_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder. Frozen and hashable: a static `jit` argument.

    One decoder serves the family; the flags are all that distinguishes its members: `qkv_bias` (Qwen2),
    `qk_norm` (Qwen3), `rope.scaling` (Llama 3.1), `tie_embeddings` (SmolLM2 and small Qwens).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    rms_norm_eps: float
    max_position: int
    tie_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_query_heads // self.num_kv_heads

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` turns back into an equal configuration."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """Raises `UnsupportedModelError` where `data` is not what `to_json` writes."""
        try:
            rope = dict(data["rope"])
            scaling = rope.pop("scaling")
            factors = rope.pop("factors")
            return cls(
                **{
                    **data,
                    "rope": Rope(
                        **rope,
                        scaling=None if scaling is None else Llama3Scaling(**scaling),
                        factors=None if factors is None else tuple(factors),
                    ),
                    "eos_token_ids": tuple(data["eos_token_ids"]),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"the model section of config.json is not valid ({error}); convert the model again"
            ) from None


def config_from_hf(data: Mapping[str, Any]) -> ModelConfig:
    """The configuration in a Hugging Face `config.json`, as written by transformers 4 or 5.

    Raises `UnsupportedModelError`, naming the offending entry, for anything the decoder does not compute.
    """
    family = _hf_family(data)
    defaults = _HF_DEFAULTS[family]
    # transformers 5 keeps every rotary setting in one dictionary; 4 had rope_theta beside rope_scaling.
    rope = {**(data.get("rope_scaling") or {}), **(data.get("rope_parameters") or {})}
    theta = rope.get("rope_theta", data.get("rope_theta", defaults.get("rope_theta")))
    max_position = data.get("max_position_embeddings", defaults.get("max_position_embeddings"))
    kv_heads = data.get("num_key_value_heads")
    if kv_heads is None and family == "llama":
        kv_heads = data.get("num_attention_heads")
    sizes = {
        **{key: data.get(key) for key in ("vocab_size", "hidden_size", "intermediate_size")},
        **{key: data.get(key) for key in ("num_hidden_layers", "num_attention_heads")},
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_position,
    }
    _require({**sizes, "rms_norm_eps": data.get("rms_norm_eps"), "rope_theta": theta}, "config.json")
    _require_sizes(sizes, "config.json")
    assert kv_heads is not None and max_position is not None and theta is not None
    _refuse_hf(data, rope, {**defaults, **data}, family)
    heads = int(data["num_attention_heads"])
    head_dim = data.get("head_dim") or defaults.get("head_dim") or int(data["hidden_size"]) // heads
    attention_bias = bool(data.get("attention_bias", False))
    eos = data.get("eos_token_id")
    return _checked(
        ModelConfig(
            model_type=family,
            vocab_size=int(data["vocab_size"]),
            hidden_size=int(data["hidden_size"]),
            intermediate_size=int(data["intermediate_size"]),
            num_layers=int(data["num_hidden_layers"]),
            num_query_heads=heads,
            num_kv_heads=int(kv_heads),
            head_dim=int(head_dim),
            rope=Rope(
                theta=float(theta),
                head_dim=int(head_dim),
                scaling=_hf_scaling(rope),
                max_position=max(int(max_position), MIN_ROPE_POSITIONS),
            ),
            rms_norm_eps=float(data["rms_norm_eps"]),
            max_position=int(max_position),
            tie_embeddings=bool(data.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or (family in ("llama", "qwen3") and attention_bias),
            output_bias=family in ("llama", "qwen3") and attention_bias,
            mlp_bias=family == "llama" and bool(data.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            bos_token_id=data.get("bos_token_id"),
            eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        )
    )


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """The configuration in a GGUF file: its metadata, and which optional tensors it holds.

    Raises `UnsupportedModelError`, naming the offending entry, for anything the decoder does not compute.
    """
    meta = file.metadata
    arch = meta.get("general.architecture")
    if arch not in GGUF_ARCHITECTURES:
        raise UnsupportedModelError(
            f"GGUF architecture {arch!r} is not supported; supported are {', '.join(GGUF_ARCHITECTURES)}"
        )

    def get(key: str, default: Any = None) -> Any:
        return meta.get(f"{arch}.{key}", default)

    sizes = {
        f"{arch}.{key}": get(key)
        for key in (
            "block_count",
            "context_length",
            "embedding_length",
            "feed_forward_length",
            "attention.head_count",
        )
    }
    heads, context, layers = get("attention.head_count"), get("context_length"), get("block_count")
    kv_heads = get("attention.head_count_kv", heads)
    epsilon = f"{arch}.attention.layer_norm_rms_epsilon"
    embedding = file.shapes.get("token_embd.weight")
    _require({**sizes, epsilon: meta.get(epsilon), "token_embd.weight": embedding}, str(file.path))
    _require_sizes({**sizes, f"{arch}.attention.head_count_kv": kv_heads}, str(file.path))
    if embedding is None or layers > len(file.shapes):
        raise UnsupportedModelError(f"{file.path} has {len(file.shapes)} tensors for {layers} layers")
    head_dim = get("attention.key_length", get("embedding_length") // heads)
    _refuse_gguf(get, arch, head_dim)
    biased = "blk.0.attn_q.bias" in file
    factors = _gguf_factors(file)
    eos = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return _checked(
        ModelConfig(
            model_type=arch,
            vocab_size=embedding[0],
            hidden_size=get("embedding_length"),
            intermediate_size=get("feed_forward_length"),
            num_layers=layers,
            num_query_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rope=Rope(
                theta=float(get("rope.freq_base", 10000.0)),
                head_dim=head_dim,
                factors=factors,
                max_position=max(context, MIN_ROPE_POSITIONS),
            ),
            rms_norm_eps=_shortest(meta[epsilon]),
            max_position=context,
            tie_embeddings="output.weight" not in file,
            qkv_bias=arch == "qwen2" or biased,
            output_bias="blk.0.attn_output.bias" in file,
            mlp_bias="blk.0.ffn_gate.bias" in file,
            qk_norm=arch == "qwen3",
            bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
            eos_token_ids=tuple(dict.fromkeys(int(e) for e in eos if e is not None)),
        )
    )


def _gguf_factors(file: GgufFile) -> tuple[float, ...] | None:
    if "rope_freqs.weight" not in file:
        return None
    factors = file.read("rope_freqs.weight").reshape(-1)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise WeightsError(f"{file.path}: rope_freqs.weight holds values that are no factors; fetch the file again")
    return tuple(factors.tolist())


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to this float32: 1e-05, not 9.999999747e-06."""
    return float(str(np.float32(value)))


def _require(entries: Mapping[str, Any], where: str) -> None:
    missing = sorted(key for key, value in entries.items() if value is None)
    if missing:
        raise UnsupportedModelError(f"{where} lacks {', '.join(missing)}")


def _require_sizes(entries: Mapping[str, Any], where: str) -> None:
    for key, value in entries.items():
        if not isinstance(value, int) or value < 1:
            raise UnsupportedModelError(f"{where}: {key} is {value!r}, not one positive number")


def _checked(config: ModelConfig) -> ModelConfig:
    """Geometry that no decoder could have."""
    if config.num_query_heads % config.num_kv_heads:
        raise UnsupportedModelError(
            f"{config.num_query_heads} query heads are not a multiple of {config.num_kv_heads} KV heads"
        )
    if config.head_dim % 2:
        raise UnsupportedModelError(f"head_dim {config.head_dim} is odd; rotary embedding needs channel pairs")
    factors = config.rope.factors
    if factors is not None and len(factors) != config.head_dim // 2:
        raise UnsupportedModelError(f"rope_freqs.weight has {len(factors)} factors for head_dim {config.head_dim}")
    return config


def _hf_family(data: Mapping[str, Any]) -> str:
    family = data.get("model_type")
    known = ", ".join(ARCHITECTURES)
    if family not in ARCHITECTURES:
        experts = " (a mixture of experts)" if any(data.get(key) for key in _MOE_KEYS) else ""
        raise UnsupportedModelError(f"model_type {family!r}{experts} is not supported; supported are {known}")
    named = data.get("architectures") or [ARCHITECTURES[family]]
    if list(named) != [ARCHITECTURES[family]]:
        raise UnsupportedModelError(
            f"architecture {', '.join(map(str, named))} is not supported; "
            f"a {family} checkpoint must be {ARCHITECTURES[family]}"
        )
    return family


def _refuse_hf(data: Mapping[str, Any], rope: Mapping[str, Any], filled: Mapping[str, Any], family: str) -> None:
    for key in _MOE_KEYS:
        if data.get(key):
            raise UnsupportedModelError(f"{key} {data[key]}: a mixture of experts is not supported")
    if data.get("quantization_config"):
        method = dict(data["quantization_config"]).get("quant_method", "of unknown method")
        raise UnsupportedModelError(
            f"quantization_config {method}: pre-quantised checkpoints are not supported; use the original weights"
        )
    activation = data.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError(f"hidden_act {activation!r} is not supported; only silu is")
    partial = rope.get("partial_rotary_factor", data.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UnsupportedModelError(f"partial_rotary_factor {partial} is not supported; only 1 is")
    window = _hf_window(filled, family)
    if window is not None:
        raise UnsupportedModelError(f"an active sliding window ({window}) is not supported; only full attention is")


def _hf_window(filled: Mapping[str, Any], family: str) -> str | None:
    """What makes a sliding window active, or None."""
    kinds = sorted(set(filled.get("layer_types") or ()) - {"full_attention"})
    if kinds:
        return f"layer_types {', '.join(kinds)}"
    window = filled.get("sliding_window")
    if family == "llama" or window is None or window >= filled.get("max_position_embeddings", 0):
        return None
    if family == "mistral":
        return f"sliding_window {window}"
    sliding_layers = filled["max_window_layers"] < filled["num_hidden_layers"]
    if filled.get("use_sliding_window") and not filled.get("layer_types") and sliding_layers:
        return f"use_sliding_window, sliding_window {window}"
    return None


def _hf_scaling(rope: Mapping[str, Any]) -> Llama3Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" and not any(isinstance(value, Mapping) for value in rope.values()):
        return None
    if kind != "llama3":
        raise UnsupportedModelError(f"RoPE scaling {kind!r} is not supported; only llama3 and none are")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    _require({f"rope_scaling.{key}": rope.get(key) for key in keys}, "config.json")
    factor, low, high, original = (rope[key] for key in keys)
    return Llama3Scaling(float(factor), float(low), float(high), int(original))


def _refuse_gguf(get: Any, arch: str, head_dim: int) -> None:
    window = get("attention.sliding_window")
    if window and window < get("context_length"):
        raise UnsupportedModelError(f"{arch}.attention.sliding_window {window}: only full attention is supported")
    scaling = get("rope.scaling.type", "none")
    if scaling != "none":
        raise UnsupportedModelError(f"{arch}.rope.scaling.type {scaling!r}: RoPE scaling is not supported")
    linear = get("rope.scale_linear", 1.0)
    if linear != 1.0:
        raise UnsupportedModelError(f"{arch}.rope.scale_linear {linear}: RoPE scaling is not supported")
    if get("expert_count", 0):
        raise UnsupportedModelError(f"{arch}.expert_count {get('expert_count')}: experts are not supported")
    rotated = get("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise UnsupportedModelError(
            f"{arch}.rope.dimension_count {rotated} of head_dim {head_dim}: partial rotary is not supported"
        )
    value_dim = get("attention.value_length", head_dim)
    if value_dim != head_dim:
        raise UnsupportedModelError(
            f"{arch}.attention.value_length {value_dim} differs from key_length {head_dim}: not supported"
        )
