"""The `vecinfer` command. Errors are one line on stderr and exit status 1."""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from vecinfer_jax.calibration.collect import PASSAGE_LENGTH, PASSAGES, SAMPLES
from vecinfer_jax.errors import CalibrationWarning, InputError, VecInferError

# What typer raises for a misuse of the command line, whether it carries its own click or imports it.
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    help="LLM inference in JAX with a compressed KV cache.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
evaluate_app = typer.Typer(help="What a compressed cache costs in quality.", no_args_is_help=True)
app.add_typer(evaluate_app, name="evaluate")

Model = Annotated[str, typer.Option(help="A known name, a Hugging Face or Orbax directory, or a .gguf file.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: by device.")]
Method = Annotated[
    str,
    typer.Option(
        help="How keys and values are kept, with any of its settings: kivi, kivi:bits=2,group=32. "
        "An unknown name lists those there are."
    ),
]
Bits = Annotated[float | None, typer.Option(help="Average bits an element (vecinfer: 4, 3, 2, 1.5, 1.25, 1).")]
Key = Annotated[str | None, typer.Option(help="Code format of the keys, such as d4b10.")]
Value = Annotated[str | None, typer.Option(help="Code format of the values, such as d8b12.")]
Residual = Annotated[int | None, typer.Option(help="Recent tokens kept in full precision.")]
Sink = Annotated[int | None, typer.Option(help="First tokens kept in full precision.")]
Transform = Annotated[
    str | None, typer.Option(help="Of the keys; default: metric, ours; smooth-hadamard is the paper's.")
]
Scope = Annotated[str | None, typer.Option(help="One codebook per layer_head, per layer or global.")]
CalibrationDir = Annotated[
    Path | None, typer.Option("--calibration", help="An artefact of `vecinfer calibrate`; default: shipped or kept.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write what was measured here ('-': stdout).")]
