"""The web page in Gradio: what is seen, and what each event does.

Drawing and refining use the model and wait in one queue; whatever else is clicked is answered at once.
"""

import html
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from megarq.errors import MegarqError
from megarq.page.page import Asked, Drawing, Page, Stopped

COLUMNS = 4
SMALL = 128
"""Pictures of fewer pixels a side are enlarged without blur."""
ERROR_SECONDS = 30
FILES = (600, 3600)
"""Every so many seconds, files of pictures older than so many are deleted; those on a page have been loaded by then."""
WAITING = 20
"""Questions in the queue; more are turned away."""
STYLE = """
footer { display: none !important }
.gradio-container { max-width: 1100px !important; margin: auto !important }
.grid-wrap { min-height: 0 !important }
.grid-container { padding-top: 2.2rem; grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important }
"""
SHARP = ".grid-container img { image-rendering: pixelated }"
ONE_QUEUE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
GALLERY: dict[str, Any] = {
    "format": "png",
    "object_fit": "contain",
    "height": "auto",
    "allow_preview": False,
    "interactive": False,
    "fit_columns": False,
    "buttons": [],
}


@contextmanager
def _told() -> Iterator[None]:
    """Show a MegarqError on the page; it may quote what a visitor typed."""
    try:
        yield
    except MegarqError as error:
        raise gr.Error(html.escape(str(error)), duration=ERROR_SECONDS, print_exception=False) from None


class Events:
    """What happens on the page. Gradio tells each event its session, and shows what it returns."""

    def __init__(self, page: Page, folder: Path) -> None:
        """Pictures to be downloaded are written into `folder`."""
        self._page = page
        self._folder = folder

    def begin(self, request: gr.Request) -> tuple[Any, Any]:
        """The buttons to draw and to stop, while a drawing waits and is made."""
        self._page.visit(request.session_hash).stopping = False
        return gr.update(interactive=False), gr.update(interactive=True)

    def end(self) -> tuple[Any, Any]:
        """The same, afterwards."""
        return gr.update(interactive=True), gr.update(interactive=False)

    def stop(self, request: gr.Request) -> None:
        """End the drawing after the position it is at."""
        self._page.visit(request.session_hash).stopping = True

    def leave(self, request: gr.Request) -> None:
        """A tab was closed."""
        self._page.leave(request.session_hash)

    def draw(
        self,
        subject: str,
        count: str,
        temperature: str,
        top_k: str,
        top_p: str,
        guidance: str,
        seed: str,
        fresh: bool,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - by which Gradio knows that there is progress to show
    ) -> Any:
        """A new drawing, and the history that it is now part of."""
        visit = self._page.visit(request.session_hash)
        typed = (subject, count, temperature, top_k, top_p, guidance, "" if fresh else seed)
        asked = Asked(*(text or "" for text in typed))  # a field that is not shown is None
        began = time.monotonic()
        try:
            with _told():
                drawing = self._page.draw(visit, asked, lambda done, total: progress((done, total), unit="stacks"))
        except Stopped:
            gr.Info("Stopped. Nothing was drawn.")
            return gr.skip()
        if (tokens := self._page.cut(drawing)) is not None:
            read = self._page.generator.transformer.config.cond_length
            gr.Warning(f"The prompt has {tokens} tokens; the model reads the first {read}.", duration=ERROR_SECONDS)
        history = _gallery([(each.pictures[0], _name(each)) for each in visit.drawings])
        return *_show(drawing, f", in {time.monotonic() - began:.1f} s"), history, drawing.asked.seed

    def recall(self, chosen: gr.SelectData, request: gr.Request) -> Any:
        """An earlier drawing, and its question."""
        visit = self._page.visit(request.session_hash)
        if chosen.index >= len(visit.drawings):
            return gr.skip()
        visit.shown = visit.drawings[chosen.index]
        return *_show(visit.shown), gr.update(selected_index=None), *vars(visit.shown.asked).values(), False

    def refine(self, chosen: gr.SelectData, request: gr.Request) -> Any:
        """One picture of the drawing that is shown, depth by depth, and its file."""
        drawing = self._page.visit(request.session_hash).shown
        if drawing is None or chosen.index >= len(drawing.pictures):
            return gr.skip()
        refined = self._page.refine(drawing, chosen.index)
        file = drawing.save(chosen.index, Path(tempfile.mkdtemp(dir=self._folder)))
        return _gallery(list(zip(refined, _depths(len(refined)), strict=True))), gr.update(value=file, interactive=True)


