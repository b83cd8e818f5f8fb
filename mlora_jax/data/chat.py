"""Renders a chat as text and marks the assistant's turns, which are the only parts that are learned.

If the tokenizer's chat template writes the chat, the turns are found by rendering two prefixes of it: the messages
before a turn, with the beginning of the assistant's turn, and the messages up to the end of the turn. The whole text
must begin with both of them. The text between their ends is the turn, with its tool calls and the token that ends it.

A turn of weight 0 is written but not learned. The chat ends with the last turn that is learned, which is the one that
evaluation asks for. What follows this turn is left out, because nothing is learned from it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mlora_jax.data.tasks import ChatStyle
from mlora_jax.models.chat_template import REASONING_KEYS
from mlora_jax.models.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]

# Keys of a message besides its content that a template may write as a part of the assistant's turn.
TURN_KEYS = ("tool_calls", *REASONING_KEYS)
# Keys that say who speaks to whom. Few templates write them, so a template that leaves them out is not refused.
ADDRESS_KEYS = ("name", "tool_call_id")
# Keys that say where a row or a message comes from. They do not affect what is trained.
METADATA = frozenset(
    "id _id idx index uid uuid hash row_id example_id prompt_id message_id conversation_id chat_id turn_id "
    "source sources dataset dataset_name subset config split origin url license author annotator user_id "
    "category categories topic topics domain subject task task_type type tags keywords difficulty "
    "lang language locale country created created_at updated_at date time timestamp version model model_name "
    "generator score scores rating quality num_tokens token_count num_turns turn metadata meta info comment "
    "notes".split()
)


class Piece(NamedTuple):
    """A part of a chat's text.

    Attributes:
      text: the text of the part.
      learned: whether its tokens are targets.
      ended: whether the eos token follows it.
    """

    text: str
    learned: bool
    ended: bool = False


def render_chat(
    messages: Messages,
    style: ChatStyle,
    tokenizer: Tokenizer | None,
    name: str,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Renders a chat as a row for `tokenize` and for evaluation.

    The messages after the assistant's last message with a weight other than 0 are left out, because nothing is learned
    from them.

    Args:
      messages: [{"role": ..., "content": ...}, ...], with at least one message of the assistant. "weight" 0 keeps a
        message of the assistant from being learned. All other keys are for the chat template.
      style: how the chat is written.
      tokenizer: the model's tokenizer; its chat template is used unless the style has headers of its own.
      name: the name of this example in errors.
      tools: the tools, for the chat template; see `Tokenizer.render_chat`.
      documents: the documents, for the chat template.
      template_arguments: further variables, for the chat template.

    Returns:
      A dictionary with these keys:
      prompt: the text up to the assistant's last learned turn.
      answer: the content of that turn. If the template also writes tool calls or reasoning, it is the turn as the
        model would generate it.
      choices: [].
      label: -1.
      pieces: the whole text as `Piece`s.
      joined: whether the pieces are tokenised as one text, in which the template ends the turns. Otherwise each piece
        is tokenised alone, and answers end in the eos token.
      quotes_arguments: whether the template has put the arguments of a call in quotes because they are JSON text
        already. They are given to the template unchanged, as transformers' `apply_chat_template` does.

    Raises:
      ValueError: a tokenizer or a chat template is needed and missing, there is nothing to learn, the turns cannot be
        found, or the text would lose a part of the chat.
    """
    try:
        check_turns(messages)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    last = max(index for index, message in enumerate(messages) if _learned(message))
    weights = [_learned(message) for message in messages[: last + 1]]
    messages = [{key: value for key, value in m.items() if key != "weight"} for m in messages[: last + 1]]
    given = {"tools": tools, "documents": documents, "template_arguments": template_arguments or None}
    given = {key: value for key, value in given.items() if value is not None}
    if style.headers is None:
        pieces = _pieces_by_template(messages, weights, tokenizer, name, given)
    else:
        messages = [
            {**m, "content": without_end(m["content"], tokenizer)} if m["role"] == "assistant" and "content" in m else m
            for m in messages
        ]
        pieces = _pieces_by_headers(messages, weights, style.headers, style.footer, name, given)
    answer = messages[-1].get("content", "")
    if tokenizer is not None and style.headers is None and any(key in messages[-1] for key in TURN_KEYS):
        answer = tokenizer.decode(tokenizer.encode(pieces[-1].text, bos=False))
    return {
        "prompt": "".join(piece.text for piece in pieces[:-1]),
        "answer": answer,
        "choices": [],
        "label": -1,
        "pieces": pieces,
        "joined": style.headers is None,
        "quotes_arguments": _quotes_arguments(messages, "".join(piece.text for piece in pieces)),
    }


def check_turns(messages: Sequence[Mapping[str, Any]]) -> None:
    """Checks that a chat has a message to learn and a message before it.

    Args:
      messages: the messages, as `render_chat` takes them.

    Raises:
      ValueError: the assistant has no message, all its messages have the weight 0, or the first message is the
        assistant's.
    """
    weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
    if not weights:
        raise ValueError("the chat has no message from the assistant, so nothing to learn")
    if not any(weights):
        raise ValueError("every message of the assistant has the weight 0, so there is nothing to learn")
    if messages[0]["role"] == "assistant":
        raise ValueError("the chat begins with the assistant: there is nothing it answers")


