"""A conversation as the one text that a model was trained on, made by the Jinja template that comes with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hfaccel.errors import DataError, IntegrityError, UsageError

Message = Mapping[str, Any]
Conversation = Sequence[Message]

TEMPLATE_FILE = "chat_template.jinja"
SETTINGS_FILE = "tokenizer_config.json"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """A chat template in a sandbox: it comes from whoever made the checkpoint, and is not trusted.

    Args:
        source: text of the template; None where the model has none.
        special_tokens: what the template knows as ``bos_token``, ``eos_token`` and so on.
        where: the file that it comes from, for messages.

    Raises:
        IntegrityError: the template is not Jinja.
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str], where: str) -> None:
        self._special_tokens = dict(special_tokens)
        self._where = where
        self._template = None if source is None else _compile(source, where)

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate:
        """Read ``chat_template.jinja``, else the template in ``tokenizer_config.json``; a folder may have neither.

        Raises:
            IntegrityError: a file cannot be read.
        """
        settings_path = folder / SETTINGS_FILE
        settings = _read_settings(settings_path)
        path = folder / TEMPLATE_FILE
        if not path.is_file():
            return cls(_default_template(settings.get("chat_template"), settings_path), _tokens(settings), str(settings_path))
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise IntegrityError(
                f"the chat template cannot be read: {error}", where=str(path), hint="compile the model again"
            ) from error
        return cls(source, _tokens(settings), str(path))

    @property
    def exists(self) -> bool:
        """Whether the model has a chat template."""
        return self._template is not None

    def render(self, messages: Conversation, *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The conversation as text, special tokens included.

        Args:
            messages: dicts with ``role`` and ``content``, and what else the template reads.
            add_generation_prompt: end with the beginning of an answer.
            variables: more that the template reads (``enable_thinking``); plain JSON data.

        Raises:
            UsageError: the model has no chat template, or its template tries what the sandbox forbids.
            DataError: the messages are none, or the template refuses them.
        """
        if self._template is None:
            raise UsageError(
                "this model has no chat template, so it reads texts and no messages",
                where=self._where,
                hint="give the prompt as one text",
            )
        data = {**self._special_tokens, **variables, "messages": _plain(messages), "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(data)
        except SecurityError as error:
            raise UsageError(
                f"the chat template tries what its sandbox forbids: {error}",
                where=self._where,
                hint="do not trust this model; or give the prompt as one text",
            ) from error
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
            # Beside Jinja's own errors those of the expressions in the template, about the messages that they were given.
            raise DataError(
                f"the chat template refuses the messages: {error}",
                where=self._where,
                hint="give messages with the roles, in the order, that the model was trained on",
            ) from error


class _GenerationBlock(Extension):
    """``{% generation %}`` marks answers for training; here it prints what is in it."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str, where: str) -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise IntegrityError(
            f"the chat template is not valid Jinja: {error.message} (line {error.lineno})",
            where=where,
            hint="correct the template in the checkpoint and compile the model again",
        ) from error


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes characters of HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _plain(messages: Conversation) -> list[dict[str, Any]]:
    """A copy of plain JSON data: the template gets no object whose methods the sandbox does not know."""
    if not isinstance(messages, Sequence):
        hint = "put the message into a list" if isinstance(messages, Mapping) else "give a text"
        raise DataError(f"a prompt is a text or a list of messages, not {type(messages).__name__}", hint=hint)
    if not messages:
        raise DataError(
            "the conversation has no messages", hint="give at least one, such as {'role': 'user', 'content': 'Hello'}"
        )
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise DataError(
                f"not a message: {message!r}"[:200],
                where=f"message {position}",
                hint="a message is a dict such as {'role': 'user', 'content': 'Hello'}",
            )
    try:
        plain: list[dict[str, Any]] = json.loads(json.dumps([dict(message) for message in messages]))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the messages hold more than texts, numbers, lists and dicts: {error}", hint="give plain data"
        ) from error
    return plain


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"the tokenizer settings cannot be read: {error}", where=str(path), hint="compile the model again"
        ) from error
    return settings if isinstance(settings, dict) else {}


def _default_template(value: Any, path: Path) -> str | None:
    if value is None or isinstance(value, str):
        return value
    named = (
        {item.get("name"): item.get("template") for item in value if isinstance(item, dict)} if isinstance(value, list) else {}
    )
    source = named.get("default")
    if not isinstance(source, str):
        names = ", ".join(map(str, named)) or "none"
        raise IntegrityError(
            f"of the chat templates none is named default (names: {names})",
            where=f"{path}: chat_template",
            hint="name one of them default in the checkpoint and compile the model again",
        )
    return source


def _tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by their name; each is a text, or a dict with the text as its content."""
    found: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found
