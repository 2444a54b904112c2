from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from hfaccel.errors import DataError, HfaccelError, IntegrityError, UsageError
from hfaccel.runtime.generation.chat import ChatTemplate

HELLO = [{"role": "user", "content": "Hello <b>Käse</b>"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    *HELLO,
    {"role": "assistant", "content": "Hi!", "tool_calls": [{"name": "cook", "arguments": {"dish": "Käse & <Brot>"}}]},
    {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
]
TOOLS_TEMPLATE = """{%- set ns = namespace(first=true) -%}
{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% if message.tool_calls %}
{{ message.tool_calls | tojson }}{{ message.tool_calls | tojson(indent=2) }}
    {% endif %}
    {% if message.role == 'assistant' %}
    {% generation %}
{{ message.content }}{{ eos_token }}
    {% endgeneration %}
    {% elif message.content is string %}
{{ loop.index0 }}: {{ message['content'] }}{% set ns.first = false %}
    {% else %}
{{ message.content[0]['text'] }}{{ ns.first }}
    {% endif %}
{% endfor %}
{{ custom | default('none') }}{% if add_generation_prompt %}>>{% endif %}"""


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, "chat_template.jinja")


@pytest.fixture
def reference(tokenizer_folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "no-prompt"])
@pytest.mark.parametrize("messages", [HELLO, TALK], ids=["one", "many"])
@pytest.mark.parametrize("which", ["file", "tools"])
def test_a_conversation_is_rendered_as_transformers_does(
    reference: Any, tokenizer_folder: Path, which: str, messages: list[dict[str, Any]], prompt: bool
) -> None:
    source = TOOLS_TEMPLATE if which == "tools" else (tokenizer_folder / "chat_template.jinja").read_text(encoding="utf-8")
    if which == "file":
        messages = [message for message in messages if isinstance(message["content"], str)]
    expected = reference.apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=prompt, custom="mine"
    )
    assert template(source).render(messages, add_generation_prompt=prompt, custom="mine") == expected
    assert "Käse" in expected


def test_the_day_of_today() -> None:
    assert template("{{ strftime_now('%Y') }}").render(HELLO) == datetime.now().strftime("%Y")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ range(10000000) | length }}",
    ],
)
def test_the_sandbox_lets_nothing_out(source: str) -> None:
    with pytest.raises(HfaccelError, match=r"^chat_template\.jinja: the chat template (tries what its sandbox forbids|refuses)"):
        template(source).render(HELLO)


def test_an_unsafe_template_is_named_as_such() -> None:
    with pytest.raises(UsageError, match=r"chat_template\.jinja: .*sandbox forbids: .*__mro__|__class__.*do not trust"):
        template("{{ ''.__class__.__mro__ }}").render(HELLO)


def test_what_the_template_refuses() -> None:
    with pytest.raises(DataError, match=r"refuses the messages: roles must take turns \(give messages"):
        template("{{ raise_exception('roles must take turns') }}").render(HELLO)
    with pytest.raises(DataError, match="refuses the messages"):
        template("{{ messages[5].content.text }}").render(HELLO)
    with pytest.raises(DataError, match="refuses the messages"):
        template("{{ messages[0].content + 5 }}").render(HELLO)


def test_what_is_no_conversation() -> None:
    chat = template("{{ messages }}")
    with pytest.raises(DataError, match="has no messages"):
        chat.render([])
    with pytest.raises(DataError, match=r"message 1: not a message: 'Hello'"):
        chat.render([*HELLO, "Hello"])  # type: ignore[list-item]
    with pytest.raises(DataError, match="not a message"):
        chat.render([{"content": "Hello"}])
    with pytest.raises(DataError, match="more than texts, numbers, lists and dicts"):
        chat.render([{"role": "user", "content": object()}])
    with pytest.raises(DataError, match="not int"):
        chat.render(5)  # type: ignore[arg-type]


def write(folder: Path, settings: Any) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    assert not ChatTemplate.from_folder(tmp_path).exists
    folder = write(tmp_path, {"chat_template": "text {{ bos_token }}{{ eos_token }}", "bos_token": {"content": "<s>"}})
    assert ChatTemplate.from_folder(folder).render(HELLO) == "text <s>"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    assert ChatTemplate.from_folder(write(tmp_path, {"chat_template": named})).render(HELLO) == "default"
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert ChatTemplate.from_folder(tmp_path).render(HELLO) == "file"


def test_a_model_without_template_reads_no_messages(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tokenizer_config\.json: this model has no chat template.*one text"):
        ChatTemplate.from_folder(write(tmp_path, {"bos_token": "<s>"})).render(HELLO)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"none is named default \(names: rag\)"):
        ChatTemplate.from_folder(write(tmp_path, {"chat_template": [{"name": "rag", "template": "x"}]}))
    with pytest.raises(IntegrityError, match=r"not valid Jinja: .*line 2"):
        ChatTemplate.from_folder(write(tmp_path, {"chat_template": "\n{% for %}"}))
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(IntegrityError, match="tokenizer settings cannot be read"):
        ChatTemplate.from_folder(tmp_path)
    write(tmp_path, {})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(IntegrityError, match="chat template cannot be read"):
        ChatTemplate.from_folder(tmp_path)
