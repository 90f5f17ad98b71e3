"""The scores and the protocol card of results, as tables with one column for each."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from megarq.scoring.report_chart import Point, number
from megarq.scoring.report_html import Html, tag
from megarq.scoring.report_results import Result, in_order
from megarq.scoring.result import DIGITS

NAMES = {
    "fid": ("FID", "lower is better"),
    "fd-dinov2": ("FD-DINOv2", "lower is better"),
    "kid": ("KID", "lower is better"),
    "is": ("Inception Score", "higher is better"),
    "precision": ("Precision", "higher is better"),
    "recall": ("Recall", "higher is better"),
    "clip": ("CLIP score", "higher is better"),
    "rfid": ("rFID", "lower is better"),
    "psnr": ("PSNR, dB", "higher is better"),
    "ssim": ("SSIM", "higher is better"),
    "lpips": ("LPIPS", "lower is better"),
}
"""Metrics in the order of the page, and how to read them."""
_SHARED_NOTES = {"prc": ("precision", "recall")}
"""Warnings bear the name that --metrics has."""
_TOLD = ("value", "interval", "std")
"""Fields of a metric that stand beside its value; the rest is on the card."""
NOTHING = "–"

Read = Callable[[Result], object]


def metric_names(results: Sequence[Result]) -> list[str]:
    """All metrics of the results, in the order of the page."""
    found = dict.fromkeys(name for result in results for name in result["metrics"])
    return [*(name for name in NAMES if name in found), *(name for name in found if name not in NAMES)]


def title(metric: str) -> str:
    """A metric's name for people."""
    return NAMES.get(metric, (metric, ""))[0]


def concerns(warning: str) -> tuple[str, ...]:
    """The metrics that a warning, `fid: too few ..`, is about; none for one about all."""
    name = warning.partition(":")[0]
    return _SHARED_NOTES.get(name, (name,) if name in NAMES else ())


def scores_table(results: Sequence[Result]) -> Html:
    """Metrics in rows, their warnings with them; what concerns all scores of a result in the last row."""
    rows = []
    for metric in metric_names(results):
        head = tag("th", title(metric), tag("small", NAMES.get(metric, ("", ""))[1]), scope="row")
        rows.append(tag("tr", head, *(_score(result, metric) for result in results)))
    general = [[note for note in result["warnings"] if not _beside(result, note)] for result in results]
    if any(general):
        cells = [tag("td", *(_note(note) for note in notes)) for notes in general]
        rows.append(tag("tr", tag("th", "All scores", scope="row"), *cells))
    return _table("Scores", results, [rows], "scores")


def _beside(result: Result, note: str) -> bool:
    return any(metric in result["metrics"] for metric in concerns(note))


def _score(result: Result, metric: str) -> Html:
    score = result["metrics"].get(metric)
    if score is None:
        return tag("td", NOTHING)
    parts = [tag("span", number(score["value"]), class_="value", title=score["value"])]
    if score.get("interval"):
        low, high = map(number, score["interval"])
        parts.append(tag("small", f"95% interval: {low} to {high}"))
    if score.get("std") is not None:
        parts.append(tag("small", f"standard deviation {number(score['std'])}"))
    parts += [_note(note.partition(":")[2].strip()) for note in result["warnings"] if metric in concerns(note)]
    return tag("td", *parts)


def _note(note: str) -> Html:
    return tag("small", note, class_="note")


def card(results: Sequence[Result]) -> Html:
    """Everything that the scores depend on. What is equal in all results stands once."""
    groups: list[list[tuple[str, Read]]] = [
        [(_words(name), partial(_protocol, name)) for name in _keys(results, "protocol")],
        [
            ("Pictures", _pictures),
            ("Pictures' sha256", lambda result: _hash(result["images"].get("sha256"))),
            ("Seed", lambda result: result["seed"]),
            ("Sampling", lambda result: _sampling(result["images"])),
            ("Model", lambda result: _hash(result["model_fingerprint"])),
            ("Weights of the model", _weights),
            ("Step", lambda result: None if result["step"] is None else f"{result['step']:,}"),
        ],
        [
            ("Reference", lambda result: _reference(result["reference"])),
            ("Reference's sha256", lambda result: _hash(result["reference_sha256"])),
        ],
        [(f"Network {name}", partial(_network, name)) for name in _keys(results, "weights_sha256")],
        [
            *((f"Settings of {title(name)}", partial(_settings, name)) for name in metric_names(results)),
            ("Seed of scoring", lambda result: result["scored_seed"]),
            ("Resamples", lambda result: result["bootstrap"] or None),
        ],
        [("Machine", _machine), ("Versions", _versions)],
    ]
    rows = [[_card_row(name, [read(result) for result in results]) for name, read in group] for group in groups]
    return _table("Protocol card", results, rows, "card")


def _keys(results: Sequence[Result], section: str) -> list[str]:
    return list(dict.fromkeys(key for result in results for key in result[section]))


def _words(name: str) -> str:
    words = name.replace("_", " ")
    return "Protocol" if name == "name" else words[:1].upper() + words[1:]


