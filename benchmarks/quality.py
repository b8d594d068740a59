"""Perplexity of each method on a text, as JSON: the source of the README's quality table.

    python benchmarks/quality.py --text wikitext2_detok_test.txt [--model NAME] [--windows 12]

Rows are written as they are measured, and rows already in the file are not measured again.
"""

import argparse
import dataclasses
import hashlib
import json
import time
from pathlib import Path

import results

import vecinfer_jax as vj
from vecinfer_jax.evaluation.perplexity import rescoring_kl

ROWS = {
    "full": vj.FullPrecision(),
    "vecinfer-2-r128": vj.VecInfer(bits=2, residual=128),
    "vecinfer-2-r0": vj.VecInfer(bits=2, residual=0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--rescoring-tokens", type=int, default=512, help="0: leave out")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    name = f"quality-{args.model}"
    path = args.output or results.ROOT / results.device_name() / f"{name}.json"
    content = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    text = args.text.read_text()
    digest = hashlib.sha256(text.encode()).hexdigest()
    content["model"] = args.model
    lm = vj.load(args.model, args.dtype)
    for row in args.rows:
        method = ROWS[row]
        calibration = vj.resolve_calibration(lm, method)
        provenance = {
            "method": repr(method),
            "dtype": args.dtype,
            "text": args.text.name,
            "text_sha256": digest,
            "calibration": calibration.digest,
        }
        old = content["rows"].get(row, {})
        same = provenance.items() <= old.items()
        if same and (old["length"], old["windows"]) == (args.length, args.windows):
            continue
        begin = time.perf_counter()
        result = vj.evaluate.perplexity(lm, method, calibration, text, length=args.length, windows=args.windows)
        seconds = round(time.perf_counter() - begin, 1)
        content["rows"][row] = dataclasses.asdict(result) | provenance | {"seconds": seconds}
        results.write(name, content, args.output)
    if args.rescoring_tokens:
        method = ROWS["vecinfer-2-r128"]
        calibration = vj.resolve_calibration(lm, method)
        tokens = lm.tokenizer.encode(text)[: args.rescoring_tokens]
        content["rescoring"] = {
            "method": repr(method),
            "calibration": calibration.digest,
            "text_sha256": digest,
            "tokens": len(tokens),
            "kl_decoded_from_scored": rescoring_kl(lm, method, calibration, tokens, start=1),
        }
    print(results.write(name, content, args.output))


if __name__ == "__main__":
    main()
