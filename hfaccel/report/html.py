"""``report.html``: one file for whoever decides on deployment; no script, nothing from the network, only the manifest."""

from __future__ import annotations

from hfaccel.report.evidence import accuracy, check_and_run, environment, recipe, stages, timings
from hfaccel.report.facts import Manifest, is_label_free
from hfaccel.report.headline import cautions, headline
from hfaccel.report.markup import Markup, element, join, paragraph
from hfaccel.report.sections import candidates, plot, precision_map, tiles, way
from hfaccel.report.style import STYLE

FILE_NAME = "report.html"


def report_html(manifest: Manifest) -> str:
    """The whole page."""
    title = f"{manifest['source']['id']}, compiled"
    head = element(
        "head",
        {},
        element("meta", {"charset": "utf-8"}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("title", {}, title),
        element("style", {}, Markup(STYLE)),
    )
    body = element("body", {}, element("main", {}, _top(manifest, title), *_parts(manifest), _foot(manifest)))
    page = element("html", {"lang": "en"}, head, body)
    return f"<!doctype html>\n{page.replace('95 %', '95&nbsp;%')}\n"  # a line must not break there


def _top(manifest: Manifest, title: str) -> Markup:
    notes = [paragraph(text, kind="note") for text in cautions(manifest)]
    first = not manifest["target"]["speed_measured_on_it"] or is_label_free(manifest)
    lead = [paragraph(headline(manifest), kind="headline")]
    about = f"{manifest['source']['task']} for {manifest['target']['name']}"
    return join(
        [element("h1", {}, title), paragraph(about, kind="what"), *(notes + lead if first else lead + notes), tiles(manifest)]
    )


def _parts(manifest: Manifest) -> list[Markup]:
    named = [
        ("What was tried", join([plot(manifest), candidates(manifest)])),
        ("From source to artifact", way(manifest)),
        ("Precision of each layer", precision_map(manifest)),
        ("Accuracy", accuracy(manifest)),
        ("Timings", timings(manifest)),
        ("Stages", stages(manifest)),
        ("Environment", environment(manifest)),
        ("Recipe", recipe(manifest)),
        ("Check it and run it", check_and_run(manifest)),
    ]
    return [element("section", {}, element("h2", {}, name), content) for name, content in named]


def _foot(manifest: Manifest) -> Markup:
    source = manifest["source"]
    revision = f", revision {source['revision']}" if source["revision"] else ""
    made = f"Made by hfaccel {manifest['hfaccel_version']} from {source['id']}{revision}, weights sha256 {source['sha256']}, "
    return element("footer", {}, f"{made}key {manifest['key']}. All numbers of this page are in manifest.json beside it.")
