"""The page: its components, and what each of them calls. Only this file knows gradio.

Pictures and downloads are part of the answers, so that no file has to be written for them.
"""

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.state_holder import SessionState

from plan_jax.demo import library, render, uploads
from plan_jax.demo.downloads import Display
from plan_jax.demo.grounder import MAX_PHRASES, OpenFilm, check_number
from plan_jax.demo.service import NUM_OFFERED, OFFERED_PHRASES, Service
from plan_jax.types import UserError

# Otherwise each tab keeps its phrases, answers and downloads, for deep links, which are closed.
SessionState._update_value_in_config = lambda *_: None
OPACITY = 0.85
LINES = ["contour", "boxes"]
DOWNLOADS = {"png": "picture (PNG)", "npz": "maps (NPZ)", "json": "boxes and scores (JSON)"}
SET_OPACITY = "(value) => document.documentElement.style.setProperty('--pj-opacity', value)"
SET_LINES = """(shown) => {
  for (const line of ["contour", "boxes"])
    document.documentElement.style.setProperty(
      `--pj-${line}`, shown.includes(line) ? "block" : "none");
}"""
SAVE = """(data) => {
  if (!data) return "";
  const [name, kind, content] = data.split("|");
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([bytes], {type: kind}));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  return "";
}"""


@dataclass(frozen=True)
class Components:
    """The components of the page that ask or answer something."""

    message: Any
    upload: Any
    example: Any
    about: Any
    level: Any
    width: Any
    typed: Any
    picked: Any
    locate: Any
    threshold: Any
    opacity: Any
    rounds: Any
    lines: Any
    results: Any
    save: dict[str, Any]
    parcel: Any
    report: Any
    to_films: Any
    to_reports: Any
    found: Any


def build(service: Service, folder: Path) -> Any:
    """Returns the page of a service, whose uploads come into `folder`."""
    sweep = (uploads.SWEEP_SECONDS, uploads.SWEEP_SECONDS)
    with gr.Blocks(
        title="plan_jax", analytics_enabled=False, fill_width=True, delete_cache=sweep
    ) as blocks:
        components = _lay_out(service)
        _connect_films(blocks, components, service, folder)
        _connect_phrases(components, service)
        _connect_retrieval(components, service)

        def close(request: gr.Request) -> None:
            session = str(request.session_hash)
            service.close(session)
            # Otherwise gradio keeps the components of the tab for an hour.
            blocks.state_holder.session_data.pop(session, None)
            blocks.state_holder.time_last_used.pop(session, None)

        blocks.unload(close)
    return blocks


