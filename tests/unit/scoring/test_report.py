import base64
import copy
import io
import re
from html.parser import HTMLParser

import pytest
import torch
from made_up_results import colour, draw_set, made_up_result, plain, write
from PIL import Image

from megarq.data.picture_set import Item
from megarq.errors import ConfigError, DataError
from megarq.scoring.evaluate import Request, evaluate
from megarq.scoring.protocols import PROTOCOLS
from megarq.scoring.report import MOST_SETS, ReportRequest, make_report
from megarq.scoring.report_html import Html, escape, tag
from megarq.scoring.report_pictures import choose
from megarq.scoring.report_results import load_results
from megarq.scoring.report_tables import step_series
from megarq.scoring.result import to_result, write_result

EVIL = "<script>alert('x')</script> \"quoted\" & more\x00"
COUNT = 25
VOID = ("meta", "img")


class Page(HTMLParser):
    """A page taken apart: rows of tables by their header, pictures, text; every element must be closed."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.images, self.open, self.tags, self.text = {}, [], [], set(), ""
        self._row = None
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.tags.add(name)
        if name not in VOID:
            self.open.append(name)
        if name == "img":
            self.images.append(dict(attributes))
        if name == "tr":
            self._row = []
        if name in ("td", "th"):
            self._row.append("")

    def handle_startendtag(self, name, attributes):
        self.tags.add(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name
        if name == "tr":
            self.rows[self._row[0]] = self._row[1:]

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self._row[-1] += data

    def row(self, name):
        """The cells of the row that begins so."""
        return next(cells for head, cells in self.rows.items() if head.startswith(name))

    def shown(self, kind):
        """Names of the pictures of a kind, in order."""
        return [image["alt"] for image in self.images if image["alt"].startswith(kind)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A set of pictures, with the first prompt an evil one."""
    items = [Item(EVIL if index == 0 else f"picture of {index}", id=500 + index) for index in range(COUNT)]
    return draw_set(tmp_path_factory.mktemp("drawn") / "set", items)


@pytest.fixture
def result(drawn):
    return made_up_result(drawn, COUNT)


@pytest.fixture
def page(tmp_path):
    """`page(result, .., samples=4)`: the page of results that are written as 0.json, 1.json .."""

    def make(*results, **options):
        paths = [str(write(tmp_path / f"{index}.json", content)) for index, content in enumerate(results)]
        return Page(make_report(ReportRequest(paths, **options)))

    return make