def _card_row(name: str, values: Sequence[object]) -> Html | None:
    if all(value is None or value == "" for value in values):
        return None
    shown = [NOTHING if value is None or value == "" else value for value in values]
    if len({str(value) for value in shown}) == 1:
        cells = [tag("td", shown[0], colspan=len(shown) if len(shown) > 1 else None)]
    else:
        cells = [tag("td", value) for value in shown]
    return tag("tr", tag("th", name, scope="row"), *cells)


def _table(name: str, results: Sequence[Result], groups: Sequence[Sequence[Html | None]], kind: str) -> Html:
    bodies = [tag("tbody", *rows) for rows in groups if any(rows)]
    heads = [tag("th", result.label, tag("small", _under(result)), scope="col") for result in results]
    head = tag("thead", tag("tr", tag("td"), *heads)) if len(results) > 1 or kind == "scores" else None
    many = " many" if len(results) > 1 else ""
    table = tag("table", tag("caption", name), head, *bodies)
    return tag("div", table, class_=f"scroll {kind}{many}", role="region", aria_label=name, tabindex="0")


def _under(result: Result) -> str:
    step = "" if result["step"] is None else f", step {result['step']:,}"
    return f"{result['protocol']['name']}, {result['count']:,} pictures{step}"


def _hash(sha256: str | None) -> Html | None:
    return tag("code", tag("b", sha256[:DIGITS]), sha256[DIGITS:]) if sha256 else None


def _pictures(result: Result) -> str:
    size = result["images"].get("size")
    told = f" of {' × '.join(map(str, size))}" if size else ""
    return f"{result['count']:,}{told} in {result['images']['path']}"


def _sampling(images: dict[str, Any]) -> str | None:
    sampling = (images.get("sampling") or {}).items()
    told = [f"{_plain(name)} {_value(value)}" for name, value in sampling if (name, value) != ("guidance", 1)]
    if images.get("dtype"):
        told.append(images["dtype"])
    kept, ranker = images.get("keep_fraction"), images.get("ranker")
    if kept is not None and kept < 1:
        by = f" by {ranker['network']} of sha256 {ranker['sha256'][:DIGITS]}" if ranker else ""
        told.append(f"the best {100 * kept:.4g}% of the candidates kept{by}")
    return ", ".join(told) or None


def _weights(result: Result) -> str | None:
    return {True: "moving average (EMA)", False: "as trained, no moving average", None: None}[result["ema"]]


def _reference(reference: dict[str, Any] | None) -> str | None:
    if not reference:
        return None
    count = "an unknown number" if reference.get("count") is None else f"{reference['count']:,}"
    transform = f", transform {reference['transform']}" if reference.get("transform") else ""
    return f"{reference['path']} ({reference['kind']} of {count}{transform})"


def _protocol(name: str, result: Result) -> object:
    return result["protocol"].get(name)


def _network(name: str, result: Result) -> Html | None:
    return _hash(result["weights_sha256"].get(name))


def _settings(name: str, result: Result) -> str:
    metric = result["metrics"].get(name, {})
    told = ((_plain(key), value) for key, value in metric.items() if key not in _TOLD and value is not None)
    return ", ".join(f"{name} {_value(value)}" for name, value in told)


def _machine(result: Result) -> str | None:
    machine = result["machine"] or {}
    if not machine:
        return None
    return f"{machine.get('gpu') or 'no GPU'}, {machine.get('cores')} cores, load {machine.get('load')}"


def _versions(result: Result) -> str | None:
    machine = result["machine"] or {}
    told = (f"{name} {value}" for name, value in machine.items() if name not in ("gpu", "cores", "load") and value)
    return ", ".join(told) or None


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _value(value: object) -> str:
    return value if isinstance(value, str) else in_order(value)


SERIES: dict[str, Read] = {
    "protocol": lambda result: result["protocol"]["name"],
    "weights": lambda result: {True: "EMA", False: "no EMA", None: "weights not told"}[result["ema"]],
    "reference": lambda result: (result["reference"] or {}).get("path", "no reference"),
    "count": lambda result: f"{result['count']:,} pictures",
    "size": lambda result: " × ".join(map(str, result["images"].get("size") or ["size not told"])),
    "sampling": lambda result: _sampling(result["images"]) or "sampling not told",
}
"""What results of one line in a chart have in common, beside the networks."""


def step_series(results: Sequence[Result], metric: str) -> dict[str, list[Point]]:
    """The scores of a metric by step: a line for each protocol, reference and so on, named by what differs."""
    lines: dict[tuple[object, ...], list[Point]] = {}
    for result in results:
        score = result["metrics"].get(metric)
        if result["step"] is not None and score and abs(score["value"]) < float("inf"):
            network = in_order([result["weights_sha256"].get(score.get("network")), result["reference_sha256"]])
            key = (*(read(result) for read in SERIES.values()), network)
            lines.setdefault(key, []).append(Point(result["step"], score["value"], score.get("interval")))
    differing = [place for place in range(len(SERIES)) if len({key[place] for key in lines}) > 1]
    named: dict[str, list[Point]] = {}
    for key, points in lines.items():
        name = ", ".join(str(key[place]) for place in differing) or "one network or reference"
        while name in named:
            name += ", another network or reference"
        named[name] = sorted(points, key=lambda point: point.step)
    return named
