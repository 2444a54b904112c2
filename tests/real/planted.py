"""Models with outliers planted on purpose, and texts to judge them by: ``python tests/real/planted.py KIND OUT``.

``two-fragile`` is a BERT in which exactly two feed-forward MatMuls are fragile. ``deberta-v2`` and ``xlm-r`` are random weights with
what makes trained ones hard to quantize:

channels: a handful of hidden dimensions whose LayerNorm weight is 10 to 40 times that of the others, in all norms but the last
    (Wei et al., "Outlier Suppression", 2022; Dettmers et al., "LLM.int8()", 2022). The weights that read them are as much smaller,
    and a pair of feed-forward neurons takes each back to the size of the others before the block's norm, as trained weights do:
    ``gelu(z) - gelu(-z) = z``.
neurons: one per feed-forward block with a massive activation on separators and none elsewhere (Sun et al., "Massive Activations in
    Large Language Models", 2024).
attention: a quarter of the heads look at separators, whose values there are nothing (Bondarenko et al., "Understanding and
    Overcoming the Challenges of Efficient Transformer Quantization", 2021, and "Quantizable Transformers", 2023).

Labels are the float model's own predictions, a tenth of them replaced: what quantization loses is lost accuracy.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

Head = Literal["text-classification", "feature-extraction"]
Projections = tuple[nn.Linear, nn.Linear, nn.Linear]
"""Query, key and value of a layer."""

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MARKS = (",", ".")
SEPARATORS = (SPECIAL.index("[SEP]"), len(SPECIAL), len(SPECIAL) + 1)
"""Token ids that massive neurons fire on and heads look at: ``[SEP]`` and the marks."""
LABELS = ("sport", "music", "trade")
NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {name: number for number, name in enumerate(LABELS)}}
MAX_LENGTH = 64
NOISE = 0.1
"""Share of labels that are not the float model's own."""
SAMPLE_TEXTS = 128
"""Texts that the planting measures the model on."""
HEAD_TEXTS = 8 * SAMPLE_TEXTS
"""Texts that a classification head is fitted on."""
CALIBRATION_TEXTS = 128
GAMMAS = (10.0, 40.0)
MASSIVE = 60.0
LOOK_LOGITS = 5.0
"""How much more a separator scores than another token, before the softmax, in a head that looks at them."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, of which ``channels`` hidden dimensions are outliers, and the ``longest`` text in words."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    words: int
    channels: int
    longest: int = 40


SHAPES = {
    "tiny": Shape(hidden=64, layers=4, heads=4, intermediate=256, words=500, channels=2),
    "minilm": Shape(hidden=384, layers=6, heads=12, intermediate=1536, words=8000, channels=4),
    "base": Shape(hidden=768, layers=6, heads=12, intermediate=3072, words=8000, channels=6),
}


def two_fragile_matmuls(shape: Shape, *, layers: tuple[int, int], seed: int = 0, loudness: float = 2000.0) -> Any:
    """A random BertModel; in two ``layers`` one feed-forward neuron is so loud that 8 bits are too few for the second product.

    Its reader is as deaf as it is loud. It fires for every token alike, so no share of texts is spared.
    """
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    model = BertModel(BertConfig(**_sizes(shape), hidden_act="relu"), add_pooling_layer=False).eval()
    with torch.no_grad():
        for number in layers:
            block = model.encoder.layer[number]
            block.intermediate.dense.weight[5] *= loudness
            block.intermediate.dense.bias[5] = loudness
            block.output.dense.weight *= 8  # so that the feed-forward part matters in a random model
            block.output.dense.weight[:, 5] /= loudness
    return model


def deberta_v2(shape: Shape, *, head: Head = "text-classification", seed: int = 0) -> Any:
    """A DeBERTa-v3-like model with planted outliers, see the module's docstring."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, DebertaV2Model

    config = DebertaV2Config(
        **_sizes(shape),
        **NAMES,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=MAX_LENGTH // 2,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        type_vocab_size=0,
    )
    torch.manual_seed(seed)
    model = DebertaV2ForSequenceClassification(config).eval()
    attention = [layer.attention.self for layer in model.deberta.encoder.layer]
    projections = [(item.query_proj, item.key_proj, item.value_proj) for item in attention]
    _plant(model, model.deberta, projections, shape, seed, score_scale=3**0.5)  # three terms are added up in a score
    _fit_head(model, model.classifier, shape, seed)
    return _with_head(model, model.deberta, DebertaV2Model, head)


