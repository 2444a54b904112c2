"""Prompts with expected answers, as a decoder reads them: for its perplexity on the answers, and for its own answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hfaccel.evaluate.example import Example
from hfaccel.evaluate.perplexity import Window
from hfaccel.runtime.generation.chat import ChatTemplate
from hfaccel.runtime.generation.model import Prompt
from hfaccel.runtime.tokenizer import open_tokenizer

MOST_ANSWER_TOKENS = 128
_ROOM_FACTOR, _ROOM_MORE = 2, 8


@dataclass(frozen=True)
class AnswerLimits:
    """When an answer that is to be compared with a reference ends.

    Attributes:
        max_new_tokens: twice as many as the longest reference has and some more, at most 128.
        stop: a new line, where no reference has one and the model knows no conversations: it would go on with the next question.
    """

    max_new_tokens: int
    stop: tuple[str, ...]


class PromptReader:
    """Turns examples into tokens, as ``hfaccel run`` does: as a user's message where the model has a chat template, else as they are.

    Args:
        tokenizer_folder: holds ``tokenizer.json`` and the chat template.

    Raises:
        IntegrityError: a file of the tokenizer is missing or damaged.
    """

    def __init__(self, tokenizer_folder: Path) -> None:
        self._tokenizer = open_tokenizer(tokenizer_folder / "tokenizer.json")
        self._chat = ChatTemplate.from_folder(tokenizer_folder)

    def prompt(self, example: Example) -> Prompt:
        """What the model is asked."""
        text = str(example.text)
        return [{"role": "user", "content": text}] if self._chat.exists else text

    def window(self, number: int, example: Example) -> Window:
        """The prompt, and behind it the first of the expected answers, whose tokens alone are scored.

        Args:
            number: of the example; no other has it.
            example: with at least one answer.
        """
        prompt, answer = self.prompt(example), example.answers[0].strip()
        chat = not isinstance(prompt, str)
        begun = prompt if isinstance(prompt, str) else self._chat.render(prompt)
        # Tokens of the whole: a tokenizer may write a word behind a blank otherwise than alone.
        whole = begun + answer if chat or begun[-1:].isspace() else f"{begun} {answer}"
        before, ids = (self._tokenizer.encode(text, add_special_tokens=not chat).ids for text in (begun, whole))
        common = next((place for place, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), len(before))
        return Window(tuple(ids), number, first=max(1, min(common, len(ids) - 1)))

    def limits(self, examples: Sequence[Example]) -> AnswerLimits:
        """For the model's own answers to these examples."""
        references = [answer.strip() for example in examples for answer in example.answers]
        longest = max(len(self._tokenizer.encode(text, add_special_tokens=False).ids) for text in references)
        lines = self._chat.exists or any("\n" in text for text in references)
        return AnswerLimits(min(MOST_ANSWER_TOKENS, _ROOM_FACTOR * longest + _ROOM_MORE), () if lines else ("\n",))
