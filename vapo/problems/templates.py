"""From a row's prompt to the text that the policy sees: a plain template, or a tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vapo import recipe
from vapo.errors import UserError
from vapo.problems.optional import need
from vapo.problems.rows import BadRow, shown

PLACE = "{prompt}"  # where the prompt stands in problems.template; other braces are text, as in \boxed{}
ROLES = ("system", "user", "assistant")

Message = Mapping[str, str]
Render = Callable[[Sequence[Message]], str]


def messages_of(value: object, column: str) -> list[Message]:
    """A prompt as chat messages {role, content}; a text is one message of the user's.

    Raises:
        BadRow: it is neither, or it does not end with the user's message.
    """
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise BadRow(f"column {column!r}: expected a text or chat messages, found {shown(value)}")
    for message in value:
        if (
            not isinstance(message, dict)
            or message.get("role") not in ROLES
            or not isinstance(message.get("content"), str)
            or not message["content"].strip()
        ):
            raise BadRow(f"column {column!r}: expected messages with role {ROLES} and content, found {shown(message)}")
    if value[-1]["role"] != "user":
        raise BadRow(f"column {column!r}: the last message is the {value[-1]['role']}'s: end with what the user asks")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def plain(messages: Sequence[Message]) -> str:
    """The contents of messages with an empty line between: a prompt's text where no template is applied."""
    return messages[0]["content"] if len(messages) == 1 else "\n\n".join(m["content"] for m in messages)


def renderer(section: recipe.Problems) -> Render:
    """How `section` turns messages into the policy's prompt; it sees nothing else of a row.

    problems.template is put around the last message, then the chat template around all of them.

    Raises:
        UserError: chat_template_from has no chat template, or transformers is not there.
    """
    around = _chat_template(section.chat_template_from) if section.chat_template_from else plain

    def render(messages: Sequence[Message]) -> str:
        last = section.template.replace(PLACE, messages[-1]["content"])
        return around([*messages[:-1], {"role": "user", "content": last}])

    return render


def _chat_template(folder: str) -> Render:
    """The chat template of a Hugging Face tokenizer's folder, followed by what makes the assistant speak."""
    key = f"problems.chat_template_from {folder!r}"
    if not Path(folder).is_dir():
        raise UserError(f"{key}: no such folder: give that of a Hugging Face tokenizer")
    try:
        tokenizer = need("transformers", key).AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: no tokenizer ({str(error).splitlines()[0]}): give a Hugging Face tokenizer") from None
    if not tokenizer.chat_template:
        raise UserError(f"{key}: its tokenizer has no chat template: give another folder, or use problems.template")
    template_error = need("jinja2", key).TemplateError

    def render(messages: Sequence[Message]) -> str:
        try:
            text = tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=True
            )
        except template_error as error:
            raise BadRow(f"the chat template of {folder} refuses it: {error}") from None
        if messages[-1]["content"].strip() not in text:
            raise UserError(f"{key}: its chat template leaves out what the user says: give another")
        return _one_start(tokenizer, text)

    return render


def _one_start(tokenizer: Any, text: str) -> str:
    """The text without the start token that its template writes, where the tokenizer puts one before every text."""
    start = tokenizer.bos_token_id
    if start is None or tokenizer(text).input_ids[:2] != [start, start]:
        return text
    return text.removeprefix(tokenizer.bos_token)