def xlm_roberta(shape: Shape, *, head: Head = "text-classification", seed: int = 0) -> Any:
    """An XLM-R-like model with planted outliers, see the module's docstring."""
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification, XLMRobertaModel

    config = XLMRobertaConfig(**_sizes(shape), **NAMES, type_vocab_size=1)
    torch.manual_seed(seed)
    model = XLMRobertaForSequenceClassification(config).eval()
    attention = [layer.attention.self for layer in model.roberta.encoder.layer]
    projections = [(item.query, item.key, item.value) for item in attention]
    _plant(model, model.roberta, projections, shape, seed, score_scale=1.0)
    _fit_head(model, model.classifier.out_proj, shape, seed)
    return _with_head(model, model.roberta, XLMRobertaModel, head)


FAMILIES = {"deberta-v2": deberta_v2, "xlm-r": xlm_roberta}


def make_texts(count: int, shape: Shape, *, seed: int) -> list[str]:
    """Different texts of 3 words and marks to the longest; more words of one of the topics ``LABELS`` than of the others."""
    return [text for text, _ in _texts_with_topics(count, shape, seed)]


def predict(model: Any, texts: Sequence[str], shape: Shape, *, batch: int = 64) -> np.ndarray:
    """Logits [texts, labels] of a classifier, or means of the token vectors [texts, hidden], by torch."""
    found = []
    for start in range(0, len(texts), batch):
        ids, mask = _encode(texts[start : start + batch], shape)
        with torch.inference_mode():
            outputs = model(input_ids=ids, attention_mask=mask)
        weights = mask[..., None].float()
        found.append(outputs.logits if "logits" in outputs else (outputs.last_hidden_state * weights).sum(1) / weights.sum(1))
    return torch.cat(found).numpy()


def labels_of(logits: np.ndarray, *, seed: int) -> list[str]:
    """The predictions of ``logits`` [texts, labels], a share ``NOISE`` of them replaced by another label."""
    random = np.random.default_rng(seed)
    shift = np.where(random.random(len(logits)) < NOISE, random.integers(1, len(LABELS), len(logits)), 0)
    return [LABELS[index] for index in (logits.argmax(axis=1) + shift) % len(LABELS)]


def write_checkpoint(model: Any, folder: Path, shape: Shape) -> None:
    """A checkpoint folder with weights and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    model.save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(_vocabulary(shape))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {f"{word[1:-1].lower()}_token": word for word in SPECIAL}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_LENGTH, **named}
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_data(path: Path, texts: Sequence[str], labels: Sequence[str] | None) -> None:
    """CSV: text, and label where there are any."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", *(["label"] if labels is not None else [])])
        writer.writerows(zip(texts, labels, strict=True) if labels is not None else ([text] for text in texts))


def _sizes(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": len(_vocabulary(shape)),
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": MAX_LENGTH + 2,
        "pad_token_id": 0,
    }


def _vocabulary(shape: Shape) -> list[str]:
    return [*SPECIAL, *MARKS, *(f"word{number}" for number in range(shape.words))]


