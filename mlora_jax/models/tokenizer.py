"""A model's tokenizer, which the `tokenizers` library reads from the Hugging Face folder without transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import tokenizers

from mlora_jax.models.chat_template import (
    TEMPLATE_FILE,
    compiled,
    names_in,
    read_chat_template,
    read_tool_template,
    template_messages,
)
from mlora_jax.models.hub import checkpoint_folder
from mlora_jax.models.json_file import read_json_object
from mlora_jax.models.token_files import TOKENIZER_FILE, read_token_files
from mlora_jax.models.token_roles import GENERATION_FILE, TokenRoles, token_roles

CONFIG_FILE = "config.json"
# The replacements that clean_up_tokenization_spaces of transformers makes in a decoded text, in this order.
_CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class Tokenizer:
    """Turns text into token ids and back, and chats into text. `Tokenizer.load` makes one.

    Attributes:
      bos_id: the id of the token that begins a text, or None. `TokenRoles` says how these ids are chosen.
      eos_id: the id of the token that ends a text.
      eos_ids: every id at which generation stops, with `eos_id` first. Chat models have several.
      shown_stops: the ids of `eos_ids` that are ordinary tokens, which decoded text therefore shows.
      pad_id: the id that fills rows; it is `eos_id` if the tokenizer has no padding token.
      prefix_id: the id that stands before a text without a context.
      opening: the ids with which the model's own tokenizer begins every text; mostly none, or BOS.
      vocab_size: the number of tokens including added ones. The V of a model may be larger.
      largest_id: the largest id of any token.
      chat_template: the Jinja source that renders chats, or None.
      tool_template: the Jinja source that renders chats with tools; None: `chat_template` renders them too.
      known_below: the model knows the ids below this one; None: it is unknown which ids the model knows.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        roles: TokenRoles,
        *,
        opening: Sequence[int] = (),
        chat_template: str | None = None,
        tool_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        cleans_up: bool = False,
        known_below: int | None = None,
    ) -> None:
        self._backend = backend
        self._special_tokens = dict(special_tokens or {})
        self._cleans_up = cleans_up
        self.bos_id, self.eos_id, self.eos_ids = roles.bos_id, roles.eos_id, roles.stops
        self.pad_id, self.prefix_id = roles.pad_id, roles.prefix_id
        self.opening = tuple(opening)
        special = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        self.shown_stops = tuple(id for id in self.eos_ids if id not in special)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.largest_id = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
        self.chat_template, self.tool_template, self.known_below = chat_template, tool_template, known_below
        self._prefix_text = self.decode([self.prefix_id], skip_special_tokens=False)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """Reads the tokenizer of a Hugging Face folder, or of a model on the hub.

        The result encodes text like the `AutoTokenizer` of transformers 5. The folder must have a `tokenizer.json`. The
        module `token_files` says which other files define tokens, `tokenizer_classes` which class is built, and
        `token_roles` which tokens end a text.

        Args:
          path: the folder, or a hub id as in `load_decoder`.

        Returns:
          The tokenizer. It begins texts as the post-processor in `tokenizer.json` does.

        Raises:
          FileNotFoundError: there is no such folder or model, or it has no `tokenizer.json`.
          ValueError: a file cannot be read, an entry is not supported, or no token ends a text.
        """
        folder = checkpoint_folder(path, weights=False)
        file = folder / TOKENIZER_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} has no {TOKENIZER_FILE}: other formats are converted to it by "
                f"`transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`"
            )
        config, generation = (
            read_json_object(folder / name) if (folder / name).is_file() else None
            for name in (CONFIG_FILE, GENERATION_FILE)
        )
        read = read_token_files(folder, config or {})
        known = {role: read.backend.token_to_id(token) for role, token in read.named.items()}
        ids = {role: id for role, id in known.items() if id is not None}
        return cls(
            read.backend,
            token_roles(ids, folder, generation, config or {}),
            opening=read.opening,
            chat_template=read_chat_template(folder, read.values),
            tool_template=read_tool_template(folder, read.values),
            special_tokens=read.named,
            cleans_up=read.cleans_up,
            known_below=(config or {}).get("vocab_size"),
        )

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Returns the token ids of a text, without an end token.

        Args:
          text: any string. Names of special tokens in it become those tokens.
          bos: whether a text begins here. BOS comes first only if the model's own tokenizer does so (`opening`), and is
            not repeated before a text that already begins with its name, as a rendered chat does.

        Returns:
          The ids.
        """
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [*self.opening, *ids] if bos and not text.startswith(self._prefix_text) else ids

    def check_known(self, ids: Sequence[int], *, name: str) -> None:
        """Checks that the model knows every id.

        Args:
          ids: token ids of this tokenizer.
          name: the name of the text in error messages.

        Raises:
          ValueError: an id belongs to a token that the tokenizer has and the model lacks.
        """
        if self.known_below is None or self.largest_id < self.known_below:
            return
        for id in ids:
            if id >= self.known_below:
                raise ValueError(
                    f"{name} holds the token {self.token(id)!r} of id {id}, and the model knows the ids below "
                    f"{self.known_below} only (vocab_size in its config.json): the folder's tokenizer is another "
                    f"model's, or tokens were added to it and not to the model"
                )

    def encode_pair(self, prompt: str, answer: str, *, boundary: str) -> tuple[list[int], list[int]]:
        """Returns the token ids of a prompt and of the answer that follows it.

        Args:
          prompt: the text that the model is given. Its ids begin with BOS if the tokenizer adds it.
          answer: the text that the model learns to answer, without an end token.
          boundary: the way in which the two texts are encoded. "joint" and "lossless" first move the trailing white
            space of the prompt to the answer.
            "separate": each text is encoded on its own. Many tokenizers then put a space before the answer.
            "joint": the two are encoded as one text, which is cut after as many ids as the prompt alone has. Where the
            tokenizer merges across the boundary, this loses or repeats text, and may leave few ids or none for the
            answer. The harness scores choices in this way, and choices should be trained as they are scored.
            "lossless": the same as "joint" where that keeps the text. Otherwise the answer gets its ids as a text of
            its own or, if these do not spell it, its ids after a line break. So the ids always spell the text.

        Returns:
          The ids of the prompt and the ids of the answer. With "joint" and "lossless" the ids of the prompt depend on
          the prompt alone: they reveal nothing of the answer, and generation starts from the same ids.

        Raises:
          ValueError: the boundary is unknown, or with "lossless" no ids after those of the prompt spell the answer.

        Source: "joint" is `TemplateLM._encode_pair` of lm-evaluation-harness.

        Example:
          These are the tokens of a tokenizer that knows the word "upon" ("|" stands between tokens):

              boundary        "Once up" and "on a time"
              separate    Once| up|| on| a| time      one space too many
              joint       Once| up|| a| time          "on" is lost
              lossless    Once| up||on| a| time
        """
        if boundary not in BOUNDARIES:
            raise ValueError(f"boundary {boundary!r} is not one of {', '.join(map(repr, BOUNDARIES))}")
        return BOUNDARIES[boundary](self, prompt, answer)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids.

        Args:
          ids: the token ids, each below `vocab_size`.
          skip_special_tokens: whether to leave out special tokens such as BOS and EOS.

        Returns:
          The text.
        """
        text = self._backend.decode([int(id) for id in ids], skip_special_tokens=skip_special_tokens)
        if self._cleans_up:
            for spaced, tight in _CLEAN_UP:
                text = text.replace(spaced, tight)
        return text

    def token(self, id: int) -> str:
        """Returns a token as the vocabulary writes it, such as "▁up" or "</s>".

        Raises:
          ValueError: no token has this id.
        """
        token = self._backend.id_to_token(int(id))
        if token is None:
            raise ValueError(f"no token has the id {id}")
        return token

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """Renders a chat with the model's own template, as `apply_chat_template` of transformers does.

        Args:
          messages: the messages, dicts with "role", "content" and any other keys that the template reads.
          add_generation_prompt: whether to open the assistant's next turn.
          tools: the functions that the assistant may call, as JSON schemas; None: the chat mentions no tools.
          documents: the texts to answer from, for templates that read them.
          template_arguments: further variables of the template.

        Returns:
          The text, with special tokens by name. It may be encoded with either value of `bos`.

        Raises:
          ValueError: the tokenizer has no template, or the template refuses the messages.
        """
        try:
            return compiled(self._template(tools)).render(
                messages=template_messages(messages),
                tools=None if tools is None else [dict(tool) for tool in tools],
                documents=None if documents is None else [dict(document) for document in documents],
                add_generation_prompt=add_generation_prompt,
                **{**self._special_tokens, **(template_arguments or {})},
            )
        except (jinja2.TemplateError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            # A template is a program, so it may raise errors of Python, for instance where it adds a list to a text.
            raise ValueError(f"the chat template does not render these messages: {error}") from error

    def template_names(self, tools: Sequence[Mapping[str, Any]] | None = None) -> frozenset[str]:
        """Returns every name that the template for a chat with these tools may read; see `names_in`."""
        return names_in(self._template(tools))

    def _template(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        template = self.chat_template if tools is None or self.tool_template is None else self.tool_template
        if template is None:
            raise ValueError(
                f"this tokenizer has no chat template, or several and none named default: put one into {TEMPLATE_FILE} "
                f"beside {TOKENIZER_FILE}, or give prompt and completion instead of messages"
            )
        return template


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
    # The decoded texts are compared, because a normalizer may change a text with any boundary.
    text = tokenizer.decode(whole, skip_special_tokens=False)
    rest = (prompt + answer)[len(kept) :]
    # Many tokenizers put a space before a text. After a line break the answer has none, and line breaks rarely merge.
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


BOUNDARIES = {"separate": _separate, "joint": _joint, "lossless": _lossless}
