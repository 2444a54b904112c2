"""The sentences at the top of a report: what ships, and what to know before believing the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hfaccel.report.facts import Candidate, Manifest, chosen, data_of, headline_timing, is_float, is_label_free, worst_loss
from hfaccel.report.wording import examples_words, megabytes, percent, point_words, precision_words


def headline(manifest: Manifest) -> str:
    """One sentence, or two: what ships, how much faster it is, what it loses, how large it is."""
    winner = chosen(manifest)
    size = f"It takes {megabytes(winner['size_bytes'])}; the checkpoint has {megabytes(manifest['source']['weight_bytes'])}."
    if is_float(winner):
        tried = sum(not is_float(item) for item in manifest["candidates"])
        why = (
            f"none of the {tried} other candidates was faster and accurate enough"
            if tried > 1
            else "the other candidate was not faster and accurate enough"
            if tried
            else "nothing else was tried"
        )
        return f"The float graph ships: {why}. {sentence(accuracy_words(manifest))} {size}"
    lead = f"The {precision_words(winner['precision'])} candidate “{winner['name']}” ships: {speed_words(winner)}."
    return f"{lead} {sentence(accuracy_words(manifest))} {size}"


EXPECTED_ACCURACY, EXPECTED = "expected_accuracy", "accuracy, expected by the source's own probabilities,"
"""A metric of data without labels, and how it is told."""


def sentence(text: str) -> str:
    """The text with a capital first letter and a full stop."""
    return text[:1].upper() + text[1:] + "."


def speed_words(candidate: Candidate) -> str:
    """How much faster than the float graph, at which workload, with bounds."""
    timing = headline_timing(candidate)
    if timing is None:
        return "its speed was not measured"
    unstable = "" if timing["stable"] else "; not stable while measured"
    return (
        f"{timing['speedup']:.2f} times as fast as the float graph on {point_words(timing['point'])} "
        f"(95 % bounds {timing['speedup_lower_bound']:.2f} to {timing['speedup_upper_bound']:.2f}{unstable})"
    )


def accuracy_words(manifest: Manifest) -> str:
    """What the shipped candidate loses, with the bound, on how many examples of which data."""
    name, _, _ = data_of(manifest)
    verdict: Mapping[str, Any] = chosen(manifest)["verdict"] or {}
    loss = worst_loss(verdict)
    if loss:
        return f"{_loss_words(loss)}, on {examples_words(loss)} of {name}"
    if verdict.get("agreement_mean") is not None:
        return (
            f"it gives the source's answer in {percent(verdict['agreement_mean'])} (with 95 % confidence in at least "
            f"{percent(verdict['agreement_lower_bound'])}) of {verdict['examples']} texts of {name}, without labels"
        )
    if verdict:
        return (
            f"its vectors have a mean cosine of {verdict['cosine_mean']:.4f} with the source's (with 95 % confidence at least "
            f"{verdict['cosine_lower_bound']:.4f}), on {verdict['examples']} texts of {name}, without labels"
        )
    return "its accuracy was not measured"


def _loss_words(loss: Mapping[str, Any]) -> str:
    lost, bound = loss["loss"], loss["upper_bound"]
    metric = EXPECTED if loss["metric"] == EXPECTED_ACCURACY else loss["metric"].replace("_", " ")
    if lost == bound == 0:
        return f"its {metric} is the source's, {loss['source']:.4f}"
    compared = f"its {metric} is {loss['candidate']:.4f} against the source's {loss['source']:.4f}"
    measured = f"{percent(abs(lost))} {'worse' if lost > 0 else 'better'}, " if percent(abs(lost)) != percent(0) else ""
    return f"{compared}, {measured}with 95 % confidence {f'at most {percent(bound)} worse' if bound > 0 else 'not worse'}"


def cautions(manifest: Manifest) -> Iterator[str]:
    """What a reader must know before the numbers: notices, and what was not measured."""
    winner, target = chosen(manifest), manifest["target"]
    _, _, labelled = data_of(manifest)
    if not target["speed_measured_on_it"]:
        yield (
            f"Speed was not measured on the target: this host is not {target['name']}. Accuracy holds only for the instructions that "
            "this host has."
        )
    if is_label_free(manifest):
        yield (
            "No data was given. What stands here as accuracy is agreement with the source model on packaged texts, not accuracy on "
            "your task: compile again with --data to know that."
        )
    elif not labelled:
        yield "The data has no labels that could be used: what stands here as accuracy is agreement with the source model."
    shaky = [timing["point"] for timing in winner["timings"] if not timing["stable"] and not is_float(winner)]
    if shaky:
        yield (
            f"The speed-up at {', '.join(shaky)} changed while it was measured, as it does when other work runs on the machine: do not "
            "rely on it before it is measured again (hfaccel bench)."
        )
    yield from (str(notice) for notice in manifest["notices"])