def _topic_of_words(shape: Shape) -> np.ndarray:
    """[vocabulary], number of the topic that each word speaks of; -1: of none, as half of the words do."""
    topics = np.full(len(_vocabulary(shape)), -1)
    first = len(SPECIAL) + len(MARKS)
    topics[first : first + shape.words // 2] = np.arange(shape.words // 2) % len(LABELS)
    return topics


def _texts_with_topics(count: int, shape: Shape, seed: int) -> list[tuple[str, int]]:
    random = np.random.default_rng([seed, 11])
    topics, words = _topic_of_words(shape), _vocabulary(shape)
    pools = [np.flatnonzero(topics == topic) for topic in range(len(LABELS))]
    others = np.arange(len(SPECIAL) + len(MARKS), len(words))
    made: dict[str, int] = {}
    while len(made) < count:
        topic, share = int(random.integers(len(LABELS))), random.uniform(0.1, 0.5)
        length = int(random.integers(3, shape.longest + 1))
        chosen = np.where(random.random(length) < share, random.choice(pools[topic], length), random.choice(others, length))
        marks = random.integers(len(SPECIAL), len(SPECIAL) + len(MARKS), length)
        chosen = np.where(random.random(length) < 0.1, marks, chosen)
        made.setdefault(" ".join(words[index] for index in chosen), topic)
    return list(made.items())


def _encode(texts: Sequence[str], shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [texts, longest], as the tokenizer of :func:`write_checkpoint` gives them."""
    numbers = {word: number for number, word in enumerate(_vocabulary(shape))}
    rows = [[2, *(numbers[word] for word in text.split()), 3] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return ids, (ids != 0).long()


@dataclass(frozen=True)
class _Probe:
    """Sees what a module reads while the model runs over the sample texts."""

    model: Any
    ids: torch.Tensor
    mask: torch.Tensor

    def inputs_of(self, module: nn.Module) -> torch.Tensor:
        """[tokens, features], or [texts, features] of a head."""
        seen: list[torch.Tensor] = []
        hook = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
        self.model(input_ids=self.ids, attention_mask=self.mask)
        hook.remove()
        values = seen[0]
        return values[self.mask.bool()] if values.shape[:2] == self.mask.shape else values

    def separators(self) -> torch.Tensor:
        """Which tokens are separators [tokens]."""
        return torch.isin(self.ids[self.mask.bool()], torch.tensor(SEPARATORS))

    def separator_direction(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [features] and bias of ``weight @ x + bias``: 1 for separators and 0 for other tokens, in the mean."""
        own = self.separators()
        yes, no = values[own].mean(0), values[~own].mean(0)
        within = values[own].var(0) + values[~own].var(0)
        weight = (yes - no) / (within + 1e-3 * within.mean())
        weight = weight / (weight @ (yes - no))
        return weight, -weight @ no


@torch.no_grad()
def _plant(model: Any, body: Any, projections: Sequence[Projections], shape: Shape, seed: int, *, score_scale: float) -> None:
    """Plant outliers from the first layer to the last; each step measures what the steps before made of the sample texts."""
    random = np.random.default_rng([seed, 7])
    _spread_weights(body, shape, random)
    probe = _Probe(model, *_encode(make_texts(SAMPLE_TEXTS, shape, seed=seed + 1_000_000), shape))
    channels = torch.tensor(np.sort(random.choice(shape.hidden, shape.channels, replace=False)))
    _amplify(body.embeddings.LayerNorm, channels, random, readers=projections[0])
    for number, layer in enumerate(body.encoder.layer):
        _look_at_separators(probe, projections[number], shape, score_scale)
        _amplify(layer.attention.output.LayerNorm, channels, random, readers=[layer.intermediate.dense])
        _massive_neurons(probe, layer, channels, random)
        if number + 1 < shape.layers:
            _amplify(layer.output.LayerNorm, channels, random, readers=projections[number + 1])


def _spread_weights(body: Any, shape: Shape, random: np.random.Generator) -> None:
    """Weights that keep the size of what they read (random checkpoints hardly move it), and words of a topic that are alike."""
    for module in body.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.normal_(module.bias, std=0.1)
    words = body.embeddings.word_embeddings.weight
    nn.init.normal_(words)
    topics = _topic_of_words(shape)
    directions = torch.tensor(random.normal(size=(len(LABELS), shape.hidden)), dtype=torch.float32)
    words[topics >= 0] += directions[topics[topics >= 0]]
    words[torch.tensor(SEPARATORS)] += torch.tensor(random.normal(size=shape.hidden), dtype=torch.float32)
    words[0] = 0


def _amplify(norm: nn.LayerNorm, channels: torch.Tensor, random: np.random.Generator, *, readers: Sequence[nn.Linear]) -> None:
    gammas = torch.tensor(random.uniform(*GAMMAS, len(channels)), dtype=torch.float32)
    norm.weight[channels] *= gammas
    for reader in readers:
        reader.weight[:, channels] /= gammas


def _look_at_separators(probe: _Probe, projections: Projections, shape: Shape, score_scale: float) -> None:
    """The first dimension of a quarter of the heads says "separator" in the key and "look there" in the query."""
    query, key, value = projections
    values = probe.inputs_of(value)
    weight, bias = probe.separator_direction(values)
    separator = values[probe.separators()].mean(0)
    width = shape.hidden // shape.heads
    strength = (LOOK_LOGITS * score_scale * width**0.5) ** 0.5
    for head in range(max(1, shape.heads // 4)):
        first, rows = head * width, slice(head * width, (head + 1) * width)
        key.weight[first], key.bias[first] = strength * weight, strength * bias
        query.weight[first], query.bias[first] = 0, strength
        at_separator = value(separator)[rows]
        value.weight[rows] -= torch.outer(at_separator, weight)
        value.bias[rows] -= at_separator * bias


def _massive_neurons(probe: _Probe, layer: Any, channels: torch.Tensor, random: np.random.Generator) -> None:
    """Neuron 0 fires on separators only; the next ones, in pairs, bring the outlier channels back to the size of the others."""
    up, down = layer.intermediate.dense, layer.output.dense
    values = probe.inputs_of(up)
    weight, bias = probe.separator_direction(values)
    up.weight[0], up.bias[0] = 2 * MASSIVE * weight, 2 * MASSIVE * (bias - 0.5)
    down.weight[:, 0] = torch.tensor(random.normal(size=down.out_features), dtype=torch.float32) / MASSIVE
    for position, channel in enumerate(channels.tolist()):
        plus, minus = 1 + 2 * position, 2 + 2 * position
        size = float(values[:, channel].square().mean().sqrt())
        gain = MASSIVE / 4 / size
        up.weight[[plus, minus]], up.bias[[plus, minus]] = 0, 0
        up.weight[plus, channel], up.weight[minus, channel] = gain, -gain
        down.weight[:, [plus, minus]] = 0
        down.weight[channel, plus], down.weight[channel, minus] = -(1 - 1 / size) / gain, (1 - 1 / size) / gain


@torch.no_grad()
def _fit_head(model: Any, last: nn.Linear, shape: Shape, seed: int) -> None:
    """The last product of a classifier by ridge regression on the topics of texts: spread logits, balanced labels."""
    made = _texts_with_topics(HEAD_TEXTS, shape, seed + 2_000_000)
    parts = [[text for text, _ in made[start : start + SAMPLE_TEXTS]] for start in range(0, HEAD_TEXTS, SAMPLE_TEXTS)]
    features = torch.cat([_Probe(model, *_encode(part, shape)).inputs_of(last) for part in parts]).double()
    wanted = torch.nn.functional.one_hot(torch.tensor([topic for _, topic in made]), len(LABELS)).double() - 1 / len(LABELS)
    mean = features.mean(0)
    centred = features - mean
    square = centred.T @ centred
    ridge = torch.eye(shape.hidden, dtype=torch.float64) * square.diagonal().mean() * 0.1
    weight = torch.linalg.solve(square + ridge, centred.T @ wanted).T
    scale = 2.0 / (centred @ weight.T).std()
    last.weight.copy_(weight * scale)
    last.bias.copy_(-(weight @ mean) * scale)


def _with_head(model: Any, body: Any, body_class: Any, head: Head) -> Any:
    """The classifier, or its body as a model of its own."""
    if head == "text-classification":
        return model
    bare = body_class(model.config)
    bare.load_state_dict(body.state_dict(), strict=False)  # XLM-R's own has a pooler, which the classifier lacks
    return bare.eval()


def write_planted(kind: str, folder: Path, shape: Shape, *, head: Head, seed: int, examples: int) -> None:
    """Checkpoint, evaluation data (``data.csv``) and calibration texts (``calibration.txt``) of a kind of model in ``folder``."""
    if kind == "two-fragile":
        model, head = two_fragile_matmuls(shape, layers=(1, shape.layers - 2), seed=seed), "feature-extraction"
    else:
        model = FAMILIES[kind](shape, head=head, seed=seed)
    write_checkpoint(model, folder, shape)
    texts = make_texts(examples, shape, seed=3 * seed + 1)
    labels = labels_of(predict(model, texts, shape), seed=seed) if head == "text-classification" else None
    write_data(folder / "data.csv", texts, labels)
    calibration = make_texts(CALIBRATION_TEXTS, shape, seed=3 * seed + 2)
    (folder / "calibration.txt").write_text("\n".join(calibration) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Write a checkpoint with outliers planted on purpose, and texts to judge it by.")
    parser.add_argument("kind", choices=["two-fragile", *FAMILIES])
    parser.add_argument("folder", metavar="OUT", type=Path, help="folder to make")
    parser.add_argument("--size", choices=list(SHAPES), help="default: minilm for two-fragile, base for the others")
    parser.add_argument("--head", choices=["text-classification", "feature-extraction"], default="text-classification")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=2000, help="rows of data.csv")
    options = parser.parse_args(arguments)
    size = options.size or ("minilm" if options.kind == "two-fragile" else "base")
    write_planted(options.kind, options.folder, SHAPES[size], head=options.head, seed=options.seed, examples=options.examples)
    print(options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
