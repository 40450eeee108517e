"""The page of `python -m vit_embed.app`: Gradio around `views.Views`. What a Space runs.

Visitors are strangers: a page shows pictures that it made itself, and no file of this machine; it asks nothing of any
other machine; and whatever they send, they get a line on the page.
"""

from __future__ import annotations

import html
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import

try:
    import gradio as gr
except ImportError as error:
    raise ImportError(f"the page needs gradio ({error}): pip install 'vit_embed[app]'") from error

from fastapi import Response
from fastapi.middleware import Middleware

from vit_embed.retrieval.views import Views

logger = logging.getLogger(__name__)

MAX_UPLOAD = "40mb"
# Visitors that wait; a later one is told that the queue is full.
MAX_WAITING = 64
# Uploads and results are deleted after an hour.
KEPT_SECONDS = 3600
# One question at a time: a model keeps all cores busy, one large picture is in memory, and tokenizers are not
# thread-safe. The others wait in line and see how long.
ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}

# The browser itself refuses what would come from another machine.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'"
)

CSS = """
.gradio-container > .main { width: 100%; max-width: 1240px; margin: 0 auto; }
#top h1 { font-size: 1.5rem; font-weight: 650; margin: 0; }
#top p { color: var(--body-text-color-subdued); margin: .1rem 0 0; }
.note { padding: .55rem .8rem; border-radius: 8px; background: var(--background-fill-secondary); }
.note.refused { background: #fef3c7; color: #78350f; border-left: 4px solid #f59e0b; }
.grid-wrap { min-height: 0 !important; height: auto !important; max-height: none !important;
  overflow: visible !important; }
.thumbnail-lg { display: flex !important; flex-direction: column; height: auto !important;
  aspect-ratio: auto !important; }
.thumbnail-lg img { height: auto !important; aspect-ratio: 1; padding: 6px; }
#near img, #looks img, #depth img { aspect-ratio: auto; }
.thumbnail-lg .caption-label { position: static !important; width: 100%; max-width: none !important;
  border: 0 !important; font-size: .85rem; text-align: center; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
"""


class Guard:
    """Middleware: no fetching of other machines' files through this one, and POLICY for the browser."""

    def __init__(self, app: Any):
        self.app = app
        # A Space is shown inside another site's page, by a script of that site.
        self.headers = [] if "SPACE_ID" in os.environ else [(b"content-security-policy", POLICY.encode())]

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        async def with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self.headers, (b"referrer-policy", b"no-referrer")]
            await send(message)

        path = scope.get("path", "")
        if scope["type"] == "http" and ("/proxy=" in path or ("file=" in path and ":" in path.partition("file=")[2])):
            await Response("not served", 403)(scope, receive, send)
        else:
            await self.app(scope, receive, with_headers)


def note(text: str, is_refusal: bool = False) -> str:
    """A line of the page; whatever is in it stays text."""
    return f'<div class="note{" refused" if is_refusal else ""}" role="status">{html.escape(text)}</div>'


def answered(function: Callable[..., tuple], empty: tuple) -> Callable[..., tuple]:
    """`function`, whose last value is a note, with a note in the place of an error and `empty` in that of the rest."""

    def answer(*inputs: Any) -> tuple:
        try:
            return function(*inputs)
        except ValueError as error:
            return (*empty, note(str(error), is_refusal=True))
        except Exception:
            logger.exception("a question of a visitor failed")
            return (
                *empty,
                note("Something went wrong on this side; the log of the server says what.", is_refusal=True),
            )

    return answer


