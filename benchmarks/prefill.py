"""Long prompts at Llama-3.1-8B's shapes, random weights in bfloat16: time and peak memory with each cache.

    python benchmarks/prefill.py [--output FILE] [--rows 0 1 ...]

A row runs in a process of its own, so that the device's peak is that row's; rows that are not run now stay. `ms` is
the median of several runs of the compiled prefill into an empty cache, the last token's logits included; `peak_bytes`
is the compiler's account of it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# method, lengths of the prompts of the batch
ROWS: list[tuple[str, list[int]]] = [
    (method, lengths)
    for lengths in ([32768], [16384, 12000, 8000, 5000])
    for method in ("full", "vecinfer:bits=2,transform=smooth-hadamard", "vecinfer:bits=4,transform=smooth-hadamard")
]
REPEATS = 5


def measure(name: str, lengths: list[int]) -> dict[str, Any]:
    import jax
    import numpy as np

    from vecinfer_jax import specs
    from vecinfer_jax.bench import SHAPES, StepBench
    from vecinfer_jax.caches import METHODS

    bench = StepBench(SHAPES["llama-3.1-8b"])
    config, params, batch, longest = bench.config, bench.params, len(lengths), max(lengths)
    engine, calibration = bench.engine(specs.parse(name, METHODS, "method"), batch, longest + 128)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, longest)).astype(np.int32)

    def run() -> float:
        caches = jax.block_until_ready(engine.init_caches(calibration, batch, longest + 128))
        begin = time.perf_counter()
        logits, caches = engine.prefill(params, caches, tokens, np.asarray(lengths, np.int32))
        jax.block_until_ready(caches)
        taken = time.perf_counter() - begin
        assert np.isfinite(np.asarray(logits)).all()
        return 1e3 * taken

    run()
    times = [run() for _ in range(REPEATS)]
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "name": name,
        "lengths": lengths,
        "ms": round(statistics.median(times), 2),
        "peak_bytes": engine.peak_bytes,
        "device_peak_bytes": memory.get("peak_bytes_in_use", 0),
        "weights_bytes": sum(x.nbytes for x in jax.tree.leaves(params)),
        "repeats": REPEATS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rows", type=int, nargs="*", help="which rows, by number")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row is not None:
        print(json.dumps(measure(*ROWS[args.row])))
        return
    import results

    path = args.output or results.ROOT / results.device_name() / "prefill-llama-3.1-8b.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for index in args.rows if args.rows is not None else range(len(ROWS)):
        done = subprocess.run([sys.executable, __file__, "--row", str(index)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{ROWS[index]}: {done.stderr.strip().splitlines()[-1]}")
        row = json.loads(done.stdout.splitlines()[-1])
        print(row, flush=True)
        rows = [old for old in rows if (old["name"], old["lengths"]) != (row["name"], row["lengths"])] + [row]
        results.write("prefill-llama-3.1-8b", {"rows": rows}, path)


if __name__ == "__main__":
    main()
