"""The whole decoding step of Hugging Face transformers at Llama-3.1-8B's shapes: the peer of benchmarks/step.py.

    python benchmarks/transformers_step.py [--output FILE] [--rows 0 1 ...]

Needs torch and transformers. Random weights in bfloat16, attention by PyTorch's SDPA, caches full of random keys and
values: the dynamic cache (what `generate` uses unless told otherwise; it concatenates every step) and the static one.
Time by the host's clock around synchronised steps, median of several.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.remove(str(Path(__file__).resolve().parent))  # transformers looks for a package named `kernels`

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

ROOT = Path(__file__).resolve().parent / "results"
# batch, tokens held, cache
ROWS = [
    *((1, tokens, cache) for tokens in (1024, 196608) for cache in ("dynamic", "static")),
    *((12, 32768, cache) for cache in ("dynamic", "static")),
]
WHAT = ("cache", "batch", "tokens")
WARM, STEPS = 3, 10


def llama_8b(layers: int = 32, hidden: int = 4096, feed_forward: int = 14336, vocabulary: int = 128256) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512),
        head_dim=128,
        max_position_embeddings=2**20,
        rope_theta=5e5,
        attn_implementation="sdpa",
    )


def make_model(config: LlamaConfig, device: str) -> LlamaForCausalLM:
    """Random weights, made on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device), transformers.initialization.no_init_weights():
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def filled_cache(kind: str, config: LlamaConfig, batch: int, tokens: int, device: str) -> Any:
    """A cache of `tokens` random tokens with room for the steps."""
    room = tokens + WARM + STEPS
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=room)
    shape = batch, config.num_key_value_heads, tokens, config.head_dim
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


@torch.inference_mode()
def milliseconds_per_step(model: LlamaForCausalLM, kind: str, batch: int, tokens: int, device: str) -> float:
    cache = filled_cache(kind, model.config, batch, tokens, device)
    assert cache.get_seq_length() == tokens
    token = torch.zeros((batch, 1), dtype=torch.long, device=device)
    times = []
    for step in range(WARM + STEPS):
        position = torch.full((batch, 1), tokens + step, device=device)
        synchronise(device)
        begin = time.perf_counter()
        logits = model(token, past_key_values=cache, position_ids=position, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
        synchronise(device)
        times.append(1e3 * (time.perf_counter() - begin))
    assert cache.get_seq_length() == tokens + WARM + STEPS
    return statistics.median(times[WARM:])


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rows", type=int, nargs="*", help="which rows, by number")
    parser.add_argument("--tiny", action="store_true", help="try the script on a small model, on any device")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = llama_8b(2, 1024, 256, 512) if args.tiny else llama_8b()
    model = make_model(config, device)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    environment = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "versions": versions}
    held = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    same = held.get("environment") == environment  # else all is to be measured again
    rows = {tuple(row[key] for key in WHAT): row for row in held["rows"]} if same else {}
    for index in args.rows if args.rows is not None else range(len(ROWS)):
        batch, tokens, kind = ROWS[index]
        row: dict[str, Any] = {"cache": kind, "batch": batch, "tokens": tokens // 64 if args.tiny else tokens}
        try:
            row["ms_per_step"] = round(milliseconds_per_step(model, kind, batch, row["tokens"], device), 3)
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        if device == "cuda":
            torch.cuda.empty_cache()
        rows[tuple(row[key] for key in WHAT)] = row
        print(json.dumps(row), flush=True)
        result = {"environment": environment, "rows": list(rows.values())}
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
