"""What a table's rows say: `results.json`, `report.md` and plots.

The mean over calibration seeds stands in a table, with the largest distance of a seed from it.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vecinfer_jax.caches.vecinfer import CENTRING_TRANSFORMS
from vecinfer_jax.calibration.collect import DEFAULT_TEXT, PASSAGE_LENGTH, PASSAGES, SAMPLES
from vecinfer_jax.errors import InputError

Content = dict[str, Any]

# Not worth a word in a table: the defaults of `calibrate`.
USUAL_CALIBRATION = {
    "passages": PASSAGES,
    "passage_length": PASSAGE_LENGTH,
    "samples": SAMPLES,
    "text": DEFAULT_TEXT,
}


def read_rows(directory: str | Path) -> list[Content]:
    """The rows of a table's directory, or of a `results.json`. Raises `InputError`."""
    path = Path(directory)
    files = sorted((path / "rows").glob("*.json")) if path.is_dir() else [path]
    rows: list[Content] = []
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            found = content.get("rows", [content])
            _ = [[row[key] for key in ("model", "task", "method", "seed", "result")] for row in found]
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise InputError(f"{file} cannot be read ({error!r}): delete it and run again") from None
        rows += found
    if not rows:
        raise InputError(f"{directory} holds no finished rows")
    return sorted(rows, key=lambda row: json.dumps([row["model"], row["task"], row["method"], row["seed"] or 0]))


