from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from hfaccel.errors import DataError, UsageError
from hfaccel.runtime.generation.answering import answer_tokens
from hfaccel.runtime.generation.beams import BeamSettings, search_beams
from hfaccel.runtime.generation.rules import Hook, TokenRules, rules_of
from hfaccel.runtime.generation.sampling import SamplingSettings, make_generators

START = 3
TOKENS = 24


@pytest.fixture(params=["t5", "bart", "marian", "whisper"])
def tiny(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def answers(
    tiny: Any,
    sources: Sequence[np.ndarray],
    rules: TokenRules | None = None,
    hook: Hook | None = None,
    settings: SamplingSettings | None = None,
    rows: list[list[int]] | None = None,
) -> list[list[int]]:
    model, found = tiny.open(), [[] for _ in sources]
    settings = settings or SamplingSettings(max_new_tokens=TOKENS)

    def accept(row: int, token: int) -> bool:
        found[row].append(token)
        return False

    steps = answer_tokens(
        model,
        model.encode(tiny.feeds(sources)),
        rows or [[START]] * len(sources),
        settings,
        rules or rules_of(tiny.settings),
        make_generators(settings.seed, len(sources)),
        accept,
        hook,
    )
    for _ in steps:
        pass
    return found


def beam_answers(
    tiny: Any, sources: Sequence[np.ndarray], settings: BeamSettings, rules: TokenRules | None = None, hook: Hook | None = None
) -> list[list[int]]:
    model = tiny.open()
    memory = model.encode(tiny.feeds(sources))
    return search_beams(model, memory, [[START]] * len(sources), settings, rules or rules_of(tiny.settings), hook)


def with_some_ends(tiny: Any, count: int) -> Any:
    """The model with end tokens that come at different places of its answers."""
    free = tiny.expected(tiny.sources, TOKENS, no_repeat_ngram_size=2)
    return tiny.with_ends(*dict.fromkeys(row[4 + 3 * place] for place, row in enumerate(free[:count])))


RULES = {
    "none": {},
    "penalty": {"repetition_penalty": 1.7},
    "ngrams": {"no_repeat_ngram_size": 2},
    "no token twice": {"no_repeat_ngram_size": 1},
    "long": {"min_new_tokens": 14, "no_repeat_ngram_size": 2},
    "forced": {"forced_bos_token_id": 17, "forced_eos_token_id": 2, "no_repeat_ngram_size": 3},
    "suppressed": {"suppress_tokens": [*range(0, 400, 3)], "begin_suppress_tokens": [*range(1, 400, 3)]},
    "all": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 10,
        "forced_bos_token_id": 17,
        "forced_eos_token_id": 2,
        "suppress_tokens": [*range(0, 400, 7)],
        "begin_suppress_tokens": [*range(1, 400, 2)],
    },
}
OURS = {
    "forced_bos_token_id": "forced_first_token_id",
    "forced_eos_token_id": "forced_last_token_id",
    "suppress_tokens": "suppressed_token_ids",
    "begin_suppress_tokens": "suppressed_first_token_ids",
}
every_rule = pytest.mark.parametrize("options", RULES.values(), ids=RULES.keys())


