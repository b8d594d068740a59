"""What every weight is called in our parameter tree, in Hugging Face checkpoints and in GGUF files."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from vecinfer_jax.models.config import ModelConfig
from vecinfer_jax.models.decoder import param_shapes

Layout = Literal["same", "transposed"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of weight; `{i}` stands for the layer.

    layout: "same" keeps the checkpoint's order of axes (vectors, the embedding); "transposed" turns a stored
            [outputs, inputs] matrix into our kernel, whose axes are [inputs..., outputs...].
    inputs: how many leading axes of our kernel are inputs.
    heads:  whose rows llama's GGUF files store with rotary pairs interleaved ("" where none are).
    """

    path: str
    hf: str
    gguf: str
    layout: Layout
    inputs: int = 0
    heads: Literal["", "query", "key"] = ""


def _layer(
    path: str, hf: str, gguf: str, layout: Layout, inputs: int = 0, heads: Literal["", "query", "key"] = ""
) -> Row:
    return Row(f"layers_{{i}}/{path}", f"model.layers.{{i}}.{hf}", f"blk.{{i}}.{gguf}", layout, inputs, heads)


# fmt: off
TABLE = (
    Row("embed", "model.embed_tokens.weight", "token_embd.weight", "same"),
    Row("lm_head", "lm_head.weight", "output.weight", "transposed", 1),
    Row("final_norm/scale", "model.norm.weight", "output_norm.weight", "same"),
    _layer("input_norm/scale", "input_layernorm.weight", "attn_norm.weight", "same"),
    _layer("post_attention_norm/scale", "post_attention_layernorm.weight", "ffn_norm.weight", "same"),
    _layer("attention/q_proj/kernel", "self_attn.q_proj.weight", "attn_q.weight", "transposed", 1, "query"),
    _layer("attention/q_proj/bias", "self_attn.q_proj.bias", "attn_q.bias", "same", 0, "query"),
    _layer("attention/k_proj/kernel", "self_attn.k_proj.weight", "attn_k.weight", "transposed", 1, "key"),
    _layer("attention/k_proj/bias", "self_attn.k_proj.bias", "attn_k.bias", "same", 0, "key"),
    _layer("attention/v_proj/kernel", "self_attn.v_proj.weight", "attn_v.weight", "transposed", 1),
    _layer("attention/v_proj/bias", "self_attn.v_proj.bias", "attn_v.bias", "same"),
    _layer("attention/o_proj/kernel", "self_attn.o_proj.weight", "attn_output.weight", "transposed", 2),
    _layer("attention/o_proj/bias", "self_attn.o_proj.bias", "attn_output.bias", "same"),
    _layer("attention/q_norm/scale", "self_attn.q_norm.weight", "attn_q_norm.weight", "same"),
    _layer("attention/k_norm/scale", "self_attn.k_norm.weight", "attn_k_norm.weight", "same"),
    _layer("feed_forward/gate_proj/kernel", "mlp.gate_proj.weight", "ffn_gate.weight", "transposed", 1),
    _layer("feed_forward/gate_proj/bias", "mlp.gate_proj.bias", "ffn_gate.bias", "same"),
    _layer("feed_forward/up_proj/kernel", "mlp.up_proj.weight", "ffn_up.weight", "transposed", 1),
    _layer("feed_forward/up_proj/bias", "mlp.up_proj.bias", "ffn_up.bias", "same"),
    _layer("feed_forward/down_proj/kernel", "mlp.down_proj.weight", "ffn_down.weight", "transposed", 1),
    _layer("feed_forward/down_proj/bias", "mlp.down_proj.bias", "ffn_down.bias", "same"),
)
# fmt: on


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of one model: `Row` with the layer filled in, and the shape it must have in our tree."""

    row: Row
    path: str
    hf: str
    gguf: str
    shape: tuple[int, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape a checkpoint holds it in: [outputs, inputs], or a flat vector, or the embedding."""
        if self.row.layout == "transposed":
            split = self.row.inputs
            return (math.prod(self.shape[split:]), math.prod(self.shape[:split]))
        return self.shape if self.row.path == "embed" else (math.prod(self.shape),)

    def arrange(self, stored: Float[np.ndarray, "*stored"]) -> Float[np.ndarray, "*shape"]:
        """`stored`, of `stored_shape`, as our tree wants it (a view)."""
        if self.row.layout == "transposed":
            stored = stored.T
        return stored.reshape(self.shape)

    def store(self, ours: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*stored"]:
        """Undoes `arrange`."""
        if self.row.layout == "transposed":
            return ours.reshape(self.stored_shape[::-1]).T
        return ours.reshape(self.stored_shape)


def weights_of(config: ModelConfig) -> tuple[Weight, ...]:
    """Every weight of a model, in a fixed order."""
    shapes = flatten(param_shapes(config, jnp.float32))
    found = []
    for row in TABLE:
        layers = range(config.num_layers) if "{i}" in row.path else (0,)
        for i in layers:
            path = row.path.replace("{i}", str(i))
            if path in shapes:
                hf, gguf = row.hf.replace("{i}", str(i)), row.gguf.replace("{i}", str(i))
                found.append(Weight(row, path, hf, gguf, tuple(shapes[path].shape)))
    unnamed = shapes.keys() - {weight.path for weight in found}
    assert not unnamed, f"parameters without a row in the table: {sorted(unnamed)}"
    return tuple(found)


def flatten(tree: Any) -> dict[str, Any]:
    """A parameter tree as {"layers_0/attention/q_proj/kernel": leaf, ...}."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """Undoes `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
