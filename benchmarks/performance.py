"""Tables and plots of speed and memory for `report.py`, from results/<device>/*.json."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vecinfer_jax.devices import device_of_kind

ROOT = Path(__file__).resolve().parent / "results"
H100, H200 = "nvidia-h100-80gb-hbm3", "nvidia-h200"
MODEL = "llama-3.1-8b"
IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
TWO_BITS = "vecinfer:bits=2,transform=smooth-hadamard"
NAMES = {"full": "bfloat16", TWO_BITS: "VecInfer 2 bit"}


def read(device: str, name: str) -> dict[str, Any]:
    return json.loads((ROOT / device / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# -- kernels


def decode_rows() -> list[dict[str, Any]]:
    """Rows of decode attention with what their name says as fields."""
    rows = []
    for row in read(H100, "kernels")["rows"]:
        name = r"vq_decode_attention K (\S+) V (\S+) \S+: B(\d+) S(\d+) (\d+)/(\d+) heads D(\d+)"
        if match := re.fullmatch(name, row["name"]):
            key, value, *numbers = match.groups()
            fields = dict(zip(("batch", "tokens", "query_heads", "heads", "dim"), map(int, numbers), strict=True))
            rows.append(row | fields | {"key": key, "value": value})
    return rows


def formats_of(row: dict[str, Any]) -> str:
    key, value = row["key"], row["value"].replace("-fp8", "")
    label = key if key == value else f"K {key}, V {value}"
    return label + (", fp8 table of V" if row["value"].endswith("-fp8") else "")


def main_decode_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shapes that the README shows: every format at one, 2 bits at the others."""
    usual = [r for r in rows if (r["query_heads"], r["heads"], r["dim"]) == (32, 8, 128)]
    shapes = {(16, 32768), (1, 196608), (64, 4096)}
    return [r for r in usual if (r["batch"], r["tokens"]) in shapes]


def decode_table(rows: list[dict[str, Any]], triton: bool) -> str:
    lines = []
    for row in rows:
        shape = f"B{row['batch']} S{row['tokens']:,}, {row['query_heads']}/{row['heads']} heads, D{row['dim']}"
        times = f"{row['us']:.0f}", f"{row['peer_us']:.0f}"
        extra = ("map_us", "triton_us") if triton else ()
        more = [f"{row[name]:.0f}" if name in row else "" for name in extra]
        share = f"{row['percent_of_bandwidth']:.0f}%"
        lines.append([shape, formats_of(row), *times, f"{row['ratio']:.2f}x", share, *more])
    header = ["shape", "format", "ours, µs", "cuDNN bf16, µs", "speed-up", "of read bandwidth"]
    return table(header + (["queries mapped, µs", "Triton kernel, µs"] if triton else []), lines)


def decode_kernel() -> str:
    return decode_table(main_decode_rows(decode_rows()), triton=True)


def decode_shapes() -> str:
    rows, shown = decode_rows(), main_decode_rows(decode_rows())
    return decode_table([row for row in rows if row not in shown], triton=False)


def decode_peers() -> str:
    """Kernels that read a bfloat16 cache."""
    lines = []
    for row in read(H100, "kernels")["rows"]:
        kernel, _, shape = row["name"].partition(" bfloat16: ")
        if kernel == "decode_attention" or kernel.startswith("tokamax"):
            label = "our schedule, bfloat16" if kernel == "decode_attention" else kernel
            lines.append([shape, label, f"{row['us']:.0f}", f"{row['peer_us']:.0f}", f"{row['ratio']:.2f}x"])
    return table(["shape", "kernel", "µs", "cuDNN bf16, µs", "cuDNN's over it"], lines)


def kernel_table(name: str, codes: Callable[[str, str], str]) -> str:
    """Rows whose names, but for the shape at their end, match `name`, in two groups that `codes` makes a label of."""
    lines = []
    for row in read(H100, "kernels")["rows"]:
        if match := re.fullmatch(name + r" \S+: (.+)", row["name"]):
            times = f"{row['us']:.0f}", f"{row['peer_us']:.0f}"
            share = f"{row['percent_of_bandwidth']:.0f}%"
            lines.append([match[3], codes(match[1], match[2]), *times, f"{row['ratio']:.2f}x", share])
    return table(["shape", "codes", "ours, µs", "cuDNN bf16, µs", "speed-up", "of read bandwidth"], lines)


