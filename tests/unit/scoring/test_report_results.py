import pytest
from made_up_results import made_up_result, write

from megarq.errors import DataError
from megarq.scoring.report_results import load_results


@pytest.fixture
def result():
    return made_up_result("set", 25)


def test_folders_and_globs_are_searched_and_numbers_sorted_as_numbers(tmp_path, result):
    for step in (10000, 2000):
        write(tmp_path / "scores" / f"step-{step}.json", result)
    (tmp_path / "scores" / "other.json").write_text('{"format": "megarq-pictures"}')
    last = write(tmp_path / "last.json", result)
    found = load_results([str(tmp_path / "scores"), str(tmp_path / "scores" / "step-*.json"), str(last)])
    assert [one.label for one in found] == ["step-2000", "step-10000", "last"]


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path, result):
    for name in ("a", "b"):
        write(tmp_path / name / "fid.json", result)
    assert [one.label for one in load_results([str(tmp_path)])] == ["a/fid", "b/fid"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot be read as JSON .* Copy it again"),
        ("[]", "is no result of evaluation/score.py: its format is not 'megarq-scores'"),
        ('{"format": "megarq-pictures"}', "is no result of evaluation/score.py"),
        ('{"format": "megarq-scores", "version": 2}', "has version 2, but this version of MegaRQ reads version 1"),
    ],
)
def test_a_file_that_is_no_result_is_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_results([str(tmp_path / "a.json")])


@pytest.mark.parametrize("name", ["nowhere.json", "nowhere-*.json", "."])
def test_no_result_is_an_error(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no such file or folder: nowhere|no file matches nowhere|\. holds no result"):
        load_results([name])


@pytest.mark.parametrize(
    "field, value, named",
    [
        ("metrics", None, "metrics is None"),
        ("metrics", {"fid": 3}, "metrics.fid is 3"),
        ("metrics", {"fid": {"value": "3"}}, "metrics.fid.value is '3'"),
        ("metrics", {"fid": {"value": 3, "interval": [1]}}, r"metrics.fid.interval is \[1\]"),
        ("protocol", {}, "protocol.name is None"),
        ("warnings", [3], "warnings is 3"),
        ("count", True, "count is True"),
        ("images", {"path": 4}, "images.path is 4"),
        ("images", {"path": "a", "ranker": {"network": "clip"}}, "images.ranker.sha256 is None"),
        ("clip_scores", {"best": [[0.5, 1]], "worst": []}, "clip_scores.best.index is 0.5"),
    ],
)
def test_a_damaged_result_is_refused_by_the_field(tmp_path, result, field, value, named):
    write(tmp_path / "a.json", {**result, field: value})
    with pytest.raises(DataError, match=f"a.json is damaged: its {named}. Copy it again"):
        load_results([str(tmp_path / "a.json")])
