"""Writes the tables of README.md and of docs/ from the JSON files under results/, and the plots in docs/images. Run
with --check, it only says whether the tables are up to date.

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

import performance
from performance import table

from vecinfer_jax.evaluation.report import USUAL_CALIBRATION, label_table, mean_and_spread, method_label, task_table

ROOT = Path(__file__).resolve().parent
PAGES = [
    ROOT.parent / "README.md",
    *(ROOT.parent / "docs" / f"{name}.md" for name in ("quality", "performance", "better-than-the-paper")),
]
SMOLLM2, QWEN, QWEN_LARGE = (
    "smollm2-135m-instruct",
    "qwen2.5-coder-0.5b-instruct",
    "qwen2.5-coder-1.5b-instruct",
)
WIKITEXT = "wikitext2_detok_test.txt"

# Settings of VecInfer's calibration that the paper does not have, as rows have them where they are off.
BARE: dict[str, Any] = {
    "rotate_values": False,
    "weighted": "none",
    "restarts": 1,
    "refine": "none",
    "mixed": "none",
    "fp8_values": False,
}

# What of a perplexity's row, and how.
SHOWN = {"perplexity": "{:.2f}", "kl": "{:.4f}"}


def rows_of(
    model: str,
    task: str,
    kept: Callable[[dict[str, Any]], bool] | None = None,
    all_devices: bool = False,
    **settings: Any,
) -> list[dict[str, Any]]:
    """The rows of benchmarks/quality.py for a task whose task, method or reading of the prompt has these settings.

    `kept`: which of these, where settings cannot say it. `all_devices`: of all, in a table that names them.
    """

    def wanted(row: dict[str, Any]) -> bool:
        has = row["task"] | row["method"] | {"prefill": row["prefill"], "seed": row["seed"]}
        fits = row["task"]["name"] == task and all(has.get(key) == value for key, value in settings.items())
        return fits and (kept is None or kept(row))

    paths = sorted((ROOT / "results").glob(f"*/quality-{model}.json"))
    by_device = [[row for row in json.loads(path.read_text())["rows"] if wanted(row)] for path in paths]
    if all_devices:
        return [row for rows in by_device for row in rows]
    return max(by_device, key=len, default=[])  # of the device with most of them


def paper_and_baselines(
    model: str, task: str, calibrated: Callable[[dict[str, Any]], bool] | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """Without the ablations: the paper's transform and codebooks, and its seven configurations."""
    rows = rows_of(model, task, **settings)
    as_in_paper = {"transform": "smooth-hadamard", "scope": "layer_head", "sink": 0, **BARE}
    formats = {(None, None), ("d4b10", "d8b12")}
    return [
        row
        for row in rows
        if all(row["method"].get(key, usual) == usual for key, usual in as_in_paper.items())
        and (row["method"].get("key"), row["method"].get("value")) in formats
        and (calibrated is None or calibrated(row["calibration"] or USUAL_CALIBRATION))
    ]


def usual(calibration: dict[str, Any]) -> bool:
    return calibration == USUAL_CALIBRATION


def of_same_text(calibration: dict[str, Any]) -> bool:
    """Calibrated on text half of which is of the kind that is scored."""
    return "wikitext2" in calibration["text"]


def quality() -> str:
    """The README's: some methods on one model, with and without a window, ours in the mean of its calibrations."""
    shown = {
        ("vecinfer", 4),
        ("vecinfer", 2),
        ("kivi", 2),
        ("hadamard-int", 2),
        ("plain-vq", 2),
    }
    rows = [
        row
        for row in paper_and_baselines(SMOLLM2, "perplexity", usual, length=1024, path=WIKITEXT)
        if row["method"]["name"] == "full"
        or ((row["method"]["name"], row["method"]["bits"]) in shown and row["method"].get("key") is None)
    ]

    def default(row: dict[str, Any]) -> bool:
        return is_default(row["method"]) and of_short_passages(row["calibration"])

    ours = rows_of(
        SMOLLM2, "perplexity", default, length=1024, path=WIKITEXT, prefill="coded", transform="metric", sink=1
    )
    return task_table([row for row in rows if row["method"].get("group", 32) == 32] + ours)