def nuq_kernel() -> str:
    """Attention over KVQuant's codes."""
    name = r"nuq_decode_attention nuq(\d) (\S+)%"
    return kernel_table(name, lambda bits, share: f"nuq{bits}" + (f", {share}% outliers" if share != "0" else ""))


def group_int_kernel() -> str:
    """Attention over integers in groups."""
    name = r"group_int_decode_attention int(\d) group (\d+)"
    return kernel_table(name, lambda bits, group: f"{bits} bits, groups of {group}")


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


# -- whole steps


def step_rows(model: str = MODEL) -> dict[tuple[int, int], dict[str, float]]:
    """(batch, tokens) -> cache -> milliseconds."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for row in sorted(read(H100, f"step-{model}")["rows"], key=lambda row: (row["batch"], row["tokens"])):
        if "ms_per_step" in row:
            found.setdefault((row["batch"], row["tokens"]), {})[row["name"]] = row["ms_per_step"]
    return found


def steps() -> str:
    """bfloat16 beside 2 bits."""
    lines = []
    for model in (MODEL, "smollm2-135m", "qwen2.5-14b"):
        for (batch, tokens), ms in step_rows(model).items():
            full, ours = ms.get("full"), ms.get(TWO_BITS)
            if full is not None and ours is not None:
                cells = f"{full:.2f}", f"{ours:.2f}", f"{full / ours:.2f}x"
                lines.append([model, str(batch), f"{tokens:,}", *cells])
    header = ["shapes of", "batch", "tokens each", "bfloat16 + cuDNN, ms", "VecInfer 2 bit, ms", "speed-up"]
    return table(header, lines)


def step_widths() -> str:
    """Other caches at one sequence's longest length, and others as measured."""
    lines = []
    for (batch, tokens), ms in step_rows().items():
        for name, value in ms.items():
            if name not in NAMES:
                against = f"{ms['full'] / value:.2f}x" if "full" in ms else ""
                lines.append([name, str(batch), f"{tokens:,}", f"{value:.2f}", against])
    return table(["cache", "batch", "tokens each", "ms a step", "against bfloat16"], lines)


def step_lines() -> str:
    """By length, one sequence: how steep a step's line is, where it begins, and where it crosses bfloat16's."""
    device = device_of_kind(read(H100, f"step-{MODEL}")["environment"]["device"])
    assert device is not None
    layers, elements = 32, 2 * 8 * 128  # a token's keys and values in a layer
    widths = {"full": 16, "vecinfer d2b8/d2b8": 4, "vecinfer d4b8/d4b8": 2, "vecinfer d8b8/d8b8": 1}
    lines, steepest = [], 0.0
    for key, bits in widths.items():
        cache = device.caches[key]
        us = layers * elements * bits / 8 / cache.gb_per_s  # a thousand tokens
        more = layers * cache.layer_us / 1e3
        steepest = steepest or us
        crossing = f"{1e6 * more / (steepest - us):,.0f}" if us < steepest else ""
        lines.append([key, f"{us:.1f}", f"{more:.2f}", f"{cache.gb_per_s:,.0f}", crossing])
    header = [
        "cache",
        "µs a thousand tokens",
        "ms whatever the length, over bfloat16",
        "GB/s read",
        "slower below, tokens",
    ]
    return table(header, lines)


def transformers() -> str:
    """Hugging Face transformers beside both."""
    ours = step_rows()
    lines = []
    for row in read(H100, f"transformers-{MODEL}")["rows"]:
        here = ours.get((row["batch"], row["tokens"]), {})
        ms = f"{row['ms_per_step']:.1f}" if "ms_per_step" in row else row["error"]
        cells = [f"{here[name]:.2f}" if name in here else "" for name in NAMES]
        ratio = ""
        if "ms_per_step" in row and TWO_BITS in here:
            ratio = f"{row['ms_per_step'] / here[TWO_BITS]:.1f}x"
        lines.append([str(row["batch"]), f"{row['tokens']:,}", row["cache"], ms, *cells, ratio])
    header = [
        "batch",
        "tokens each",
        "transformers' cache",
        "transformers, ms",
        "our bfloat16, ms",
        "our 2 bit, ms",
        "ratio",
    ]
    return table(header, lines)