def without_end(answer: str, tokenizer: Tokenizer | None) -> str:
    """Removes the text of the eos token from the end of an answer, which would otherwise be trained and compared twice.

    TRL likewise does not append its eos_token to a completion that already ends in it. An answer that consists of the
    token alone is kept.

    Args:
      answer: the text of the answer.
      tokenizer: the model's tokenizer; without one, the answer is returned unchanged.
    """
    if tokenizer is None:
        return answer
    return answer.removesuffix(tokenizer.token(tokenizer.eos_id)) or answer


def _learned(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and bool(message.get("weight", 1))


def _pieces_by_headers(
    messages: Messages,
    learned: Sequence[bool],
    headers: Mapping[str, str],
    footer: str,
    name: str,
    given: Mapping[str, Any],
) -> list[Piece]:
    way_out = (
        "which this style would lose: set data.style='chat-template' if the model's template reads it, or leave it "
        "out of the file"
    )
    if any(given.values()):
        raise ValueError(f"{name} holds {', '.join(map(repr, given))}, {way_out}")
    pieces = []
    context = ""
    for number, (message, target) in enumerate(zip(messages, learned, strict=True), start=1):
        unwritten = [key for key in message if key not in ("role", "content") and key not in METADATA]
        if unwritten:
            raise ValueError(f"{name}: message {number} holds {', '.join(map(repr, unwritten))}, {way_out}")
        context += headers[message["role"]]
        if message["role"] == "assistant":
            pieces += [Piece(context, False), Piece(message["content"], target, ended=True)]
            context = footer
        else:
            context += message["content"] + footer
    return pieces


def _pieces_by_template(
    messages: Messages, learned: Sequence[bool], tokenizer: Tokenizer | None, name: str, given: Mapping[str, Any]
) -> list[Piece]:
    if tokenizer is None:
        raise ValueError(f"{name} is a chat: load_task needs the model's tokenizer, whose template writes it")
    if not tokenizer.chat_template and (given.get("tools") is None or not tokenizer.tool_template):
        raise ValueError(
            f"{name} is a chat, and the model's tokenizer has no chat template: set data.style='plain-chat', "
            "or add a chat_template to the model's tokenizer_config.json"
        )

    def rendered(messages: Messages, begin_turn: bool) -> str:
        try:
            return tokenizer.render_chat(messages, add_generation_prompt=begin_turn, **given)
        except ValueError as error:
            empty = [number for number, message in enumerate(messages, start=1) if message.get("content") is None]
            hint = f" (message {empty[0]} has no content: where the template needs one, write a text)" if empty else ""
            raise ValueError(f"{name}: {error}{hint}") from error

    whole = rendered(messages, False)
    _check_read(messages, tokenizer, name, given, lambda others: rendered(others, False) != whole)
    pieces = []
    done = 0
    for index in [index for index, target in enumerate(learned) if target]:
        before, after = rendered(messages[:index], True), rendered(messages[: index + 1], False)
        if not (whole.startswith(before) and whole.startswith(after) and done <= len(before) < len(after)):
            raise ValueError(
                f"{name}: the tokenizer's chat template writes message {index + 1} otherwise when the chat "
                "ends there than in the whole chat, so the assistant's turns cannot be found: end the chat "
                "with that turn, give that message \"weight\": 0, or set data.style='plain-chat'"
            )
        pieces += [Piece(whole[done : len(before)], False), Piece(whole[len(before) : len(after)], True)]
        done = len(after)
    return pieces


def _check_read(
    messages: Messages, tokenizer: Tokenizer, name: str, given: Mapping[str, Any], changes: Callable[[Messages], bool]
) -> None:
    """Refuses keys that the template would silently leave out.

    A template reads the keys that it names. It also reads a key of a message if the text `changes` without that key, as
    in a template that writes messages whole.
    """
    names = tokenizer.template_names(given.get("tools"))
    variables = [key for key in ("tools", "documents") if given.get(key)] + list(given.get("template_arguments", ()))
    for key in variables:
        if key not in names:
            raise ValueError(
                f"{name} holds {key!r}, which the model's chat template does not read, so the model would never see "
                "it: leave it out of the file, or take a model whose template reads it"
            )
    free = {"role", "content", *ADDRESS_KEYS, *METADATA}
    for number, message in enumerate(messages, start=1):
        for key in message:
            if key in free or key in names or message[key] in ([], {}, ""):
                continue
            if key in REASONING_KEYS and names.intersection(REASONING_KEYS):
                continue
            if not changes([{k: v for k, v in other.items() if k != key} for other in messages]):
                raise ValueError(
                    f"{name}: message {number} holds {key!r}, which the model's chat template does not read, so the "
                    "model would never see it: leave it out of the file, or name it in data.ignored_keys"
                )


def _quotes_arguments(messages: Messages, text: str) -> bool:
    """Whether the template has put quotes around the arguments of a call that are JSON text already."""
    calls = [call.get("function", call) for message in messages for call in message.get("tool_calls") or ()]
    texts = [call["arguments"] for call in calls if isinstance(call.get("arguments"), str)]
    return any(json.dumps(arguments, ensure_ascii=False) in text for arguments in texts)