def build_page(views: Views) -> gr.Blocks:
    """The page, with a tab for each thing that the model can do."""
    tabs = (
        ("Search", views.has_search, _search_tab),
        ("Classify", views.has_classes, _classes_tab),
        ("Maps", views.has_attention or views.has_similarity, _maps_tab),
        ("Depth", views.has_depth, _depth_tab),
    )
    with gr.Blocks(title="vit_embed", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gr.HTML(_headline(views), elem_id="top")
        with gr.Tabs():
            for name, is_there, fill in tabs:
                if is_there:
                    with gr.Tab(name, id=name.lower()):
                        fill(views)
    return page.queue(max_size=MAX_WAITING)


def _headline(views: Views) -> str:
    name = str(views.model.name_or_path)
    parts = [Path(name).resolve().name if os.path.isdir(name) else name]
    if views.vectors is not None:
        parts.insert(0, f"{len(views.vectors.paths):,} pictures of {views.vectors.path.name}")
    return f"<h1>vit_embed</h1><p>{html.escape(' · '.join(parts))}</p>"


def _search_tab(views: Views) -> None:
    has_words = views.texts is not None
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            words = gr.Textbox("", label="Words", placeholder="a red apple", elem_id="words", visible=has_words)
            picture = _upload("search-picture")
            minus = gr.Textbox(
                value="", label="But not", placeholder="words to be subtracted", elem_id="minus", visible=has_words
            )
            with gr.Accordion("More", open=False):
                count = gr.Slider(1, 60, 12, step=1, label="How many")
                pattern = gr.Textbox("", label="Only paths like", placeholder="cats/*", elem_id="pattern")
            button = gr.Button("Search", variant="primary", elem_id="search")
        with gr.Column(scale=3):
            said = gr.HTML(note("Words and a picture are added up, what is not wanted is taken away."), elem_id="found")
            tiles = _gallery("Nearest pictures", "tiles", columns=4)

    def find(*inputs: Any) -> tuple:
        found = views.find(*inputs)
        return found.tiles, note(found.note, is_refusal=not found.stands_out)

    _on(
        [button.click, words.submit, minus.submit, pattern.submit],
        find,
        [words, picture, minus, pattern, count],
        [tiles, said],
    )


def _classes_tab(views: Views) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            picture = _upload("class-picture")
            names = gr.Textbox(
                value="",
                label="Class names, one a line",
                lines=5,
                placeholder="cat\ndog\nrocket",
                elem_id="class-names",
            )
            template = gr.Textbox(
                label="Sentence", value="{}", info="{} is the class name: a photo of a {}", elem_id="sentence"
            )
            button = gr.Button("Classify", variant="primary", elem_id="classify")
        with gr.Column(scale=2):
            said = gr.HTML(note("No training: the names are compared with the picture."), elem_id="classified")
            bars = gr.Label(label="Probability", elem_id="bars", show_heading=False)

    def classify(*inputs: Any) -> tuple:
        shares = views.classify(*inputs)
        best = max(shares, key=shares.get)
        return shares, note(f"Most likely: {best} ({shares[best]:.1%}).")

    _on([button.click], classify, [picture, names, template], [bars, said])


def _maps_tab(views: Views) -> None:
    details = views.details()
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            picture = _upload("map-picture")
            texts = gr.Textbox(
                value="",
                label="Where is …, one a line",
                lines=2,
                placeholder="the ear\nthe tail",
                elem_id="map-texts",
                visible=views.has_similarity,
            )
            layer = gr.Slider(
                1,
                views.num_layers,
                views.num_layers,
                step=1,
                label="Layer of the attention",
                visible=views.has_attention,
            )
            detail = gr.Radio(
                [(f"{each}×", each) for each in details],
                value=max(each for each in details if each <= 3),
                label="Enlarge the picture",
                info="A finer grid than the model was trained on: more detail, less sure",
            )
            button = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Column(scale=3):
            said = gr.HTML(note("Colours over the picture, as much of it as the model sees."), elem_id="drawn")
            near = _gallery(
                "Where the words are: cosine of each patch", "near", columns=3, visible=views.has_similarity
            )
            looks = _gallery("Where the class token looks", "looks", columns=3, visible=views.has_attention)

    def draw(picture: str | None, texts: str, layer: float, detail: float) -> tuple:
        detail = detail if detail in details else 1
        close = views.similarity(picture, texts, detail) if texts.strip() and views.has_similarity else []
        seen = views.attention(picture, layer, detail) if views.has_attention else []
        if not close and not seen:
            raise ValueError("Type what to look for, one thing a line.")
        rows, columns = (detail * side for side in views.model.config.grid_size)
        return close, seen, note(f"{rows} × {columns} patches; below each map, what its colours stand for.")

    _on([button.click], draw, [picture, texts, layer, detail], [near, looks, said])


def _depth_tab(views: Views) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            picture = _upload("depth-picture")
            button = gr.Button("Measure", variant="primary", elem_id="measure")
        with gr.Column(scale=3):
            said = gr.HTML(note("How far away each pixel is."), elem_id="measured")
            tiles = _gallery("Depth", "depth", columns=2)

    def measure(picture: str | None) -> tuple:
        seen, depth, text = views.depth(picture)
        return [(seen, "what the model sees"), (depth, "depth")], note(text)

    _on([button.click], measure, [picture], [tiles, said])


def _upload(name: str) -> gr.Image:
    """Gives the file that was uploaded: Gradio itself would open it, and fail on a broken one before we are asked."""
    picture = gr.Image(label="Picture", elem_id=name, height=240, sources=["upload", "clipboard"], buttons=[])
    picture.preprocess = lambda payload: payload.path if payload is not None else None
    return picture


def _gallery(label: str, name: str, columns: int, visible: bool = True) -> gr.Gallery:
    """Pictures that the page made: it keeps copies of them, and serves those."""
    return gr.Gallery(
        label=label,
        elem_id=name,
        columns=columns,
        fit_columns=False,
        object_fit="contain",
        height="auto",
        format="png",
        visible=visible,
        interactive=False,
        buttons=["fullscreen"],
    )


def _on(triggers: list[Any], function: Callable[..., tuple], inputs: list[Any], outputs: list[Any]) -> None:
    """Runs a function of the inputs whose last value is the note; where there is no answer, the outputs are emptied."""
    empty = (None,) * (len(outputs) - 1)
    gr.on(triggers, answered(function, empty), inputs, outputs, show_progress="minimal", **ONE_AT_A_TIME)


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Serves the page beside what the process does next; `page.block_thread()` waits for Ctrl-C.

    Raises:
        OSError: the port is taken, or this machine has no such address.
    """
    theme = gr.themes.Default(
        primary_hue="indigo",
        font=["system-ui", "sans-serif"],  # of the visitor's machine: none are fetched
        font_mono=["ui-monospace", "monospace"],
    )
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=MAX_UPLOAD,
        app_kwargs={"middleware": [Middleware(Guard)]},
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        theme=theme,
        css=CSS,
    )
