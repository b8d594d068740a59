"""Whole decoding steps of Llama-3.1-8B, or another architecture, with random weights in bfloat16 and each cache.

    python benchmarks/step.py [--output FILE] [--rows 0 1 ...] [--profile]

The measurement is `vecinfer bench`'s (vecinfer_jax/bench.py); here are the shapes that the documentation shows. Rows
that the JSON file holds already and that are not run now stay in it.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import results

from vecinfer_jax import specs
from vecinfer_jax.bench import SHAPES, StepBench
from vecinfer_jax.caches import METHODS

LENGTHS = (1024, 16384, 65536, 196608)
# batch, tokens held, method
ROWS = [
    *((1, tokens, method) for tokens in LENGTHS for method in ("full", "vecinfer:bits=2,transform=smooth-hadamard")),
    (12, 32768, "full"),
    (12, 32768, "vecinfer:bits=2,transform=smooth-hadamard"),
    *((1, 196608, f"vecinfer:bits={bits},transform=smooth-hadamard") for bits in ("4", "3", "1.5", "1")),
    (12, 8192, "full"),
    (12, 8192, "vecinfer:bits=2,transform=smooth-hadamard"),
    (64, 4096, "full"),
    (64, 4096, "vecinfer:bits=2,transform=smooth-hadamard"),
    (16, 4096, "full"),
    (16, 4096, "vecinfer:bits=2,transform=smooth-hadamard"),
    (12, 32768, "vecinfer:bits=4,transform=smooth-hadamard"),
    *((1, tokens, method) for method in ("hadamard-int:bits=2", "kivi:bits=2") for tokens in (16384, 65536)),
    (1, 3600000, "vecinfer:bits=2,transform=smooth-hadamard"),  # as many tokens as one card holds
    # Queries through a dense map in the place of lambda and the Hadamard matrix.
    (1, 196608, "vecinfer:bits=2,transform=metric,sink=1"),
    (12, 32768, "vecinfer:bits=2,transform=metric,sink=1"),
    (12, 32768, "vecinfer:bits=2,sink=1,transform=smooth-hadamard"),
    # KVQuant; a million tokens of Llama-2-7B's shapes on one card.
    (1, 1000000, "kvquant:bits=2,outliers=0"),
    (1, 65536, "kvquant:bits=2,outliers=0"),
    (1, 65536, "kvquant:bits=3,outliers=0.01"),
    (1, 65536, "kvquant:bits=4,outliers=0.01"),
    # Tables of the values in fp8, and the same without.
    *(
        (batch, tokens, f"vecinfer:bits={bits},transform=metric,sink=1{fp8}")
        for batch, tokens in ((12, 32768), (1, 196608))
        for bits in ("3", "1")
        for fp8 in ("", ",fp8_values=true")
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="default: results/<device>/step-<model>.json")
    parser.add_argument("--model", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--rows", type=int, nargs="*", help="which rows, by number")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="what the device does in a step, instead of its time")
    args = parser.parse_args()
    bench = StepBench(SHAPES[args.model])
    path = args.output or results.ROOT / results.device_name() / f"step-{args.model}.json"
    held = json.loads(path.read_text())["rows"] if path.exists() else []
    for index in args.rows if args.rows is not None else range(len(ROWS)):
        batch, tokens, name = ROWS[index]
        method = specs.parse(name, METHODS, "method")
        row: dict[str, Any] = {"name": name, "batch": batch, "tokens": tokens}
        if args.profile:
            row |= {"profile": dataclasses.asdict(bench.profile(method, batch, tokens))}
        else:
            row |= dataclasses.asdict(bench.step(method, batch, tokens, repeats=args.repeats))
        print(json.dumps(row), flush=True)
        held = [old for old in held if identity(old) != identity(row)] + [row]
        results.write(f"step-{args.model}", {"rows": held}, path)


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is a measurement of."""
    return row["name"], row["batch"], row["tokens"], "profile" in row


if __name__ == "__main__":
    main()
