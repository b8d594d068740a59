"""Quality of every method, as tables of rows: the source of what the README and docs/quality.md say about it.

    python benchmarks/quality.py --group paper --model smollm2-135m-instruct --data DIR --output WORK [--workers 4]

`DIR` holds wikitext2_detok_test.txt and gsm8k_test.jsonl; essays.txt is written there from the essays that `vecinfer
fetch paul-graham-essays` gets. A row is measured once: an interrupted run goes
on, and rows that benchmarks/results/<device>/quality-<model>.json holds are taken from there. All rows are written
back to it (or below --results). Everything is float32.

    python benchmarks/quality.py --collect WORK [WORK ...]      only writes the rows of finished runs there

`--mixed-with FILE` calibrates on text of which half is FILE's and half Wikipedia paragraphs.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import results

import vecinfer_jax as vj
from vecinfer_jax import assets, specs
from vecinfer_jax.caches import METHODS
from vecinfer_jax.calibration.collect import DEFAULT_TEXT, PASSAGE_LENGTH, PASSAGES, SAMPLES
from vecinfer_jax.cli import read_documents
from vecinfer_jax.evaluation.report import grouped, read_rows
from vecinfer_jax.evaluation.table import IDENTITY, TASKS, Row, Table, rows_of

SMOLLM2, QWEN, QWEN_LARGE = (
    "smollm2-135m-instruct",
    "qwen2.5-coder-0.5b-instruct",
    "qwen2.5-coder-1.5b-instruct",  # head_dim 128
)
WINDOWS = {SMOLLM2: 12, QWEN: 6}
FORMATS = ("d8b8", "d8b12", "d4b8", "d4b12", "d2b8")
TRANSFORMS = ("none", "smooth", "hadamard", "hadamard-smooth")
CENTRING = ("mean-smooth-hadamard", "rotation")
AS_PAPER = "transform=smooth-hadamard"
PAPER = [
    *(f"vecinfer:bits={bits:g},{AS_PAPER}" for bits in (4, 3, 2, 1.5, 1.25, 1)),
    f"vecinfer:key=d4b10,value=d8b12,{AS_PAPER}",
]
BASELINES = [
    *(f"kivi:bits={bits},group=32" for bits in (4, 2)),
    *(f"kivi:bits={bits},group=64" for bits in (4, 2)),
    *(f"hadamard-int:bits={bits}" for bits in (4, 3, 2)),
    *(f"plain-vq:bits={bits:g}" for bits in (4, 2, 1)),
]
# One thing changed at a time: Q-Norm at 2 bits, the rest at 3.
KVQUANT_ABLATIONS = (
    *(f"bits=2,outliers={share:g},sink=1,qnorm=false" for share in (0.01, 0)),
    "bits=3,outliers=0,sink=1",
    *(f"bits=3,outliers=0,sink=1,{change}" for change in ("keys=per-token", "rope=post", "codebook=int")),
    *(f"bits=3,outliers=0,{change}" for change in ("sink=0", "sink=1,fisher=false")),
    *(f"bits=3,outliers={share:g},sink=1" for share in (0.001, 0.005, 0.01)),
    *(f"bits=3,outliers={share:g},sink=1,capped=false" for share in (0.001, 0.005, 0.01)),
    *(f"bits=2,outliers={share:g},sink=1,fisher=false" for share in (0.01, 0)),
)
METRIC = "vecinfer:bits=2,transform=metric,sink=1"
# What calibration can do beyond k-means, one at a time; all of it together is BEST.
IDEAS = (
    "weighted=keys",
    "weighted=values",
    "weighted=both",
    "restarts=4",
    "rotate_values=true",
    "refine=attention",
    "refine=kl",
)
TURNED = "weighted=both,rotate_values=true"
BEST = f"{TURNED},refine=kl"
# Two bits on average, unequally between keys and values.
UNEQUAL = (("d4b9", "d4b7"), ("d4b10", "d4b6"), ("d4b10", "d8b12"), ("d4b7", "d4b9"))
# Characters of essays that are scored.
ESSAYS = 400_000
# Of RULER's thirteen tasks, some that SmolLM2 solves at all at 4,096 tokens.
RULER = ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multivalue")
# TailorKV: layers of the models, and the paper's settings for LongBench and for InfiniteBench and RULER.
LAYERS = {SMOLLM2: 30, QWEN: 24, QWEN_LARGE: 28}
TAILORKV = ("tokens=128,sink=8,recent=56,channels=8", "tokens=896,sink=64,recent=64,channels=12")
BUDGETS = (32, 64, 256)
JUDGED = [
    "full",
    *(f"vecinfer:bits={bits},{AS_PAPER}" for bits in (4, 2)),
    "kivi:bits=2,group=32",
    "hadamard-int:bits=2",
]


def windowed(methods: list[str], residuals: tuple[int, ...]) -> list[str]:
    """Each method with each residual window; full precision has none."""
    return [m if m == "full" else f"{m},residual={r}" for m in methods for r in residuals if m != "full" or not r]


def groups(model: str, data: Path) -> dict[str, dict[str, Any]]:
    """name -> methods, tasks, prefills, seeds."""
    windows = WINDOWS.get(model, 6)
    text = f"perplexity:path={data / 'wikitext2_detok_test.txt'},windows={windows}"
    error = f"code-error:path={data / 'wikitext2_detok_test.txt'},windows=4"
    long = [
        f"perplexity:path={data / name},length=8192,windows=2" for name in ("essays.txt", "wikitext2_detok_test.txt")
    ]
    shown = windowed(["full", *PAPER, *BASELINES], (0, 128))
    n = LAYERS.get(model, 32)
    sparse, first = f"tailorkv:roles=sparse*{n}", f"tailorkv:roles=quantised+sparse*{n - 1}"
    return {
        "paper": {"methods": windowed(["full", *PAPER], (0, 128)), "tasks": [text], "seeds": [0, 1, 2]},
        "baselines": {"methods": windowed(BASELINES, (0, 128)), "tasks": [text], "seeds": [0]},
        "transforms": {
            "methods": [
                f"vecinfer:bits={bits},transform={t},residual=0"
                for bits, t in itertools.product((2, 1.5), ("smooth-hadamard", *TRANSFORMS))
            ],
            "tasks": [text],
            "seeds": [0],
        },
        "scopes": {
            "methods": [
                f"vecinfer:bits={bits},{AS_PAPER},scope={s},residual=0"
                for bits, s in itertools.product((2, 1.5), ("layer_head", "layer", "global"))
            ],
            "tasks": [text],
            "seeds": [0],
        },
        "formats": {
            "methods": [f"vecinfer:key={k},value={v},{AS_PAPER},residual=0" for k in FORMATS for v in FORMATS],
            "tasks": [text],
            "seeds": [0],
        },
        # Calibrated on passages as long as the windows that are scored: --passages 32 --passage-length 1024.
        "metric": {
            "methods": [f"vecinfer:bits=2,transform=metric,sink=1,residual={r}" for r in (0, 128)],
            "tasks": [text],
            "seeds": [0, 1, 2],
        },
        "metric-widths": {
            "methods": [
                *(f"vecinfer:bits=2,transform={t},sink=1,residual=0" for t in ("smooth-hadamard", *CENTRING)),
                *(f"vecinfer:bits={bits},transform=metric,sink=1,residual=0,mixed=none" for bits in (1, 4, 1.5, 3)),
                *(f"vecinfer:bits=4,transform=metric,sink=1,residual={r}" for r in (0, 128)),
                "vecinfer:bits=2,transform=metric,sink=1,residual=0,rotate_values=true",
            ],
            "tasks": [text],
            "seeds": [0],
        },
        "metric-needle": {
            "methods": [f"vecinfer:bits=2,transform=metric,sink=1,residual={r}" for r in (128, 0)],
            "tasks": ["needle"],
            "seeds": [0],
        },
        # Likewise, but BEST likes more text to descend on: --passages 128 --passage-length 1024.
        "metric-ideas": {
            "methods": [
                f"{METRIC},residual=0",
                *(f"{METRIC},residual=0,{idea}" for idea in IDEAS),
                *(f"{METRIC},residual=0,key={k},value={v}" for k, v in UNEQUAL),
                *(f"{METRIC},residual={r},{BEST}" for r in (0, 128)),
                *(f"{METRIC},residual=0,{BEST}".replace("bits=2", f"bits={bits:g}") for bits in (1.5, 1)),
            ],
            "tasks": [text],
            "seeds": [0],
        },
        # Sub-vectors of 2, mixed and as they are dealt, and with ten bits; 16 exact tokens are as many as KIVI's keys,
        # in groups of 32, have on average without a window. --passages 64 --passage-length 1024.
        "mixed": {
            "methods": [
                f"vecinfer:bits=4,transform=metric,sink=1,residual={r},{TURNED},mixed={mixed}"
                for mixed, r in itertools.product(("none", "both"), (0, 16, 128))
            ],
            "tasks": [text],
            "seeds": [0, 1, 2],
        },
        "ten-bits": {
            "methods": [
                f"vecinfer:key=d2b10,value={value},transform=metric,sink=1,residual={r},{TURNED}"
                for value, r in itertools.product(("d2b10", "d2b8"), (0, 128))
            ],
            "tasks": [text],
            "seeds": [0],
        },
        # Tables of the values in fp8, by width: --passages 32 --passage-length 1024.
        "fp8": {
            "methods": [
                f"vecinfer:bits={bits},transform=metric,sink=1,residual=0" + ",fp8_values=true" * fp8
                for bits, fp8 in itertools.product((3, 2, 1), (0, 1))
            ],
            "tasks": [text],
            "seeds": [0],
        },
        # Calibrated on passages as long as the windows that are scored: --passages 32 --passage-length 1024.
        "kvquant": {
            "methods": [
                f"kvquant:bits={bits},outliers={outliers:g},sink=1,residual=0"
                for bits, outliers in itertools.product((4, 3, 2), (0.01, 0))
            ],
            "tasks": [text, error],
            "seeds": [0],
        },
        "kvquant-ablations": {
            "methods": [f"kvquant:{settings},residual=0" for settings in KVQUANT_ABLATIONS],
            "tasks": [text],
            "seeds": [0],
        },
        # By what is read from the host, by the channels that choose it, and by the layers that are quantised.
        "tailorkv": {
            "methods": [
                *(f"{sparse},{setting}" for setting in TAILORKV),
                *(f"{sparse},{TAILORKV[0]}".replace("tokens=128", f"tokens={tokens}") for tokens in BUDGETS),
                *(f"{sparse},{TAILORKV[0]}".replace("channels=8", f"channels={c}") for c in (4, 12, 64)),
                *(f"{first},bits={bits},{TAILORKV[0]}" for bits in (1, 2)),
                f"tailorkv:roles=quantised*2+sparse*{n - 2},bits=1,{TAILORKV[0]}",
                f"tailorkv:roles=quantised*{n},bits=1,{TAILORKV[0]}",
            ],
            "tasks": [f"perplexity:path={data / 'wikitext2_detok_test.txt'},windows=4"],
            "seeds": [0],
        },
        "tailorkv-needle": {
            "methods": [
                "full",
                *(f"{sparse},{setting}" for setting in TAILORKV),
                *(f"{first},bits={bits},{TAILORKV[0]}" for bits in (1, 2)),
            ],
            "tasks": ["needle:samples=1", "needle:lengths=4096,samples=1"],
            "prefills": ["exact"],  # as the paper reads prompts
            "seeds": [0],
        },
        # By how long the passages are: --passages 64 --passage-length 1024, 16 of 4,096, 8 of 8,192.
        "lengths": {
            "methods": [f"{METRIC},residual={r}" for r in (128, 0)],
            "tasks": [*long, text],
            "seeds": [0],
        },
        # The same choice in our basis, and by each query head: --passages 16 --passage-length 4096.
        "tailorkv-basis": {
            "methods": [
                f"{sparse},{TAILORKV[0]},{ours}"
                for ours in ("basis=principal", "heads=each", "basis=principal,heads=each")
            ],
            "tasks": ["needle:samples=1", "needle:lengths=4096,samples=1"],
            "prefills": ["exact"],
            "seeds": [0],
        },
        # What nothing was chosen on: a model, and a text.
        "unseen": {
            "methods": [
                "full",
                "kivi:bits=2,group=32,residual=0",
                *windowed([f"vecinfer:bits=2,transform={t},sink=1" for t in ("smooth-hadamard", "metric")], (0, 128)),
            ],
            "tasks": [text, text.replace("wikitext2_detok_test.txt", "essays.txt")],
            "seeds": [0],
        },
        # Likewise, refined: --passages 64 --passage-length 2048 --repeated 0.5.
        "unseen-best": {
            "methods": [f"{METRIC},residual={r},{BEST}" for r in (0, 128)],
            "tasks": [text.replace("wikitext2_detok_test.txt", "essays.txt")],
            "seeds": [0],
        },
        # On --passages 128 --passage-length 1024, and, so that the needle is found, 64 of 2,048 and --repeated 0.5.
        "metric-best": {
            "methods": [f"{METRIC},residual={r},{BEST}" for r in (0, 128)],
            "tasks": [text],
            "seeds": [0, 1, 2],
        },
        # --passages 256 --passage-length 1024
        "metric-best-mixed": {
            "methods": [f"{METRIC},residual={r},{BEST},mixed=values" for r in (0, 128)],
            "tasks": [text],
            "seeds": [0, 1, 2],
        },
        # --passages 64 --passage-length 1024
        "best-widths": {
            "methods": [
                f"{METRIC},residual={r},{BEST}".replace("bits=2", f"bits={bits}")
                for bits, r in itertools.product((4, 3), (0, 16, 128))
            ],
            "tasks": [text],
            "seeds": [0, 1, 2],
        },
        "metric-best-needle": {
            "methods": [f"{METRIC},residual={r},{BEST}" for r in (128, 0)],
            "tasks": ["needle"],
            "seeds": [0, 1, 2],
        },
        "codes": {"methods": windowed([*PAPER, *BASELINES], (0,)), "tasks": [error], "seeds": [0, 1, 2]},
        "long": {"methods": [*windowed(JUDGED, (128,)), "full"], "tasks": long, "seeds": [0]},
        "needle": {"methods": shown, "tasks": ["needle"], "prefills": ["coded", "exact"], "seeds": [0]},
        "ruler": {
            "methods": [*windowed(JUDGED, (128,)), "full"],
            "tasks": [f"ruler:tasks={'+'.join(RULER)},samples=5"],
            "prefills": ["coded", "exact"],
            "seeds": [0],
        },
        "gsm8k": {
            "methods": [*windowed(JUDGED, (128,)), "full"],
            "tasks": [f"gsm8k:path={data / 'gsm8k_test.jsonl'},problems=100,generated=24"],
            "prefills": ["exact", "coded"],
            "seeds": [0],
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", type=Path, nargs="+", metavar="WORK")
    parser.add_argument("--group", nargs="+", default=[])
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, help="working directory of the table")
    parser.add_argument("--results", type=Path, default=results.ROOT, help="where the JSON files go")
    parser.add_argument("--passages", type=int, default=PASSAGES)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--passage-length", type=int, default=PASSAGE_LENGTH)
    parser.add_argument("--repeated", type=float, default=0.0, help="share of the passages that say everything twice")
    parser.add_argument("--calibration-text", type=Path, help="default: Wikipedia paragraphs")
    parser.add_argument("--mixed-with", type=Path, metavar="FILE", help="half the calibration text")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1, help="processes that share the rows")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.collect:
        save([row for work in args.collect for row in read_rows(work)], args.results)
        return 0
    if not args.group or args.data is None or args.output is None:
        parser.error("give --group, --data and --output, or --collect")
    if args.mixed_with is not None and args.calibration_text is not None:
        parser.error("give either --mixed-with or --calibration-text")
    known = groups(args.model, args.data)
    unknown = [name for name in args.group if name not in known]
    if unknown:
        parser.error(f"no group {unknown[0]}: choose from {', '.join(known)}")
    essays = args.data / "essays.txt"
    if not essays.exists() and any(str(essays) in task for name in args.group for task in known[name]["tasks"]):
        text = json.loads(assets.fetch("paul-graham-essays").read_text(encoding="utf-8"))["text"]
        essays.write_text(text[:ESSAYS], encoding="utf-8")
    if args.workers > 1 and args.worker is None:
        command = [sys.executable, __file__, *sys.argv[1:]]
        workers = [subprocess.Popen([*command, "--worker", str(i)]) for i in range(args.workers)]
        statuses = [worker.wait() for worker in workers]
        if any(statuses):
            return 1
    lm = vj.load(args.model, "float32", progress=False)
    table = Table(
        lm,
        args.output,
        passages=args.passages,
        passage_length=args.passage_length,
        samples=args.samples,
        repeated=args.repeated,
        **texts_of(args),
        batch=args.batch,
        progress=args.worker in (None, 0),
    )
    held = args.results / results.device_name() / f"quality-{args.model}.json"
    if held.exists():
        table.restore(read_rows(held))
    every: list[Row] = []
    for name in args.group:
        wanted = known[name]
        every += rows_of(
            [specs.parse(text, METHODS, "method") for text in wanted["methods"]],
            [specs.parse(text, TASKS, "task") for text in wanted["tasks"]],
            prefills=wanted.get("prefills", ["coded"]),
            seeds=wanted["seeds"],
        )
    every = list(dict.fromkeys(every))
    if args.worker is not None:  # rows that share a calibration stay together
        shared: dict[Any, int] = {}
        for row in every:
            shared.setdefault(calibration_of(row), len(shared))
        every = [row for row in every if shared[calibration_of(row)] % args.workers == args.worker]
    table.run(every)
    if args.worker is None:
        save(read_rows(args.output), args.results)
    return 0


def texts_of(args: argparse.Namespace) -> dict[str, Any]:
    """The calibration text and its name, as `Table` takes them."""
    if args.mixed_with is not None:
        documents = list(read_documents(args.mixed_with))
        wanted, half = sum(map(len, documents)), []
        for some in itertools.batched(assets.paragraphs(DEFAULT_TEXT), 100):
            if wanted <= 0:
                break
            half += some
            wanted -= sum(map(len, some))
        return {"texts": documents + half, "text_name": f"{DEFAULT_TEXT} and {args.mixed_with.stem}"}
    if args.calibration_text is not None:
        return {"texts": list(read_documents(args.calibration_text)), "text_name": args.calibration_text.stem}
    return {}


def calibration_of(row: Row) -> str:
    """What rows with the same calibration have in common."""
    return json.dumps([row.method.calibration_key(), row.seed], sort_keys=True)


def save(rows: list[dict[str, Any]], root: Path) -> None:
    """Adds rows to the JSON file of their model and device, one row a line."""
    for (model, device), group in grouped(rows, lambda r: r["model"], lambda r: r["device"]).items():
        path = root / results.folder_of(device) / f"quality-{model}.json"
        held = {json.dumps([row[key] for key in IDENTITY]): row for row in (read_rows(path) if path.exists() else [])}
        held |= {json.dumps([row[key] for key in IDENTITY]): row for row in group}
        lines = [json.dumps(held[key], ensure_ascii=False) for key in sorted(held)]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"rows": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    sys.exit(main())
