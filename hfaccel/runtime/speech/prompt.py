"""What a Whisper decoder reads before it answers: language, task, and whether times are wanted."""

from __future__ import annotations

from typing import Literal

import numpy as np

from hfaccel.artifact.generation import SpeechSettings
from hfaccel.errors import UsageError

SpeechTask = Literal["transcribe", "translate"]


def start_tokens(settings: SpeechSettings, *, language: str | None, task: SpeechTask, timestamps: bool) -> list[int]:
    """The tokens that an answer is asked for with.

    Args:
        settings: of the model.
        language: code; None of models that know one language.
        task: also into English (``translate``), of models that know several.
        timestamps: whether times are wanted.

    Raises:
        UsageError: the model does not know the language or the task.
    """
    tokens = [settings.start_of_transcript_token_id]
    if language is not None:
        tokens.append(dict(settings.languages)[known_language(settings, language)])
    if settings.tasks:
        tasks = dict(settings.tasks)
        if task not in tasks:
            raise UsageError(f"the model has no task {task!r}", where="task", hint=f"it has: {', '.join(tasks)}")
        tokens.append(tasks[task])
    elif task != "transcribe":
        raise UsageError(f"a model of one language has no task {task!r}", where="task", hint="use a multilingual model")
    return tokens if timestamps else [*tokens, settings.no_timestamps_token_id]


def known_language(settings: SpeechSettings, language: str) -> str:
    """The language as the settings call it; ``en``, ``EN`` and ``<|en|>`` are the same.

    Raises:
        UsageError: the model does not know it.
    """
    codes = {_bare(code): code for code, _ in settings.languages}
    if not codes:
        raise UsageError("a model of one language lets none be chosen", where="language", hint="leave it out")
    if _bare(language) not in codes:
        raise UsageError(
            f"the model does not know the language {language!r}", where="language", hint=f"it knows: {', '.join(codes)}"
        )
    return codes[_bare(language)]


def heard_languages(settings: SpeechSettings, logits: np.ndarray) -> list[str]:
    """The likeliest language of each sound.

    Args:
        settings: of a multilingual model.
        logits: float32 [batch, vocabulary], of the token that follows ``start_of_transcript``.

    Returns:
        Codes, as the settings have them.
    """
    # Of two that are equally likely the lower token, as an argmax over the vocabulary has it.
    languages = sorted(settings.languages, key=lambda pair: pair[1])
    best = logits[:, [token for _, token in languages]].argmax(axis=1)
    return [languages[place][0] for place in best.tolist()]


def _bare(language: str) -> str:
    return language.strip().lower().removeprefix("<|").removesuffix("|>")