def perplexities(model: str) -> Callable[[], str]:
    """One line a method and window."""
    return lambda: task_table(paper_and_baselines(model, "perplexity", usual, length=1024, path=WIKITEXT))


def same_text() -> str:
    """VecInfer calibrated on text half of which is of the kind that is scored, in the mean over all seeds."""
    rows = [
        row
        for model in (SMOLLM2, QWEN)
        for row in paper_and_baselines(model, "perplexity", of_same_text, length=1024, path=WIKITEXT)
        if row["method"]["name"] == "vecinfer"
    ]
    found: dict[tuple[str, str, int], list[float]] = {}
    for row in rows:
        method = row["method"]
        width = f"K {method['key']} V {method['value']}" if method["key"] else f"{method['bits']:g} bit"
        key = row["model"].split("-")[0], width, method["residual"]
        found.setdefault(key, []).append(row["result"]["perplexity"])
    lines = [
        [model, width, str(residual), str(len(values)), f"{sum(values) / len(values):.2f}"]
        for (model, width, residual), values in found.items()
    ]
    return table(["model", "vecinfer", "residual", "seeds", "perplexity"], lines)


def codes() -> str:
    """Relative errors of the paper's configurations and the baselines."""
    return task_table(paper_and_baselines(SMOLLM2, "code-error", usual))


def ablation(setting: str, **others: Any) -> Callable[[], str]:
    """Perplexity by one setting of VecInfer without a window, for both models and two widths; one calibration seed."""

    def make() -> str:
        columns = [(model, bits) for model in (SMOLLM2, QWEN) for bits in (2, 1.5)]
        fixed = {"name": "vecinfer", "residual": 0, "sink": 0, "key": None, "seed": 0, "length": 1024} | others
        cells: dict[str, dict[Any, float]] = {}
        for model, bits in columns:
            for row in rows_of(model, "perplexity", **{k: v for k, v in fixed.items() if k != "name"}, bits=bits):
                if row["method"]["name"] == "vecinfer" and usual(row["calibration"]):
                    value = row["method"][setting]
                    cells.setdefault(value, {})[model, bits] = row["result"]["perplexity"]
        measured = [c for c in columns if sum(c in found for found in cells.values()) > 1]
        lines = [
            [f"`{value}`", *(f"{found[c]:.1f}" if c in found else "" for c in measured)]
            for value, found in sorted(cells.items(), key=lambda item: next(iter(item[1].values())))
        ]
        return table([setting, *(f"{model.split('-')[0]}, {bits:g} bit" for model, bits in measured)], lines)

    return make


def answers(task: str, model: str = SMOLLM2, **settings: Any) -> Callable[[], str]:
    """A task's table, and by its parts where it has some."""

    def make() -> str:
        rows = paper_and_baselines(model, task, **settings)
        text = task_table(rows)
        parts = rows[0]["result"]["answers"][0]["labels"]
        return text + "\n\n" + label_table(rows, "task") if "task" in parts else text

    return make


