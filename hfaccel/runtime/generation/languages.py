"""Languages of translation models that have many: tokens by which a source says what it is, and an answer what it shall be.

mBART, M2M-100 and NLLB mark a source with a special token of its language, which their tokenizer puts before it or behind it, and an
answer with its first token. The names are those of their papers: ``en_XX`` (arXiv:2001.08210, arXiv:2008.00401), ``__en__``
(arXiv:2010.11125) and ``eng_Latn`` (arXiv:2207.04672).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hfaccel.errors import UsageError

if TYPE_CHECKING:
    from hfaccel.runtime.tokenizer import Encoded

_MARK = re.compile(r"(?:__([a-z]{2,3})__|([a-z]{2,3})_[A-Z][A-Za-z]{1,3})")
_SHOWN = 8


def language_ids(tokenizer: Any) -> dict[str, int]:
    """Ids of the languages that a tokenizer knows, by the name of their token; none for most models.

    Args:
        tokenizer: of the ``tokenizers`` library.
    """
    added = tokenizer.get_added_tokens_decoder()
    return {
        token.content: int(number) for number, token in sorted(added.items()) if token.special and _MARK.fullmatch(token.content)
    }


def find_language(name: str, languages: Mapping[str, int], *, option: str) -> int:
    """Id of a language by the name of its token, ``fr_XX``, or by the code in it, ``fr``, where one language has that code.

    Args:
        name: as the user gave it.
        languages: of the model.
        option: that it was given with.

    Raises:
        UsageError: the model knows no languages, or not this one.
    """
    if not languages:
        raise UsageError("this model marks no languages", where=option, hint="leave it out")
    if name in languages:
        return languages[name]
    of_code = [token for token in languages if name in _codes(token)]
    if len(of_code) == 1:
        return languages[of_code[0]]
    near = of_code or difflib.get_close_matches(name, languages, n=_SHOWN, cutoff=0.4) or list(languages)[:_SHOWN]
    raise UsageError(
        f"'{name}' is {'no' if not of_code else 'more than one'} language of this model, which has {len(languages)}",
        where=option,
        hint=f"such as {', '.join(near)}",
    )


def mark_source(source: Encoded, language: int, languages: Mapping[str, int]) -> Encoded:
    """A tokenized source as one of that language.

    Args:
        source: as the tokenizer marked it.
        language: id of its token.
        languages: of the model.

    Raises:
        UsageError: the tokenizer marks no source.
    """
    known = np.isin(source.ids, list(languages.values())) & np.array(source.special_tokens_mask, dtype=bool)
    if not known.any():
        raise UsageError(
            "the tokenizer of this model marks no language in a source", where="source_language", hint="leave it out"
        )
    ids = np.where(known, language, source.ids)
    ids.flags.writeable = False
    return replace(source, ids=ids)


def _codes(token: str) -> tuple[str, ...]:
    found = _MARK.fullmatch(token)
    return () if found is None else tuple(code for code in found.groups() if code)
