"""What the events of the page wait for."""

from megarq.page.layout import build


def test_only_what_uses_the_model_waits_in_the_queue(page, tmp_path):
    events = {event.name: event.queue for event in build(page, tmp_path, "a model").fns.values()}
    assert {"begin", "stop", "recall", "end"} < events.keys()
    events.pop("leave")  # Gradio calls it by itself when a tab is closed
    assert {name for name, queued in events.items() if queued} == {"draw", "refine"}