def capacity() -> str:
    lines = []
    rows = [(model, row) for model in (MODEL, "llama-2-7b") for row in read(H100, f"step-{model}")["rows"]]
    for model, row in rows:
        if "ms_per_step" in row and row["tokens"] >= 10**6:
            sizes = (row[key] / 1e9 for key in ("weights_bytes", "device_bytes", "device_peak_bytes"))
            total = row["cache_bytes"]["total"] / 1e9
            weights, used, peak = (f"{size:.1f}" for size in sizes)
            tokens = f"{row['batch'] * row['tokens']:,}"
            lines.append([model, row["name"], tokens, weights, f"{total:.1f}", used, peak, f"{row['ms_per_step']:.1f}"])
    header = ["shapes of", "cache", "tokens held", "weights, GB", "cache, GB", "in use, GB", "peak, GB", "ms a step"]
    return table(header, lines)


def prefill() -> str:
    rows = read(H100, f"prefill-{MODEL}")["rows"]
    full = {tuple(row["lengths"]): row["ms"] for row in rows if row["name"] == "full"}
    lines = [
        [
            row["name"],
            ", ".join(f"{n:,}" for n in row["lengths"]),
            f"{row['ms']:,.0f}",
            f"{row['ms'] / full[tuple(row['lengths'])]:.3f}x",
            f"{row['weights_bytes'] / 1e9:.1f}",
            f"{row['peak_bytes'] / 1e9:.1f}",
            f"{row['device_peak_bytes'] / 1e9:.1f}",
        ]
        for row in rows
    ]
    return table(
        ["cache", "prompts", "ms", "of bfloat16's", "weights, GB", "peak, GB (compiler)", "peak, GB (device)"], lines
    )


KINDS = {
    "matrix products (K's and V's as reductions)": "gemm|cublas|cutlass|nvjet|wrapped_transpose|input_reduce",
    "attention over the cache": "decode_attention|cudnn",
    "append: ring, encoding, write": "vq_append",
    "norms": "rms_norm",
    "RoPE, activation, residual, sampling and the rest": "",
}


def profile() -> str:
    """Where a step's time goes, by kind of kernel."""
    lines = []
    for row in read(H100, f"step-{MODEL}")["rows"]:
        if "profile" not in row:
            continue
        found = {kind: [0.0, 0.0] for kind in KINDS}
        for name, event in row["profile"]["events"].items():
            kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))
            found[kind][0] += event["count"]
            found[kind][1] += event["us"]
        for kind, (count, us) in found.items():
            shape = f"{NAMES.get(row['name'], row['name'])}, B{row['batch']} x {row['tokens']:,}"
            lines.append([shape, kind, f"{count:.0f}", f"{us / 1e3:.2f}"])
    return table(["step", "what", "kernels", "ms together"], lines)


def offload() -> str:
    """Caches in the host's memory beside one on the device."""
    lines, full = [], None
    for row in sorted(read(H100, f"offload-{MODEL}")["rows"], key=lambda row: row["name"] != "full"):
        if "ms_per_step" in row:
            full = full or row["ms_per_step"]
            held = row["cache_bytes"]
            device, host = (f"{size / 1e9:.2f}" for size in (held["total"], held["host"]))
            floor = f"{row['link_floor_ms']:.1f}" if row["fetched_bytes"] else ""
            times = f"{row['ms_per_step']:.2f}", f"{row['ms_per_step'] / full:.2f}x", floor
            lines.append([row["name"], f"{row['tokens']:,}", device, host, *times])
    sizes = ["on the device, GB", "on the host, GB"]
    return table(["cache", "tokens", *sizes, "ms a step", "of bfloat16's", "the bus alone, ms"], lines)