def rules_from(tiny: Any, options: dict[str, Any]) -> TokenRules:
    named = {OURS.get(name, name): tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    return replace(rules_of(tiny.settings), **named)


@every_rule
def test_greedy_answers_are_those_of_transformers(tiny: Any, options: dict[str, Any]) -> None:
    ending = with_some_ends(tiny, 2)
    expected = ending.expected(ending.sources, TOKENS, **options)
    assert answers(ending, ending.sources, rules_from(ending, options)) == expected
    alone = [answers(ending, [source], rules_from(ending, options))[0] for source in ending.sources]
    assert alone == expected


def test_answers_end_at_different_places(tiny: Any) -> None:
    ending = with_some_ends(tiny, 3)
    found = answers(ending, ending.sources, rules_from(ending, {"no_repeat_ngram_size": 2}))
    assert len({len(row) for row in found}) > 2  # else dropping rows would not be tested above
    assert all(row[-1] in ending.settings.end_token_ids or len(row) == TOKENS for row in found)


class _OddAfterEven(LogitsProcessor):
    """After an even new token an odd one must follow."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row, ids in zip(scores, input_ids[:, 1:].tolist(), strict=True):
            if ids and ids[-1] % 2 == 0:
                row[::2] = -torch.inf
        return scores


def _odd_after_even(rows: Sequence[Sequence[int]], logits: np.ndarray) -> np.ndarray:
    logits = logits.copy()
    for row, ids in zip(logits, rows, strict=True):
        if ids and ids[-1] % 2 == 0:
            row[::2] = -np.inf
    return logits


def test_a_hook_is_given_the_new_tokens_and_has_the_last_word(tiny: Any) -> None:
    ending = with_some_ends(tiny, 2)
    theirs = {"logits_processor": LogitsProcessorList([_OddAfterEven()]), "no_repeat_ngram_size": 3}
    rules = rules_from(ending, {"no_repeat_ngram_size": 3})
    assert answers(ending, ending.sources, rules, _odd_after_even) == ending.expected(ending.sources, TOKENS, **theirs)
    found = beam_answers(ending, ending.sources, BeamSettings(3, TOKENS), rules, _odd_after_even)
    assert found == ending.expected(ending.sources, TOKENS, num_beams=3, **theirs)


def test_draws_repeat_with_their_seed_and_obey_the_rules(bart: Any) -> None:
    settings = SamplingSettings(max_new_tokens=20, do_sample=True, temperature=2.0, seed=5)
    rules = rules_from(bart, RULES["all"])
    together = answers(bart, bart.sources, rules, settings=settings)
    assert answers(bart, bart.sources[:2], rules, settings=settings) == together[:2]
    assert answers(bart, bart.sources, rules, settings=replace(settings, seed=6)) != together
    assert {(row[0], row[-1]) for row in together} == {(17, 2)}
    assert not {*range(0, 400, 7)} & {token for row in together for token in row[1:-1]}


def test_the_caller_ends_an_answer(bart: Any) -> None:
    model, found = bart.open(), {0: [], 1: []}

    def accept(row: int, token: int) -> bool:
        found[row].append(token)
        return row == 0 and len(found[0]) == 4

    settings = SamplingSettings(max_new_tokens=12)
    memory = model.encode(bart.feeds(bart.sources[:2]))
    rules = rules_of(bart.settings)
    for _ in answer_tokens(model, memory, [[START]] * 2, settings, rules, make_generators(0, 2), accept):
        pass
    expected = bart.expected(bart.sources[:2], 12)
    assert found == {0: expected[0][:4], 1: expected[1]}


def test_an_answer_ends_where_the_context_is_full(tiny: Any) -> None:
    short = replace(tiny, settings=replace(tiny.settings, context_length=6))
    begun = [[START, 50, 60], [START]]
    found = answers(short, tiny.sources[:2], rows=begun)
    assert [len(row) for row in found] == [3, 5]
    assert found[1] == tiny.expected(tiny.sources[1:2], 5)[0]
    with pytest.raises(DataError, match=r"row 1: the answer begins with 6 tokens, and the decoder reads 6"):
        answers(short, tiny.sources[:2], rows=[[START], [START] * 6])


@pytest.mark.parametrize("ends", [0, 1, 3])
@pytest.mark.parametrize("early", [False, True], ids=["patient", "early"])
def test_beams_find_what_transformers_finds(tiny: Any, ends: int, early: bool) -> None:
    ending = with_some_ends(tiny, ends) if ends else tiny
    theirs = {"num_beams": 4, "early_stopping": early, "no_repeat_ngram_size": 3}
    expected = ending.expected(ending.sources, TOKENS, **theirs)
    rules = rules_from(ending, {"no_repeat_ngram_size": 3})
    assert beam_answers(ending, ending.sources, BeamSettings(4, TOKENS, early_stopping=early), rules) == expected
    alone = [beam_answers(ending, [source], BeamSettings(4, TOKENS, early_stopping=early), rules)[0] for source in ending.sources]
    assert alone == expected
    if ends == 3:
        assert len({len(row) for row in expected}) > 1


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.6, 2.0])
@pytest.mark.parametrize("beams", [2, 5])
def test_the_length_penalty_is_that_of_transformers(tiny: Any, length_penalty: float, beams: int) -> None:
    ending = with_some_ends(tiny, 2)
    expected = ending.expected(ending.sources, TOKENS, num_beams=beams, length_penalty=length_penalty)
    assert beam_answers(ending, ending.sources, BeamSettings(beams, TOKENS, length_penalty)) == expected


@every_rule
def test_beams_obey_the_rules_as_in_transformers(tiny: Any, options: dict[str, Any]) -> None:
    ending = with_some_ends(tiny, 2)
    expected = ending.expected(ending.sources, TOKENS, num_beams=4, **options)
    assert beam_answers(ending, ending.sources, BeamSettings(4, TOKENS), rules_from(ending, options)) == expected


def test_one_beam_takes_the_likeliest_tokens(bart: Any) -> None:
    assert beam_answers(bart, bart.sources, BeamSettings(1, 20)) == bart.expected(bart.sources, 20)


def test_beams_find_likelier_answers_than_greed(t5: Any) -> None:
    greedy = t5.expected(t5.sources, 12)
    assert beam_answers(t5, t5.sources, BeamSettings(4, 12)) != greedy


def test_values_that_options_cannot_have() -> None:
    with pytest.raises(UsageError, match="num_beams: must be a whole number from 1"):
        BeamSettings(0)
    with pytest.raises(UsageError, match="length_penalty: must be a number from -10 to 10"):
        BeamSettings(2, length_penalty=float("nan"))
    with pytest.raises(UsageError, match="early_stopping: must be True or False"):
        BeamSettings(2, early_stopping="never")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="min_new_tokens: must be a whole number from 0"):
        TokenRules(min_new_tokens=-1)
    with pytest.raises(UsageError, match="no_repeat_ngram_size: must be a whole number from 0"):
        TokenRules(no_repeat_ngram_size=1.5)  # type: ignore[arg-type]
