"""The real checkpoints answer as well as they should, in plain transformers: what every compiled artifact is judged against."""

from __future__ import annotations

import csv
import json
import wave
from pathlib import Path

import numpy as np
import pytest

from hfaccel.evaluate.dataset import load_dataset
from hfaccel.evaluate.metrics import METRICS
from hfaccel.evaluate.perplexity import WindowScores, cut_windows, perplexity, score_window

pytestmark = pytest.mark.real


def test_minilm_ranks_document_pairs_like_people(minilm_checkpoint: Path, lee_pairs: Path) -> None:
    import torch
    from scipy.stats import spearmanr
    from transformers import AutoModel, AutoTokenizer

    with lee_pairs.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    texts = sorted({row[column] for row in rows for column in ("text1", "text2")})
    tokenizer = AutoTokenizer.from_pretrained(minilm_checkpoint)
    model = AutoModel.from_pretrained(minilm_checkpoint).eval()
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**encoded).last_hidden_state
    mask = encoded["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
    position = {text: index for index, text in enumerate(texts)}
    similarities = [float(vectors[position[row["text1"]]] @ vectors[position[row["text2"]]]) for row in rows]
    correlation = spearmanr(similarities, [float(row["score"]) for row in rows]).statistic
    assert len(rows) == 1225
    assert correlation == pytest.approx(0.508, abs=0.01)


def test_rampart_finds_the_generated_personal_data(rampart_checkpoint: Path, pii_sentences: Path) -> None:
    import torch
    from seqeval.metrics import f1_score
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    examples = [json.loads(line) for line in pii_sentences.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(rampart_checkpoint)
    model = AutoModelForTokenClassification.from_pretrained(rampart_checkpoint).eval()
    predicted = []
    for example in examples:
        encoded = tokenizer(example["words"], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            label_ids = model(**encoded).logits[0].argmax(dim=-1).tolist()
        owners = encoded.word_ids()
        first_tokens = [owners.index(word) for word in range(len(example["words"]))]
        predicted.append([model.config.id2label[label_ids[token]] for token in first_tokens])
    assert len(examples) == 600
    # The sentences change with the version of Faker, so this is a floor; 0.947 was measured with Faker 40.54.
    assert f1_score([example["tags"] for example in examples], predicted) > 0.92


def test_sentiment_probe_beats_chance_by_far(sentiment_checkpoint: Path, movie_reviews_test: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with movie_reviews_test.open(encoding="utf-8", newline="") as stream:
        rows = sorted(csv.DictReader(stream), key=lambda row: len(row["text"]))
    tokenizer = AutoTokenizer.from_pretrained(sentiment_checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(sentiment_checkpoint).eval()
    right = 0
    for start in range(0, len(rows), 32):
        batch = rows[start : start + 32]
        encoded = tokenizer([row["text"] for row in batch], padding=True, truncation=True, max_length=128, return_tensors="pt")
        with torch.no_grad():
            label_ids = model(**encoded).logits.argmax(dim=-1).tolist()
        right += sum(model.config.id2label[label] == row["label"] for label, row in zip(label_ids, batch, strict=True))
    assert len(rows) == 1500
    assert right / len(rows) == pytest.approx(0.758, abs=0.01)


def test_smollm2_reads_the_news_as_well_as_it_should(smollm2_checkpoint: Path, lee_background: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = lee_background.read_text(encoding="utf-8").splitlines()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(smollm2_checkpoint).eval()
    source: list[WindowScores] = []
    for window in cut_windows([tokenizer(text)["input_ids"] for text in texts[:12]], length=512):
        with torch.no_grad():
            logits = model(torch.tensor([window.ids])).logits[0]
        source.append(score_window(logits.numpy(), window))
    assert len(texts) == 300
    assert sum(len(scores.nll) for scores in source) == 2837
    # With a base of 10000 in the rotary embedding, which a reader that finds no rope_theta takes, it would be about 10 % higher.
    assert perplexity(source) == pytest.approx(34.0, abs=0.1)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert json.loads((smollm2_checkpoint / "config.json").read_text(encoding="utf-8"))["rope_theta"] == 100_000
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


def test_whisper_hears_the_audio_book_as_well_as_it_should(whisper_checkpoint: Path, speech: Path) -> None:
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    data = load_dataset(str(speech), task="automatic-speech-recognition", max_examples=100, seed=0)
    processor = WhisperProcessor.from_pretrained(whisper_checkpoint)
    model = WhisperForConditionalGeneration.from_pretrained(whisper_checkpoint).eval()
    answers = []
    for example in data.examples:
        with wave.open(str(example.text)) as sound:
            assert (sound.getframerate(), sound.getsampwidth(), sound.getnchannels()) == (16_000, 2, 1)
            samples = np.frombuffer(sound.readframes(sound.getnframes()), dtype="<i2").astype(np.float32) / 2**15
        features = processor(samples, sampling_rate=16_000, return_tensors="pt").input_features
        with torch.no_grad():
            answers.append(processor.decode(model.generate(features)[0], skip_special_tokens=True))
    references = [example.answers for example in data.examples]
    assert [len(rows) for rows in (references, references[:5])] == [19, 5]
    # Of 71 words 4 are wrong, one of them "Mr." for "mister"; without that one the rate is 0.042.
    assert METRICS["wer"].compute(answers[:5], references[:5]) == pytest.approx(4 / 71)
    spelt_out = [answer.replace("Mr.", "Mister") for answer in answers[:5]]
    assert METRICS["wer"].compute(spelt_out, references[:5]) == pytest.approx(3 / 71)
    # Verse of 1609 is harder.
    assert METRICS["wer"].compute(answers[5:], references[5:]) == pytest.approx(19 / 106, abs=0.03)
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    assert processor.feature_extractor.feature_size == 80
    assert processor.tokenizer.decode(processor.tokenizer(" Hello").input_ids, skip_special_tokens=True) == " Hello"
