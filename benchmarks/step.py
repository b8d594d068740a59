"""Whole decoding steps at Llama-3.1-8B's shapes, random weights in bfloat16: milliseconds a token with each cache.

    python benchmarks/step.py [--output FILE] [--rows 0 1 ...] [--profile]

The measurement is `vecinfer bench`'s (vecinfer_jax/bench.py); here are the shapes that the documentation shows.
"""

import argparse
import dataclasses
from pathlib import Path

import results

from vecinfer_jax import specs
from vecinfer_jax.bench import SHAPES, StepBench
from vecinfer_jax.caches import METHODS

# batch, tokens held, method
ROWS = [
    (1, 196608, "full"),
    (1, 196608, "vecinfer:bits=2"),
    (12, 32768, "full"),
    (12, 32768, "vecinfer:bits=2"),
    (1, 1024, "full"),
    (1, 1024, "vecinfer:bits=2"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, nargs="*", help="which rows, by number")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="list the kernels of a step of the quantised caches")
    args = parser.parse_args()
    bench = StepBench(dataclasses.replace(SHAPES["llama-3.1-8b"], num_layers=args.layers))
    rows = []

    def keep(row: dict) -> None:
        rows.append(row)
        print(row, flush=True)
        results.write("step-llama-8b", {"rows": rows}, args.output)

    chosen = [ROWS[index] for index in args.rows or range(len(ROWS))]
    for batch, tokens, name in chosen:
        method = specs.parse(name, METHODS, "method")
        keep({"name": name} | dataclasses.asdict(bench.step(method, batch, tokens, repeats=args.repeats)))
    for batch, tokens, name in chosen if args.profile else []:
        if name != "full":
            method = specs.parse(name, METHODS, "method")
            keep({"name": name, "batch": batch, "tokens": tokens, "kernels": bench.kernels(method, batch, tokens)})


if __name__ == "__main__":
    main()