def make_theme() -> Any:
    """Returns the usual theme with fonts of the system: others would come from elsewhere."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])


# Components --------------------------------------------------------------------------------------


def _lay_out(service: Service) -> Components:
    parts: dict[str, Any] = {}
    gr.HTML(render.render_head(service.grounder, service.name))
    parts["message"] = gr.HTML(elem_id="message")
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            parts |= _lay_out_film(service)
        with gr.Column(scale=5, min_width=320), gr.Tabs():
            with gr.Tab("Where is it?", id="grounding"):
                parts |= _lay_out_phrases(service)
            with gr.Tab("Films and reports", id="retrieval"):
                parts |= _lay_out_retrieval(service)
    return Components(**parts)


def _lay_out_film(service: Service) -> dict[str, Any]:
    titles = [example.title for example in service.examples[:NUM_OFFERED]]
    return {
        "upload": gr.File(label="Film: PNG, JPEG or DICOM", height=170, elem_id="upload"),
        "example": gr.Dropdown(titles, value=None, label="or a phantom", elem_id="example"),
        "about": gr.HTML(elem_id="about"),
        "level": gr.Slider(0, 1, label="Window level", visible=False, elem_id="level"),
        "width": gr.Slider(1, 2, label="Window width", visible=False, elem_id="width"),
    }


def _lay_out_phrases(service: Service) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    with gr.Row():
        with gr.Column(scale=3, min_width=280):
            parts["typed"] = gr.Textbox(
                label=f"Phrases, one in each line, up to {MAX_PHRASES}",
                lines=3,
                max_lines=6,
                elem_id="phrases",
            )
            parts["picked"] = gr.Dropdown(
                list(OFFERED_PHRASES), value=[], multiselect=True, label="or pick", elem_id="picked"
            )
            parts["locate"] = gr.Button("Locate", variant="primary", elem_id="locate")
        with gr.Column(scale=2, min_width=240):
            parts |= _lay_out_sliders(service)
    parts["results"] = gr.HTML(elem_id="results")
    with gr.Row():
        parts["save"] = {
            kind: gr.Button(f"Download {name}", size="sm", elem_id=f"save-{kind}")
            for kind, name in DOWNLOADS.items()
        }
    parts["parcel"] = gr.Textbox(visible=False)
    return parts


def _lay_out_sliders(service: Service) -> dict[str, Any]:
    low, high = service.grounder.limits
    max_rounds = service.grounder.max_rounds
    return {
        "threshold": gr.Slider(
            0,
            1,
            value=min(max(round((low + high) / 2, 2), 0.0), 1.0),
            step=0.01,
            label="Threshold of contour and boxes",
            elem_id="threshold",
        ),
        "opacity": gr.Slider(
            0, 1, value=OPACITY, step=0.05, label="Opacity of the map", elem_id="opacity"
        ),
        "rounds": gr.Slider(
            0,
            max(max_rounds, 1),
            value=service.grounder.model.rounds,
            step=1,
            label="Rounds of refinement",
            visible=max_rounds > 0,
            elem_id="rounds",
        ),
        "lines": gr.CheckboxGroup(LINES, value=LINES, label="Lines", elem_id="lines"),
    }


def _lay_out_retrieval(service: Service) -> dict[str, Any]:
    gr.HTML(render.render_library(library.describe(service.entries), service.notes))
    report = gr.Textbox(label="A report: which films are like it?", lines=3, elem_id="report")
    with gr.Row():
        to_films = gr.Button("Find films", variant="primary", elem_id="find-films")
        to_reports = gr.Button("Find reports of the film", elem_id="find-reports")
    found = gr.HTML(elem_id="found")
    return {"report": report, "to_films": to_films, "to_reports": to_reports, "found": found}


# Calls -------------------------------------------------------------------------------------------


def _answer(function: Callable[..., tuple], num_outputs: int) -> Callable[..., list]:
    """Returns a function for gradio, whose first output is the message.

    A mistake of the user becomes one sentence in the page, and what was there stays. So does an
    error of ours, of which the kind and the place are printed, and no word or name of the user's.
    """

    @wraps(function)
    def call(*values: Any) -> list:
        try:
            return ["", *function(*values)]
        except UserError as error:
            sentence = str(error)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            print(f"error of the page: {type(error).__name__} in {place}", file=sys.stderr)
            sentence = f"the page had an error ({type(error).__name__}); try something else"
        kept = [gr.skip() for _ in range(num_outputs - 1)]
        return [render.render_message(sentence), *kept]

    return call


def _listen(
    trigger: Any, function: Callable[..., tuple], inputs: list, outputs: list, **options: Any
) -> Any:
    """Lets an event call a function; `outputs` begins with the message.

    The function gets what the browser has sent. Otherwise gradio makes an empty file for each
    upload, which nobody deletes, and has no sentence for a number that is missing or out of range.
    """
    options = {"show_progress": "minimal", "api_visibility": "private"} | options
    options["preprocess"] = False
    return trigger(_answer(function, len(outputs)), inputs, outputs, **options)


def _show_film(film: OpenFilm) -> tuple:
    """Returns what is known of a film, and the sliders of its window."""
    about, window = render.render_film(film, film.film.name), film.window
    if window is None:
        return about, gr.update(visible=False), gr.update(visible=False)
    low, high = min(window.low, window.center), max(window.high, window.center)
    span = max(high - low, window.width, 2.0)
    level = gr.update(visible=True, minimum=low, maximum=high, value=window.center)
    return about, level, gr.update(visible=True, minimum=1, maximum=span, value=window.width)


def _connect_films(blocks: Any, parts: Components, service: Service, folder: Path) -> None:
    title = service.examples[0].title

    def ground(session: str, *question: Any) -> str:
        try:
            return _ground(service, session, *question)
        except UserError as error:  # of the phrases; the film is open
            return render.render_message(str(error))

    def open_upload(
        file: dict[str, Any] | None,
        typed: str,
        picked: list[str],
        threshold: float,
        rounds: float,
        request: gr.Request,
    ) -> tuple:
        if not file:
            raise UserError(f"no file has come; {uploads.REMEDY}")
        session = str(request.session_hash)
        film = service.open_upload(session, Path(file["path"]), folder)
        results = ground(session, typed, picked, threshold, rounds)
        return None, *_show_film(film), results

    def open_example(title: str, threshold: float, rounds: float, request: gr.Request) -> tuple:
        session = str(request.session_hash)
        film = service.open_example(session, title)
        typed = "\n".join(film.phrases[:MAX_PHRASES])
        return typed, [], *_show_film(film), ground(session, typed, [], threshold, rounds)

    def start(threshold: float, rounds: float, request: gr.Request) -> tuple:
        return title, *open_example(title, threshold, rounds, request)

    def change_window(
        level: float,
        width: float,
        typed: str,
        picked: list[str],
        threshold: float,
        rounds: float,
        request: gr.Request,
    ) -> tuple:
        session = str(request.session_hash)
        film = service.change_window(session, level, width)
        results = ground(session, typed, picked, threshold, rounds)
        return render.render_film(film, film.film.name), results

    question = [parts.typed, parts.picked, parts.threshold, parts.rounds]
    shown = [parts.about, parts.level, parts.width, parts.results]
    opened = [parts.typed, parts.picked, *shown]
    first = [parts.message, parts.example, *opened]
    _listen(blocks.load, start, question[2:], first)
    inputs = [parts.example, *question[2:]]
    _listen(parts.example.input, open_example, inputs, [parts.message, *opened])
    sent = _listen(
        parts.upload.upload,
        open_upload,
        [parts.upload, *question],
        [parts.message, parts.example, *shown],
    )
    # Also of a file that was refused, which is deleted too.
    sent.then(lambda: None, None, [parts.upload], api_visibility="private", show_progress="hidden")
    for slider in (parts.level, parts.width):
        _listen(
            slider.input,
            change_window,
            [parts.level, parts.width, *question],
            [parts.message, parts.about, parts.results],
            trigger_mode="always_last",
        )


def _ground(
    service: Service, session: str, typed: str, picked: list[str], threshold: float, rounds: float
) -> str:
    display = _read_display(service, threshold, OPACITY, rounds)
    return service.ground(session, typed, picked, display.threshold, display.rounds)


def _read_display(
    service: Service, threshold: float | None, opacity: float | None, rounds: float | None
) -> Display:
    most = service.grounder.max_rounds
    return Display(
        check_number(threshold, "threshold", 0, 1),
        check_number(opacity, "opacity", 0, 1),
        int(check_number(rounds, "number of rounds", 0, most)),
    )


def _connect_results(trigger: Any, parts: Components, service: Service, **options: Any) -> None:
    def ground(
        typed: str, picked: list[str], threshold: float, rounds: float, request: gr.Request
    ) -> tuple:
        session = str(request.session_hash)
        return (_ground(service, session, typed, picked, threshold, rounds),)

    question = [parts.typed, parts.picked, parts.threshold, parts.rounds]
    _listen(trigger, ground, question, [parts.message, parts.results], **options)


def _connect_phrases(parts: Components, service: Service) -> None:
    for trigger in (parts.locate.click, parts.typed.submit, parts.picked.input):
        _connect_results(trigger, parts, service)
    for slider in (parts.threshold, parts.rounds):
        _connect_results(slider.input, parts, service, trigger_mode="always_last")
    # These two change how layers are shown, for which the server is not asked.
    parts.opacity.input(None, [parts.opacity], None, js=SET_OPACITY, api_visibility="private")
    parts.lines.input(None, [parts.lines], None, js=SET_LINES, api_visibility="private")

    def save(kind: str) -> Callable[..., tuple]:
        def encode(
            typed: str,
            picked: list[str],
            threshold: float,
            opacity: float,
            rounds: float,
            request: gr.Request,
        ) -> tuple:
            display = _read_display(service, threshold, opacity, rounds)
            session = str(request.session_hash)
            return (service.download(session, kind, typed, picked, display),)

        return encode

    inputs = [parts.typed, parts.picked, parts.threshold, parts.opacity, parts.rounds]
    for kind, button in parts.save.items():
        event = _listen(button.click, save(kind), inputs, [parts.message, parts.parcel])
        event.success(None, [parts.parcel], [parts.parcel], js=SAVE, api_visibility="private")


def _connect_retrieval(parts: Components, service: Service) -> None:
    def find_films(text: str) -> tuple:
        return (service.find_films(text),)

    def find_reports(request: gr.Request) -> tuple:
        return (service.find_reports(str(request.session_hash)),)

    outputs = [parts.message, parts.found]
    _listen(parts.to_films.click, find_films, [parts.report], outputs)
    _listen(parts.to_reports.click, find_reports, [], outputs)
