"""Parameters with a cache method's transform of the values folded in."""

from typing import Any

import jax.numpy as jnp

from vecinfer_jax.caches.base import CacheMethod
from vecinfer_jax.calibration.artefact import Calibration
from vecinfer_jax.models.decoder import layer_shape


def fold_values(lm: Any, method: CacheMethod, calibration: Calibration) -> Any:
    """The model's parameters for use with `method`: W_v, b_v and W_o of the layers it transforms are copies.

    The model's own parameters stay as they are; layers a method leaves alone are shared, not copied.
    """
    folded = dict(lm.params)
    for index in range(lm.config.num_layers):
        layer_method = method.for_layer(index, lm.config.num_layers)
        if not layer_method.folds_values:
            continue
        name = f"layers_{index}"
        attention = dict(folded[name]["attention"])
        v, o = dict(attention["v_proj"]), dict(attention["o_proj"])
        kernel, bias, out = layer_method.fold_values(
            layer_shape(lm.config, index, lm.dtype),
            calibration.layers[index],
            v["kernel"].astype(jnp.float32),
            v["bias"].astype(jnp.float32) if "bias" in v else None,
            o["kernel"].astype(jnp.float32),
        )
        v["kernel"], o["kernel"] = kernel.astype(lm.dtype), out.astype(lm.dtype)
        if bias is not None:
            v["bias"] = bias.astype(lm.dtype)
        folded[name] = {**folded[name], "attention": {**attention, "v_proj": v, "o_proj": o}}
    return folded
