"""The part of ``hfaccel run`` for models that generate text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        pieces = model.generate(prompts[0], **options, stream=True)
        show_pieces(output, pieces, lambda text: len(model.tokenizer.encode(text, add_special_tokens=False).ids))
        return
    answers = model.generate(prompts, **options)
    output.result([{"prompt": text, "answer": answer} for text, answer in zip(texts, answers, strict=True)])
    for text, answer in zip(texts, answers, strict=True):
        output.line(f"{text}\n{answer}\n" if len(texts) > 1 else answer)


def show_pieces(output: Output, pieces: Iterable[str], count_tokens: Callable[[str], int]) -> None:
    """An answer piece by piece as it grows, and then how long it took on standard error.

    Args:
        output: where to.
        pieces: of one answer.
        count_tokens: how many tokens a text has.
    """
    start = time.monotonic()
    first, seen = start, list[str]()
    for piece in pieces:
        first = time.monotonic() if not seen else first
        seen.append(piece)
        output.piece(piece)
    seconds = time.monotonic() - first
    output.piece("\n")
    tokens = count_tokens("".join(seen)) if seen else 0
    speed = f", then {(tokens - 1) / seconds:.0f} a second" if tokens > 1 and seconds > 0 else ""
    output.info(f"about {tokens} tokens: the first after {first - start:.2f} s{speed}")


def _conversation(text: str, system: str | None) -> Prompt:
    before = [{"role": "system", "content": system}] if system is not None else []
    return [*before, {"role": "user", "content": text}]
