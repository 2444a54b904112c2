"""Reports made of hand-made manifests: what a reader finds, and that nothing of a manifest can break the page."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from hfaccel.report.evidence import data_words
from hfaccel.report.facts import many_rows_of, measures, threads_of
from hfaccel.report.headline import cautions, headline
from hfaccel.report.html import report_html
from hfaccel.report.markdown import candidate_rows, readme_text, report_text

HOSTILE = "<script>alert(\"x\")</script> & 'y' | z"
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Elements, text and attributes of a page; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.identifiers: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.identifiers += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).replace("\u00a0", " ").split())


def timing(point: str, candidate_ms: float, *, stable: bool = True) -> dict[str, Any]:
    speedup = 40 / candidate_ms
    bounds = {"speedup_lower_bound": speedup * 0.9, "speedup_upper_bound": speedup * 1.1}
    return {"point": point, "parent_ms": 40.0, "candidate_ms": candidate_ms, "speedup": speedup, **bounds, "stable": stable}


def verdict(loss: float, bound: float, *, labelled: bool = True, agreement: float | None = None) -> dict[str, Any]:
    losses = [
        {"metric": "accuracy", "source": 0.8, "candidate": 0.8 * (1 - loss), "loss": loss, "upper_bound": bound, "examples": 500}
    ]
    return {
        "passed": bound <= 0.01,
        "losses": losses if labelled else [],
        "cosine_mean": 0.999,
        "cosine_lower_bound": 0.998,
        "agreement_mean": agreement,
        "agreement_lower_bound": None if agreement is None else agreement - 0.001,
        "kl_mean": None,
        "examples": 500,
        "labelled": labelled,
        "batch_cosine": 1.0,
    }


def candidate(name: str, *, reason: str | None = None, detail: str = "", **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "graph": "model.onnx",
        "precision": "fp32" if name == "float" else "int8",
        "session": {"intra_op_num_threads": 0},
        "size_bytes": 60_000_000,
        "timings": [],
        "speedup": 1.0,
        "reason": reason,
        "detail": detail,
        "quantized": 0 if name == "float" else 36,
        "kept_float": [],
        "verdict": None,
        **fields,
    }


def parity() -> dict[str, float]:
    return {"max_abs": 2e-7, "min_cosine": 1.0}


def manifest(*, data: str = "reviews.csv", label_free: bool = False, labelled: bool = True) -> dict[str, Any]:
    """One candidate ships, one holds, one is refused, one could not be built; two workload points."""
    agreement = None if labelled else 0.995
    shipped = verdict(0.002, 0.006, labelled=labelled, agreement=agreement)
    floating = candidate(
        "float",
        reason="not-better-than-chosen",
        detail="holds all gates; static is better",
        timings=[timing("1x16", 40.0), timing("8x128", 40.0)],
        verdict=verdict(0, 0, labelled=labelled, agreement=agreement),
    )
    return {
        "format_revision": 1,
        "hfaccel_version": "0.1.0",
        "key": "k" * 64,
        "source": {
            "id": "acme/model",
            "folder": "/m",
            "revision": None,
            "sha256": "s" * 64,
            "model_type": "bert",
            "task": "text-classification",
            "weight_bytes": 90_000_000,
        },
        "graph": "model.onnx",
        "engine": "onnxruntime",
        "precision": "int8",
        "chosen": "static",
        "contract": {
            "task": "text-classification",
            "inputs": [{"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]}],
            "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 2]}],
            "text": {"max_length": 256, "pad_token_id": 0},
        },
        "session": {"intra_op_num_threads": 0, "allow_spinning": True},
        "target": {"name": "cpu-avx2", "speed_measured_on_it": True},
        "host": {"cpu": "Some CPU", "physical_cores": 2},
        "versions": {"onnxruntime": "1.30", "optimum": None},
        "recipe": {
            "name": "bert",
            "accuracy": {"max_loss": 0.01, "min_cosine": 0.995, "min_agreement": 0.95, "min_same_order": 0.99, "batch_invariance": 0.99},
            "measure": {"workload": ["1x16", "8x128"], "objective": "latency"},
            "quantize": {"ladder": [{"name": "static", "smooth": 0.75}]},
        },
        "recipe_origins": {"name": "bert.yaml:2", "measure.workload": "--workload", "quantize.ladder.0": "encoder.yaml:33"},
        "notices": [],
        "stages": [
            {"stage": "export", "status": "done", "seconds": 17.7, "peak_memory_bytes": 778_000_000, "size_bytes": 90_000_000,
             "metrics": {"parity": parity()}},
            {"stage": "optimize", "status": "cached", "seconds": 1.0, "size_bytes": 89_000_000, "metrics": {"parity": parity()}},
            {"stage": "fuse", "status": "skipped", "seconds": 0.0, "metrics": {}},
            {"stage": "quantize", "status": "done", "seconds": 40.0, "size_bytes": 400_000_000,
             "metrics": {"float_parent": "optimized", "float_ms": {"optimized": {"1x16": 39.0, "8x128": 41.0}}}},
            {"stage": "accuracy", "status": "done", "seconds": 9.0, "metrics": {
                "data": {"name": data, "sha256": "d" * 64, "examples": 500, "labelled": labelled}, "label_free_sample": label_free}},
        ],
        "candidates": [
            candidate("static", detail="chosen", speedup=3.0, verdict=shipped,
                      timings=[timing("1x16", 10.0, stable=False), timing("8x128", 16.0)]),
            candidate("dynamic", reason="loss-over-budget", detail="accuracy 0.8 -> 0.7", speedup=3.5,
                      verdict=verdict(0.05, 0.09, labelled=labelled, agreement=agreement),
                      timings=[timing("1x16", 9.0), timing("8x128", 15.0)]),
            candidate("smooth", reason="needs-calibration-data", detail="give --calibration FILE", size_bytes=0),
            floating,
        ],
        "seconds": 80.0,
        "files": [],
    }  # fmt: skip


def only_float() -> dict[str, Any]:
    made = manifest()
    made["candidates"] = [candidate("float", detail="chosen", verdict=verdict(0, 0))]
    made |= {"chosen": "float", "precision": "fp32"}
    made["stages"] = [item for item in made["stages"] if item["stage"] != "quantize"]
    return made


def off_target() -> dict[str, Any]:
    made = manifest()
    made["target"]["speed_measured_on_it"] = False
    for item in made["candidates"]:
        item |= {"timings": [], "speedup": 1.0}
    made["stages"][3]["metrics"]["float_ms"] = {}
    return made


def nothing_measured() -> dict[str, Any]:
    made = off_target()
    for item in made["candidates"]:
        item["verdict"] = None
    made["stages"] = [{"stage": "export", "status": "done", "seconds": 0.0, "metrics": {}}]
    return made


def one_point() -> dict[str, Any]:
    made = manifest()
    for item in made["candidates"]:
        item["timings"] = item["timings"][-1:]
    return made


def without_data() -> dict[str, Any]:
    return manifest(label_free=True, labelled=False)


def without_data_vectors() -> dict[str, Any]:
    made = manifest(label_free=True, labelled=False)
    for item in made["candidates"]:
        if item["verdict"]:
            item["verdict"] |= {"agreement_mean": None, "agreement_lower_bound": None}
    return made


def equal_candidates() -> dict[str, Any]:
    """Points of the plot that lie on each other, at the same speed and the same loss."""
    made = manifest()
    twin = made["candidates"][0]
    made["candidates"] = [
        twin,
        *({**copy.deepcopy(twin), "name": f"twin-{index}", "detail": "", "reason": None} for index in range(9)),
    ]
    return made


KINDS = {
    made.__name__: made
    for made in (
        manifest, only_float, off_target, nothing_measured, one_point, without_data, without_data_vectors, equal_candidates,
    )
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_the_page_is_well_formed_self_contained_and_small(kind: str) -> None:
    text = report_html(KINDS[kind]())
    page = Page(text)
    assert "//" not in re.sub(r'xmlns="[^"]*"', "", text)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("href", "src")]
    assert "url(" not in text
    assert "@import" not in text
    assert len(page.identifiers) == len(set(page.identifiers))
    assert len(text.encode()) < 150_000


@every_kind
def test_both_reports_name_every_candidate_and_say_what_ships(kind: str) -> None:
    made = KINDS[kind]()
    for text in (Page(report_html(made)).text, report_text(made)):
        assert headline(made) in text
        for item in made["candidates"]:
            assert item["name"] in text
            assert item["detail"] in text or item["detail"] == "chosen"


@every_kind
def test_every_picture_has_words(kind: str) -> None:
    text = report_html(KINDS[kind]())
    for drawing in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        opening = drawing.partition(">")[0]
        if 'role="img"' in opening:
            assert "<title" in drawing
            assert "<desc" in drawing
        else:
            assert 'aria-hidden="true"' in opening or "overflow" in opening


def test_names_and_texts_are_escaped_wherever_they_come_from() -> None:
    made = manifest(data=HOSTILE)
    made["source"] |= {"id": HOSTILE, "model_type": HOSTILE, "task": HOSTILE, "revision": HOSTILE}
    made |= {
        "notices": [HOSTILE],
        "host": {HOSTILE: HOSTILE},
        "versions": {HOSTILE: HOSTILE},
        "chosen": HOSTILE,
        "graph": HOSTILE,
    }
    made["target"]["name"] = HOSTILE
    made["contract"]["inputs"][0]["name"] = HOSTILE
    made["recipe"]["name"] = HOSTILE
    made["recipe_origins"]["name"] = HOSTILE
    winner = made["candidates"][0]
    winner |= {"name": HOSTILE, "kept_float": [[HOSTILE, 0.1]]}
    winner["verdict"]["losses"][0]["metric"] = HOSTILE
    winner["verdict"]["slices"] = [slice_of(HOSTILE)]
    winner["matmuls"] = [{"name": HOSTILE, "layer": 0, "role": HOSTILE, "precision": HOSTILE}]
    made["candidates"][1]["detail"] = HOSTILE
    text = report_html(made)
    assert "<script" not in text
    assert '"x"' not in text
    page = Page(text)
    assert page.text.count("<script>alert") > 10
    assert "script" not in page.tags


def slice_of(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "examples": 40,
        "source": 0.8,
        "candidate": 0.79,
        "loss": 0.01,
        "lower_bound": -0.02,
        "upper_bound": 0.2,
    }


def test_the_headline_says_speed_loss_data_and_size() -> None:
    assert headline(manifest()) == (
        "The 8-bit candidate “static” ships: 2.50 times as fast as the float graph on 8 texts of 128 tokens (95 % bounds 2.25 to 2.75). "
        "Its accuracy is 0.7984 against the source's 0.8000, 0.20% worse, with 95 % confidence at most 0.60% worse, on 500 labelled "
        "examples of reviews.csv. It takes 60.0 MB; the checkpoint has 90.0 MB."
    )


def test_the_headline_of_a_float_graph() -> None:
    assert headline(only_float()).startswith(
        "The float graph ships: nothing else was tried. Its accuracy is the source's, 0.8000, on 500"
    )


def test_the_headline_without_labels_speaks_of_agreement() -> None:
    assert "It gives the source's answer in 99.50% (with 95 % confidence in at least 99.40%) of 500 texts" in headline(
        without_data()
    )
    assert "a mean cosine of 0.9990 with the source's" in headline(without_data_vectors())
    made = without_data()
    loss = {
        "metric": "expected_accuracy",
        "source": 0.8,
        "candidate": 0.796,
        "loss": 0.005,
        "upper_bound": 0.008,
        "examples": 500,
    }
    for item in made["candidates"]:
        if item["verdict"]:
            item["verdict"]["losses"] = [loss | {"labelled": False}]
    assert (
        "Its accuracy, expected by the source's own probabilities, is 0.7960 against the source's 0.8000, 0.50% worse, with 95 % "
        "confidence at most 0.80% worse, on 500 texts without labels of the packaged multilingual sample."
    ) in headline(made)
    assert [measure.key for measure in measures(made)] == ["loss", "agreement"]


def test_the_headline_quotes_an_unstable_timing_only_with_a_warning() -> None:
    made = manifest()
    for item in made["candidates"][0]["timings"]:
        item["stable"] = False
    assert "not stable while measured" in headline(made)


@pytest.mark.parametrize(
    ("made", "first"),
    [
        (off_target(), "Speed was not measured on the target"),
        (without_data(), "No data was given."),
        (manifest(labelled=False), "The data has no labels that could be used"),
        (manifest(), "The speed-up at 1x16 changed while it was measured"),
    ],
)
def test_what_must_be_known_comes_first(made: dict[str, Any], first: str) -> None:
    assert next(cautions(made)).startswith(first)
    text = Page(report_html(made)).text
    assert first in text
    if first.startswith(("Speed", "No data")):
        assert text.index(first) < text.index(headline(made)[:40])


@pytest.mark.parametrize(
    ("rows", "bound", "said"),
    [
        (4, 0.009, "from 4 rows on the graph for prompts"),
        (None, 0.009, "was not found faster"),
        (None, 0.012, "loses more than 1.00% there (loss +0.70%, bound +1.20%)"),
    ],
)
def test_what_steps_of_several_rows_run_on_is_said(rows: int | None, bound: float, said: str) -> None:
    made = manifest()
    assert many_rows_of(made) is None
    made["contract"]["generation"] = {"prompt_graph_rows": rows}
    made["candidates"][0]["verdict"]["many_rows"] = {"loss": 0.007, "upper_bound": bound}
    made["recipe"]["accuracy"]["max_loss"] = 0.01
    assert said in str(many_rows_of(made))


def test_the_number_of_threads_is_said_with_its_reason() -> None:
    made = manifest()
    assert threads_of(made) is None
    trials = [
        {"count": 8, "against": 16, "speedup": 1.31, "lower_bound": 1.2},
        {"count": 4, "against": 8, "speedup": 0.9, "lower_bound": 0.8},
    ]
    accuracy = next(record for record in made["stages"] if record["stage"] == "accuracy")
    accuracy["metrics"]["threads"] = {"cores": 16, "count": 8, "trials": trials}
    assert threads_of(made) == "8 on 16 cores (8 instead of 16: 1.31x as fast, 4 instead of 8: 0.90x as fast)"
    assert "8 on 16 cores" in Page(report_html(made)).text
    made["recipe"]["measure"]["threads"] = 4
    assert threads_of(made) == "4, as asked for"


def test_what_was_not_measured_is_called_so() -> None:
    text = Page(report_html(nothing_measured())).text
    assert "Nothing was timed." in text
    assert "Accuracy was not measured." in text
    assert "its speed was not measured" in text
    assert "There is no plot" in text


def test_off_the_target_sizes_stand_for_speed() -> None:
    made = off_target()
    made["candidates"][0]["size_bytes"] = 30_000_000
    text = Page(report_html(made)).text
    assert "size in MB (speed was not measured)" in text
    assert "Left is smaller" in text


def test_the_way_from_the_source_has_times_sizes_and_switched_off_stages() -> None:
    text = report_text(manifest())
    assert "39.0 ms | 41.0 ms | 89.0 MB" in text
    assert "| fuse | switched off | not measured | not measured | not measured | not measured |" in text
    assert "10.0 ms | 16.0 ms | 60.0 MB | accuracy loss +0.20%, at most +0.60%" in text


def test_the_map_shows_layers_by_operators_where_they_were_recorded() -> None:
    made = manifest()
    made["candidates"][0] |= {
        "kept_float": [["node_7", 0.002]],
        "matmuls": [
            {"name": "node_1", "layer": 0, "role": "query", "precision": "int8"},
            {"name": "node_7", "layer": 1, "role": "down", "precision": "fp32"},
            {"name": "node_9", "layer": None, "role": "classifier", "precision": "bf16"},
        ],
    }
    text = Page(report_html(made)).text
    assert "query down classifier layer 0 int8 layer 1 float beside the layers bf16" in text
    assert "node_7 0.002" in text
    assert "Which layers they belong to was not recorded." in Page(report_html(manifest())).text


def test_slices_are_shown_in_both_reports() -> None:
    made = manifest()
    made["candidates"][0]["verdict"]["slices"] = [slice_of("17 to 64 tokens")]
    assert "17 to 64 tokens +1.00% (-2.00% to +20.00%)" in Page(report_html(made)).text
    assert "| 17 to 64 tokens | 40 | +1.00% (-2.00% to +20.00%) |" in report_text(made)


def test_a_bound_that_is_wide_for_want_of_examples_is_told_apart() -> None:
    made = manifest()
    made["candidates"][1]["verdict"]["too_few_examples"] = True
    assert "refused: too few examples to prove it" in Page(report_html(made)).text
    assert "refused: loss over the budget" in Page(report_html(manifest())).text


def test_settings_say_where_they_were_set() -> None:
    text = Page(report_html(manifest())).text
    assert "name bert bert.yaml:2" in text
    assert "measure.workload 1x16, 8x128 --workload" in text
    assert "quantize.ladder.0.smooth 0.75 default" in text


def test_the_reports_do_not_depend_on_what_is_written_after_them() -> None:
    made = manifest()
    before = report_html(made), report_text(made)
    made["files"] = [{"path": "model.onnx", "size_bytes": 1, "sha256": "0" * 64}]
    assert (report_html(json.loads(json.dumps(made))), report_text(made)) == before


def test_the_table_of_candidates_for_the_terminal() -> None:
    header, rows = candidate_rows(manifest())
    assert header[:4] == ["candidate", "MB", "1x16 ms", "8x128 ms"]
    assert rows[0] == ["static", "60", "10.00 (not stable)", "16.00", "3.00x", "+0.20% (+0.60%)", "0.9990", "chosen"]
    assert rows[2][-1] == "needs-calibration-data"


def test_the_readme_says_how_to_run_it() -> None:
    text = readme_text(manifest())
    assert "hfaccel.load(" in text
    assert "`report.html`" in text
    assert "`input_ids` int64 ['batch', 'sequence']" in text


def test_the_data_is_named() -> None:
    assert data_words(manifest()) == "500 labelled examples of reviews.csv (sha256 dddddddddddd)."


def test_a_decoder_says_how_far_it_writes_what_the_source_writes() -> None:
    made = manifest()
    made["source"]["task"] = "text-generation"
    assert "same tokens" not in candidate_rows(made)[0]
    made["candidates"][0]["verdict"]["greedy"] = {
        "share": 0.8125,
        "share_lower_bound": 0.6,
        "prefix_mean": 41.5,
        "prefix_lower_bound": 20.0,
        "steps": 64,
        "tokens": 512,
        "prompts": 8,
        "texts": 6,
    }
    header, rows = candidate_rows(made)
    assert [row[header.index("same tokens")] for row in rows] == ["81.2% (at least 60.0%)", "", "", ""]
    assert all(len(row) == len(header) for row in rows)
    for text in (Page(report_html(made)).text, report_text(made)):
        assert "8 prompts of 6 texts by 64 tokens" in text
        assert "81.2% (with 95 % confidence at least 60.0%)" in text
        assert "the first 41.5 (at least 20.0)" in text
    made["candidates"][0]["verdict"]["greedy"] |= {"texts": 1, "share_lower_bound": 0.0, "prefix_lower_bound": 0.0}
    assert "one text gives no bound" in report_text(made)
