"""A chat as text with the assistant's turns marked: the only parts that are learned.

Through the tokenizer's chat template, the turns are found by rendering prefixes: what the template gives for
the messages before a turn, asked to begin the assistant's turn, and for the messages up to and with it, must
both begin the whole rendering; the text between is the turn, with whatever token ends it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mlora_jax.data.tasks import ChatStyle
from mlora_jax.models.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]


def render_chat(messages: Messages, style: ChatStyle, tokenizer: Tokenizer | None, name: str) -> dict[str, Any]:
    """A chat as a row for `tokenize` and for evaluation.

    Messages after the assistant's last turn are left out: there is nothing to learn from them.

    Args:
        messages: [{"role": ..., "content": ...}, ...], with one of the assistant at least; what else they hold is for
            the chat template.
        style: how to write them.
        tokenizer: the model's, whose chat template is used unless the style has headers of its own.
        name: what errors call this example.

    Returns:
        prompt: the text up to the assistant's last turn; answer: that turn's content; choices [], label -1;
        pieces: the whole text as (text, is it an answer) pairs; joined: whether the pieces are one text (the
        template says how turns end) or each is tokenised on its own and answers end in the eos token.

    Raises:
        ValueError: no tokenizer or chat template where one is needed, turns that cannot be found, or more in a message
            than a style with headers writes.
    """
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    messages = messages[: last + 1]
    write = _pieces_by_template if style.headers is None else _pieces_by_headers
    pieces = write(messages, style, tokenizer, name)
    return {
        "prompt": "".join(text for text, _ in pieces[:-1]),
        "answer": messages[-1]["content"],
        "choices": [],
        "label": -1,
        "pieces": pieces,
        "joined": style.headers is None,
    }


def _pieces_by_headers(
    messages: Messages, style: ChatStyle, tokenizer: Tokenizer | None, name: str
) -> list[tuple[str, bool]]:
    del tokenizer
    pieces = []
    context = ""
    for number, message in enumerate(messages, start=1):
        unwritten = [key for key in message if key not in ("role", "content")]
        if unwritten:
            raise ValueError(
                f"{name}: message {number} holds {', '.join(map(repr, unwritten))}, which this style would lose: set "
                "data.style='chat-template' if the model's template reads it, or leave it out of the file"
            )
        context += style.headers[message["role"]]
        if message["role"] == "assistant":
            pieces += [(context, False), (message["content"], True)]
            context = style.footer
        else:
            context += message["content"] + style.footer
    return pieces


def _pieces_by_template(
    messages: Messages, style: ChatStyle, tokenizer: Tokenizer | None, name: str
) -> list[tuple[str, bool]]:
    del style
    if tokenizer is None:
        raise ValueError(f"{name} is a chat: load_task needs the model's tokenizer, whose template writes it")
    if not tokenizer.chat_template:
        raise ValueError(
            f"{name} is a chat, and the model's tokenizer has no chat template: set data.style='plain-chat', "
            "or add a chat_template to the model's tokenizer_config.json"
        )

    def rendered(count: int, begin_turn: bool) -> str:
        try:
            return tokenizer.render_chat(messages[:count], add_generation_prompt=begin_turn)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    whole = rendered(len(messages), False)
    pieces = []
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = rendered(index, True), rendered(index + 1, False)
        if not (whole.startswith(before) and whole.startswith(after) and done <= len(before) < len(after)):
            raise ValueError(
                f"{name}: the tokenizer's chat template writes message {index + 1} otherwise when the chat "
                "ends there than in the whole chat, so the assistant's turns cannot be found: end the chat "
                "with that turn, or set data.style='plain-chat'"
            )
        pieces += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
        done = len(after)
    return pieces