def decoded(image):
    kind, _, content = image["src"].partition(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    return Image.open(io.BytesIO(base64.b64decode(content, validate=True))).convert("RGB")


def close(one, two):
    return all(abs(a - b) <= 3 for a, b in zip(one, two, strict=True))


def test_scores_stand_with_their_intervals_and_deviations(page, result):
    made = page(result)
    assert made.row("FID") == ["12.3595% interval: 11.9 to 12.7"]
    assert made.row("Inception Score") == ["25.5standard deviation 0.31"]
    assert made.row("Precision") == ["0.66"]


def test_what_score_writes_makes_a_page(quick, generated, real, tmp_path):
    metrics = ("fid", "kid", "prc")
    asked = Request(str(generated), str(real), PROTOCOLS["rq-paper"], metrics, torch.device("cpu"), bootstrap=10)
    write_result(tmp_path / "scores.json", to_result(evaluate(asked)))
    made = Page(make_report(ReportRequest([str(tmp_path / "scores.json")])))
    assert {"FID", "KID", "Precision", "Recall"} <= {re.sub("(lower|higher) is better", "", name) for name in made.rows}
    assert "95% interval" in made.row("FID")[0] and "too few" in made.row("FID")[0]
    assert len(made.shown("generated")) == len(made.shown("reference")) == 6


def test_a_column_for_each_result_in_the_order_given(page, result):
    other = copy.deepcopy(result)
    other["metrics"] = {"fid": {"value": 7.0, "interval": None, "network": "inception", "layer": "2048"}}
    made = page(result, other)
    assert [cell.partition("rq")[0] for cell in made.row("")] == ["0", "1"]
    assert made.row("FID")[1] == "7"
    assert made.row("Recall") == ["0.5", "–"]


def test_warnings_stand_beside_the_scores_they_concern(page, result):
    result["warnings"] = ["fid: 25 are too few.", "prc: 25 are too few for it.", "the file names no network: look."]
    made = page(result)
    assert made.row("FID")[0].endswith("12.725 are too few.")
    assert made.row("Precision")[0].endswith("25 are too few for it.")
    assert made.row("Recall")[0].endswith("25 are too few for it.")
    assert "too few" not in made.row("CLIP score")[0]
    assert made.row("All scores") == ["the file names no network: look."]


def test_a_warning_about_a_score_that_is_not_there_is_still_shown(page, result):
    result["warnings"] = ["kid: 25 are too few."]
    assert page(result).row("All scores") == ["kid: 25 are too few."]


def test_the_card_says_everything_that_scores_follow_from(page, result):
    made = page(result)
    assert made.row("Protocol") == ["rq-paper"]
    for name in ("Resize", "Input", "Normalize", "Statistics"):
        assert made.row(name) == [result["protocol"][name.lower()]]
    assert made.row("Network inception") == ["ab" * 32]
    assert made.row("Reference's sha256") == ["ef" * 32]
    assert made.row("Reference") == ["coco-val.npz (statistics of 40,504)"]
    assert made.row("Pictures")[0].startswith("25 of 32 × 32 in ")
    assert made.row("Seed") == ["0"] and made.row("Seed of scoring") == ["2020"]
    assert made.row("Sampling") == ["top k 1024, top p 0.95, temperature 1.0, fp32"]
    assert made.row("Model") == [result["model_fingerprint"]]
    assert made.row("Weights of the model") == ["moving average (EMA)"]
    assert made.row("Step") == ["1,000"]
    assert made.row("Settings of Inception Score") == ["splits 10, network inception"]
    assert made.row("Settings of CLIP score") == ["network clip, resize short side to 224"]
    assert made.row("Machine") == ["no GPU, 2 cores, load 0.5"]
    assert made.row("Versions") == ["python 3.11.7, torch 2.15.0"]


def test_what_is_not_known_is_left_off_the_card(page, result):
    result.update(seed=None, model_fingerprint=None, ema=None, step=None, reference=None, reference_sha256=None)
    result["images"].update(sampling=None, dtype=None)
    made = page(result, samples=0)
    assert not {"Seed", "Model", "Weights of the model", "Step", "Reference", "Sampling"} & set(made.rows)


def test_rejection_sampling_is_told(page, result):
    result["images"]["keep_fraction"] = 0.05
    assert page(result).row("Sampling")[0].endswith("fp32, the best 5% of the candidates kept")
    result["images"]["ranker"] = {"network": "resnet101", "sha256": "63fe2227" * 8}
    assert page(result).row("Sampling")[0].endswith("candidates kept by resnet101 of sha256 63fe222763fe")


def test_guidance_is_told_where_there_is_any(page, result):
    told = page(result).row("Sampling")
    result["images"]["sampling"]["guidance"] = 1.0
    assert page(result).row("Sampling") == told
    result["images"]["sampling"]["guidance"] = 4.0
    assert page(result).row("Sampling")[0].endswith("guidance 4.0, fp32")


def test_a_score_that_is_no_number_is_said_to_be_none(page, result):
    result["metrics"]["fid"] = {"value": float("nan"), "interval": None}
    assert page(result).row("FID") == ["not a number"]


def test_results_of_different_protocols_are_shown_with_a_warning(page, result):
    other = copy.deepcopy(result)
    other["protocol"]["name"] = "clean"
    made = page(result, other)
    assert "may not be compared" in made.text
    assert "Their protocol differs." in made.text
    assert "(rq-paper: 0; clean: 1)" in made.text


def test_other_references_counts_and_networks_are_named(page, result):
    other = copy.deepcopy(result)
    other.update(reference_sha256="00" * 32, weights_sha256={"inception": "11" * 32})
    other["metrics"]["precision"]["network"] = "vgg16"
    made = page(result, other)
    assert "differ in reference, weights of inception and network of precision." in made.text


def test_results_of_one_protocol_have_no_such_warning(page, result):
    other = copy.deepcopy(result)
    other.update(step=2000, model_fingerprint="00" * 32)
    assert "may not be compared" not in page(result, other, samples=0).text


def at_step(result, step, **changes):
    made = copy.deepcopy(result)
    made.update(step=step, **changes)
    made["metrics"]["fid"]["value"] = 1e5 / step
    return made


def test_several_steps_make_a_chart_for_each_metric(page, result):
    made = page(*(at_step(result, step) for step in (3000, 1000, 2000)), samples=0)
    assert "Against checkpoint step" in made.text
    assert "svg" in made.tags
    assert made.text.index("step 1,000: 100") < made.text.index("step 2,000: 50") < made.text.index("step 3,000: 33.33")


def test_one_step_makes_no_chart(page, result):
    assert "Against checkpoint step" not in page(result, at_step(result, 1000), samples=0).text


def test_other_protocols_and_weights_have_lines_of_their_own(tmp_path, result):
    steps = [at_step(result, step, ema=ema) for step in (1000, 2000) for ema in (True, False)]
    steps[0]["protocol"] = {**result["protocol"], "name": "clean"}
    paths = [str(write(tmp_path / f"{index}.json", content)) for index, content in enumerate(steps)]
    lines = step_series(load_results(paths), "fid")
    assert {name: [point.step for point in line] for name, line in lines.items()} == {
        "clean, EMA": [1000],
        "rq-paper, no EMA": [1000, 2000],
        "rq-paper, EMA": [2000],
    }


def test_samples_are_spread_evenly_or_the_first():
    assert choose(100, 4, spread=True) == [0, 25, 50, 75]
    assert choose(100, 4, spread=False) == [0, 1, 2, 3]
    assert choose(3, 24, spread=True) == [0, 1, 2]


def test_samples_are_the_pictures_of_the_set_with_their_prompts(page, result):
    made = page(result, samples=5)
    assert len(made.images) == 5
    for image, index in zip(made.images, (0, 5, 10, 15, 20), strict=True):
        assert image["alt"].startswith(f"generated picture {index}: ")
        assert close(decoded(image).getpixel((7, 7)), colour(index))
    assert "picture of 15" in made.text


def test_classes_stand_under_pictures_that_have_no_prompt(page, tmp_path):
    drawn = draw_set(tmp_path / "classes", [Item(label=index // 2) for index in range(6)])
    made = page(made_up_result(drawn, 6), samples=6)
    assert made.images[3]["alt"] == "generated picture 3: class 1"


def test_best_and_worst_by_clip_score(page, result):
    result["clip_scores"] = {"best": [[7, 0.4], [3, 0.35]], "worst": [[9, 0.05], [11, 0.1]]}
    made = page(result, samples=2)
    assert made.text.index("Best by CLIP score") < made.text.index("#7 · CLIP 0.400")
    assert made.text.index("Worst by CLIP score") < made.text.index("#9 · CLIP 0.050")
    pixels = [decoded(image).getpixel((5, 5)) for image in made.images[2:]]
    assert all(close(pixel, colour(index)) for pixel, index in zip(pixels, (7, 3, 9, 11), strict=True))


def reference_folder(folder, names):
    folder.mkdir()
    for index, name in enumerate(names):
        plain(index).save(folder / name)
    return {"path": str(folder), "kind": "pictures", "count": len(names), "size": [32, 32], "transform": None}


def test_reference_pictures_stand_beside_the_items_whose_ids_they_bear(page, result, tmp_path):
    names = [f"COCO_val2014_{500 + index:012d}.png" for index in range(COUNT)]
    result["reference"] = reference_folder(tmp_path / "real", names)
    made = page(result, samples=5)
    assert [image["alt"].partition(":")[0] for image in made.images[:4]] == [
        "generated picture 0",
        "reference picture for 0",
        "generated picture 5",
        "reference picture for 5",
    ]
    assert close(decoded(made.images[2]).getpixel((1, 1)), decoded(made.images[3]).getpixel((1, 1)))


def test_reference_pictures_in_tars_are_found_by_their_keys(page, result, tmp_path):
    items = [Item(f"real {index}") for index in range(600)]
    reference = draw_set(tmp_path / "real", items, per_tar=300)
    made = page(result, samples=2, reference=f"{reference}/*.tar")
    assert close(decoded(made.images[1]).getpixel((1, 1)), colour(500))


def test_an_item_whose_reference_is_missing_is_said_to_lack_it(page, result, tmp_path):
    result["reference"] = reference_folder(tmp_path / "real", ["x500.png", "y505.png", "z999.png"])
    made = page(result, samples=3)  # items 500, 508, 516
    assert "no reference picture of this name" not in made.text
    made = page(result, samples=2)  # items 500, 512
    assert "no reference picture of this name" in made.text


def test_without_such_names_the_reference_is_a_random_sample_and_the_page_says_so(page, result, tmp_path):
    result["reference"] = reference_folder(tmp_path / "real", [f"real-{'abcdefgh'[index]}.png" for index in range(8)])
    made, again = page(result, samples=4), page(result, samples=4)
    assert "A random sample of the 8 reference pictures (seed 2020)" in made.text
    assert len(made.shown("reference")) == 4
    assert made.images == again.images


def test_a_reference_that_is_gone_is_told_and_no_error(page, result):
    result["reference"] = {"path": "/nowhere/real", "kind": "pictures", "count": 5, "transform": None}
    assert "The reference pictures, /nowhere/real, are not at hand." in page(result).text


@pytest.mark.parametrize(
    ("transform", "left"), [("center", (0, 0, 255)), ("squeeze", (255, 0, 0))], ids=["center", "squeeze"]
)
def test_reference_pictures_are_shown_as_the_networks_saw_them(page, result, tmp_path, transform, left):
    result["reference"] = {**reference_folder(tmp_path / "real", []), "transform": transform}
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste("blue", (32, 0, 64, 32))
    wide.save(tmp_path / "real" / "a.png")
    made = page(result, samples=1)
    shown = decoded(next(image for image in made.images if image["alt"].startswith("reference")))
    assert shown.size == (32, 32)
    assert close(shown.getpixel((2, 16)), left) and close(shown.getpixel((29, 16)), left)
    assert close(shown.getpixel((16, 16)), (0, 0, 255))


def test_thumbnails_are_small(page, tmp_path):
    side, folder = 640, tmp_path / "large"
    folder.mkdir()
    Image.effect_noise((side, side // 2), 80).convert("RGB").save(folder / "a.png")
    result = made_up_result(folder, 1, seed=None, model_fingerprint=None)
    (image,) = page(result).images
    assert decoded(image).size == (160, 80) == (int(image["width"]), int(image["height"]))
    assert len(image["src"]) < 25_000


def test_results_of_one_set_show_it_once(page, result):
    other = copy.deepcopy(result)
    other["protocol"]["name"] = "clean"
    assert len(page(result, other, samples=3).images) == 3


def test_of_many_sets_some_are_shown_and_the_others_named(page, result):
    many = [at_step(result, 1000 * step) for step in range(1, MOST_SETS + 3)]
    for index, content in enumerate(many):
        content["images"]["sha256"] = f"{index:064d}"
    made = page(*many)
    assert made.text.count("spread evenly over the set") == MOST_SETS
    assert re.search(r"Pictures of \d, \d are left out", made.text)
    assert len(made.images) <= 48


def test_prompts_are_text_and_no_markup(page, result):
    made = page(result, samples=1)
    assert "script" not in made.tags
    assert "<script>alert('x')</script> \"quoted\" & more\ufffd" in made.text
    assert made.images[0]["alt"].endswith("more\ufffd")
    assert set(made.images[0]) == {"src", "alt", "width", "height", "class"}


def test_all_text_of_a_result_is_escaped(page, result):
    evil = "\"'><img src=x onerror=alert(1)>"
    result["protocol"] = {**result["protocol"], "name": evil, evil: evil}
    result["metrics"][evil] = {"value": 1.0, "network": evil, evil: evil}
    result.update(warnings=[f"fid: {evil}", evil], weights_sha256={evil: evil}, model_fingerprint=evil)
    result["machine"] = {"gpu": evil, evil: evil}
    result["images"].update(sampling={evil: evil}, dtype=evil)
    result["images"].update(keep_fraction=0.5, ranker={"network": evil, "sha256": evil})
    steps = [at_step(result, step) for step in (1000, 2000)]
    steps[1]["protocol"] = {"name": evil + "2"}
    made = page(*steps, samples=0, title=evil)
    assert made.images == []
    assert made.text.count(evil) > 10


def test_attributes_and_text_are_escaped_once():
    made = tag("a", "1 < 2", Html("<b>x</b>"), title='"&', class_="c", aria_label=None, hidden=True)
    assert made == '<a title="&quot;&amp;" class="c" hidden>1 &lt; 2<b>x</b></a>'
    assert escape(escape("&")) == "&amp;"


def test_half_a_surrogate_pair_can_be_encoded():
    assert escape("a\ud800b \U0001f600").encode().decode() == "a\ufffdb \U0001f600"


def test_the_page_names_no_address_and_forbids_loading(tmp_path, result):
    made = make_report(ReportRequest([str(write(tmp_path / "a.json", result))], samples=2))
    assert "default-src &#x27;none&#x27;" in made
    assert not re.search(r"(https?:)?//|url\(|@import|<link|<script", re.sub(r'"data:[^"]*"', "", made))


def test_pictures_that_have_moved_are_named_and_found_by_images(page, result, drawn, tmp_path):
    result["images"]["path"] = str(tmp_path / "gone")
    with pytest.raises(DataError, match="scored pictures that cannot be shown: .*gone.* Give --images .* --samples 0"):
        page(result)
    assert page(result, samples=0).images == []
    assert len(page(result, images=[str(drawn)], samples=3).images) == 3


def test_pictures_of_another_count_are_refused(page, result):
    with pytest.raises(DataError, match="set holds 25 pictures, but .*0.json scored 30. Give --images"):
        page({**result, "count": 30})


@pytest.mark.parametrize("field, value", [("seed", 3), ("model_fingerprint", "00")])
def test_pictures_of_another_seed_or_model_are_refused(page, result, field, value):
    with pytest.raises(DataError, match=f"has {field} .*, but .*0.json scored {field} {value}"):
        page({**result, field: value})


def test_images_are_given_once_for_each_set(page, result, drawn):
    with pytest.raises(ConfigError, match="--images is given 2 times, but the results are of 1 picture sets"):
        page(result, images=[str(drawn), str(drawn)])


def test_a_number_of_samples_below_none_is_refused(page, result):
    with pytest.raises(ConfigError, match="--samples -1: use 0 or more"):
        page(result, samples=-1)


def test_a_clip_score_of_a_picture_that_is_not_there_is_refused(page, result):
    result["clip_scores"] = {"best": [[COUNT, 0.4]], "worst": []}
    with pytest.raises(DataError, match="names picture 25 of 25 in its clip_scores"):
        page(result)


def test_a_damaged_picture_is_named(page, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="a.png: not a readable picture of 10 bytes"):
        page(made_up_result(folder, 1, seed=None, model_fingerprint=None))