def _show(drawing: Drawing, more: str = "") -> tuple[Any, Any, Any]:
    """The grid of a drawing, in which no picture is chosen yet."""
    grid = _gallery(drawing.pictures, label=f"{len(drawing.pictures)} pictures of seed {drawing.asked.seed}{more}")
    return grid, _gallery([]), gr.update(value=None, interactive=False)


def _gallery(pictures: Any, **changes: Any) -> Any:
    return gr.update(value=pictures, selected_index=None, **changes)


def _name(drawing: Drawing) -> str:
    return " · ".join(part for part in (drawing.asked.subject, f"seed {drawing.asked.seed}") if part)


def _depths(count: int) -> list[str]:
    return ["depth 1", *(f"depths 1 to {depth}" for depth in range(2, count + 1))]


def build(page: Page, folder: Path, title: str) -> gr.Blocks:
    """The page of a model. Files are written into `folder`."""
    events = Events(page, folder)
    config, own = page.generator.transformer.config, page.generator.sampling
    captions = config.condition == "text"
    each = f"one for all depths, or {config.depth} with commas between"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=FILES) as blocks:
        gr.Markdown(f"# {html.escape(title)}")
        with gr.Row():
            with gr.Column(scale=1):
                subject = gr.Textbox(
                    label="Prompt" if captions else "Class",
                    info=f"The model reads the first {config.cond_length} tokens."
                    if captions
                    else f"0 to {config.cond_vocab_size - 1}",
                    visible=config.condition != "none",
                    autofocus=True,
                )
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", min_width=100)
                    stop = gr.Button("Stop", variant="stop", interactive=False, min_width=100)
                count = gr.Textbox("4", label="Pictures", info=f"1 to {page.most}")
                with gr.Row():
                    seed = gr.Textbox("0", label="Seed", info="The same seed, the same pictures.")
                    fresh = gr.Checkbox(True, label="Random", info="A new seed for each drawing.")
                with gr.Accordion("Settings; an empty one is the model's own", open=True):
                    temperature = gr.Textbox(label="Temperature", info=each, placeholder=f"{own.temperature:g}")
                    top_k = gr.Textbox(label="Top-k", info=each, placeholder=str(own.top_k or max(config.sizes)))
                    top_p = gr.Textbox(label="Top-p", info=each, placeholder=f"{own.top_p:g}")
                    guidance = gr.Textbox(
                        label="Guidance",
                        info="1 is none; more stresses the caption, of a model trained with caption dropout.",
                        placeholder=f"{own.guidance:g}",
                        visible=captions,
                    )
            with gr.Column(scale=2):
                grid = gr.Gallery(label="Pictures", columns=COLUMNS, elem_id="grid", **GALLERY)
                refined = gr.Gallery(
                    label="The chosen picture, depth by depth", columns=config.depth, elem_id="refined", **GALLERY
                )
                file = gr.DownloadButton("Download the chosen picture", interactive=False)
                history = gr.Gallery(label="Drawn before", columns=5, elem_id="history", **GALLERY)
        fields = [subject, count, temperature, top_k, top_p, guidance, seed]
        shown = [grid, refined, file, history]
        begun = gr.on([draw.click, subject.submit], events.begin, None, [draw, stop], **AT_ONCE)
        drawn = begun.then(events.draw, [*fields, fresh], [*shown, seed], show_progress_on=grid, **ONE_QUEUE)
        for ended in (drawn.success, drawn.failure):
            ended(events.end, None, [draw, stop], **AT_ONCE)
        stop.click(events.stop, **AT_ONCE)
        history.select(events.recall, None, [*shown, *fields, fresh], **AT_ONCE)
        grid.select(events.refine, None, [refined, file], **ONE_QUEUE)
        blocks.unload(events.leave)
    return blocks.queue(max_size=WAITING, api_open=False)


def launch(blocks: gr.Blocks, page: Page, host: str, port: int, passwords: Callable[[str, str], bool] | None) -> None:
    """Begin to serve, in threads, without a word to or from any other host. Raises OSError for a port in use."""
    small = page.generator.info.rqvae.resolution < SMALL
    blocks.launch(
        server_name=host,
        server_port=port,
        auth=passwords,
        theme=gr.themes.Default(font="sans-serif", font_mono="monospace"),
        css=STYLE + SHARP * small,
        max_file_size=1,
        share=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        prevent_thread_lock=True,
        quiet=True,
    )
