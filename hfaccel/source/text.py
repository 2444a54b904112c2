"""How text becomes ids: the settings read from a checkpoint, and the tokenizer files an artifact carries."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from hfaccel.artifact.contract import TextSettings
from hfaccel.errors import SourceError
from hfaccel.runtime.batching import pad
from hfaccel.runtime.tokenizer import Text, TextTokenizer
from hfaccel.source.marian import INPUTS, build_tokenizer, is_marian, marian_vocabulary
from hfaccel.source.model import CONFIG_FILE, PREPROCESSOR_FILE, SourceModel, read_object

# Their position ids start after the padding id, so that many positions cannot be used.
_OFFSET_POSITION_TYPES = (
    "camembert",
    "data2vec-text",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
_DEFAULT_MAX_LENGTH_TOKENS = 512
_SANE_MAX_LENGTH_TOKENS = 1_000_000  # transformers writes 1e30 for "unknown"
_COPIED_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# Case, accents, spaces, scripts without spaces, signs, nothing at all, pairs: where tokenizers are seen to part.
_CHECKED_TEXTS: tuple[Text, ...] = (
    "Hello, World! It's 3.14 o'clock",
    "word word2",
    "  two  spaces\tand a\nnew line ",
    "Crème brûlée für Straße, ÅNGSTRÖM",
    "Привет, как дела?",
    "今天天气很好。",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "emoji 👩‍🚀 and ½ ﬁ",
    "https://example.org/a_b?c=D",
    "",
    ("Who is it?", "It is Anna."),
    ("", "second only"),
)
_DECODED_AT_ONCE = 50
_SETTINGS_FILES = (CONFIG_FILE, "generation_config.json", PREPROCESSOR_FILE)


def text_settings(source: SourceModel) -> TextSettings:
    """What the run time needs to know beside ``tokenizer.json``.

    Raises:
        SourceError: the tokenizer has no padding token and the config none either, or the vocabulary cannot be loaded.
    """
    settings = read_object(source.folder / "tokenizer_config.json")
    special_tokens = read_object(source.folder / "special_tokens_map.json")
    pad_token = _token_text(settings.get("pad_token") or special_tokens.get("pad_token"))
    mask_token = _token_text(settings.get("mask_token") or special_tokens.get("mask_token"))
    ids, padding = _token_ids(source, [token for token in (pad_token, mask_token) if token is not None])
    pad_token_id = ids.get(pad_token) if pad_token is not None else None
    candidates = [pad_token_id, source.config.get("pad_token_id"), padding.get("pad_id")]
    if source.task == "text-generation":
        candidates.append(0)  # many decoders have none, and what pads a prompt is never looked at
    known_ids = [int(value) for value in candidates if value is not None and int(value) >= 0]
    if not known_ids:
        raise SourceError("the tokenizer has no padding token", where=source.id, hint="add pad_token to tokenizer_config.json")
    sentence_files = source.sentence_transformers
    return TextSettings(
        max_length=_max_length(source, settings),
        pad_token_id=known_ids[0],
        pad_token_type_id=int(settings.get("pad_token_type_id", padding.get("pad_type_id", 0))),
        padding_side="right"
        if source.task == "text-generation"
        else _side(settings.get("padding_side") or str(padding.get("direction", "right")).lower()),
        truncation_side=_side(settings.get("truncation_side", "right")),
        mask_token=mask_token if mask_token in ids else None,
        mask_token_id=ids.get(mask_token) if mask_token is not None else None,
        lowercase=sentence_files.lowercase if sentence_files is not None else False,
    )


def tokenizer_inputs(source: SourceModel) -> tuple[str, ...]:
    """Names of the model inputs that the tokenizer of the checkpoint makes, as transformers loads it.

    Raises:
        SourceError: transformers cannot load the tokenizer.
    """
    if is_marian(source.folder):
        return INPUTS
    return tuple(str(name) for name in _load_tokenizer(source).model_input_names)


def write_tokenizer(source: SourceModel, destination_folder: Path) -> None:
    """Write ``tokenizer.json`` and the settings files of the checkpoint into an artifact folder.

    A checkpoint with vocabulary files only gets its ``tokenizer.json`` built by transformers; see :mod:`hfaccel.source.marian` for
    those of which transformers builds none.

    Raises:
        SourceError: no ``tokenizer.json`` can be built from the vocabulary files.
    """
    destination_folder.mkdir(parents=True, exist_ok=True)
    if (source.folder / "tokenizer.json").is_file():
        for name in ("tokenizer.json", *_COPIED_FILES):
            _copy(source.folder, destination_folder, name)
    elif is_marian(source.folder):
        build_tokenizer(source.folder).tokenizer.save(str(destination_folder / "tokenizer.json"))
        for name in _COPIED_FILES:
            _copy(source.folder, destination_folder, name)
    else:
        _load_tokenizer(source).save_pretrained(destination_folder)
        if not (destination_folder / "tokenizer.json").is_file():
            raise SourceError(
                "the tokenizer has no fast version", where=source.id, hint="add a tokenizer.json to the checkpoint folder"
            )
    for name in _SETTINGS_FILES:
        _copy(source.folder, destination_folder, name)


def check_tokenizer(source: SourceModel, folder: Path) -> tuple[str, ...]:
    """Hold the ``tokenizer.json`` that :func:`write_tokenizer` put into ``folder`` against the tokenizer that transformers makes.

    transformers may build another one than ``tokenizer.json`` says (other files of the checkpoint ask for lower case, a prefix
    space, other special tokens); the compiled model would then answer other questions than the source.

    Args:
        source: the checkpoint.
        folder: the artifact folder.

    Returns:
        What the user must know: what could not be compared, and what differs in rare texts.

    Raises:
        SourceError: ids, attention mask, token types or what ids are decoded to differ; names the first text where they do.
    """
    if source.task == "automatic-speech-recognition":
        return ()  # it reads no text: ids become text, and what the tokenizer puts around a text plays no part
    marian = is_marian(source.folder)
    notices = _marian_notices(source) if marian else ()
    if marian and find_spec("sentencepiece") is None:
        return notices
    settings = text_settings(source)
    ours, theirs = TextTokenizer(folder, settings), _load_tokenizer(source)
    long = " ".join(str(text) for text in _CHECKED_TEXTS) * (1 + settings.max_length // 50)
    texts: tuple[Text, ...] = (*_CHECKED_TEXTS, long, (long, "short"), ("short", long))
    for text, encoded in zip(texts, ours.encode(texts), strict=True):
        expected = _encode(theirs, text, settings)
        _compare(source, text, "ids", encoded.ids.tolist(), expected["input_ids"])
        if "token_type_ids" in expected:
            _compare(source, text, "token types", encoded.type_ids.tolist(), expected["token_type_ids"])
    if theirs.pad_token is not None:
        padded = theirs.pad([_encode(theirs, text, settings) for text in ("word", "word word word")], return_tensors="np")
        mask = pad(ours.encode(["word", "word word word"]), settings)["attention_mask"]
        _compare(source, "word", "attention mask", mask[0].tolist(), padded["attention_mask"][0].tolist())
    if marian:
        _compare_decoding(source, ours, theirs)
    return notices


def _marian_notices(source: SourceModel) -> tuple[str, ...]:
    notices = []
    if find_spec("sentencepiece") is None:
        notices.append(
            "the tokenizer.json made of source.spm was not compared with transformers' tokenizer, which needs sentencepiece "
            "(pip install sentencepiece)"
        )
    if left_out := build_tokenizer(source.folder).left_out:
        notices.append(
            f"{len(left_out)} pieces of source.spm are not in vocab.json, such as {', '.join(map(repr, left_out[:3]))}: where "
            "transformers takes them for unknown, the compiled model reads smaller pieces"
        )
    return tuple(notices)


def _compare_decoding(source: SourceModel, ours: TextTokenizer, theirs: Any) -> None:
    """Answers may hold any token: all of them are decoded, some at a time."""
    ids = sorted(marian_vocabulary(source.folder).values())
    for start in range(0, len(ids), _DECODED_AT_ONCE):
        row = ids[start : start + _DECODED_AT_ONCE]
        made, expected = ours.decode(row, skip_special_tokens=True), theirs.decode(row, skip_special_tokens=True)
        if made.strip() != expected.strip():
            raise SourceError(
                f"the tokenizer made of target.spm decodes ids {row[0]} to {row[-1]} to {made[:60]!r}, that of transformers to "
                f"{expected[:60]!r}",
                where=str(source.folder),
                hint="add a tokenizer.json to the checkpoint folder",
            )


def _encode(tokenizer: Any, text: Text, settings: TextSettings) -> Any:
    parts = [text] if isinstance(text, str) else list(text)
    if settings.lowercase:  # sentence-transformers lowers the text before its tokenizer sees it
        parts = [part.lower() for part in parts]
    # verbose=False: the longest text is cut on purpose, a warning would alarm the user.
    return tokenizer(*parts, truncation=True, max_length=settings.max_length, verbose=False)


def _compare(source: SourceModel, text: Text, what: str, ours: list[int], theirs: list[int]) -> None:
    if ours == theirs:
        return
    shown = repr(text) if len(repr(text)) <= 60 else repr(text)[:60] + "..."
    position = next((index for index, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    start = max(0, min(len(ours), len(theirs)) if position is None else position)
    window = slice(max(0, start - 2), start + 6)
    raise SourceError(
        f"tokenizer.json and the tokenizer that transformers makes of the checkpoint disagree on {shown}: {what} from position "
        f"{window.start} on are {ours[window]} and {theirs[window]}",
        where=str(source.folder),
        hint="write one that agrees: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER); or correct tokenizer_config.json",
    )


def _copy(folder: Path, destination_folder: Path, name: str) -> None:
    if (folder / name).is_file():
        shutil.copyfile(folder / name, destination_folder / name)


def _max_length(source: SourceModel, settings: Mapping[str, Any]) -> int:
    """Largest number of tokens, special tokens included, that the checkpoint takes."""
    positions = source.config.get("max_position_embeddings") or source.config.get("n_positions")
    bound = int(positions) if isinstance(positions, int) and positions > 0 else None
    if bound is not None and source.model_type in _OFFSET_POSITION_TYPES:
        pad_token_id = source.config.get("pad_token_id")
        bound -= (1 if pad_token_id is None else int(pad_token_id)) + 1
    wished = source.sentence_transformers.max_length if source.sentence_transformers is not None else None
    tokenizer_limit = settings.get("model_max_length")
    if wished is None and isinstance(tokenizer_limit, int | float) and 0 < tokenizer_limit < _SANE_MAX_LENGTH_TOKENS:
        wished = int(tokenizer_limit)
    limits = [value for value in (wished, bound) if value is not None]
    return min(limits) if limits else _DEFAULT_MAX_LENGTH_TOKENS


def _token_text(token: Any) -> str | None:
    """Token files write a special token as text or as an object with ``content``."""
    if isinstance(token, dict):
        token = token.get("content")
    return str(token) if token else None


def _side(value: Any) -> Literal["right", "left"]:
    return "left" if value == "left" else "right"


def _token_ids(source: SourceModel, tokens: list[str]) -> tuple[dict[str, int], Mapping[str, Any]]:
    """Ids of the special tokens that exist, and the ``padding`` section of ``tokenizer.json``."""
    content = read_object(source.folder / "tokenizer.json")
    if is_marian(source.folder):
        known = marian_vocabulary(source.folder)
        return {token: known[token] for token in tokens if token in known}, {}
    if not content:
        tokenizer = _load_tokenizer(source)
        vocabulary = tokenizer.get_vocab()
        return {token: int(vocabulary[token]) for token in tokens if token in vocabulary}, {}
    ids = {str(token["content"]): int(token["id"]) for token in content.get("added_tokens") or ()}
    vocabulary = content["model"].get("vocab", {})
    for token in tokens:
        if token not in ids and isinstance(vocabulary, dict) and token in vocabulary:
            ids[token] = int(vocabulary[token])
    return {token: ids[token] for token in tokens if token in ids}, content.get("padding") or {}


def _load_tokenizer(source: SourceModel) -> Any:
    from transformers import AutoTokenizer

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")  # Marian's reads no text with it
            return AutoTokenizer.from_pretrained(
                source.folder, local_files_only=True, trust_remote_code=source.trust_remote_code, use_fast=True
            )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        # transformers asks for other libraries where this one is missing.
        wants = any(source.folder.glob("*.model")) and find_spec("sentencepiece") is None
        hint = "pip install sentencepiece, or add a tokenizer.json to the checkpoint folder" if wants else ""
        raise SourceError(f"transformers cannot load the tokenizer: {error}", where=source.id, hint=hint) from error
