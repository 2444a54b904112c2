"""The part of ``hfaccel run`` for models that generate text."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfaccel.cli.output import Output
from hfaccel.errors import UsageError

if TYPE_CHECKING:
    from hfaccel.runtime.generation.model import GenerationModel, Prompt


def show_generation(
    output: Output,
    model: GenerationModel,
    texts: Sequence[str],
    options: Mapping[str, Any],
    *,
    system: str | None,
    raw: bool,
    stream: bool,
) -> None:
    """Answer each text, as a message where the model has a chat template.

    Args:
        output: where to.
        model: generates.
        texts: at least one.
        options: of ``model.generate``.
        system: system message, for models with a chat template.
        raw: go on with the text itself.
        stream: show a single answer while it grows.

    Raises:
        UsageError: options that do not go together.
    """
    chat = model.chat_template.exists and not raw
    if system is not None and not chat:
        raise UsageError("a system message needs a chat template", where="--system", hint="leave out --raw or --system")
    prompts = [_conversation(text, system) if chat else text for text in texts]
    if stream:
        if len(prompts) > 1 or output.as_json:
            raise UsageError("--stream shows the answer to one text as it grows", where="--stream", hint="leave it out")
        _show_while_it_grows(output, model, prompts[0], options)
        return
    answers = model.generate(prompts, **options)
    output.result([{"prompt": text, "answer": answer} for text, answer in zip(texts, answers, strict=True)])
    for text, answer in zip(texts, answers, strict=True):
        output.line(f"{text}\n{answer}\n" if len(texts) > 1 else answer)


def _show_while_it_grows(output: Output, model: GenerationModel, prompt: Prompt, options: Mapping[str, Any]) -> None:
    """The answer piece by piece, and then how long it took on standard error."""
    start = time.monotonic()
    first, pieces = start, list[str]()
    for piece in model.generate(prompt, **options, stream=True):
        first = time.monotonic() if not pieces else first
        pieces.append(piece)
        output.piece(piece)
    seconds = time.monotonic() - first
    output.piece("\n")
    tokens = len(model.tokenizer.encode("".join(pieces), add_special_tokens=False).ids)
    speed = f", then {(tokens - 1) / seconds:.0f} a second" if tokens > 1 and seconds > 0 else ""
    output.info(f"about {tokens} tokens: the first after {first - start:.2f} s{speed}")


def _conversation(text: str, system: str | None) -> Prompt:
    before = [{"role": "system", "content": system}] if system is not None else []
    return [*before, {"role": "user", "content": text}]