def offload_prompts() -> str:
    """Prompts read into caches in the host's memory and on the device."""
    lines = []
    for row in read(H100, f"offload-{MODEL}")["rows"]:
        if "prompt_seconds" in row:
            allowed = f"{row['memory_gib']:g}" if "memory_gib" in row else "all"
            # The first of the tokens is chosen with the prompt.
            step = f"{1e3 * row['decoded_seconds'] / (row['decoded_tokens'] - 1):.1f}"
            peak = f"{row['device_peak_bytes'] / 2**30:.1f}"
            lines.append([row["name"], f"{row['tokens']:,}", allowed, peak, f"{row['prompt_seconds']:.1f}", step])
    return table(["cache", "tokens", "device, GiB", "peak, GiB", "prompt, s", "then ms a token"], lines)


def host_tier() -> str:
    """The kernels that read the host's memory."""
    lines = []
    for row in read(H100, "kernels")["rows"]:
        kernel, tokens, *_ = row["name"].split()
        what = {
            "fetch_channels": f"fetch {tokens} channels of each head",
            "select_tokens": f"choose {tokens} tokens by them",
            "select_tokens_by_each": f"choose {tokens} tokens by them, by each query head",
            "attend_rows": f"fetch {tokens} tokens and attend to them",
        }.get(kernel)
        if what:
            speed = f"{row['gb_per_s']:.1f}" if not kernel.startswith("select_tokens") else ""
            lines.append([what, f"{row['us']:.0f}", speed, f"{row['peer']}: {row['peer_us']:.0f}"])
    return table(["kernel", "ours, µs", "over the bus, GB/s", "peer, µs"], lines)


def overlap() -> str:
    """What runs at once in a step with a cache on the host."""
    lines = []
    for row in read(H100, f"offload-{MODEL}")["rows"]:
        if "profile" in row:
            seen = row["profile"]
            fetched = seen["events"]["fetch_channels"]["us"]
            times = (seen["us_per_step"], fetched, seen["overlapped_us"], seen["idle_us"])
            lines.append([row["name"], *(f"{us / 1e3:.1f}" for us in times)])
    return table(["cache", "a step, ms", "fetching channels", "two streams at once", "nothing runs"], lines)


def parallel_attention() -> str:
    """A layer's append, attention and merge over the devices of `context`."""
    rows = read(H200, "parallel")["attention"]
    one = {row["tokens"]: row["us"] for row in rows if row["devices"] == 1}
    merges = [merge for merge in dict.fromkeys(row["merge"] for row in rows) if merge not in (None, "alone")]
    lines = []
    for tokens in sorted(one):
        us = {row["merge"]: row["us"] for row in rows if row["tokens"] == tokens and row["devices"] == 2}
        cells = [f"{us[merge]:.1f}" if merge in us else "" for merge in (*merges, "alone")]
        faster = f"{one[tokens] / us['gather']:.2f}x" if "gather" in us else ""
        lines.append([f"{tokens:,}", f"{one[tokens]:.1f}", *cells, faster])
    return table(["tokens", "one device, µs", *merges, "no merge", "speed-up by gather"], lines)


def parallel_steps() -> str:
    """Whole steps, and the largest caches, over a mesh."""
    lines, content = [], read(H200, "parallel")
    for row in content["step"] + content["largest"]:
        if "ms_per_step" in row:
            mesh = " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1) or "one device"
            sizes = [f"{row['device_bytes'] / 1e9:.1f}"]
            said = row.get("plan")
            sizes.append(f"{(said['weights_bytes'] + said['cache_bytes']['total']) / 1e9:.1f}" if said else "")
            what = f"{row['tokens']:,}", row["model"], row["name"], mesh
            lines.append([*what, f"{row['ms_per_step']:.2f}", *sizes])
    return table(
        ["tokens", "shapes", "cache", "mesh", "ms a step", "in use on a device, GB", "said by plan, GB"], lines
    )


def parallel_prompts() -> str:
    """A prompt over the devices of `context`, and what of it is the gathering of keys and values."""
    rows = read(H200, "parallel")["prefill"]
    alone = {(row["name"], row["tokens"]): row["ms"] for row in rows if row["mesh"]["context"] == 1}
    lines = []
    for row in rows:
        devices = row["mesh"]["context"]
        if devices > 1:
            one = alone[row["name"], row["tokens"]]
            times = f"{one:,.0f}", f"{row['ms']:,.0f}", f"{one / row['ms']:.2f}x"
            share = f"{row['gather_ms']:.0f} ms, {100 * row['gather_ms'] / row['ms']:.1f}%"
            lines.append([row["name"], f"{row['tokens']:,}", str(devices), *times, share])
    return table(["cache", "tokens", "devices", "one device, ms", "ms", "speed-up", "gathering"], lines)


