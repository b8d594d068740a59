"""How far decoding token by token is from scoring the same tokens at once, on a real model, as JSON.

    python benchmarks/rescoring.py --text wikitext2_detok_test.txt [--model NAME] [--tokens 256]

Both read everything that has left the window from codes. The mean KL is not zero: codes are discrete, and a rounding
difference may flip one (or the last bit of a 16-bit scale), after which the two runs go apart as two codings of one
text do. `equal_tokens` is how many tokens they go together (KL below 1e-5 nats), before the first flip.
"""

import argparse
import hashlib
from pathlib import Path

import results

import vecinfer_jax as vj
from vecinfer_jax.evaluation.perplexity import rescoring_kls

METHODS = (
    vj.FullPrecision(),
    vj.VecInfer(bits=2),
    vj.VecInfer(bits=2, residual=0),
    vj.KIVI(bits=2, group=32),
    vj.HadamardInt(bits=4, residual=0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    text = args.text.read_text()
    lm = vj.load(args.model, "float32", progress=False)
    tokens = lm.tokenizer.encode(text)[: args.tokens]
    rows = []
    for method in METHODS:
        calibration = vj.resolve_calibration(lm, method)
        kls = rescoring_kls(lm, method, calibration, tokens)
        apart = [i for i, kl in enumerate(kls) if kl > 1e-5]
        rows.append(
            {
                "method": repr(method),
                "calibration": calibration.digest if method.needs_calibration else None,
                "kl_decoded_from_scored": sum(kls) / len(kls),
                "equal_tokens": apart[0] if apart else len(kls),
            }
        )
        print(rows[-1], flush=True)
    text_sha256 = hashlib.sha256(text.encode()).hexdigest()
    content = {"model": args.model, "tokens": len(tokens), "text_sha256": text_sha256, "rows": rows}
    print(results.write(f"rescoring-{args.model}", content, args.output))


if __name__ == "__main__":
    main()