def write_report(directory: str | Path, plots: bool = True) -> Path:
    """Makes results.json, report.md and (with matplotlib) plots from the rows of a directory."""
    path = Path(directory)
    rows = read_rows(path)
    try:
        (path / "results.json").write_text(json.dumps({"rows": rows}, indent=1, ensure_ascii=False) + "\n", "utf-8")
        images = draw(rows, path) if plots else []
        (path / "report.md").write_text(markdown(rows, images), "utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    return path / "report.md"


# -- tables


# KVQuant's settings but for bits, outliers and Q-Norm.
KVQUANT = {"fisher": True, "keys": "per-channel", "rope": "pre", "codebook": "nuq", "capped": True}


def method_label(method: Mapping[str, Any]) -> str:
    """A method's settings, short: "vecinfer 2 bit, residual=0". Settings at their usual values are left out."""
    shown = []
    rest = {k: v for k, v in method.items() if k != "name"}
    key, value, bits = rest.pop("key", None), rest.pop("value", None), rest.pop("bits", None)
    if key or value:  # what is not given is the format of `bits`
        key, value = (form or f"{bits:g} bit" for form in (key, value))
        shown.append(key if key == value else f"K {key} V {value}")
    elif bits is not None:
        shown.append(f"{bits:g} bit")
    centred = rest.get("transform") in CENTRING_TRANSFORMS
    usual = {"sink": int(centred), "transform": "metric", "scope": "layer_head"} | KVQUANT
    shown += [f"{k}={v}" for k, v in rest.items() if usual.get(k, ...) != v and v is not None]
    return " ".join([method["name"], ", ".join(shown)]).strip()


def task_label(row: Mapping[str, Any]) -> str:
    """A task's settings and how its prompts were read."""
    shown = [f"{k}={v}" for k, v in row["task"].items() if k != "name" and not k.endswith("sha256") and v is not None]
    return f"{row['task']['name']} ({', '.join(shown)})"


Measure = tuple[str, Callable[[Content], float], str]
TEXT: list[Measure] = [
    ("bits", lambda r: r["bits_per_element"], "{:.4g}"),
    ("perplexity", lambda r: r["perplexity"], "{:.2f}"),
    ("KL, nats", lambda r: r["kl"], "{:.4f}"),
    ("top-1 agreement, %", lambda r: 100 * r["top1_agreement"], "{:.1f}"),
]
CODE_ERROR: list[Measure] = [
    ("bits", lambda r: r["bits_per_element"], "{:.4g}"),
    ("key error", lambda r: r["key_error"], "{:.4f}"),
    ("value error", lambda r: r["value_error"], "{:.4f}"),
]
ANSWERS: list[Measure] = [
    ("bits", lambda r: r["bits_per_element"], "{:.4g}"),
    ("score", lambda r: r["score"], "{:.1f}"),
    ("of", lambda r: r["answered"], "{:.0f}"),
    ("gold NLL, nats a case", lambda r: r["gold_nll"], "{:.2f}"),
    ("gold NLL a token", lambda r: r["gold_nll_per_token"], "{:.3f}"),
]


def measures_of(task: str) -> list[Measure]:
    """What a task's table shows."""
    return {"perplexity": TEXT, "code-error": CODE_ERROR}.get(task, ANSWERS)


def grouped(rows: Iterable[Content], *keys: Callable[[Content], Any]) -> dict[Any, list[Content]]:
    """Rows by the values of some keys, in order of appearance."""
    groups: dict[Any, list[Content]] = defaultdict(list)
    for row in rows:
        groups[tuple(key(row) for key in keys)].append(row)
    return dict(groups)


def same_but_seed(row: Content) -> str:
    """Equal for rows that differ in nothing but the calibration's seed (and where and when they were measured)."""
    identity = ("fingerprint", "dtype", "task", "method", "calibration", "prefill")
    return json.dumps([row.get(key) for key in identity], sort_keys=True)


def same_task(row: Content) -> str:
    """Equal for rows that stand in one table."""
    return json.dumps([row.get(key) for key in ("model", "fingerprint", "dtype", "task")], sort_keys=True)


def mean_and_spread(values: Sequence[float], form: str) -> str:
    """The mean, and how far the furthest of several seeds is from it."""
    mean = float(np.mean(values))
    if len(set(values)) == 1:
        return form.format(mean)
    return f"{form.format(mean)} ± {form.format(max(abs(v - mean) for v in values))}"


def markdown(rows: Sequence[Content], images: Sequence[str] = ()) -> str:
    """The report: a table a model and task, plots below."""
    parts = ["# Evaluation\n"]
    parts.append(
        "Mean over calibration seeds ± the furthest seed. `bits` counts codes, scales and zeros of a cached element; "
        "prompt `coded`: every query reads codes, as decoding does; `exact`: as generation reads its prompt.\n"
    )
    for group in grouped(rows, same_task).values():
        devices = ", ".join(sorted({row["device"] for row in group}))
        first = group[0]
        parts.append(f"## {task_label(first)}\n\n{first['model']}, {first['dtype']}, {devices}\n")
        parts.append(task_table(group) + "\n")
        if "task" in (group[0]["result"].get("answers") or [{"labels": {}}])[0].get("labels", {}):
            parts.append(label_table(group, "task") + "\n")
    parts += [f"![{Path(image).stem}]({image})\n" for image in images]
    return "\n".join(parts)


def task_table(rows: Sequence[Content]) -> str:
    """One line a method and reading of the prompt."""
    measures = measures_of(rows[0]["task"]["name"])
    groups = list(grouped(rows, same_but_seed).values())
    several = any(len(group) > 1 for group in groups)
    lines = [["method", "prompt", *(["seeds"] if several else []), *(name for name, _, _ in measures)]]
    lines.append(["---"] * len(lines[0]))

    def order(group: list[Content]) -> Any:
        first = group[0]
        bits = first["result"]["bits_per_element"]
        return first["method"]["name"] != "full", -bits, _method(first), first["prefill"]

    for group in sorted(groups, key=order):
        cells = [mean_and_spread([get(row["result"]) for row in group], form) for _, get, form in measures]
        seeds = ["" if group[0]["seed"] is None else str(len(group))] if several else []
        lines.append([_method(group[0]), group[0]["prefill"], *seeds, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def label_table(rows: Sequence[Content], label: str) -> str:
    """Mean judgement by the value of a label (RULER's tasks, say), one line a method."""
    values = list(dict.fromkeys(a["labels"][label] for a in rows[0]["result"]["answers"]))
    lines = [["method", "prompt", *map(str, values)], ["---"] * (len(values) + 2)]
    for group in grouped(rows, same_but_seed).values():
        method, prefill = _method(group[0]), group[0]["prefill"]
        answers = [a for row in group for a in row["result"]["answers"] if a["score"] is not None]
        means = [np.mean([a["score"] for a in answers if a["labels"][label] == value] or [np.nan]) for value in values]
        lines.append([method, prefill, *(f"{100 * mean:.0f}%" for mean in means)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _method(row: Content) -> str:
    """The method's label, with what its calibration was made from where that is not the usual."""
    made = row.get("calibration") or {}
    unusual = [f"{name} {value}" for name, value in made.items() if value != USUAL_CALIBRATION.get(name)]
    return method_label(row["method"]) + (f" (calibrated on {', '.join(unusual)})" if unusual else "")


# -- plots


def draw(rows: Sequence[Content], directory: Path) -> list[str]:
    """Every plot that the rows are enough for -> file names."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("plots need matplotlib: pip install matplotlib, or leave them out with --no-plots") from None
    matplotlib.use("Agg")
    names = []
    for index, group in enumerate(grouped(rows, same_task).values()):
        task = group[0]["task"]["name"]
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{index:02d}-{group[0]['model']}-{task}")
        if task != "code-error":
            names += _quality_against_bits(group, directory / f"{stem}-bits.png")
        if task == "perplexity":
            names += _key_value_heatmap(group, directory / f"{stem}-key-value.png")
        if task == "needle":
            names += _needle_heatmap(group, directory / f"{stem}-heatmap.png")
    return names


def _quality_against_bits(rows: Sequence[Content], path: Path) -> list[str]:
    from matplotlib import pyplot as plt

    text = rows[0]["task"]["name"] == "perplexity"
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    full = [row for row in rows if row["method"]["name"] == "full"]

    def family(row: Content) -> str:
        settings = {k: v for k, v in row["method"].items() if k not in ("bits", "key", "value")}
        return f"{method_label(settings)}, {row['prefill']}"

    def value(row: Content) -> float:
        return row["result"]["perplexity" if text else "gold_nll"]

    coded = [row for row in rows if row["method"]["name"] != "full"]
    for (name,), group in grouped(coded, family).items():
        points = grouped(group, lambda r: r["result"]["bits_per_element"])
        xs = sorted(points)
        axes.plot([x[0] for x in xs], [np.mean([value(r) for r in points[x]]) for x in xs], marker="o", label=name)
    if full:
        axes.axhline(float(np.mean([value(r) for r in full])), color="black", linestyle="--", label="full precision")
    axes.set_xlabel("true bits an element")
    axes.set_ylabel("perplexity" if text else "negative log-likelihood of the gold answer, nats")
    axes.set_yscale("log")
    axes.set_title(f"{rows[0]['model']}: {rows[0]['task']['name']}")
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return [path.name] if coded else []


def _key_value_heatmap(rows: Sequence[Content], path: Path) -> list[str]:
    """Perplexity over bits of keys x bits of values, where a grid of formats was run."""
    from matplotlib import pyplot as plt

    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        key, value = row["method"].get("key"), row["method"].get("value")
        if key and value and row["method"]["name"] == "vecinfer":
            cells[key, value].append(row["result"]["perplexity"])

    def width(form: str) -> float:
        length, bits = form[1:].split("b")
        return int(bits) / int(length)

    keys = sorted({k for k, _ in cells}, key=width)
    values = sorted({v for _, v in cells}, key=width)
    if len(keys) < 2 or len(values) < 2:
        return []
    grid = np.asarray([[np.mean(cells.get((k, v)) or [np.nan]) for v in values] for k in keys])
    figure, axes = plt.subplots(figsize=(1.2 * len(values) + 2, 0.9 * len(keys) + 1.5), layout="constrained")
    axes.imshow(np.log(grid), cmap="viridis_r", aspect="auto")
    for i, j in np.ndindex(grid.shape):
        axes.text(j, i, f"{grid[i, j]:.1f}", ha="center", va="center", color="white", fontsize="small")
    axes.set_xticks(range(len(values)), [f"{width(v):g}\n{v}" for v in values])
    axes.set_yticks(range(len(keys)), [f"{width(k):g}  {k}" for k in keys])
    axes.set_xlabel("bits of values")
    axes.set_ylabel("bits of keys")
    axes.set_title("perplexity")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return [path.name]


def _needle_heatmap(rows: Sequence[Content], path: Path) -> list[str]:
    """Fraction found over depth x length, one panel a method and reading of the prompt."""
    from matplotlib import pyplot as plt

    panels = list(grouped(rows, same_but_seed).values())
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    size = (3.2 * columns, 2.6 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, group in zip(axes.flat, panels, strict=False):
        method, prefill = _method(group[0]), group[0]["prefill"]
        scores: dict[tuple[float, int], list[float]] = defaultdict(list)
        for found in (a for row in group for a in row["result"]["answers"] if a["score"] is not None):
            scores[found["labels"]["depth"], found["labels"]["length"]].append(found["score"])
        depths, lengths = sorted({d for d, _ in scores}), sorted({n for _, n in scores})
        grid = np.asarray([[np.mean(scores.get((d, n)) or [np.nan]) for n in lengths] for d in depths])
        axis.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize="x-small")
        axis.set_yticks(range(len(depths)), [f"{100 * d:.0f}%" for d in depths], fontsize="x-small")
        axis.set_title(f"{method}\n{prefill} prompt", fontsize="x-small")
        axis.set_ylabel("depth", fontsize="x-small")
    figure.suptitle("needles found, by length and depth")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return [path.name]
