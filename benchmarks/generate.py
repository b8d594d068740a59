"""Prefill and decode of a real model with each cache, as JSON: tokens/s, bytes, milliseconds a step.

    python benchmarks/generate.py [--model NAME] [--batches 1 16] [--prompt-lengths 512 4096]

Prompts are random token ids; every timing is the median of several runs of compiled programs.
"""

import argparse
import dataclasses
import statistics
from pathlib import Path

import numpy as np
import results

import vecinfer_jax as vj

METHODS = {"full": vj.FullPrecision(), "vecinfer-2": vj.VecInfer(bits=2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--prompt-lengths", type=int, nargs="*", default=[512, 4096])
    parser.add_argument("--new-tokens", type=int, default=65)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    lm = vj.load(args.model, args.dtype)
    rng = np.random.default_rng(0)
    rows = []
    for length in args.prompt_lengths:
        for batch in args.batches:
            prompts = rng.integers(0, lm.config.vocab_size, (batch, length)).tolist()
            for name, method in METHODS.items():
                runs = [
                    vj.generate(lm, prompts, method=method, max_new_tokens=args.new_tokens, stop_token_ids=[]).stats
                    for _ in range(args.repeats + 1)
                ]
                timed = runs[1:]
                decode = statistics.median(run.decode_seconds for run in timed)
                rows.append(
                    {
                        "method": name,
                        "settings": repr(method),
                        "batch": batch,
                        "prompt_length": length,
                        "prefill_ms": 1e3 * statistics.median(run.prefill_seconds for run in timed),
                        "decode_ms_per_step": 1e3 * decode / timed[0].decode_steps,
                        "decode_tokens_per_second": batch * timed[0].decode_steps / decode,
                        "compile_seconds": runs[0].compile_seconds,
                        "capacity": timed[0].capacity,
                        "cache_bytes": dict(timed[0].cache_bytes),
                    }
                )
                print({k: v for k, v in rows[-1].items() if k not in ("settings", "cache_bytes")}, flush=True)
    content = {"model": args.model, "dtype": str(np.dtype(lm.dtype)), "rows": rows}
    content["config"] = {f.name: repr(getattr(lm.config, f.name)) for f in dataclasses.fields(lm.config)}
    print(results.write(f"generate-{args.model}", content, args.output))


if __name__ == "__main__":
    main()
