"""From messages to the policy's prompt: a plain template, a tokenizer's chat template, and nothing twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vapo.errors import UserError
from vapo.problems.rows import BadRow
from vapo.problems.templates import messages_of, plain, renderer
from vapo.recipe import Problems

USER = {"role": "user", "content": "What is {1} + 1?"}
SYSTEM = {"role": "system", "content": "Work with care."}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def render(*messages: dict[str, str], **keys: Any) -> str:
    return renderer(Problems(source="file", path="p", **keys))(messages_of(list(messages), "prompt"))


def test_messages() -> None:
    assert messages_of("x", "prompt") == [{"role": "user", "content": "x"}]
    assert messages_of([{**SYSTEM, "name": "a"}, USER], "prompt") == [SYSTEM, USER]
    shot = [USER, {"role": "assistant", "content": "2"}, USER]
    assert messages_of(shot, "prompt") == shot
    assert plain([SYSTEM, USER]) == "Work with care.\n\nWhat is {1} + 1?"
    assert plain([USER]) == USER["content"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "column 'q': expected a text or chat messages, found null"),
        ("", "expected a text or chat messages, found ''"),
        ([], "expected a text or chat messages, found []"),
        ({"role": "user", "content": "x"}, "expected a text or chat messages, found {"),
        (["x"], "with role ('system', 'user', 'assistant') and content, found 'x'"),
        ([{"role": "user"}], "and content, found {'role': 'user'}"),
        ([{"role": "user", "content": " "}], "and content, found"),
        ([{"role": "tool", "content": "x"}], "and content, found"),
        ([{"role": ["user"], "content": "x"}], "and content, found"),
        ([USER, {"role": "assistant", "content": "2"}], "the last message is the assistant's: end with what the user"),
        ([SYSTEM], "the last message is the system's"),
    ],
)
def test_what_is_no_prompt(value: object, said: str) -> None:
    with pytest.raises(BadRow) as fault:
        messages_of(value, "q")
    assert said in str(fault.value)


def test_a_plain_template_is_put_around_the_last_message() -> None:
    assert render(USER) == USER["content"]
    around = "Q: {prompt}\nThe answer in \\boxed{}:"
    assert render(USER, template=around) == "Q: What is {1} + 1?\nThe answer in \\boxed{}:"
    assert render(SYSTEM, USER, template=around).startswith("Work with care.\n\nQ: What is")
    assert render({"role": "user", "content": "{prompt}"}, template="<{prompt}>") == "<{prompt}>"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A folder with a tokenizer of words that puts <s> before every text."""
    return write_tokenizer(tmp_path / "tokenizer", CHATML)


def write_tokenizer(folder: Path, template: str | None) -> Path:
    pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "care": 2}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "unk_token": "<unk>"}
    config |= {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_the_chat_template_of_a_tokenizer(tokenizer: Path) -> None:
    """With what makes the assistant speak, and problems.template within."""
    found = render(SYSTEM, USER, chat_template_from=str(tokenizer), template="{prompt} Be brief.")
    assert found == (
        "<|im_start|>system\nWork with care.<|im_end|>\n"
        "<|im_start|>user\nWhat is {1} + 1? Be brief.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_start_token_stands_once(tokenizer: Path) -> None:
    """A template that writes the token which the tokenizer puts before every text would have two."""
    write_tokenizer(tokenizer, "{{ bos_token }}" + CHATML)
    found = render(USER, chat_template_from=str(tokenizer))
    assert found.startswith("<|im_start|>user")
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["post_processor"] = None  # it puts none before: the template's stays
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    assert render(USER, chat_template_from=str(tokenizer)) == f"<s>{found}"


def test_messages_that_a_chat_template_refuses(tokenizer: Path) -> None:
    write_tokenizer(tokenizer, "{{ raise_exception('no system here') if messages[0].role == 'system' }}" + CHATML)
    assert render(USER, chat_template_from=str(tokenizer)).endswith("assistant\n")
    with pytest.raises(BadRow, match=r"the chat template of .*tokenizer refuses it: no system here"):
        render(SYSTEM, USER, chat_template_from=str(tokenizer))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "its tokenizer has no chat template: give another folder, or use problems.template"),
        ("{{ messages[0].role }}", "its chat template leaves out what the user says"),
        ("{% for %}", "refuses it"),
        ("{{ messages.__class__.__mro__ }}", "refuses it"),  # it is foreign code, in a sandbox
    ],
)
def test_a_chat_template_that_is_none(tokenizer: Path, template: str | None, said: str) -> None:
    write_tokenizer(tokenizer, template)
    with pytest.raises((UserError, BadRow), match=said):
        render(USER, chat_template_from=str(tokenizer))


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"problems\.chat_template_from '.*gone': no such folder"):
        render(USER, chat_template_from=str(tmp_path / "gone"))
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=r"problems\.chat_template_from '.*': no tokenizer \(") as error:
        render(USER, chat_template_from=str(tmp_path))
    assert "\n" not in str(error.value)