def memory() -> str:
    rows = []
    for row in read(H100, "memory")["rows"]:
        if row["kind"] == "cache":
            allocated, device = row["allocated_bytes"]["total"], row["device_bytes"]
            what = f"cache, B{row['batch']}, {row['tokens']:,} tokens"
        else:
            allocated, device = row["peak_bytes"], row["device_peak_bytes"]
            what = f"peak of a prompt of {row['tokens']:,}, {row['chunk']:,} at a time"
        off = f"{100 * (allocated / device - 1):+.1f}%"
        rows.append([row["method"], what, f"{allocated / 2**20:,.0f}", f"{device / 2**20:,.0f}", off])
    return table(["cache", "what", "reported, MiB", "device says, MiB", "difference"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "decode-kernel": decode_kernel,
    "decode-peers": decode_peers,
    "decode-shapes": decode_shapes,
    "nuq-kernel": nuq_kernel,
    "group-int-kernel": group_int_kernel,
    "encode-kernel": encode_kernel,
    "other-kernels": other_kernels,
    "steps": steps,
    "step-widths": step_widths,
    "step-lines": step_lines,
    "transformers": transformers,
    "capacity": capacity,
    "prefill": prefill,
    "profile": profile,
    "memory": memory,
    "offload": offload,
    "offload-prompts": offload_prompts,
    "overlap": overlap,
    "host-tier": host_tier,
    "parallel-attention": parallel_attention,
    "parallel-steps": parallel_steps,
    "parallel-prompts": parallel_prompts,
}


# -- plots


def draw() -> list[Path]:
    """docs/images/*.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    IMAGES.mkdir(parents=True, exist_ok=True)
    made = []

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        path = IMAGES / f"{name}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)
        made.append(path)

    rows = [r for r in decode_rows() if (r["query_heads"], r["heads"], r["dim"]) == (32, 8, 128)]
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for batch in sorted({r["batch"] for r in rows}):
        line = sorted((r["tokens"], r["ratio"]) for r in rows if r["batch"] == batch and formats_of(r) == "d4b8")
        axes.plot(*zip(*line, strict=True), marker="o", label=f"batch {batch}")
    axes.axhline(1, color="grey", lw=0.8)
    axes.set(xscale="log", xlabel="tokens each", ylabel="times as fast as cuDNN, bfloat16", ylim=(0, None))
    axes.set_title("2-bit decode attention, 32/8 heads of 128, one H100")
    axes.legend()
    save(figure, "speedup")

    bandwidth = next(r["gb_per_s"] for r in read(H100, "kernels")["rows"] if r["name"].startswith("read bandwidth"))
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for form in dict.fromkeys(formats_of(r) for r in decode_rows()):
        points = [(r["bytes"] / 1e6, r["gb_per_s"]) for r in decode_rows() if formats_of(r) == form and r["dim"] == 128]
        if points:
            axes.scatter(*zip(*points, strict=True), label=form, s=22, marker="x" if "fp8" in form else "o")
    axes.axhline(bandwidth, color="grey", lw=0.8)
    axes.annotate("read bandwidth", (0.02, bandwidth), xycoords=("axes fraction", "data"), va="bottom", color="grey")
    axes.set(xscale="log", xlabel="codes, MB", ylabel="codes read, GB/s", ylim=(0, 1.12 * bandwidth))
    axes.set_title("Decode attention against memory, one H100")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, "roofline")

    figure, axes = plt.subplots(figsize=(6.4, 4))
    for name, label in NAMES.items():
        line = [(tokens, ms[name]) for (batch, tokens), ms in step_rows().items() if batch == 1 and name in ms]
        line = [point for point in line if point[0] < 10**6]
        axes.plot(*zip(*line, strict=True), marker="o", label=label)
    axes.set(xlabel="tokens cached, one sequence", ylabel="ms a token", ylim=(0, None))
    axes.set_title("Whole step, Llama-3.1-8B's shapes, one H100")
    axes.legend()
    save(figure, "step")
    return made
