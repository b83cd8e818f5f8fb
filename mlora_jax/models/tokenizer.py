"""A model's tokenizer, read from its Hugging Face folder by the `tokenizers` library alone."""

from __future__ import annotations

import datetime
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import tokenizers

from mlora_jax.models.hub import checkpoint_folder
from mlora_jax.models.json_file import read_json_object
from mlora_jax.models.text_file import read_text

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"

# Files that say which token begins, ends and pads a text; the first that knows wins. The tokenizer's own
# files name the token, the model's the id.
_NAMING_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_NUMBERING_FILES = ("generation_config.json", "config.json")


class Tokenizer:
    """Text to token ids and back, and chats to text.

    Made by `Tokenizer.load`.

    Attributes:
        bos_id: id of the token that begins a text, or None.
        eos_id: id of the token that ends a text.
        eos_ids: every id at which generation stops; `eos_id` first (chat models have several).
        pad_id: id to fill rows with; `eos_id` if the tokenizer has none of its own.
        adds_bos: whether the model's own tokenizer begins every text with `bos_id`.
        vocab_size: number of tokens including added ones; a model's V may be larger.
        largest_id: the largest id of any token.
        chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None,
        eos_ids: Sequence[int],
        pad_id: int | None = None,
        adds_bos: bool = False,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        if not eos_ids:
            raise ValueError(
                "the tokenizer has no token that ends a text: name it as eos_token in tokenizer_config.json"
            )
        self._backend = backend
        self._special_tokens = dict(special_tokens or {})
        self._special_ids = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.eos_id = self.eos_ids[0]
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.adds_bos = adds_bos and bos_id is not None
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.largest_id = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
        self.chat_template = chat_template

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """Reads the tokenizer of a Hugging Face folder, or of a model on the hub.

        Besides `tokenizer.json`, which must be there, it heeds `tokenizer_config.json`,
        `special_tokens_map.json`, `generation_config.json`, `config.json` and `chat_template.jinja`.

        Args:
            path: the folder, or a hub id as for `load_decoder`.

        Returns:
            The tokenizer. It begins texts with BOS if `add_bos_token` says so, or, where nothing is said,
            if the post-processor in `tokenizer.json` does.

        Raises:
            FileNotFoundError: there is no such folder or model, or no `tokenizer.json` in it.
            ValueError: a file that cannot be read, a special token that is not in the vocabulary, or no token
                that ends a text.
        """
        folder = checkpoint_folder(path, weights=False)
        file = folder / TOKENIZER_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} has no {TOKENIZER_FILE}: other formats are converted to it by "
                f"`transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # The library raises no narrower class.
            raise ValueError(f"{file} cannot be read ({error}): download it again") from None
        backend.no_truncation()
        backend.no_padding()
        settings = {
            name: read_json_object(folder / name) if (folder / name).is_file() else {}
            for name in (*_NAMING_FILES, *_NUMBERING_FILES)
        }
        named = _named_tokens(settings)
        # A named token is matched whole in a text even where tokenizer.json lists it as an ordinary one.
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        ids = {role: _token_id(backend, folder, role, token) for role, token in named.items()}
        backend.add_special_tokens(sorted({token for token in named.values() if token not in known}))
        numbered = {role: _numbered(settings, role) for role in ("bos", "eos", "pad")}
        bos_id = _first(ids.get("bos_token"), *numbered["bos"])
        adds_bos = settings["tokenizer_config.json"].get("add_bos_token")
        return cls(
            backend,
            bos_id=bos_id,
            eos_ids=list(dict.fromkeys([*_present(ids.get("eos_token")), *numbered["eos"]])),
            pad_id=_first(ids.get("pad_token"), *numbered["pad"]),
            adds_bos=_post_processor_adds(backend, bos_id) if adds_bos is None else bool(adds_bos),
            chat_template=_chat_template(folder, settings["tokenizer_config.json"]),
            special_tokens=named,
        )

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Token ids of a text, without an end token.

        Args:
            text: any string; the names of special tokens in it become those tokens.
            bos: whether a text begins here. The BOS token is put first only if the model's own tokenizer does
                so, and not a second time before a text that already begins with it, as a rendered chat does.

        Returns:
            The ids.
        """
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if bos and self.adds_bos and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def encode_pair(self, prompt: str, answer: str, *, seam: str) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and of the answer that follows it.

        Args:
            prompt: what the model is given; begins with BOS if the tokenizer adds it.
            answer: what the model is to say, without an end token.
            seam: "separate": each is encoded on its own, which in many tokenizers puts a space before the answer.
                "joint": the two are encoded as one text and cut after as many ids as the prompt alone has. Where the
                tokenizer merges across the seam, this loses or repeats text, and may leave few ids or none for the
                answer; the harness scores choices so, and they are to be trained as they are scored.
                "lossless": as "joint" where that keeps the text. Elsewhere the answer gets ids that continue the
                prompt's own: those it has alone, or else behind a line break. What is trained is always the text.
                "joint" and "lossless" first move the prompt's trailing white space to the answer.

        Returns:
            The ids of the prompt and those of the answer. By "joint" and "lossless" the prompt's depend on the prompt
            alone: nothing of the answer shows in them, and generation starts from the same ids.

        Raises:
            ValueError: an unknown seam, or under "lossless" an answer that no ids after the prompt's own spell.

        Source: "joint" is `TemplateLM._encode_pair` of lm-evaluation-harness.

        Example:
            Of a tokenizer that knows the word "upon" ("|" stands between tokens):

                seam        "Once up" and "on a time"
                separate    Once| up|| on| a| time      one space too many
                joint       Once| up|| a| time          "on" is lost
                lossless    Once| up||on| a| time
        """
        if seam not in SEAMS:
            raise ValueError(f"seam {seam!r} is not one of {', '.join(map(repr, SEAMS))}")
        return SEAMS[seam](self, prompt, answer)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids.

        Args:
            ids: token ids, each below `vocab_size`.
            skip_special_tokens: leave out BOS, EOS and their like.

        Returns:
            The text.
        """
        # Filtered here: the library does not recognise special tokens that tokenizer.json marks as normalized.
        hidden = self._special_ids if skip_special_tokens else ()
        return self._backend.decode([int(id) for id in ids if int(id) not in hidden], skip_special_tokens=False)

    def token(self, id: int) -> str:
        """How the vocabulary writes a token, such as "▁up" or "</s>".

        Raises:
            ValueError: no token has this id.
        """
        token = self._backend.id_to_token(int(id))
        if token is None:
            raise ValueError(f"no token has the id {id}")
        return token

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """The text of a chat by the model's own template, as transformers' `apply_chat_template` renders it.

        Args:
            messages: dicts with "role" and "content" and whatever else the template reads.
            add_generation_prompt: whether to open the assistant's next turn.

        Returns:
            The text, special tokens by name; encode it with either value of `bos`.

        Raises:
            ValueError: the tokenizer has no template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError(
                f"this tokenizer has no chat template: put one into {TEMPLATE_FILE} beside {TOKENIZER_FILE}, or give "
                f"prompt and completion instead of messages"
            )
        try:
            return _compiled(self.chat_template).render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template does not render these messages: {error}") from error


def _separate(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    return tokenizer.encode(prompt, bos=True), tokenizer.encode(answer, bos=False)


def _joint(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    kept = prompt.rstrip()
    prompt_ids = tokenizer.encode(kept, bos=True)
    return prompt_ids, tokenizer.encode(prompt + answer, bos=True)[len(prompt_ids) :]


def _lossless(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    kept = prompt.rstrip()
    prompt_ids, whole = tokenizer.encode(kept, bos=True), tokenizer.encode(prompt + answer, bos=True)
    tail = whole[len(prompt_ids) :]
    if whole[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, tail
    # Texts are compared as decoded: a normalizer may change them, whatever the seam.
    text = tokenizer.decode(whole, skip_special_tokens=False)
    rest = (prompt + answer)[len(kept) :]
    # A line break at the front takes the space that many tokenizers put before a text, and merges with few letters.
    broken, behind_break = tokenizer.encode("\n", bos=False), tokenizer.encode(f"\n{rest}", bos=False)
    candidates = [tail, tokenizer.encode(rest, bos=False)]
    if behind_break[: len(broken)] == broken:
        candidates.append(behind_break[len(broken) :])
    for ids in candidates:
        if ids and tokenizer.decode([*prompt_ids, *ids], skip_special_tokens=False) == text:
            return prompt_ids, ids
    raise ValueError(
        f"the tokenizer merges the end of the prompt {prompt[-20:]!r} with the beginning of the answer "
        f"{answer[:20]!r}, and has no other tokens for that answer: let them meet between two words"
    )


SEAMS = {"separate": _separate, "joint": _joint, "lossless": _lossless}


def _named_tokens(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Role ("bos_token", ...) -> text of the token, from the files that name tokens."""
    named = {}
    for file in _NAMING_FILES:
        for role, value in settings[file].items():
            token = value.get("content") if isinstance(value, dict) else value
            if role.endswith("_token") and isinstance(token, str):
                named.setdefault(role, token)
    return named