def long_texts() -> str:
    """Perplexity (and KL) over 8,192 tokens, a column a text."""
    rows = paper_and_baselines(SMOLLM2, "perplexity", length=8192)
    texts = {"essays.txt": "essays", "wikitext2_detok_test.txt": "wikitext-2"}
    lines: dict[str, dict[str, dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: -row["result"]["bits_per_element"]):
        lines.setdefault(method_label(row["method"]), {})[row["task"]["path"]] = row["result"]
    cells = [
        [
            label,
            f"{next(iter(found.values()))['bits_per_element']:.4g}",
            *(f"{found[text]['perplexity']:.2f}" for text in texts),
            *(f"{found[text]['kl']:.3f}" for text in texts),
        ]
        for label, found in lines.items()
    ]
    names = texts.values()
    return table(["method", "bits", *(f"perplexity, {t}" for t in names), *(f"KL, {t}" for t in names)], cells)


def metric() -> str:
    """Transforms of the keys with one exact token, calibrated on passages as long as the windows."""
    transforms = ("metric", "rotation", "mean-smooth-hadamard", "smooth-hadamard")

    shown = {"length": 1024, "path": WIKITEXT, "sink": 1}
    rows = [row for t in transforms for row in rows_of(SMOLLM2, "perplexity", is_plain, transform=t, **shown)]
    lines: dict[tuple[Any, ...], list[float]] = {}
    for row in sorted(rows, key=lambda row: (-row["result"]["bits_per_element"], row["result"]["perplexity"])):
        method = row["method"]
        key = method["transform"], row["result"]["bits_per_element"], method["residual"]
        lines.setdefault(key, []).append(row["result"]["perplexity"])
    cells = [
        [f"`{transform}`", f"{bits:g}", str(residual), str(len(found)), mean_and_spread(found, "{:.2f}")]
        for (transform, bits, residual), found in lines.items()
    ]
    return table(["transform", "bits", "residual", "seeds", "perplexity"], cells)


def kvquant() -> str:
    """KVQuant's widths and ablations without a window, calibrated on passages as long as the windows."""
    rows = rows_of(SMOLLM2, "perplexity", length=1024, path=WIKITEXT, name="kvquant", all_devices=True)
    cells = []
    for row in sorted(rows, key=lambda row: (-row["method"]["bits"], row["result"]["perplexity"])):
        method, result = row["method"], row["result"]
        hidden = {"residual": 0, "sink": 1}
        label = method_label({key: value for key, value in method.items() if hidden.get(key) != value})
        label = label.removeprefix("kvquant ") + (", sink=0" if method["sink"] == 0 else "")
        numbers = [f"{result[name]:{form}}" for name, form in (("perplexity", ".2f"), ("kl", ".4f"))]
        cells.append([label, f"{result['bits_per_element']:.3g}", *numbers, where(row)])
    return table(["kvquant", "bits", "perplexity", "KL, nats", "device"], cells)


def where(row: dict[str, Any]) -> str:
    """The device of a row, in a word."""
    return "CPU" if row["device"] == "cpu" else row["device"].split()[1]


def tailorkv(task: str) -> Callable[[], str]:
    """TailorKV's budgets, channels and roles."""

    def make() -> str:
        cells = []
        for row in rows_of(SMOLLM2, task, name_of("tailorkv"), all_devices=True):
            method, result = row["method"], row["result"]
            quantised = method["roles"].count("quantised") if method["roles"] else 0
            layers = f"{quantised} at {method['bits']} bit" if quantised else "none"
            settings = [str(method[name]) for name in ("tokens", "channels", "sink", "recent")]
            if task == "perplexity":
                numbers = [
                    f"{result['perplexity']:.2f}",
                    f"{max(result['kl'], 0):.4f}",
                    f"{100 * result['top1_agreement']:.1f}",
                ]
            else:
                length = f"{row['task']['lengths'][0]:,}"
                numbers = [length, f"{result['score']:g} of {result['answered']}", f"{result['gold_nll']:.2f}"]
            bits = f"{result['bits_per_element']:.4g}"
            ours = method.get("basis", "channels"), method.get("heads", "mean")
            cells.append([layers, *settings, method["host"], *ours, bits, *numbers])
        cells = [list(line) for line in dict.fromkeys(map(tuple, cells))]  # some were measured on two devices
        cells.sort(key=lambda line: (line[0] != "none", line[0], -int(line[1]), int(line[2]), *line[6:8], line[9]))
        about = ["quantised layers", "tokens", "channels", "sink", "recent", "host", "basis", "heads", "bits"]
        measured = {"perplexity": ["perplexity", "KL, nats", "top-1 agreement, %"]}
        return table([*about, *measured.get(task, ["length", "found", "gold NLL, nats a case"])], cells)

    return make


def recalls() -> str:
    """How much of the attention that host tokens could get the chosen ones do, by channels, their basis, and heads."""
    kinds = {
        "by_channels": ("channels", "mean"),
        "by_channels_of_each_head": ("channels", "each"),
        "by_channels_in_principal_basis": ("principal", "mean"),
        "by_channels_in_principal_basis_of_each_head": ("principal", "each"),
    }
    cells = []
    for file in sorted((ROOT / "results").glob("*/layer-roles-*.json")):
        found = json.loads(file.read_text())
        for key, (basis, heads) in kinds.items():
            for channels, measured in found.get(key, {}).items():
                shares = [f"{100 * measured[name]:.1f}" for name in ("recall", "kept", "best")]
                cells.append([found["calibration"]["model"]["name"], basis, heads, channels, *shares])
    about = ["recall, %", "attention read, %", "at best, %"]
    return table(["model", "basis", "heads", "channels", *about], cells)


def name_of(method: str) -> Callable[[dict[str, Any]], bool]:
    return lambda row: row["method"]["name"] == method


def beside(method: dict[str, Any]) -> dict[str, Any]:
    """Those settings of `BARE` that a row has on."""
    return {name: method[name] for name, off in BARE.items() if method.get(name, off) != off}


def spelt(settings: dict[str, Any]) -> str:
    """Settings as a table shows them."""
    return ", ".join(f"`{key}={str(value).lower()}`" for key, value in settings.items()) or "none"


def unseen() -> str:
    """What nothing was chosen on, a text and a model: the transforms at 2 bits, and KIVI, without and with a window."""
    columns = {
        f"{model.split('-')[0]}, {text}": {"model": model, "path": path}
        for model in (SMOLLM2, QWEN_LARGE)
        for text, path in (("wikitext-2", WIKITEXT), ("essays", "essays.txt"))
    }
    lines: dict[str, dict[str, str]] = {}
    for name, shown in columns.items():
        for row in rows_of(task="perplexity", kept=compared, length=1024, prefill="coded", all_devices=True, **shown):
            method = row["method"]
            label = method_label(method)
            if method["name"] == "vecinfer":
                refined = ", refined" if beside(method) else ""
                label = f"{method['transform']}{refined}, residual={method['residual']}"
            lines.setdefault(label, {}).setdefault(name, f"{row['result']['perplexity']:.2f}")
    order = sorted(lines, key=lambda label: (label != "full", label.split("residual=")[-1], label))
    return table(["cache", *columns], [[label, *(lines[label].get(name, "") for name in columns)] for label in order])


def compared(row: dict[str, Any]) -> bool:
    """Whether a row belongs into `unseen`."""
    method = row["method"]
    if method["name"] == "vecinfer":
        both = method["transform"] in ("metric", "smooth-hadamard")
        shown = is_plain(row) or row["calibration"].get("repeated")
        return bool(both and shown and method["sink"] == 1 and method["bits"] == 2 and row["seed"] == 0)
    return method["name"] == "full" or (method["name"] == "kivi" and (method["bits"], method["group"]) == (2, 32))


def is_plain(row: dict[str, Any], but: str = "") -> bool:
    """Whether a VecInfer has the usual formats and nothing of `BARE` on, `but` for one that may be."""
    method = row["method"]
    return method.get("key") is None and method["scope"] == "layer_head" and beside(method).keys() <= {but}


def is_default(method: dict[str, Any]) -> bool:
    """Whether a VecInfer with the metric has its settings as they are where they are left out."""
    mixed = "keys" if method["bits"] == 4 else "none"
    return is_plain({"method": method}, but="mixed") and method.get("mixed", "none") == mixed


def of_short_passages(calibration: dict[str, Any]) -> bool:
    """Calibrated on what the metric's rows of windows of 1,024 tokens are."""
    return (calibration["passages"], calibration["passage_length"]) == (32, 1024)


def metric_ideas(model: str) -> Callable[[], str]:
    """The metric transform with what calibration can do beyond k-means, by bits, window and perplexity."""

    def make() -> str:
        lines: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        shown = {"length": 1024, "path": WIKITEXT, "transform": "metric", "sink": 1, "prefill": "coded"}
        for row in rows_of(model, "perplexity", all_devices=True, **shown):
            method, calibration = row["method"], row["calibration"]
            if calibration["passage_length"] != 1024 and not calibration.get("repeated"):  # those are in `lengths`
                continue
            settings = {name: method[name] for name in ("key", "value") if method.get(name)} | beside(method)
            about = (
                row["result"]["bits_per_element"],
                method["residual"],
                spelt(settings),
                calibrated_on(row),
                where(row),
            )
            lines.setdefault(about, []).append(row["result"])
        cells = []
        for (bits, residual, name, text, device), found in lines.items():
            measures = [mean_and_spread([r[key] for r in found], form) for key, form in SHOWN.items()]
            cells.append([f"{bits:g}", str(residual), name, text, str(len(found)), *measures, device])
        cells.sort(key=lambda line: (-float(line[0]), -int(line[1]), float(line[5].split()[0])))
        about = ["bits", "residual", "beside the transform", "passages", "seeds"]
        return table([*about, "perplexity", "KL, nats", "device"], cells)

    return make


def against_kivi() -> str:
    """4 bits and more on SmolLM2, beside KIVI's: sub-vectors of 2, mixed, with the windows they were measured with."""

    def shown(row: dict[str, Any]) -> bool:
        method = row["method"]
        if method["name"] == "kivi":
            return bool(method["bits"] == 4)
        settings = {"weighted": "both", "rotate_values": True, "mixed": "both"}
        wide = row["result"]["bits_per_element"] >= 4
        return bool(wide and method.get("transform") == "metric" and beside({**method, "refine": "none"}) == settings)

    where_from = {"length": 1024, "path": WIKITEXT, "prefill": "coded"}
    return task_table(rows_of(SMOLLM2, "perplexity", shown, **where_from))


def widths() -> str:
    """Every cache of 5 bits or fewer without a window, of both models, by true bits; ours as it is, and refined.

    Where a cache was measured with several calibrations: those with most seeds, of these those whose text says things
    twice, as `VecInfer.refined` asks, and of these those with most passages.
    """
    found: dict[tuple[float, str], dict[str, dict[str, list[dict[str, Any]]]]] = {}
    true: dict[tuple[float, str], set[str]] = {}
    for model in (SMOLLM2, QWEN):
        where_from = {"length": 1024, "path": WIKITEXT, "prefill": "coded", "residual": 0}
        for row in rows_of(model, "perplexity", all_devices=True, **where_from):
            name, bits = compared_as(row["method"]), row["result"]["bits_per_element"]
            if name is not None and bits <= 5:
                about = round(4 * bits) / 4, name  # KVQuant's scales of narrow models take a little more
                true.setdefault(about, set()).add(f"{bits:.3g}")
                texts = found.setdefault(about, {}).setdefault(model, {})
                texts.setdefault(json.dumps([row["calibration"], row["device"]]), []).append(row)

    def rank(rows: list[dict[str, Any]]) -> tuple[float, ...]:
        text = rows[0]["calibration"] or {}
        return len(rows), text.get("repeated", 0), text.get("passages", 0)

    def value(texts: dict[str, list[dict[str, Any]]]) -> str:
        if not texts:
            return ""
        rows = max(texts.values(), key=rank)
        return mean_and_spread([row["result"]["perplexity"] for row in rows], "{:.2f}")

    cells = [
        [", ".join(sorted(true[about])), about[1], *(value(models.get(model, {})) for model in (SMOLLM2, QWEN))]
        for about, models in sorted(found.items(), key=lambda item: (-item[0][0], item[0][1]))
    ]
    return table(["bits", "cache", *(model.split("-")[0] for model in (SMOLLM2, QWEN))], cells)


def compared_as(method: dict[str, Any]) -> str | None:
    """A cache's name in `widths`; None: it is not in there."""
    usual = {"scope": "layer_head", "sink": 1, "transform": "metric", "key": None, "value": None}
    if method["name"] == "vecinfer":
        if any(method[key] != value for key, value in usual.items()) or method.get("fp8_values"):
            return None
        mixed = method.get("mixed", "none")
        if method.get("refine") == "kl" and method.get("rotate_values"):
            return "vecinfer, refined" + ", mixed" * (mixed != "none")
        if not is_plain({"method": method}, but="mixed"):
            return None
        return "vecinfer" if is_default(method) else f"vecinfer, mixed={mixed}"
    if method["name"] == "kvquant":
        paper = {"outliers": (0, 0.01), "capped": (True,), "qnorm": (True, None), "fisher": (True,), "sink": (1,)}
        as_in_paper = {"rope": ("pre",), "keys": ("per-channel",), "codebook": ("nuq",)}
        fits = all(method.get(key, some[0]) in some for key, some in (paper | as_in_paper).items())
        return f"kvquant, outliers={method['outliers']:g}" if fits else None
    if method["name"] == "kivi":
        return f"kivi, groups of {method['group']}"
    return method["name"] if method["name"] in ("hadamard-int", "plain-vq") else None


def fp8() -> str:
    """Tables of the values in fp8 and in float32, otherwise the same, of the same calibration."""

    def shown(row: dict[str, Any]) -> bool:
        method = row["method"]
        plain = is_plain(row, but="fp8_values") and method["sink"] == 1 and method["bits"] < 4
        return plain and row["seed"] == 0 and of_short_passages(row["calibration"])

    lines: dict[float, dict[bool, list[str]]] = {}
    for row in rows_of(SMOLLM2, "perplexity", shown, length=1024, path=WIKITEXT, residual=0, transform="metric"):
        values = [form.format(row["result"][key]) for key, form in SHOWN.items()]
        lines.setdefault(row["method"]["bits"], {})[row["method"].get("fp8_values", False)] = values
    both = {bits: found for bits, found in sorted(lines.items(), reverse=True) if len(found) == 2}
    cells = [[f"{bits:g}", *found[False], *found[True]] for bits, found in both.items()]
    return table(["bits", "perplexity", "KL, nats", "perplexity, fp8", "KL, nats, fp8"], cells)


def calibrated_on(row: dict[str, Any]) -> str:
    """What a row was calibrated on, in words."""
    text = row["calibration"]
    share = text.get("repeated")
    return f"{text['passages']} of {text['passage_length']:,}" + (f", {share:.0%} said twice" if share else "")


def lengths() -> str:
    """The metric transform at 2 bits by the passages it was calibrated on, and by what is read."""
    texts = {
        "windows of 1,024, wikitext-2": {"length": 1024, "path": WIKITEXT},
        "of 8,192, wikitext-2": {"length": 8192, "path": WIKITEXT},
        "of 8,192, essays": {"length": 8192, "path": "essays.txt"},
    }
    lines: dict[tuple[int, str], dict[str, str]] = {}
    for name, shown in texts.items():
        for row in rows_of(
            SMOLLM2, "perplexity", is_plain, all_devices=True, transform="metric", sink=1, bits=2, **shown
        ):
            text = row["calibration"]
            if row["device"] != "cpu" and text["passages"] * text["passage_length"] == 2**16:
                made = f"{text['passages']} passages of {text['passage_length']:,}"
                key = -row["method"]["residual"], made
                lines.setdefault(key, {})[name] = f"{row['result']['perplexity']:.2f}"
    order = sorted(lines, key=lambda key: (key[0], -int(key[1].split()[0])))
    cells = [
        [str(-residual), made, *(lines[residual, made].get(name, "") for name in texts)] for residual, made in order
    ]
    return table(["residual", "calibrated on", *texts], cells)


def metric_needle() -> str:
    """The needle at 2 bits with one exact token, as calibrated by default and refined."""
    lines: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows_of(SMOLLM2, "needle", all_devices=True, transform="metric", samples=3, prefill="coded"):
        about = row["method"]["residual"], spelt(beside(row["method"])), calibrated_on(row), where(row)
        lines.setdefault(about, []).append(row["result"])
    cells = []
    for (residual, name, text, device), found in lines.items():
        scores = ", ".join(f"{r['score']:g}" for r in found) + f" of {found[0]['answered']}"
        nll = sum(r["gold_nll"] for r in found) / len(found)
        cells.append([str(residual), name, text, scores, f"{nll:.2f}", device])
    cells.sort(key=lambda line: (-int(line[0]), float(line[4])))
    return table(["residual", "beside the transform", "passages", "found", "gold NLL, nats a case", "device"], cells)


def formats() -> str:
    """Perplexity by the keys' format (rows) and the values' (columns), without a window, one seed."""
    found: dict[tuple[str, str], float] = {}
    for row in rows_of(SMOLLM2, "perplexity", length=1024, path=WIKITEXT, residual=0, seed=0, scope="layer_head"):
        method = row["method"]
        if method.get("key") and method["transform"] == "smooth-hadamard" and usual(row["calibration"]):
            found[method["key"], method["value"]] = row["result"]["perplexity"]
    order = ["d8b8", "d8b12", "d4b8", "d4b12", "d2b8"]
    names = {form: f"{form} ({int(form.split('b')[1]) / int(form[1 : form.index('b')]):g} bit)" for form in order}
    lines = [[names[k], *(f"{found[k, v]:.1f}" for v in order)] for k in order]
    return table(["keys \\ values", *(names[v] for v in order)], lines)


TABLES: dict[str, Callable[[], str]] = {
    **performance.TABLES,
    "quality": quality,
    "paper-smollm2": perplexities(SMOLLM2),
    "paper-qwen": perplexities(QWEN),
    "same-text": same_text,
    "codes": codes,
    "transforms": ablation("transform", scope="layer_head"),
    "scopes": ablation("scope", transform="smooth-hadamard"),
    "long": long_texts,
    "formats": formats,
    "metric": metric,
    "kvquant": kvquant,
    "tailorkv": tailorkv("perplexity"),
    "tailorkv-needle": tailorkv("needle"),
    "tailorkv-recall": recalls,
    "metric-ideas": metric_ideas(SMOLLM2),
    "metric-ideas-qwen": metric_ideas(QWEN),
    "metric-needle": metric_needle,
    "against-kivi": against_kivi,
    "fp8": fp8,
    "widths": widths,
    "lengths": lengths,
    "unseen": unseen,
    "needle": answers("needle"),
    "ruler": answers("ruler", samples=5),
    "gsm8k": answers("gsm8k", QWEN),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a table is out of date")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = re.sub(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", _filled, old, flags=re.DOTALL)
        if new != old:
            stale.append(page)
            if not check:
                page.write_text(new, encoding="utf-8")
    if not check:
        performance.draw()
    if check and stale:
        print(f"{stale[0].name} is out of date: run python benchmarks/report.py", file=sys.stderr)
        return 1
    return 0


def _filled(match: re.Match[str]) -> str:
    if match[2] not in TABLES:
        raise SystemExit(f"there is no table {match[2]}: choose from {', '.join(TABLES)}")
    return f"{match[1]}{TABLES[match[2]]()}\n{match[3]}"


if __name__ == "__main__":
    sys.exit(main())
