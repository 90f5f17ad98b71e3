"""One page that shows results: scores, what they depend on, scores against steps, and pictures. It loads nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megarq.errors import ConfigError
from megarq.scoring.report_chart import line_chart
from megarq.scoring.report_html import Html, escape, join, tag
from megarq.scoring.report_pictures import Gallery, Tile, make_gallery, open_scored
from megarq.scoring.report_results import Result, differences, load_results
from megarq.scoring.report_tables import card, metric_names, scores_table, step_series, title
from megarq.scoring.result import RECONSTRUCTIONS

STYLE = Path(__file__).with_name("report.css")
SAMPLES, SAMPLES_OF_ALL, FEWEST_SAMPLES, MOST_SETS = 24, 48, 4, 8
"""Pictures shown of one set; of several together; of each of them at least; sets shown. They keep pages below 3 MB."""
WIDE = 4
"""More columns are printed on paper turned on its side."""
_TINY = 80
"""Pictures of a smaller side are shown with their pixels."""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class ReportRequest:
    """What a page is to show."""

    results: Sequence[str]
    """Files, folders or globs of the JSON of score.py and reconstruction.py."""
    images: Sequence[str] = field(default_factory=tuple)
    """Where the picture sets lie now, in the order in which the results name them; by default where they lay."""
    reference: str | None = None
    """Pictures to stand beside the generated ones; by default those that the results name."""
    samples: int | None = None
    """Pictures shown of each set, and as many of best and worst; 0 for none."""
    first: bool = False
    """Show the first of each set, rather than some spread evenly."""
    title: str = "Evaluation"
    """Heading of the page."""


def make_report(request: ReportRequest) -> str:
    """The page as HTML.

    Raises:
        ConfigError: options that do not fit the results.
        DataError: results or pictures that are missing, damaged, or do not belong together.
    """
    if request.samples is not None and request.samples < 0:
        raise ConfigError(f"--samples {request.samples}: use 0 or more.")
    results = load_results(request.results)
    galleries = _galleries(request, results)
    scores = tag("section", tag("h2", "Scores"), scores_table(results))
    protocols = tag("section", tag("h2", "Protocol card"), card(results))
    body = [
        tag("header", tag("h1", request.title), tag("p", _lead(results), class_="lead")),
        _comparison(results),
        tag("div", scores, protocols, class_="one") if len(results) == 1 else scores,
        _charts(results),
        *(_gallery(gallery, several=len(galleries) > 1) for gallery in galleries),
        _left_out(results, galleries),
        protocols if len(results) > 1 else None,
        tag("footer", tag("p", "Made by MegaRQ's evaluation/report.py.", class_="soft")),
    ]
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", request.title),
        tag("style", Html(STYLE.read_text(encoding="utf-8"))),
    ]
    page = tag(
        "html",
        tag("head", *head),
        tag("body", tag("main", *body), class_="wide" if len(results) > WIDE else None),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"


def _lead(results: Sequence[Result]) -> str:
    protocols = list(dict.fromkeys(result["protocol"]["name"] for result in results))
    counts = sorted({result["count"] for result in results})
    pictures = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    told = f"{pictures} pictures under protocol{'s' * (len(protocols) > 1)} {', '.join(protocols)}"
    return told if len(results) == 1 else f"{len(results)} results: {told}"


def _comparison(results: Sequence[Result]) -> Html | None:
    """A warning where results may not be compared."""
    told = differences(results)
    if not told:
        return None
    what = f"The results differ in {', '.join(told[:-1])} and {told[-1]}." if told[1:] else f"Their {told[0]} differs."
    if "protocol" in told:
        protocols = dict.fromkeys(result["protocol"]["name"] for result in results)
        of = {name: [result.label for result in results if result["protocol"]["name"] == name] for name in protocols}
        names = "; ".join(f"{name}: {', '.join(labels)}" for name, labels in of.items())
        what += f" Numbers of different protocols say nothing about each other ({names})."
    head = tag("strong", "These scores may not be compared with each other.")
    return tag("div", head, what, class_="warning", role="note")


def _charts(results: Sequence[Result]) -> Html | None:
    charts = []
    for metric in metric_names(results):
        series = step_series(results, metric)
        if len({point.step for line in series.values() for point in line}) > 1:
            charts.append(line_chart(title(metric), series))
    if not charts:
        return None
    return tag("section", tag("h2", "Against checkpoint step"), tag("div", *charts, class_="charts"))


def _galleries(request: ReportRequest, results: Sequence[Result]) -> list[Gallery]:
    """One for each picture set, of which several results may tell; reconstructions are not kept as one."""
    if request.samples == 0:
        return []
    sets: dict[str, list[Result]] = {}
    for result in results:
        if result["images"].get("kind") == RECONSTRUCTIONS:
            continue
        sets.setdefault(result["images"].get("sha256") or result["images"]["path"], []).append(result)
    if request.images and len(request.images) != len(sets):
        named = ", ".join(told[0]["images"]["path"] for told in sets.values())
        raise ConfigError(
            f"--images is given {len(request.images)} times, but the results are of {len(sets)} picture sets: {named}. "
            "Give it once for each, in this order."
        )
    if not sets:
        return []
    given = dict(zip(sets, request.images, strict=True)) if request.images else {}
    last = len(sets) - 1
    shown = list(sets) if last < MOST_SETS else [list(sets)[i * last // (MOST_SETS - 1)] for i in range(MOST_SETS)]
    usual = SAMPLES if not last else max(FEWEST_SAMPLES, SAMPLES_OF_ALL // len(shown))
    wanted = usual if request.samples is None else request.samples
    return [
        make_gallery(
            sets[name], open_scored(sets[name][0], given.get(name)), wanted, not request.first, request.reference
        )
        for name in shown
    ]


def _left_out(results: Sequence[Result], galleries: Sequence[Gallery]) -> Html | None:
    shown = {label for gallery in galleries for label in gallery.labels}
    left = [result.label for result in results if result.label not in shown]
    if not galleries or not left:
        return None
    return tag("p", f"Pictures of {', '.join(left)} are left out, to keep the page small.", class_="soft")


def _gallery(gallery: Gallery, several: bool) -> Html:
    names = f": {', '.join(gallery.labels)}" if several else ""
    how = "spread evenly over" if gallery.spread else "the first of"
    lead = f"{len(gallery.samples)} of {gallery.count:,} pictures, {how} the set."
    if len(gallery.samples) == gallery.count:
        lead = f"All {gallery.count:,} pictures."
    if gallery.paired:
        lead += " Generated on the left, the reference's picture of the same item on the right."
        shown = join(tag("p", lead, class_="soft"), _tiles(gallery.samples, gallery.reference))
    elif gallery.reference:
        shown = tag(
            "div",
            tag("div", tag("h3", "Generated"), tag("p", lead, class_="soft"), _tiles(gallery.samples)),
            tag("div", tag("h3", "Reference"), tag("p", gallery.note, class_="soft"), _tiles(gallery.reference)),
            class_="beside",
        )
    else:
        lead += f" {gallery.note}" if gallery.note else ""
        shown = join(tag("p", lead, class_="soft"), _tiles(gallery.samples))
    extremes = [
        tag("section", tag("h3", f"{kind} by CLIP score{names}"), _tiles(tiles))
        for kind, tiles in (("Best", gallery.best), ("Worst", gallery.worst))
        if tiles
    ]
    return tag("section", tag("h2", f"Pictures{names}"), shown, *extremes)


def _tiles(tiles: Sequence[Tile | None], beside: Sequence[Tile | None] | None = None) -> Html:
    items = []
    for place, tile in enumerate(tiles):
        assert tile is not None, "only what stands beside a picture may be missing"
        pictures = [_picture(tile)] + ([_picture(beside[place])] if beside else [])
        under = [] if tile.index is None else [f"#{tile.index}"]
        under += [] if tile.score is None else [f"CLIP {tile.score:.3f}"]
        caption = tag("figcaption", tag("bdi", tile.caption) if tile.caption else None, tag("small", " · ".join(under)))
        items.append(tag("li", tag("figure", tag("div", *pictures, class_="pictures"), caption)))
    return tag("ul", *items, class_="tiles pairs" if beside else "tiles")


def _picture(tile: Tile | None) -> Html:
    if tile is None:
        return tag("div", "no reference picture of this name", class_="picture none")
    alt = tile.name if tile.caption is None else f"{tile.name}: {tile.caption}"
    width, height = tile.size
    tiny = "tiny" if max(tile.size) < _TINY else None
    return tag(
        "div", tag("img", src=escape(tile.source), alt=alt, width=width, height=height, class_=tiny), class_="picture"
    )
