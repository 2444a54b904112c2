"""A compiled generative model: prompts or conversations in, new text out."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from hfaccel.artifact.contract import Contract
from hfaccel.artifact.generation import GenerationSettings
from hfaccel.errors import DataError, UsageError
from hfaccel.runtime.batching import plan_batches
from hfaccel.runtime.generation.answer import Answer
from hfaccel.runtime.generation.chat import ChatTemplate, Conversation
from hfaccel.runtime.generation.decoder import Decoder
from hfaccel.runtime.generation.detokenizer import AnswerText
from hfaccel.runtime.generation.loop import generate_tokens
from hfaccel.runtime.generation.option_checks import check_batch
from hfaccel.runtime.generation.sampling import PROMPT_LOOKUP_NUM_TOKENS, SamplingSettings, advised_settings, make_generators
from hfaccel.runtime.tokenizer import check_characters, open_tokenizer

Prompt = str | Conversation
"""A text, or a conversation: dicts with ``role`` and ``content``."""

_MAX_BATCH = 16
# Padding is paid for once, when the prompts are read; each later step costs a batch little more than a single row.
_MAX_PADDING = 0.5


class GenerationModel:
    """A decoder with its tokenizer, its chat template and its contract. May be shared by threads.

    Args:
        decoder: made with ``contract.generation``.
        tokenizer_folder: holds ``tokenizer.json``, and where the model has them ``tokenizer_config.json`` and
            ``chat_template.jinja``.
        contract: of a ``text-generation`` model.

    Attributes:
        decoder: as given.
        tokenizer: the ``tokenizers.Tokenizer``, without padding and truncation.
        chat_template: how conversations become text; its ``exists`` says whether the model has one.
        contract: as given.

    Raises:
        UsageError: the contract is of another task.
        IntegrityError: a file of the tokenizer is missing or damaged.
    """

    def __init__(self, decoder: Decoder, tokenizer_folder: Path, contract: Contract) -> None:
        if contract.generation is None:
            raise UsageError(
                f"this model was compiled for {contract.task} and generates no text",
                hint="compile it with --task text-generation",
            )
        self.decoder = decoder
        self.tokenizer = open_tokenizer(tokenizer_folder / "tokenizer.json")
        self.chat_template = ChatTemplate.from_folder(tokenizer_folder)
        self.contract = contract
        self._generation: GenerationSettings = contract.generation

    def __call__(self, prompt: Prompt | Sequence[Prompt]) -> Any:
        """The answer to a prompt, or those to several, as the checkpoint advises; see :meth:`generate`."""
        return self.generate(prompt)

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 256,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: str | Sequence[str] | None = (),
        seed: int | None = None,
        stream: bool = False,
        max_batch: int = _MAX_BATCH,
        prompt_lookup_num_tokens: int = PROMPT_LOOKUP_NUM_TOKENS,
    ) -> Any:
        """Continue a prompt, or answer a conversation; or several of them.

        Options that are None are as the checkpoint advises (``contract.generation.defaults``). What they mean is told at
        :class:`~hfaccel.runtime.generation.sampling.SamplingSettings`.

        Args:
            prompt: a text; a conversation, which is a list of messages ``{"role", "content"}``; or a list of these.
            max_new_tokens: most tokens of an answer; it also ends where prompt and answer fill the model's context.
            do_sample: draw tokens; None draws where ``temperature``, ``top_k``, ``top_p`` or ``min_p`` is given.
            temperature: above 0; 0 takes the likeliest token, as ``do_sample=False`` does.
            top_k: tokens that stay in the draw.
            top_p: share of the probability that stays in the draw.
            min_p: least share, of the probability of the likeliest token, that stays in the draw.
            repetition_penalty: above 1 against repetition.
            stop: texts that end an answer; it ends before them.
            seed: repeats the draws. Each prompt has its own, which depend on the seed and its place in the list.
            stream: give the answer in pieces while it grows; for a single prompt.
            max_batch: most prompts computed at once; prompts of like length go together.
            prompt_lookup_num_tokens: most tokens that a prompt which is computed alone guesses in a step, by what followed the same
                tokens before; 0 guesses none. Guesses save time where an answer repeats what was there. In 8 or 4 bit a near tie
                may fall another way with them, as it may among other rows of a batch.

        Returns:
            The new text without special tokens: a str for one prompt, a list of str for several, an iterator of pieces with
            ``stream``. Pieces hold whole characters only.

        Raises:
            UsageError: an option has a value that it cannot have, several prompts are to be streamed, or messages are given to
                a model without chat template.
            DataError: a prompt is empty, longer than the model reads, or neither text nor messages.
        """
        settings = advised_settings(
            self._generation.defaults,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
        )
        check_batch(max_batch, stream=stream)
        single = _is_single(prompt)
        prompts: list[Any] = [prompt] if single else list(prompt)
        if stream and not single:
            raise UsageError(
                f"only a single prompt can be streamed, not a list of {len(prompts)}",
                where="stream",
                hint="call generate for each of them, or without stream",
            )
        rows = self._encode(prompts)
        self._check_lengths(rows)
        if stream:
            return self._stream(rows[0], settings)
        texts = [answer.text() for answer in self._answers(rows, settings, with_text=True, max_batch=max_batch)]
        return texts[0] if single else texts

    def generate_ids(
        self, rows: Sequence[Sequence[int]], settings: SamplingSettings, *, max_batch: int = _MAX_BATCH
    ) -> list[list[int]]:
        """Token ids that follow each row of prompt ids; the token that ended an answer is its last one.

        Args:
            rows: token ids of each prompt, special tokens included.
            settings: how to choose, and when to end.
            max_batch: most rows computed at once.

        Raises:
            DataError: a row is empty or longer than the model reads.
        """
        self._check_lengths(rows)
        return [answer.ids for answer in self._answers(rows, settings, with_text=bool(settings.stop), max_batch=max_batch)]

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, with the special tokens of the tokenizer, or of a conversation, with those of its template only.

        Raises:
            UsageError: messages, and the model has no chat template.
            DataError: neither a text nor messages that the template accepts.
        """
        if isinstance(prompt, str):
            check_characters(prompt)
            ids: list[int] = self.tokenizer.encode(prompt).ids
        else:
            text = self.chat_template.render(prompt)
            check_characters(text)
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def raw_outputs(self, texts: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """``logits`` [vocabulary] of the token that follows each text, as golden files hold them."""
        return [{"logits": self.decoder.prefill([self.encode(text)]).logits[0]} for text in texts]

    def _encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt; where one of several cannot be read its place is told."""
        rows = []
        for index, prompt in enumerate(prompts):
            try:
                rows.append(self.encode(prompt))
            except DataError as error:
                if len(prompts) > 1:
                    error.where = f"prompt {index}" + (f", {error.where}" if error.where else "")
                raise
        return rows

    def _check_lengths(self, rows: Sequence[Sequence[int]]) -> None:
        limit = self._generation.context_length
        for index, row in enumerate(rows):
            if not row:
                raise DataError("the prompt has no tokens", where=f"prompt {index}", hint="leave empty prompts out")
            if len(row) >= limit:
                raise DataError(
                    f"the prompt has {len(row)} tokens, and the model reads {limit}, prompt and answer together",
                    where=f"prompt {index}",
                    hint="shorten it, so that there is room for an answer",
                )

    def _answers(
        self, rows: Sequence[Sequence[int]], settings: SamplingSettings, *, with_text: bool, max_batch: int
    ) -> list[Answer]:
        answers = [self._answer(row, settings, with_text=with_text) for row in rows]
        generators = make_generators(settings.seed, len(rows))
        for batch in plan_batches([len(row) for row in rows], max_batch, _MAX_PADDING):
            own = [answers[index] for index in batch]
            for _ in self._steps([rows[index] for index in batch], settings, [generators[index] for index in batch], own):
                pass
        return answers

    def _stream(self, row: Sequence[int], settings: SamplingSettings) -> Iterator[str]:
        answer = self._answer(row, settings, with_text=True)
        with closing(self._steps([row], settings, make_generators(settings.seed, 1), [answer])) as steps:
            for _ in steps:
                if piece := answer.take():
                    yield piece
        if rest := answer.text():
            yield rest

    def _steps(
        self,
        rows: Sequence[Sequence[int]],
        settings: SamplingSettings,
        generators: Sequence[np.random.Generator],
        answers: Sequence[Answer],
    ) -> Generator[None]:
        return generate_tokens(self.decoder, rows, settings, generators, lambda row, token: answers[row].add(token))

    def _answer(self, row: Sequence[int], settings: SamplingSettings, *, with_text: bool) -> Answer:
        room = min(settings.max_new_tokens, self._generation.context_length - len(row))
        text = AnswerText(self.tokenizer, settings.stop) if with_text else None
        return Answer(room, frozenset(self._generation.end_token_ids), text)


def _is_single(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Whether it is one text or one conversation, not a list of them."""
    if isinstance(prompt, str):
        return True
    if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence):
        hint = "put the message into a list" if isinstance(prompt, Mapping) else "give a text"
        raise DataError(f"a prompt is a text or a list of messages, not {type(prompt).__name__}", hint=hint)
    return len(prompt) > 0 and isinstance(prompt[0], Mapping)
