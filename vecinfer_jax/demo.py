"""`vecinfer demo`: the same model, the same prompt, two caches side by side."""

import jax

from vecinfer_jax.caches import CacheMethod, FullPrecision
from vecinfer_jax.calibration.store import resolve_calibration
from vecinfer_jax.evaluation.perplexity import agreement
from vecinfer_jax.generation import Generation, generate
from vecinfer_jax.generation.generate import encode_prompt
from vecinfer_jax.models import load

MODEL = "smollm2-135m-instruct"

PASSAGE = """\
The lighthouse at Carrow Point was built in 1871, after three grain ships were lost on the reef in a single winter.
Its engineer, Elspeth Marr, had never built on rock before. She ordered granite from the quarry at Dunmore, forty
miles along the coast, and had every block cut to a numbered drawing so that it could be set in place between two
tides. The first course took eleven weeks. A storm in October carried away the crane and two of the boats, and the
work stopped until spring. By the following August the tower stood thirty metres above the high-water mark, and on
the night of the fourteenth of September the lamp was lit for the first time.

The lamp burned paraffin and was turned by a clockwork that the keepers wound every four hours. There were three
keepers, and they lived in rooms stacked one above the other, joined by an iron stair. Stores came once a fortnight
if the sea allowed. In the long winter of 1895 it did not allow for seven weeks, and the men lived on biscuit, salt
fish and rainwater from the gallery roof. The log of that winter is dry and exact: the hours of fog, the direction of
the wind, the oil burned each night, and on the last page the words "relieved this day, all well".

Electric light came in 1934, and with it a motor for the lens and a radio beacon. The keepers stayed on to watch the
machines. They kept bees on the mainland, carved chess sets, and taught one another languages from gramophone
records. The last of them, Tomas Reid, left in 1988 when the light was made automatic. He had served for thirty-one
years and could tell the time of night by the sound of the tide in the gully below the door.

Today a sensor switches the lamp on at dusk, and an engineer visits twice a year to clean the solar panels. The rooms
are empty but dry. Swallows nest on the stair, and on clear evenings the beam can be seen from the quarry at Dunmore,
where the first block was cut."""
QUESTION = "Tell the story of this lighthouse again in your own words, in one paragraph."


def run(method: CacheMethod, max_new_tokens: int) -> None:
    """Generates with the full-precision cache and with `method`, prints both texts and what each cache took."""
    lm = load(MODEL)
    prompt = encode_prompt(lm, [{"role": "user", "content": f"{PASSAGE}\n\n{QUESTION}"}])
    calibration = resolve_calibration(lm, method, tokens=len(prompt) + max_new_tokens - 1)

    def answer(which: CacheMethod) -> Generation:
        return generate(
            lm, [prompt], method=which, calibration=calibration if which is method else None,
            max_new_tokens=max_new_tokens,
        )  # fmt: skip

    full, coded = answer(FullPrecision()), answer(method)
    device = jax.devices()[0].device_kind
    print(f"\n{lm.name} on {device}, {full.stats.prompt_tokens} prompt tokens, greedy\n")
    shown = (("full precision", full), (f"{method.name} {_bits(lm, method)}", coded))
    for title, out in shown:
        print(f"== {title} ==\n{out.texts[0].strip()}\n")

    print(f"{'cache':18} {'codes':>10} {'window':>10} {'codebooks':>10} {'allocated':>10} {'tokens/s':>9}")
    for title, out in shown:
        size = out.stats.cache_bytes
        kinds = [f"{size[kind] / 1024:.0f} KiB" for kind in ("codes", "window", "codebooks", "total")]
        row = " ".join(f"{kind:>10}" for kind in kinds)
        print(f"{title:18} {row} {out.stats.tokens_per_second:9.1f}")
    capacity = full.stats.capacity
    saved = full.stats.cache_bytes["codes"] / capacity
    coded_tokens = capacity - getattr(method, "residual", 0) - getattr(method, "sink", 0)
    spent = coded.stats.cache_bytes["codes"] / coded_tokens
    width = jax.numpy.dtype(lm.dtype).itemsize
    halved = "" if width == 2 else f" ({saved / spent * 2 / width:.1f}x against a 16-bit cache)"
    print(f"\nper cached token: {saved:.0f} against {spent:.0f} bytes, {saved / spent:.1f}x smaller{halved}")

    tokens = full.prompt_tokens[0] + full.tokens[0]
    kl, top1 = agreement(lm, method, calibration, tokens, len(full.prompt_tokens[0]))
    same = next((i for i, (a, b) in enumerate(zip(full.tokens[0], coded.tokens[0], strict=False)) if a != b), None)
    same = min(len(full.tokens[0]), len(coded.tokens[0])) if same is None else same
    print(f"the two texts agree for their first {same} tokens")
    print(
        f"along the full-precision text, every token beyond the window read from codes: "
        f"top-1 agreement {100 * top1:.1f}%, KL {kl:.4f} nats a token"
    )


def _bits(lm: object, method: CacheMethod) -> str:
    from vecinfer_jax.evaluation.perplexity import bits_per_element

    return f"{bits_per_element(lm, method):g} bit"  # type: ignore[arg-type]
