"""Text to token ids and back, with chat templates and streaming."""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import tokenizers.processors

from vecinfer_jax.errors import InputError, WeightsError
from vecinfer_jax.models import chat_template
from vecinfer_jax.models.chat_template import Message

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_OTHER_FORMS = ("tokenizer.model", "vocab.json", TOKENIZER_CONFIG)
_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A `tokenizers.Tokenizer` with what its model's files say besides.

    backend:        does the work; `tokenizer.json` is its serialised form.
    special_tokens: named special tokens, {"bos_token": "<s>", ...}: what a chat template may refer to.
    template:       the chat template (jinja2), or None.
    eos_token_ids:  every id at which generation stops.
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    template: str | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def vocab_size(self) -> int:
        """Tokens known, added ones included; a model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text, where the model has one."""
        return self._id_of("bos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token, where the model has one."""
        return self._id_of("pad_token")

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; `add_special_tokens` adds what the model wants around it (a bos token, or
        nothing)."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a conversation, [{"role": "user", "content": "..."}, ...], special tokens written out.

        Encode it with `add_special_tokens=False`. `variables` go to the template (`tools`, `enable_thinking`,
        ...). Raises `InputError` where the model has no template, or the template refuses the messages.
        """
        if self.template is None:
            raise InputError("this model has no chat template; pass plain text, or a model trained for chat")
        return chat_template.render(
            self.template,
            messages,
            add_generation_prompt=add_generation_prompt,
            **{**self.special_tokens, **variables},
        )

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and, where there is one, chat_template.jinja."""
        directory = Path(directory)
        self.backend.save(str(directory / TOKENIZER))
        config = {**self.special_tokens, "eos_token_ids": list(self.eos_token_ids)}
        (directory / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
        if self.template is not None:
            (directory / CHAT_TEMPLATE).write_text(self.template, encoding="utf-8")


def tokenizer_from_directory(directory: str | Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory, or of one written by `Tokenizer.save`; None where it has
    none.

    Raises `WeightsError` where tokenizer.json is damaged, or a tokenizer is there in another form only.
    """
    directory = Path(directory)
    path = directory / TOKENIZER
    if not path.is_file():
        other = [name for name in _OTHER_FORMS if (directory / name).is_file()]
        if other:
            raise WeightsError(
                f"{directory} has {', '.join(other)} but no {TOKENIZER}; save the model's fast tokenizer there"
            )
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise WeightsError(f"{path} is damaged or of a newer format: {' '.join(str(error).split())}") from None
    # A saved tokenizer may pad or cut what it encodes; a prompt must come through whole.
    backend.no_padding()
    backend.no_truncation()
    config = {**_json(directory / "special_tokens_map.json"), **_json(directory / TOKENIZER_CONFIG)}
    named = {name: _content(config[name]) for name in _NAMED if config.get(name) is not None}
    if "add_bos_token" in config or "add_eos_token" in config:
        # As in transformers, this has the last word over what tokenizer.json puts around a text.
        before = named.get("bos_token") if config.get("add_bos_token") else None
        after = named.get("eos_token") if config.get("add_eos_token") else None
        put_around(backend, before, after)
    eos = [*config.get("eos_token_ids", ()), backend.token_to_id(named.get("eos_token", ""))]
    return Tokenizer(
        backend=backend,
        special_tokens=named,
        template=_template(directory, config),
        eos_token_ids=tuple(dict.fromkeys(int(i) for i in eos if i is not None)),
    )


def put_around(backend: tokenizers.Tokenizer, before: str | None, after: str | None) -> None:
    """Makes `encode` put one token before and one after every text; None puts nothing there."""
    ends = [token for token in (before, after) if token is not None]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=[token for token in (before, "$A", after) if token is not None],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(ends)],
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}") from None


def _content(token: Any) -> str:
    """A special token is a string, or an object with its text under "content"."""
    return token["content"] if isinstance(token, Mapping) else str(token)


def _template(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / CHAT_TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


class IncrementalDecoder:
    """Turns tokens into text as they come: what `push` and `finish` return adds up to `decode` of all the
    ids.

    Text is held back while the last character may still be incomplete: bytes of UTF-8 may be spread over
    tokens.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        added = tokenizer.backend.get_added_tokens_decoder() if skip_special_tokens else {}
        self._skipped = frozenset(i for i, token in added.items() if token.special)
        self._ids: list[int] = []
        # Decoding starts at `_start`, some tokens before what is new, because the first token of a text can
        # lose its leading space; `_shown` is the text from there up to `_end`, which has been returned.
        self._start = 0
        self._end = 0
        self._shown = ""

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next tokens and returns the text that they complete (possibly none)."""
        pieces = []
        for token in ids:
            if int(token) not in self._skipped:
                self._ids.append(int(token))
                pieces.append(self._advance(final=False))
        return "".join(pieces)

    def finish(self) -> str:
        """The text still held back, incomplete characters as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        text = self._decode(self._start)
        if not final and (text.endswith(_REPLACEMENT) or self._in_bytes()):
            return ""
        piece = text[len(self._shown) :]
        context = self._decode(self._end)
        if context:
            self._start, self._shown = self._end, context
        else:  # nothing visible yet to decode the next tokens after
            self._shown = text
        self._end = len(self._ids)
        return piece

    def _decode(self, start: int) -> str:
        return self._tokenizer.decode(self._ids[start:], self._skip)

    def _in_bytes(self) -> bool:
        """Whether the last token is a byte-fallback one: a run of those is decoded as a whole, all valid or
        none."""
        token = self._tokenizer.backend.id_to_token(self._ids[-1]) if self._ids else None
        return token is not None and _BYTE_TOKEN.fullmatch(token) is not None
