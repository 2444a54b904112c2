"""Marian checkpoints as opus-mt ships them: two sentencepiece models, ``vocab.json``, and no ``tokenizer.json``.

Where the package sentencepiece is installed a model is trained and transformers' own tokenizer is the reference; elsewhere a model is
written by hand, and what it makes of a text is found here by trying every way to part it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer

import hfaccel
from hfaccel.api import SilentProgress
from hfaccel.errors import SourceError
from hfaccel.runtime.generation.text_to_text import TextToTextModel
from hfaccel.source.marian import build_tokenizer
from hfaccel.source.resolve import resolve_source
from hfaccel.source.sentencepiece_file import read_sentencepiece
from hfaccel.source.text import check_tokenizer, write_tokenizer

OFF_TARGET = "cpu-arm-dotprod"
NORMAL, UNKNOWN, CONTROL = 1, 2, 3
SOURCE_PIECES = {
    "▁": -3.0, "a": -3.5, "b": -3.6, "c": -3.7, "d": -3.8, "e": -3.2, "n": -3.9, "t": -4.0, "h": -4.1, "s": -4.2, "▁the": -1.5,
    "▁a": -2.0, "▁an": -2.5, "bed": -4.5, "▁bed": -4.4, "ed": -2.6, "and": -5.0, "▁and": -2.2, "th": -3.3, "s.": -6.0, ".": -3.1,
}  # fmt: skip
TARGET_PIECES = {
    "▁": -3.0,
    "ß": -3.5,
    "▁das": -1.5,
    "▁Bett": -2.0,
    "ett": -4.0,
    "nd": -3.0,
    "and": -3.4,
    "日": -5.0,
    "日本": -5.0,
}
TEXTS = (
    "the bed", "a bed and the hat.", "  the   bed ", "bed", "", "and\u00a0the", "abcd beds.", "the 日 bed", "the 日本 bed", "the zz z bed",
    "ß", "aßb", "the andbed", ">>de<< the bed", "\ue000ß \ue001日",
)  # fmt: skip


def varint(number: int) -> bytes:
    rest, low = number >> 7, number & 0x7F
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def field(number: int, value: bytes | int | float) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def write_pieces(path: Path, pieces: Mapping[str, float], *, model_type: int = 1) -> None:
    """A sentencepiece model that replaces no characters."""
    rows = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    rows += [(piece, score, NORMAL) for piece, score in pieces.items()]
    content = b"".join(field(1, field(1, piece.encode()) + field(2, score) + field(3, kind)) for piece, score, kind in rows)
    path.write_bytes(content + field(2, field(3, model_type)) + field(3, field(1, b"identity") + field(3, 1) + field(4, 1)))


def write_folder(folder: Path, *, model_type: int = 1) -> dict[str, int]:
    """Tokenizer files; the vocabulary."""
    folder.mkdir(exist_ok=True)
    write_pieces(folder / "source.spm", SOURCE_PIECES, model_type=model_type)
    write_pieces(folder / "target.spm", TARGET_PIECES)
    tokens = list(dict.fromkeys(["</s>", "<unk>", *SOURCE_PIECES, *TARGET_PIECES, ">>de<<", "<pad>"]))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    settings = {"source_lang": "en", "target_lang": "de", "tokenizer_class": "MarianTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return vocabulary


def write_model(folder: Path, vocabulary: Mapping[str, int], enlarge: Callable[[Any], None]) -> None:
    torch.manual_seed(0)
    config = transformers.MarianConfig(
        vocab_size=len(vocabulary), pad_token_id=vocabulary["<pad>"], eos_token_id=0, decoder_start_token_id=vocabulary["<pad>"],
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_position_embeddings=64, forced_eos_token_id=None, tie_word_embeddings=False, scale_embedding=True,
    )  # fmt: skip
    model = transformers.MarianMTModel(config)
    enlarge(model)
    model.final_logits_bias[
        0, [vocabulary[token] for token in ("</s>", "<unk>", "<pad>")]
    ] = -30  # so that it has something to say
    model.save_pretrained(folder)


def best_parting(text: str, vocabulary: Mapping[str, int]) -> list[int]:
    """What sentencepiece does, the long way: of all partings of the text the likeliest; a run of unknown characters is one piece."""
    lowest = min(SOURCE_PIECES.values()) - 10

    @cache
    def best(start: int) -> tuple[float, tuple[str, ...]]:
        if start == len(whole):
            return 0.0, ()
        found = []
        for end in range(start + 1, len(whole) + 1):
            piece = whole[start:end]
            if piece in SOURCE_PIECES or (end == start + 1):
                score, rest = best(end)
                found.append((SOURCE_PIECES.get(piece, lowest) + score, (piece, *rest)))
        return max(found)

    words = text.split(" ")
    code = [vocabulary[words.pop(0)]] if words[0].startswith(">>") else []
    joined = " ".join(word for word in words if word)
    whole = "▁" + joined.replace(" ", "▁") if joined else ""
    runs: list[str] = []
    unknown = False
    for piece in best(0)[1]:
        if piece not in SOURCE_PIECES and unknown:
            runs[-1] += piece
        else:
            runs.append(piece)
        unknown = piece not in SOURCE_PIECES
    return [*code, *(vocabulary.get(run, vocabulary["<unk>"]) for run in runs), 0]


@pytest.mark.parametrize("text", TEXTS)
def test_a_source_text_has_the_ids_of_its_likeliest_parting(tmp_path: Path, text: str) -> None:
    vocabulary = write_folder(tmp_path)
    made = build_tokenizer(tmp_path).tokenizer.encode(text).ids
    if text == "the 日本 bed":  # the one difference: transformers finds the run among the answers' pieces
        vocabulary = {piece: number for piece, number in vocabulary.items() if piece != "日本"}
    assert made == best_parting(text, vocabulary)


def test_answers_are_put_together_from_all_pieces(tmp_path: Path) -> None:
    vocabulary = write_folder(tmp_path)
    tokenizer = build_tokenizer(tmp_path).tokenizer
    answer = ["▁", "▁das", "▁Bett", "▁", "ß", "▁the", "日本", ">>de<<", "日", "▁", "</s>"]
    assert tokenizer.decode([vocabulary[piece] for piece in answer]) == "das Bett ß the日本>>de<<日"
    assert tokenizer.decode([vocabulary["<unk>"], vocabulary["nd"]]) == "nd"


def test_a_folder_is_compiled_and_writes_what_transformers_writes(tmp_path: Path, enlarge: Callable[[Any], None]) -> None:
    folder = tmp_path / "model"
    vocabulary = write_folder(folder)
    write_model(folder, vocabulary, enlarge)
    (tmp_path / "pairs.csv").write_text("source,target\n" + "\n".join(f"{text} bed,das Bett and" for text in TEXTS[:6]) + "\n")
    progress = SilentProgress()
    result = hfaccel.compile(
        folder, output=tmp_path / "out", data=tmp_path / "pairs.csv", target=OFF_TARGET, overrides=["quantize.enabled=false"],
        use_cache=False, progress=progress,
    )  # fmt: skip
    model = hfaccel.load(result.folder)
    assert isinstance(model, TextToTextModel)
    source = transformers.MarianMTModel.from_pretrained(folder).eval()
    tokens = {number: piece for piece, number in vocabulary.items()}
    answers = set()
    for text in ("the bed", "a bed and the hat.", ">>de<< the beds"):
        with torch.inference_mode():
            ids = source.generate(torch.tensor([best_parting(text, vocabulary)]), max_new_tokens=20, num_beams=1, do_sample=False)
        pieces = [tokens[number] for number in ids[0].tolist() if tokens[number] not in ("</s>", "<pad>", "<unk>")]
        expected = "".join(pieces).replace("▁", " ").strip()
        assert model.generate(text, max_new_tokens=20, num_beams=1) == expected
        answers.add(expected)
    assert len(answers) > 1
    compared = any("was not compared" in line for line in progress.warnings)
    assert compared != _has_sentencepiece()


def _has_sentencepiece() -> bool:
    try:
        import sentencepiece  # noqa: F401
    except ImportError:
        return False
    return True


def test_pieces_without_an_id_are_told(tmp_path: Path, enlarge: Callable[[Any], None]) -> None:
    vocabulary = write_folder(tmp_path)
    del vocabulary["bed"]
    numbered = {piece: number for number, piece in enumerate(vocabulary)}
    (tmp_path / "vocab.json").write_text(json.dumps(numbered, ensure_ascii=False), encoding="utf-8")
    write_model(tmp_path, numbered, enlarge)
    assert build_tokenizer(tmp_path).left_out == ("bed",)
    write_tokenizer(resolve_source(str(tmp_path)), tmp_path / "out")
    assert "'bed'" in " ".join(check_tokenizer(resolve_source(str(tmp_path)), tmp_path / "out"))


def test_what_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, model_type=2)
    with pytest.raises(SourceError, match="no Unigram model"):
        build_tokenizer(tmp_path)
    write_folder(tmp_path)
    content = (tmp_path / "source.spm").read_bytes()
    for damaged in (content[:-3], b"not a model at all", b""):
        (tmp_path / "source.spm").write_bytes(damaged)
        with pytest.raises(SourceError, match="no sentencepiece model") as caught:
            build_tokenizer(tmp_path)
        assert caught.value.where.endswith("source.spm")
    write_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"separate_vocabs": true}', encoding="utf-8")
    with pytest.raises(SourceError, match="separate_vocabs"):
        build_tokenizer(tmp_path)


def trained_folder(folder: Path) -> dict[str, int]:
    """Real sentencepiece models, with the usual replacing of characters (NFKC)."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder.mkdir()
    english = [
        "The dog runs across the street, and sleeps.",
        "It's 3.14 o'clock: hello, world!",
        "See https://example.org/a_b",
    ] * 30
    german = ["Der Hund läuft über die Straße und schläft.", "Wir haben Brötchen und Äpfel gekauft.", "Größere Züge fahren."] * 30
    tokens = {"</s>": 0, "<unk>": 1}
    for name, lines, size in (("source", english, 120), ("target", german, 80)):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=str(folder / name), vocab_size=size, hard_vocab_limit=False, minloglevel=2
        )
        (folder / f"{name}.model").rename(folder / f"{name}.spm")
        for piece in read_sentencepiece(folder / f"{name}.spm").scores:
            tokens.setdefault(piece, len(tokens))
    tokens |= {">>de<<": len(tokens), "<pad>": len(tokens) + 1}
    (folder / "vocab.json").write_text(json.dumps(tokens, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"source_lang": "en", "target_lang": "de"}', encoding="utf-8")
    return tokens


def test_a_trained_model_is_read_as_transformers_reads_it(tmp_path: Path, enlarge: Callable[[Any], None]) -> None:
    vocabulary = trained_folder(tmp_path / "model")
    write_model(tmp_path / "model", vocabulary, enlarge)
    source = resolve_source(str(tmp_path / "model"))
    write_tokenizer(source, tmp_path / "out")
    assert check_tokenizer(source, tmp_path / "out") == ()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    ours = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in (*TEXTS, "The dog,\tand ﬁ ½ the Straße.", ">>de<< Hello", "ein Hund ß läuft"):
        if text != "the 日本 bed":
            assert ours.encode(text).ids == theirs(text)["input_ids"], text


def test_a_tokenizer_that_differs_is_refused(tmp_path: Path, enlarge: Callable[[Any], None]) -> None:
    vocabulary = trained_folder(tmp_path / "model")
    write_model(tmp_path / "model", vocabulary, enlarge)
    source = resolve_source(str(tmp_path / "model"))
    write_tokenizer(source, tmp_path / "out")
    path = tmp_path / "out" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "normalizer": None}), encoding="utf-8")
    with pytest.raises(SourceError, match="disagree"):
        check_tokenizer(source, tmp_path / "out")
    path.write_text(json.dumps({**content, "decoder": None}), encoding="utf-8")
    with pytest.raises(SourceError, match="decodes ids"):
        check_tokenizer(source, tmp_path / "out")


def test_of_t5_with_a_sentencepiece_model_only_the_tokenizer_is_made_or_its_library_is_asked_for(tmp_path: Path) -> None:
    pieces = {"▁": -3.0, "b": -3.6, "d": -3.8, "e": -3.2, "▁the": -1.5, "▁bed": -4.4, "ed": -2.6}
    sizes = {
        "vocab_size": 128,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    }
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(tmp_path)
    write_pieces(tmp_path / "spiece.model", pieces)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "pad_token": "<pad>"}', encoding="utf-8")
    source = resolve_source(str(tmp_path))
    if not _has_sentencepiece():
        with pytest.raises(SourceError) as caught:
            write_tokenizer(source, tmp_path / "out")
        assert "pip install sentencepiece" in caught.value.hint
        return
    write_tokenizer(source, tmp_path / "out")
    assert check_tokenizer(source, tmp_path / "out") == ()
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("the bed").tokens[:2] == ["▁the", "▁bed"]
