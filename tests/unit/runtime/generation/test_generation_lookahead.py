"""Tokens guessed ahead: they save steps and change no answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfaccel.errors import UsageError
from hfaccel.rewrites.graphs import load_graph, save_graph
from hfaccel.rewrites.last_token_logits import last_token_logits
from hfaccel.runtime.generation.decoder import Decoder
from hfaccel.runtime.generation.decoding import Decoding
from hfaccel.runtime.generation.lookahead import Lookahead
from hfaccel.runtime.generation.loop import generate_tokens
from hfaccel.runtime.generation.prompt_lookup import PromptLookup
from hfaccel.runtime.generation.sampling import SamplingSettings, make_generators

REPEATED = [1, *([17, 300, 42, 9, 7] * 4)]
OTHERS = [[1, 5, 6], [1, 9, 8, 7, 6, 5]]
NEW = 60
PRICE = 0.25
Guess = Callable[[PromptLookup, int], list[int]]
_GUESS = PromptLookup.guess


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def keeping(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny decoder whose graph gives the logits of several tokens where it is asked to."""
    tiny = request.getfixturevalue(request.param)
    model = load_graph(tiny.graph)
    assert last_token_logits(model) == 1
    return replace(tiny, graph=save_graph(model, tmp_path_factory.mktemp("keeping")))


def wrong_guesses(lookup: PromptLookup, most: int) -> list[int]:
    return [3] * most


def mixed_guesses(lookup: PromptLookup, most: int) -> list[int]:
    """Now more, now fewer, now right, now wrong; the same ones each time."""
    right = _GUESS(lookup, most)
    return [*right[: len(lookup._followers) % 3], *([7] * (len(lookup._followers) % 4))][:most]


def answers(decoder: Decoder, rows: list[list[int]], settings: SamplingSettings) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in rows]

    def accept(row: int, token: int) -> bool:
        found[row].append(token)
        return len(found[row]) == settings.max_new_tokens - 7 * row

    for _ in generate_tokens(decoder, rows, settings, make_generators(settings.seed, len(rows)), accept):
        pass
    return found


@pytest.mark.parametrize("guess", [PromptLookup.guess, wrong_guesses, mixed_guesses])
def test_greedy_answers_are_those_of_transformers_whatever_is_guessed(
    keeping: Any, guess: Guess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PromptLookup, "guess", guess)
    decoder = keeping.open()
    for row in (REPEATED, *OTHERS):
        assert answers(decoder, [row], SamplingSettings(max_new_tokens=NEW)) == [keeping.expected(row, NEW)]


@pytest.mark.parametrize("guess", [PromptLookup.guess, mixed_guesses])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.3},
        {"repetition_penalty": 1.3},
        {"do_sample": True, "top_k": 3, "repetition_penalty": 1.1},
    ],
)
def test_draws_and_penalties_choose_the_same_tokens(
    keeping: Any, options: dict[str, Any], guess: Guess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PromptLookup, "guess", guess)
    decoder = keeping.open()
    settings = SamplingSettings(max_new_tokens=NEW, seed=4, **options)
    without = answers(decoder, [REPEATED], replace(settings, prompt_lookup_num_tokens=0))
    decoder.forget()
    assert answers(decoder, [REPEATED], settings) == without


def test_right_guesses_save_steps(keeping: Any) -> None:
    decoder = keeping.open()
    ahead = Lookahead(decoder.prefill([REPEATED], room=NEW), 8, PRICE)
    expected = keeping.expected(REPEATED, NEW)
    for token in expected:
        assert int(ahead.logits.argmax()) == token
        ahead.step(np.array([token]))
    assert ahead.saved_steps > 4, "the answer of a random model repeats itself"
    assert ahead.tokens == [[*REPEATED, *expected]]


