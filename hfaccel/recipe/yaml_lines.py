"""YAML with the line number of every key path, so that an error can say where a value was written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from hfaccel.errors import RecipeError

_BOOL = "tag:yaml.org,2002:bool"


@dataclass(frozen=True)
class YamlDocument:
    """A parsed YAML mapping.

    Attributes:
        label: how messages name the document.
        data: the values as plain Python types.
        lines: dotted key path (list entries by index) -> line number, counted from 1.
    """

    label: str
    data: dict[str, Any]
    lines: Mapping[str, int]


class _Loader(yaml.SafeLoader):
    """The safe loader without aliases, and with the words of YAML 1.2 for truth values.

    A few lines of aliases can expand to gigabytes, and ``extends`` does their job. YAML 1.1 takes ``off`` for false, which is a
    value of its own here.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  # the base class declares it so
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not allowed in recipes", event.start_mark)
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def join_path(parent: str, key: object) -> str:
    """``quantize`` and ``ladder`` -> ``quantize.ladder``."""
    return f"{parent}.{key}" if parent else str(key)


def parse_yaml(text: str, *, label: str) -> YamlDocument:
    """Parse a YAML mapping.

    Args:
        text: the YAML text.
        label: file name for messages.

    Raises:
        RecipeError: not YAML, not a mapping, a key twice, a key that is not text, or an alias.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError("a recipe must be a mapping of keys to values", where=f"{label}:1", hint="start with: name: ...")
        lines: dict[str, int] = {}
        data = _convert(loader, root, "", label, lines)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"not valid YAML: {error.problem}", where=f"{label}:{line}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"not valid YAML: {error}", where=label) from None
    finally:
        loader.dispose()
    return YamlDocument(label, data, lines)


def parse_value(text: str) -> Any:
    """Parse the right side of ``--set key.path=value``.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, RecursionError) as error:  # a date that does not exist; brackets nested too deeply
        raise yaml.YAMLError(str(error)) from None


def _convert(loader: _Loader, node: yaml.Node, path: str, label: str, lines: dict[str, int]) -> Any:
    if isinstance(node, yaml.CollectionNode) and node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        raise RecipeError(f"the tag '{node.tag}' is not allowed in recipes", where=f"{label}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            line = key_node.start_mark.line + 1
            key_path = join_path(path, key)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                raise RecipeError("keys must be text", where=f"{label}:{line}", hint="quote the key")
            if key in result:
                raise RecipeError(
                    f"the key '{key}' stands twice", where=f"{label}:{line}: {key_path}", hint=f"first in line {lines[key_path]}"
                )
            lines[key_path] = line
            result[key] = _convert(loader, value_node, key_path, label, lines)
        return result
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            item_path = join_path(path, index)
            lines[item_path] = item.start_mark.line + 1
            items.append(_convert(loader, item, item_path, label, lines))
        return items
    return loader.construct_object(node, deep=True)