def _token_id(backend: tokenizers.Tokenizer, folder: pathlib.Path, role: str, token: str) -> int:
    found = backend.token_to_id(token)
    if found is None:
        raise ValueError(f"{folder}: {role} {token!r} is not in the vocabulary of {TOKENIZER_FILE}")
    return found


def _numbered(settings: Mapping[str, Mapping[str, Any]], role: str) -> list[int]:
    """The ids that the model's own files give a role; old configs write -1 for none."""
    found = []
    for file in _NUMBERING_FILES:
        value = settings[file].get(f"{role}_token_id")
        found += value if isinstance(value, list) else _present(value)
    return [token for token in found if token >= 0]


def _present(value) -> list:
    return [] if value is None else [value]


def _first(*values):
    return next((value for value in values if value is not None), None)


def _post_processor_adds(backend: tokenizers.Tokenizer, bos_id: int | None) -> bool:
    return bos_id in backend.encode("").ids[:1]


def _chat_template(folder: pathlib.Path, values: Mapping[str, Any]) -> str | None:
    """The template: a file of its own goes before the entry in tokenizer_config.json."""
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return read_text(file)
    template = values.get("chat_template")
    if isinstance(template, list):  # Several by name.
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant said; the text is its content."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    """The template in a sandbox (it comes with the model) with the functions that transformers gives it."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own filter escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)
