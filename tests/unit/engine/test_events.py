"""A run's events: appended, never taken back, readable after any death."""

from megarq.engine.events import add_event, read_events
from megarq.engine.json_lines import EVENTS_FILE


def test_events_come_back_in_order_with_their_values(tmp_path):
    add_event(tmp_path, "started", 0, ranks=2)
    add_event(tmp_path, "skipped", 3, reason="loss is nan")
    first, second = read_events(tmp_path)
    assert (first["event"], first["step"], first["ranks"]) == ("started", 0, 2)
    assert (second["event"], second["step"], second["reason"]) == ("skipped", 3, "loss is nan")
    assert first["time"] <= second["time"]


def test_a_torn_line_is_left_out(tmp_path):
    add_event(tmp_path, "started", 0)
    with (tmp_path / EVENTS_FILE).open("a") as file:
        file.write('{"time": 1, "event": "chec\n[1]\n{"event": "x"}\n')
    add_event(tmp_path, "finished", 5)
    assert [event["event"] for event in read_events(tmp_path)] == ["started", "finished"]


def test_a_run_without_events_has_none(tmp_path):
    assert read_events(tmp_path) == []