Seed = Annotated[int | None, typer.Option(help="Of the calibration to use; default: any that is there, else 0.")]
Prefill = Annotated[
    str, typer.Option(help="coded: prompts are read as decoding reads them; exact: as generation reads them.")
]
Batch = Annotated[int, typer.Option(help="Cases run at a time.")]
REPEATED_HELP = "Share of the calibration passages, 0 to 1, that say everything twice"
MeshOption = Annotated[
    str | None,
    typer.Option("--mesh", help="Devices along each axis, such as data=1,context=2,model=1; default: one device."),
]
Coordinator = Annotated[
    str | None,
    typer.Option(
        envvar="JAX_COORDINATOR_ADDRESS",
        help="host:port of process 0, where several processes share a mesh; auto: as the cluster says.",
    ),
]
Processes = Annotated[int | None, typer.Option(envvar="JAX_NUM_PROCESSES", help="How many share the mesh.")]
Process = Annotated[int | None, typer.Option(envvar="JAX_PROCESS_ID", help="Which this one is, from 0.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


def make_layout(text: str | None) -> Any:
    """The mesh that --mesh asks for; None without."""
    from vecinfer_jax import parallel

    return None if text is None else parallel.Layout(parallel.parse_mesh(text))


def _join(mesh: str | None, coordinator: str | None, processes: int | None, process: int | None) -> bool:
    """Meets the other processes of a mesh; whether this is the one that prints and writes."""
    from vecinfer_jax.parallel import processes as several

    if coordinator is None:
        if processes is not None or process is not None:
            raise InputError("--processes and --process need --coordinator: give host:port of process 0, or auto")
        return True
    if mesh is None:
        raise InputError("several processes run over a mesh: give --mesh")
    several.join(coordinator, processes, process)
    return several.leads()


def make_method(text: str, **settings: Any) -> Any:
    """A cache method from "name" or "name:field=value,..." and options; what is left out keeps the method's default."""
    from vecinfer_jax import specs
    from vecinfer_jax.caches import METHODS

    return specs.parse(text, METHODS, "method", **settings)


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; several make one batch.")] = None,
    model: Model = "smollm2-135m-instruct",
    method: Method = "vecinfer",
    bits: Bits = None,
    key: Key = None,
    value: Value = None,
    residual: Residual = None,
    sink: Sink = None,
    transform: Transform = None,
    scope: Scope = None,
    calibration: CalibrationDir = None,
    dtype: Dtype = None,
    max_new_tokens: Annotated[int, typer.Option(help="New tokens a prompt at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0: no limit.")] = 0,
    top_p: Annotated[float, typer.Option(help="1: no limit.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0: no limit.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same tokens.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the answer; may be repeated.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt through the chat template.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print one prompt's answer as it comes.")] = False,
    capacity: Annotated[int | None, typer.Option(help="Tokens a sequence to allocate the cache for.")] = None,
    input: Annotated[Path | None, typer.Option(help="JSONL of prompts: a batch job.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL of answers; an interrupted job goes on.")] = None,
    batch_size: Annotated[int, typer.Option(help="Of a batch job.")] = 8,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Log-probabilities in JSON output.")] = False,
    mesh: MeshOption = None,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process: Process = None,
    json_out: Json = None,
    quiet: Quiet = False,
) -> None:
    """Continue prompts, or run a batch job from --input to --output."""
    from vecinfer_jax import generation
    from vecinfer_jax.generation.jobs import run_job

    chosen = make_method(
        method, bits=bits, key=key, value=value, residual=residual, sink=sink, transform=transform, scope=scope
    )
    sampling = generation.Sampling(temperature, top_k, top_p, min_p)
    if (input is None) != (output is None):
        raise InputError("a batch job needs both --input and --output")
    if input is None and not prompts:
        raise InputError("give a prompt, or --input and --output for a batch job")
    if input is not None and prompts:
        raise InputError("give either prompts or --input, not both")
    if input is not None:
        ignored = {"--stream": stream, "--capacity": capacity is not None, "--json": json_out is not None}
        for option in (name for name, given in ignored.items() if given):
            raise InputError(f"a batch job has no {option}: leave it out")
    if stream and (len(prompts or []) != 1 or json_out is not None):
        raise InputError("--stream takes one prompt and no --json")
    if not process:
        _check_output(output)
        _check_output(json_out)
    leads = _join(mesh, coordinator, processes, process)
    quiet = quiet or not leads
    layout = make_layout(mesh)
    lm, fitted = _load(model, dtype, chosen, calibration, quiet, layout=layout)
    if input is not None and output is not None:
        done = run_job(
            lm,
            input,
            output,
            method=chosen,
            calibration=fitted,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop=stop or (),
            logprobs=logprobs,
            chat=chat,
            progress=not quiet,
            mesh=layout,
        )
        if leads:
            print(f"{done} answers written to {output}", file=sys.stderr)
        return
    assert prompts is not None
    texts: list[Any] = [[{"role": "user", "content": p}] for p in prompts] if chat else list(prompts)
    options: dict[str, Any] = {
        "method": chosen,
        "calibration": fitted,
        "max_new_tokens": max_new_tokens,
        "sampling": sampling,
        "seed": seed,
        "stop": stop or (),
        "capacity": capacity,
        "progress": not quiet,
        "mesh": layout,
    }
    if stream:
        for piece in itertools.chain(generation.stream(lm, texts[0], **options), ["\n"]):
            if leads:
                print(piece, end="", flush=True)
        return
    out = generation.generate(lm, texts, **options)
    if not leads:
        return
    if json_out is None or str(json_out) != "-":
        for text in out.texts:
            print(text)
    if json_out is not None:
        answers = [
            {"text": t, "tokens": ids, "finish_reason": r} | ({"logprobs": lp} if logprobs else {})
            for t, ids, r, lp in zip(out.texts, out.tokens, out.finish_reasons, out.logprobs, strict=True)
        ]
        stats = dataclasses.asdict(out.stats) | {"tokens_per_second": out.stats.tokens_per_second}
        _write_json(json_out, {"model": lm.name, "method": repr(chosen), "answers": answers, **stats})


@app.command()
def bench(
    methods: Annotated[
        list[str] | None,
        typer.Argument(help="Caches to compare, the first the reference; default: full vecinfer:bits=4 vecinfer."),
    ] = None,
    model: Annotated[
        str,
        typer.Option(help="As elsewhere, or with random weights llama-3.1-8b, llama-2-7b, mistral-7b or qwen2.5-14b."),
    ] = "smollm2-135m-instruct",
    batch: Annotated[list[int] | None, typer.Option(help="Sequences; may be repeated. Default: 1.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens cached; may be repeated. Default: 4096.")] = None,
    dtype: Dtype = None,
    repeats: Annotated[int, typer.Option(help="The median of so many.")] = 5,
    mesh: MeshOption = None,
    json_out: Json = None,
    quiet: Quiet = False,
) -> None:
    """Time whole decoding steps with different caches on this device (content is random; no prompt is run)."""
    from vecinfer_jax.bench import SHAPES, StepBench
    from vecinfer_jax.models.language_model import load, resolve_dtype

    chosen = [(text, make_method(text)) for text in methods or ["full", "vecinfer:bits=4", "vecinfer"]]
    _check_output(json_out)
    layout = make_layout(mesh)
    if model in SHAPES:
        steps = StepBench(SHAPES[model], dtype=resolve_dtype(dtype), layout=layout)
    else:
        lm = load(model, dtype, progress=not quiet, mesh=layout)
        steps = StepBench(lm.config, lm.params, lm.dtype, layout)
    rows: list[dict[str, Any]] = []
    to_stdout = json_out is not None and str(json_out) == "-"
    for count, length in ((b, t) for b in batch or [1] for t in tokens or [4096]):
        first = None
        for text, method in chosen:
            row = steps.step(method, count, length, repeats=repeats)
            first = first or row.ms_per_step
            rows.append({"name": text} | dataclasses.asdict(row))
            if not to_stdout:
                print(
                    f"{text:32} B{count} x {length:>8,} tokens  {row.ms_per_step:9.3f} ms/step "
                    f"{row.tokens_per_second:10,.1f} tokens/s  cache {row.cache_bytes['total'] / 2**20:9,.1f} MiB  "
                    f"{first / row.ms_per_step:5.2f}x" + _host_memory(row.cache_bytes)
                )
    if json_out is not None:
        import jax

        _write_json(json_out, {"model": model, "device": jax.devices()[0].device_kind, "rows": rows})


@app.command()
def plan(
    methods: Annotated[
        list[str] | None,
        typer.Argument(help="Caches to compare; default: full vecinfer:bits=4 vecinfer vecinfer:bits=1."),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="A model as elsewhere, or an architecture: llama-3.1-8b, llama-2-7b, mistral-7b, qwen2.5-14b."
        ),
    ] = "llama-3.1-8b",
    gpu: Annotated[
        str | None,
        typer.Option(help="A measured GPU (h100), its times and whole memory; default: this device."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens a sequence.")] = 131072,
    memory: Annotated[float | None, typer.Option(help="Of the device, in GiB; default: this device's.")] = None,
    host_memory: Annotated[
        float | None, typer.Option(help="Of the host, in GiB, for caches that lie there; default: no limit.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="Split the caches' tokens over so many; bytes are those of each.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of weights and windows.")] = "bfloat16",
    json_out: Json = None,
    quiet: Quiet = False,
) -> None:
    """Bytes of weights and caches, whether they fit, how many tokens would, and predicted times (allocates nothing)."""
    import jax

    from vecinfer_jax.bench import SHAPES
    from vecinfer_jax.devices import device_named, device_of_kind
    from vecinfer_jax.models.language_model import load, resolve_dtype
    from vecinfer_jax.plan import device_memory
    from vecinfer_jax.plan import plan as make_plan

    chosen = [
        (text, make_method(text)) for text in methods or ["full", "vecinfer:bits=4", "vecinfer", "vecinfer:bits=1"]
    ]
    if gpu is None:
        device, given = device_of_kind(jax.devices()[0].device_kind), device_memory()
    else:
        device = device_named(gpu)
        given = device.memory
    limit = int(memory * 2**30) if memory is not None else given
    if limit is None:
        raise InputError("this device does not say how much memory it has: give --memory, in GiB, or --gpu")
    _check_output(json_out)
    config = SHAPES[model] if model in SHAPES else load(model, dtype, progress=not quiet).config
    rows = []
    for text, method in chosen:
        kind = resolve_dtype(dtype)
        row = make_plan(
            config,
            method,
            batch=batch,
            tokens=tokens,
            memory=limit,
            device=device,
            dtype=kind,
            host_memory=None if host_memory is None else int(host_memory * 2**30),
            gpus=gpus,
        )
        rows.append({"name": text} | dataclasses.asdict(row))
        if json_out is None or str(json_out) != "-":
            print(
                f"{text:24} {row.bits_per_element:6.2f} bits  weights {row.weights_bytes / 2**30:6.2f} GiB  "
                f"cache {row.cache_bytes['total'] / 2**30:8.2f} GiB  {'fits' if row.fits else 'does NOT fit':12} "
                f"at most {row.most_tokens:>12,} tokens a sequence" + _step_time(row) + _host_memory(row.cache_bytes)
            )
    if json_out is not None:
        name = None if device is None else device.name
        about = {"model": model, "batch": batch, "tokens": tokens, "memory": limit, "device": name, "gpus": gpus}
        _write_json(json_out, about | {"rows": rows})


@app.command()
def calibrate(
    output: Annotated[Path, typer.Option(help="Directory for the artefact.")],
    model: Model = "smollm2-135m-instruct",
    method: Method = "vecinfer",
    bits: Bits = None,
    key: Key = None,
    value: Value = None,
    transform: Transform = None,
    scope: Scope = None,
    dtype: Dtype = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; default: Wikipedia paragraphs, fetched.")] = None,
    passages: Annotated[
        int | None, typer.Option(help=f"Passages to run the model over; default: {PASSAGES}, or as the method asks.")
    ] = None,
    passage_length: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens a passage: as many as will be read; default: {PASSAGE_LENGTH}, or as the method asks."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Tokens kept of each layer to fit codebooks to.")] = SAMPLES,
    repeated: Annotated[float | None, typer.Option(help=f"{REPEATED_HELP}; default: 0, or as the method asks.")] = None,
    batch_size: Annotated[int, typer.Option(help="Passages run at a time.")] = 4,
    seed: Annotated[int, typer.Option(help="The same seed gives the same artefact.")] = 0,
    mesh: MeshOption = None,
    quiet: Quiet = False,
) -> None:
    """Fit a method's codebooks, or find its layers' roles, and save them."""
    from vecinfer_jax import models
    from vecinfer_jax.calibration import collect
    from vecinfer_jax.calibration.artefact import check_destination

    chosen = make_method(method, bits=bits, key=key, value=value, transform=transform, scope=scope)
    if not chosen.needs_calibration:
        raise InputError(f"method {method!r} needs no calibration")
    check_destination(output)
    lm = models.load(model, dtype, progress=not quiet, mesh=make_layout(mesh))
    made = collect.calibrate(
        lm,
        chosen,
        read_documents(text) if text is not None else None,
        passages=passages,
        passage_length=passage_length,
        samples=samples,
        repeated=repeated,
        batch=batch_size,
        seed=seed,
        progress=not quiet,
    )
    found = made.metadata.get("findings", {})
    for index, values in enumerate(zip(*found.values(), strict=True)):
        shown = "  ".join(f"{name.replace('_', ' ')} {value}" for name, value in zip(found, values, strict=True))
        print(f"layer {index:3}  {shown}")
    print(made.save(output))


@evaluate_app.command("perplexity")
def evaluate_perplexity(
    text: Annotated[Path, typer.Option(help="UTF-8 text to score.")],
    model: Model = "smollm2-135m-instruct",
    method: Method = "vecinfer",
    bits: Bits = None,
    key: Key = None,
    value: Value = None,
    residual: Residual = None,
    sink: Sink = None,
    transform: Transform = None,
    scope: Scope = None,
    calibration: CalibrationDir = None,
    dtype: Dtype = None,
    length: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    windows: Annotated[int | None, typer.Option(help="Windows from the start; default: all.")] = None,
    prefill: Prefill = "coded",
    seed: Seed = None,
    mesh: MeshOption = None,
    json_out: Json = None,
    quiet: Quiet = False,
) -> None:
    """Perplexity, KL and top-1 agreement with full precision."""
    from vecinfer_jax import evaluation

    chosen = make_method(
        method, bits=bits, key=key, value=value, residual=residual, sink=sink, transform=transform, scope=scope
    )
    content = _read_text(text)
    _check_output(json_out)
    lm, fitted = _load(model, dtype, chosen, calibration, quiet, seed, make_layout(mesh))
    fitted = fitted or _of_seed(lm, chosen, seed, length, quiet)
    result = evaluation.perplexity(
        lm,
        chosen,
        fitted,
        content,
        length=length,
        windows=windows,
        prefill=prefill,
        progress=not quiet,
    )
    if json_out is None or str(json_out) != "-":
        print(f"perplexity        {result.perplexity:.4f}")
        print(f"full precision    {result.full_perplexity:.4f}")
        print(f"KL (nats)         {result.kl:.5f}")
        print(f"top-1 agreement   {result.top1_agreement:.4f}")
        print(f"bits per element  {result.bits_per_element:g}")
    if json_out is not None:
        _write_json(json_out, {"model": lm.name, "method": repr(chosen), **dataclasses.asdict(result)})


@evaluate_app.command("needle")
def evaluate_needle(
    model: Model = "smollm2-135m-instruct",
    method: Method = "vecinfer",
    bits: Bits = None,
    key: Key = None,
    value: Value = None,
    residual: Residual = None,
    sink: Sink = None,
    transform: Transform = None,
    scope: Scope = None,
    calibration: CalibrationDir = None,
    dtype: Dtype = None,
    length: Annotated[list[int] | None, typer.Option(help="Tokens a case; may be repeated. Default 2048.")] = None,
    samples: Annotated[int, typer.Option(help="Cases at each length and depth.")] = 3,
    prefill: Prefill = "coded",
    seed: Seed = None,
    mesh: MeshOption = None,
    batch_size: Batch = 8,
    json_out: Json = None,
    quiet: Quiet = False,
) -> None:
    """A number hidden in essays, at eight depths: how often it is found, and how likely the right one is."""
    from vecinfer_jax.evaluation.needle import Needle

    chosen = make_method(
        method, bits=bits, key=key, value=value, residual=residual, sink=sink, transform=transform, scope=scope
    )
    task = Needle(lengths=tuple(length) if length else (2048,), samples=samples)
    _run_task(task, model, dtype, chosen, calibration, prefill, seed, batch_size, mesh, json_out, quiet)


@evaluate_app.command("ruler")
def evaluate_ruler(
    model: Model = "smollm2-135m-instruct",
    method: Method = "vecinfer",
    bits: Bits = None,
    key: Key = None,
    value: Value = None,
    residual: Residual = None,
    sink: Sink = None,
    transform: Transform = None,
    scope: Scope = None,
    calibration: CalibrationDir = None,
    dtype: Dtype = None,
    task: Annotated[list[str] | None, typer.Option(help="A RULER task; may be repeated. Default: all.")] = None,
    length: Annotated[int, typer.Option(help="Tokens a case.")] = 4096,
    samples: Annotated[int, typer.Option(help="Cases a task.")] = 8,
    prefill: Prefill = "coded",
    seed: Seed = None,
    mesh: MeshOption = None,
    batch_size: Batch = 8,
    json_out: Json = None,
    quiet: Quiet = False,
) -> None:
    """RULER's synthetic tasks (arXiv 2404.06654)."""
    from vecinfer_jax.evaluation.ruler import Ruler

    chosen = make_method(
        method, bits=bits, key=key, value=value, residual=residual, sink=sink, transform=transform, scope=scope
    )
    named: dict[str, Any] = {"tasks": tuple(task)} if task else {}
    ruler = Ruler(length=length, samples=samples, **named)
    _run_task(ruler, model, dtype, chosen, calibration, prefill, seed, batch_size, mesh, json_out, quiet)


@evaluate_app.command("gsm8k")
def evaluate_gsm8k(
    path: Annotated[Path, typer.Option("--problems-file", help="JSONL with question and answer.")],
    model: Model = "smollm2-135m-instruct",
    method: Method = "vecinfer",
    bits: Bits = None,
    key: Key = None,
    value: Value = None,
    residual: Residual = None,
    sink: Sink = None,
    transform: Transform = None,
    scope: Scope = None,
    calibration: CalibrationDir = None,
    dtype: Dtype = None,
    problems: Annotated[int, typer.Option(help="Problems whose gold solution is scored.")] = 100,
    generated: Annotated[int, typer.Option(help="The first so many are answered, too.")] = 24,
    prefill: Prefill = "coded",
    seed: Seed = None,
    mesh: MeshOption = None,
    batch_size: Batch = 8,
    json_out: Json = None,
    quiet: Quiet = False,
) -> None:
    """Grade-school mathematics: likelihood of the gold solution, and generated answers."""
    from vecinfer_jax.evaluation.gsm8k import GSM8K

    chosen = make_method(
        method, bits=bits, key=key, value=value, residual=residual, sink=sink, transform=transform, scope=scope
    )
    task = GSM8K(path=path, problems=problems, generated=generated)
    _run_task(task, model, dtype, chosen, calibration, prefill, seed, batch_size, mesh, json_out, quiet)


@evaluate_app.command("table")
def evaluate_table(
    output: Annotated[Path, typer.Option(help="Directory of the table; a table that is there is gone on with.")],
    model: Model = "smollm2-135m-instruct",
    method: Annotated[
        list[str] | None, typer.Option(help="Such as vecinfer:bits=2,residual=0; may be repeated.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Such as perplexity:path=text.txt,windows=12 or needle:lengths=1024+2048; may be repeated."),
    ] = None,
    prefill: Annotated[list[str] | None, typer.Option(help="coded or exact; may be repeated. Default coded.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Calibration seeds; may be repeated. Default 0.")] = None,
    passages: Annotated[int, typer.Option(help="Calibration passages.")] = PASSAGES,
    passage_length: Annotated[int, typer.Option(help="Tokens a calibration passage.")] = PASSAGE_LENGTH,
    samples: Annotated[int, typer.Option(help="Tokens kept of each layer to fit codebooks to.")] = SAMPLES,
    repeated: Annotated[float, typer.Option(help=f"{REPEATED_HELP}; 0.5 is for refine=kl.")] = 0.0,
    calibration_text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to calibrate on; default: Wikipedia paragraphs, fetched.")
    ] = None,
    dtype: Dtype = None,
    batch_size: Batch = 8,
    mesh: MeshOption = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw plots (needs matplotlib).")] = True,
    quiet: Quiet = False,
) -> None:
    """Methods x tasks: runs what is missing, writes results.json, report.md and plots."""
    from vecinfer_jax import models, specs
    from vecinfer_jax.evaluation.perplexity import check_prefill
    from vecinfer_jax.evaluation.report import write_report
    from vecinfer_jax.evaluation.table import TASKS, Table, check_task, rows_of

    for how in prefill or []:
        check_prefill(how)
    methods = [make_method(text) for text in method or []]
    tasks: list[Any] = [specs.parse(text, TASKS, "task") for text in task or []]
    if bool(methods) != bool(tasks):
        raise InputError("give --method and --task, or neither to report on the rows that are there")
    if methods:
        lm = models.load(model, dtype, progress=not quiet, mesh=make_layout(mesh))
        for each in tasks:
            check_task(each, lm)
        table = Table(
            lm,
            output,
            passages=passages,
            passage_length=passage_length,
            samples=samples,
            repeated=repeated,
            texts=None if calibration_text is None else list(read_documents(calibration_text)),
            batch=batch_size,
            progress=not quiet,
        )
        table.run(rows_of(methods, tasks, prefills=prefill or ["coded"], seeds=seed or [0]))
    print(write_report(output, plots=plots))


@app.command()
def fetch(
    name: Annotated[str | None, typer.Argument(help="What to fetch; without it, what there is.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Fetch again.")] = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a model or text by name, check it, and keep it in the user's cache."""
    from vecinfer_jax import assets

    if name is None:
        for known in assets.available():
            print(known)
        return
    print(assets.fetch(name, progress=not quiet, force=force))


@app.command()
def convert(
    output: Annotated[Path, typer.Option(help="Directory for the Orbax checkpoint.")],
    model: Model = "smollm2-135m-instruct",
    dtype: Dtype = None,
    quiet: Quiet = False,
) -> None:
    """Save a model as an Orbax checkpoint that loads without its source."""
    from vecinfer_jax import models

    if output.exists():
        raise InputError(f"{output} exists already; name a new directory")
    _check_output(output)
    lm = models.load(model, dtype, progress=not quiet)
    print(lm.save(output))


@app.command()
def demo(
    bits: Annotated[float, typer.Option(help="Of the VecInfer cache.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(help="New tokens.")] = 96,
) -> None:
    """A real model answers from a full-precision cache and from a compressed one."""
    from vecinfer_jax.demo import run

    run(make_method("vecinfer", bits=bits), max_new_tokens)


def read_documents(path: Path) -> Any:
    """Documents of a text file, streamed: blocks of lines between blank ones."""
    try:
        with open(path, encoding="utf-8") as file:
            block: list[str] = []
            for line in file:
                if line.strip():
                    block.append(line.rstrip("\n"))
                elif block:
                    yield "\n".join(block)
                    block = []
            if block:
                yield "\n".join(block)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def _check_output(path: Path | None) -> None:
    """Raises `InputError` where a file cannot be written, before the work whose result it is to hold."""
    if path is None or str(path) == "-":
        return
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a directory")
    try:
        if path.exists():
            with open(path, "ab"):
                pass
        else:
            with tempfile.TemporaryFile(dir=path.absolute().parent):
                pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def _load(
    model: str,
    dtype: str | None,
    method: Any,
    directory: Path | None,
    quiet: bool,
    seed: int | None = None,
    layout: Any = None,
) -> tuple[Any, Any]:
    """The model, and the given calibration checked against it, or None."""
    from vecinfer_jax import models
    from vecinfer_jax.calibration.store import load_calibration

    if directory is not None and seed is not None:
        raise InputError("give either --calibration or --seed: an artefact has its own seed")
    lm = models.load(model, dtype, progress=not quiet, mesh=layout)
    return lm, None if directory is None else load_calibration(directory, lm, method)


def _of_seed(lm: Any, method: Any, seed: int | None, tokens: int, quiet: bool) -> Any:
    """The calibration of that seed for sequences of so many tokens; None without one."""
    from vecinfer_jax.calibration.store import resolve_calibration

    return None if seed is None else resolve_calibration(lm, method, tokens=tokens, seed=seed, progress=not quiet)


def _run_task(
    task: Any,
    model: str,
    dtype: str | None,
    method: Any,
    directory: Path | None,
    prefill: str,
    seed: int | None,
    batch: int,
    mesh: str | None,
    json_out: Path | None,
    quiet: bool,
) -> None:
    """Runs a task of cases and prints what it measured."""
    from vecinfer_jax import evaluation

    _check_output(json_out)
    lm, fitted = _load(model, dtype, method, directory, quiet, seed, make_layout(mesh))
    cases = task.cases(lm)
    fitted = fitted or _of_seed(lm, method, seed, max(case.tokens for case in cases), quiet)
    result = evaluation.answer(lm, task, method, fitted, prefill=prefill, batch=batch, cases=cases, progress=not quiet)
    if json_out is None or str(json_out) != "-":
        if result.answered:
            print(f"score             {result.score:g} of {result.answered}")
        print(f"gold NLL (nats)   {result.gold_nll:.4f} a case, {result.gold_nll_per_token:.4f} a token")
        print(f"bits per element  {result.bits_per_element:g}")
    if json_out is not None:
        _write_json(json_out, {"model": lm.name, "method": repr(method), **dataclasses.asdict(result)})


def _step_time(row: Any) -> str:
    """A predicted step; of several GPUs also that there is no prediction."""
    if row.ms_per_step is not None:
        return f"  {row.ms_per_step:8.2f} ms a step"
    return f"  a step over {row.gpus} GPUs was not measured" if row.gpus > 1 and row.fits else ""


def _host_memory(cache_bytes: dict[str, int]) -> str:
    """What a cache takes of the host's memory, where it does."""
    return f"  host {cache_bytes['host'] / 2**30:8.2f} GiB" if cache_bytes["host"] else ""


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False)
    if str(path) == "-":
        print(text)
        return
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from None


def main(arguments: list[str] | None = None) -> int:
    """Entry point: runs the command line, turns errors into one line, returns the exit status."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        with _warnings_in_a_line():
            status = app(args=arguments, prog_name="vecinfer", standalone_mode=False)
    except typer.Exit as stop:
        return stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        print("vecinfer: interrupted", file=sys.stderr)
        return 130
    except _UsageError as error:
        print(f"vecinfer: {error.format_message()} (see vecinfer --help)", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output has gone; Python must not complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (VecInferError, OSError) as error:
        print(f"vecinfer: {error}", file=sys.stderr)
        return 1
    return int(status or 0)


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Ours without their place in the source."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, CalibrationWarning):
                print(f"vecinfer: {message}", file=sys.stderr)
            else:
                usual(message, category, *place, **more)

        warnings.showwarning = show
        yield


def entry() -> None:
    """For `[project.scripts]`."""
    from vecinfer_jax.parallel import processes

    sys.exit(processes.leave(main()))