def test_what_was_guessed_wrongly_is_not_kept_for_the_next_prompt(keeping: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptLookup, "guess", wrong_guesses)
    decoder = keeping.open()
    first = answers(decoder, [REPEATED], SamplingSettings(max_new_tokens=10))[0]
    longer = [*REPEATED, *first, 5, 6]
    assert decoder.prefill([longer]).reused == len(REPEATED) + 9, "all but the last token, which was never read"
    decoder.forget()
    answers(decoder, [REPEATED], SamplingSettings(max_new_tokens=10))
    assert answers(decoder, [longer], SamplingSettings(max_new_tokens=NEW)) == [keeping.expected(longer, NEW)]


def test_an_interrupted_step_leaves_what_was_read(keeping: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = keeping.open()
    ahead = Lookahead(decoder.prefill([REPEATED], room=NEW), 8, PRICE)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Decoding, "_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ahead.step(np.array([17]))
    ahead.settle()
    assert ahead._decoding.tokens == [REPEATED]


def test_a_row_that_is_left_alone_goes_on_with_guesses(keeping: Any) -> None:
    decoder = keeping.open()
    rows = [REPEATED, *OTHERS]
    found = answers(decoder, rows, SamplingSettings(max_new_tokens=NEW))
    assert found == [keeping.expected(row, NEW - 7 * place) for place, row in enumerate(rows)]


@pytest.mark.parametrize("context", [192, 150])  # the cache has room for 192 tokens in both
def test_guesses_stay_inside_the_context(keeping: Any, context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptLookup, "guess", wrong_guesses)
    decoder = replace(keeping, settings=replace(keeping.settings, context_length=context)).open()
    room = context - len(REPEATED)
    assert answers(decoder, [REPEATED], SamplingSettings(max_new_tokens=room)) == [keeping.expected(REPEATED, room)]


def test_graphs_that_give_one_row_of_logits_are_stepped_without(llama_last: Any) -> None:
    decoder = llama_last.open()
    assert not decoder.gives_several_logits
    assert answers(decoder, [REPEATED], SamplingSettings(max_new_tokens=20)) == [llama_last.expected(REPEATED, 20)]


def test_a_number_of_guesses_that_cannot_be(make_model: Any) -> None:
    with pytest.raises(UsageError, match="prompt_lookup_num_tokens"):
        make_model().generate("The fox", prompt_lookup_num_tokens=-1)


@given(st.lists(st.integers(0, 5), max_size=40), st.lists(st.integers(0, 5), max_size=40), st.integers(0, 8))
def test_only_what_followed_before_is_guessed(prompt: list[int], answer: list[int], most: int) -> None:
    lookup = PromptLookup(prompt, PRICE)
    for token in answer:
        lookup.append(token)
    read = [*prompt, *answer]
    guesses = lookup.guess(most)
    assert len(guesses) <= most
    pairs = set(pairwise(read))
    assert set(zip([*read[-1:], *guesses], guesses, strict=False)) <= pairs


def test_guesses_grow_bolder_where_they_are_right() -> None:
    cycle = [5, 6, 7, 8, 9, 10, 11]
    lookup = PromptLookup(cycle * 2, PRICE)
    before = len(lookup.guess(8))
    for token in cycle * 6:
        lookup.append(token)
    assert 1 <= before < len(lookup.guess(8))


def test_cheap_guesses_are_made_sooner() -> None:
    tokens = np.random.default_rng(0).integers(0, 9, 200).tolist()
    assert len(PromptLookup(tokens, 0.05).guess(8)) > len(PromptLookup(tokens, 0.9).guess(8))


def test_hardly_anything_is_guessed_where_nothing_can_be_known() -> None:
    tokens = np.random.default_rng(0).integers(0, 5, 300).tolist()
    lookup = PromptLookup(tokens[:20], PRICE)
    counts = []
    for token in tokens[20:]:
        lookup.append(token)
        counts.append(len(lookup.guess(8)))
    assert sum(counts[-200:]) < 40


def test_the_tensor_of_a_default_is_a_scalar(keeping: Any, tmp_path: Path) -> None:
    model = load_graph(keeping.graph)
    assert model.graph.inputs[-1].name == "logits_to_keep"
    assert len(model.graph.inputs[-1].shape) == 0  # as transformers has it
