"""Writes the tables of README.md from the JSON files under results/. Run with --check, it only says whether they are.

    python benchmarks/report.py [--check]

A table stands between `<!-- table NAME -->` and `<!-- end -->`; everything between is replaced.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
README = ROOT.parent / "README.md"
H100 = "nvidia-h100-80gb-hbm3"


def read(device: str, name: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / device / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def decode_kernel() -> str:
    rows = []
    for row in read(H100, "kernels")["rows"]:
        match = re.fullmatch(
            r"vq_decode_attention K (\S+) V (\S+) (\S+): B(\d+) S(\d+) (\S+) heads D(\d+)", row["name"]
        )
        if match is None:
            continue
        key, value, _, batch, tokens, heads, dim = match.groups()
        shape = f"B{batch} S{int(tokens):,}, {heads} heads, D{dim}"
        formats = key if key == value else f"K {key}, V {value}"
        rows.append([shape, formats, f"{row['us']:.0f}", f"{row['peer_us']:.0f}", f"{row['ratio']:.2f}x"])
    return table(["shape", "format", "ours, µs", "cuDNN bf16, µs", "speed-up"], rows)


def encode_kernel() -> str:
    """One row a format: 8,192 tokens by kind, then keys and values of a long prompt beside the layer's products."""
    formats: dict[str, dict[str, str]] = {}
    for row in read(H100, "kernels")["rows"]:
        if match := re.fullmatch(r"vq_encode (d\d+b\d+) (.+): (\d+) (?:tokens x|random) .*", row["name"]):
            form, kind, count = match.groups()
            cells = formats.setdefault(form, {})
            if "largest_excess" in row:
                cells["excess"] = f"{row['largest_excess']:.0e}"
            elif kind.startswith("K ("):
                cells[f"{kind} {count}"] = f"{row['us'] / 1e3:.2f} ms, {row['percent']:.1f}%"
            else:
                cells[kind] = f"{row['us']:.0f}"
    columns = {
        "V, µs": "values",
        "K Hadamard, µs": "keys with rope, smooth, Hadamard",
        "K dense map, µs": "keys with rope, mean, dense map",
        "K + V of 32,768 tokens (of QKV + MLP)": "K (rope, smooth, Hadamard) + V 32768",
        "with the dense map": "K (rope, mean, dense map) + V 32768",
        "largest excess of 10^6": "excess",
    }
    rows = [[form, *(cells.get(key, "") for key in columns.values())] for form, cells in formats.items()]
    return table(["format", *columns], rows)


def other_kernels() -> str:
    rows = []
    for row in read(H100, "kernels")["rows"]:
        if not row["name"].startswith("hadamard") and "one token" not in row["name"]:
            continue
        peer = f"{row['peer']}: {row['peer_us']:.0f}" if "peer" in row else ""
        rows.append([row["name"], f"{row['us']:.0f}", peer])
    return table(["kernel", "ours, µs", "peer, µs"], rows)


def quality() -> str:
    rows = []
    for path in sorted((ROOT / "results" / "cpu").glob("quality-*.json")):
        content = json.loads(path.read_text())
        for row in content["rows"].values():
            method = re.sub(r"(, )?(key|value|implementation)=None|, interpret=False", "", row["method"])
            rows.append(
                [
                    content["model"],
                    f"`{method}`",
                    f"{row['bits_per_element']:g}",
                    f"{row['perplexity']:.2f}",
                    f"{row['kl']:.3f}",
                    f"{100 * row['top1_agreement']:.1f}%",
                    f"{row['windows']} x {row['length']}",
                ]
            )
    return table(["model", "cache", "bits", "perplexity", "KL, nats", "top-1 agreement", "windows"], rows)


def steps() -> str:
    rows = []
    for row in read(H100, "generate-smollm2-135m-instruct")["rows"]:
        rows.append(
            [
                row["method"],
                f"B{row['batch']}, prompt {row['prompt_length']:,}",
                f"{row['prefill_ms']:.0f}",
                f"{row['decode_ms_per_step']:.2f}",
                f"{row['cache_bytes']['total'] / 2**20:.0f} MiB",
            ]
        )
    return table(["cache", "shape", "prefill, ms", "decode, ms a step", "cache allocated"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "decode-kernel": decode_kernel,
    "encode-kernel": encode_kernel,
    "other-kernels": other_kernels,
    "quality": quality,
    "steps": steps,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a table is out of date")
    check = parser.parse_args().check
    old = README.read_text(encoding="utf-8")
    new = old
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(new):
            print(f"README.md has no table {name}", file=sys.stderr)
            return 1
        content = make()
        new = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", new)
    if check and new != old:
        print("README.md is out of date: run python benchmarks/report.py", file=sys.stderr)
        return 1
    if not check:
        README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
