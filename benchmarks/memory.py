"""Bytes: what caches allocate beside what the device says, and the peak of a prompt run whole and in chunks.

    python benchmarks/memory.py [--output FILE]

Two layers of Llama-3.1-8B's shapes, random weights and codebooks, bfloat16. Each row runs in a process of its own, so
that `peak_bytes_in_use` is that row's. `peak_bytes` is what `generate` reports (the compiler's account).
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROWS: list[dict[str, Any]] = [
    *(
        {"kind": "cache", "method": m, "batch": 16, "tokens": 8192}
        for m in ("full", "vecinfer:bits=2,transform=smooth-hadamard", "vecinfer:bits=4,transform=smooth-hadamard")
    ),
    *({"kind": "cache", "method": m, "batch": 16, "tokens": 8192} for m in ("kivi:bits=2", "hadamard-int:bits=2")),
    *(
        {"kind": "prompt", "method": m, "batch": 1, "tokens": tokens, "chunk": chunk}
        for m in ("full", "vecinfer:bits=2,transform=smooth-hadamard")
        for tokens, chunk in ((32768, 32768), (32768, 8192), (131072, 32768), (131072, 8192))
    ),
]


def measure(row: dict[str, Any]) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vecinfer_jax import specs
    from vecinfer_jax.bench import SHAPES, random_calibration
    from vecinfer_jax.caches import METHODS, allocated_bytes
    from vecinfer_jax.generation.engine import Engine
    from vecinfer_jax.models.decoder import Decoder, init_params

    config = dataclasses.replace(SHAPES["llama-3.1-8b"], num_layers=2, vocab_size=1024, tie_embeddings=True)
    method = specs.parse(row["method"], METHODS, "method")
    decoder = Decoder(config, method, jnp.bfloat16)
    rng = np.random.default_rng(0)

    calibration = [random_calibration(config, method, i, jnp.bfloat16) for i in range(config.num_layers)]
    device, engine = jax.devices()[0], Engine(decoder)

    def in_use(what: str = "bytes_in_use") -> int:
        return (device.memory_stats() or {}).get(what, 0)

    before = in_use()
    caches = jax.block_until_ready(engine.init_caches(calibration, row["batch"], row["tokens"]))
    allocated = allocated_bytes(caches)
    out = row | {"allocated_bytes": allocated, "device_bytes": in_use() - before}
    if row["kind"] == "prompt":
        params = jax.block_until_ready(init_params(config, jax.random.key(0), jnp.bfloat16))
        tokens = rng.integers(0, config.vocab_size, (row["batch"], row["tokens"])).astype(np.int32)
        engine.peak_bytes = 0
        lengths = np.full((row["batch"],), row["tokens"], np.int32)
        logits, _ = engine.prefill(params, caches, tokens, lengths, row["chunk"])
        assert np.isfinite(np.asarray(logits)).all()
        weights = sum(x.nbytes for x in jax.tree.leaves(params))
        out |= {"peak_bytes": engine.peak_bytes, "device_peak_bytes": in_use("peak_bytes_in_use"), "weights": weights}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rows", type=int, nargs="*", help="which rows, by number; the others stay")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(json.loads(args.row))))
        return
    import results

    path = args.output or results.ROOT / results.device_name() / "memory.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for row in [ROWS[i] for i in args.rows] if args.rows is not None else ROWS:
        command = [sys.executable, __file__, "--row", json.dumps(row)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{row}: {done.stderr.strip().splitlines()[-1][:300]}")
        rows = [old for old in rows if any(old[name] != row[name] for name in row)]
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
        results.write("memory", {"rows": rows}, path)


if __name__ == "__main__":
    main()
