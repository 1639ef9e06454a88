"""The page itself: Gradio's components, what they do, and its place in the application."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from gradio.utils import LRUCache
from starlette.routing import Mount

from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import UsageError
from ditc.runtime.request import Request
from ditc.runtime.serving.api.request_limits import RequestLimits
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.ui import html
from ditc.runtime.serving.ui.draw import views
from ditc.runtime.serving.ui.form import Form, form_of
from ditc.runtime.serving.ui.gate import Gate, visit_of
from ditc.runtime.serving.ui.visitors import MOST_VISITS, Visitors
from ditc.runtime.spec import Range

PATH = "/ui"
# Requests that the page draws at one time, and requests that may wait for their turn in it. The scheduler and its
# bounds come after that.
AT_ONCE, WAITING = 16, 32
# Gradio remembers the state of so many visits, of 80 kB each. The page has no state, so any number would do. Of so many
# events it makes statistics after every further one, which nobody sees.
REMEMBERED = 128
HERE = Path(__file__).parent
HEADING = '<div class="ditc-title"><h1>ditc</h1><span>pictures from text</span></div>'
EARLIER = (
    '<div class="ditc-earlier-title">Earlier pictures</div><div class="ditc-earlier ditc-pictures"></div>'
)


def add_page(app: FastAPI, models: Models, *, limits: RequestLimits) -> None:
    """Put the page under /ui of the application, behind the same layers as all other paths.

    Raises:
        UsageError: no model draws pictures.
    """
    visitors = Visitors()
    blocks = layout(models, limits, visitors)
    # Gradio mounts itself with a lifespan, which a server may not run. The gate starts it with the first request.
    holder = FastAPI()
    script = (HERE / "page.js").read_text(encoding="utf-8")
    gr.mount_gradio_app(
        holder,
        blocks,
        path=PATH,
        theme=gr.themes.Default(
            primary_hue="indigo",
            neutral_hue="slate",
            font=["system-ui", "sans-serif"],
            font_mono=["monospace"],
        ),
        css=(HERE / "page.css").read_text(encoding="utf-8"),
        head=f'<link rel="icon" href="data:,"><script>{script}</script>',
        footer_links=[],
        run_history=False,
        show_error=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
        max_file_size=1,
    )
    (gradio,) = (route.app for route in holder.routes if isinstance(route, Mount))
    app.mount(PATH, Gate(gradio, visitors, start=blocks.run_startup_events))

    @app.get("/", include_in_schema=False)
    @app.get(PATH, include_in_schema=False)
    async def page() -> RedirectResponse:
        # A path alone, because a host would be the one that the client sent.
        return RedirectResponse(f"{PATH}/")


def layout(models: Models, limits: RequestLimits, visitors: Visitors) -> gr.Blocks:
    """The components and their events."""
    manifests = {name: load_manifest(path) for name, path in models.bundles.items()}
    forms = {
        name: form_of(manifest) for name, manifest in manifests.items() if not manifest.latents.has_frames
    }
    if not forms:
        raise UsageError(
            "the page of --ui draws pictures, and each of these bundles draws videos",
            hint="leave --ui out: videos are drawn over POST /v1/videos",
        )
    names = list(forms)
    first = forms[names[0]]
    with gr.Blocks(title="ditc", analytics_enabled=False) as blocks:
        gr.HTML(HEADING)
        with gr.Row(elem_classes="ditc-columns"):
            with gr.Column(scale=4, min_width=320, elem_classes="ditc-left"):
                with gr.Column(elem_classes="ditc-first"):
                    prompt = gr.Textbox(
                        label="Prompt",
                        lines=3,
                        max_lines=8,
                        autofocus=True,
                        placeholder="What should the picture show?",
                        elem_id="ditc-prompt",
                    )
                    with gr.Row():
                        draw = gr.Button("Draw", variant="primary", min_width=120, elem_id="ditc-draw")
                        cancel = gr.Button("Cancel", interactive=False, min_width=120, elem_id="ditc-cancel")
                with gr.Column(elem_classes="ditc-settings"):
                    model = gr.Dropdown(
                        names,
                        value=names[0],
                        label="Model",
                        visible=len(forms) > 1,
                        elem_id="ditc-model",
                    )
                    fields = _fields(first, limits)
                    with gr.Row():
                        seed = gr.Number(
                            label="Seed", value=0, precision=0, minimum=0, min_width=140, elem_id="ditc-seed"
                        )
                        chance = gr.Checkbox(
                            label="New seed each time", value=True, min_width=140, elem_id="ditc-random"
                        )
            with gr.Column(scale=7, min_width=320, elem_classes="ditc-right"):
                result = gr.HTML(html.EMPTY, elem_id="ditc-result")
                gr.HTML(EARLIER)

        def draws(
            request: gr.Request,
            name: str,
            prompt: str,
            seed: float | None,
            chance: bool,
            *fields: Any,
        ) -> Iterator[tuple[Any, ...]]:
            shown = views(
                models,
                name,
                partial(_request, forms, name, prompt, seed, chance, *fields),
                limits=limits,
                caller=request.request.state.caller,
                visitors=visitors,
                visit=_visit(request),
            )
            for view in shown:
                seed_used = gr.skip() if view.seed is None else view.seed
                yield view.html, seed_used, _button(view.ended), _button(not view.ended)

        def cancels(request: gr.Request) -> None:
            visitors.cancel(_visit(request))

        gr.on(
            [draw.click, prompt.submit],
            draws,
            [model, prompt, seed, chance, *fields],
            [result, seed, draw, cancel],
            js="(...inputs) => { ditcKeepPictures(); return inputs; }",
            concurrency_limit=AT_ONCE,
            concurrency_id="draw",
            show_progress="hidden",
            api_visibility="private",
        )
        cancel.click(cancels, None, None, **QUICK)
        model.change(lambda name: _updates(forms[name], limits), model, fields, **QUICK)
    blocks.state_session_capacity = REMEMBERED
    blocks.queue(max_size=WAITING, api_open=False)
    blocks._queue.ANALYTICS_MAX_EVENTS = REMEMBERED
    # In Gradio 6.31 this is a dict, which grows with every visit.
    blocks._queue.pending_event_ids_session = LRUCache(MOST_VISITS)
    return blocks


# Events that take no time.
QUICK: dict[str, Any] = {
    "concurrency_limit": AT_ONCE,
    "concurrency_id": "quick",
    "show_progress": "hidden",
    "api_visibility": "private",
}


def _visit(request: gr.Request) -> str:
    return visit_of(request.request.scope, request.session_hash or "")


def _button(active: bool) -> Any:
    return gr.update(interactive=active)


def _request(
    forms: Mapping[str, Form],
    name: str,
    prompt: str,
    seed: float | None,
    chance: bool,
    negative: str,
    size: str,
    width: float,
    height: float,
    steps: float,
    guidance: float,
    count: float,
) -> Request:
    """What the form asks for. Its values come from a client, so any of them may be wrong."""
    form = forms[name]
    if form.sizes:
        width, height = map(int, size.split("x"))
    return Request(
        prompt=prompt,
        negative_prompt=negative if form.has_negative_prompt else "",
        height=int(height),
        width=int(width),
        num_inference_steps=int(steps),
        guidance_scale=float(guidance) if form.has_guidance else None,
        seed=random.getrandbits(32) if chance or seed is None else int(seed),
        num_images_per_prompt=int(count),
    )


def _fields(form: Form, limits: RequestLimits) -> list[Any]:
    """The components that differ between models, in the order of `_request`."""
    negative, size, width, height, steps, guidance, count = _values(form, limits)
    made: list[Any] = [
        gr.Textbox(
            label="Negative prompt",
            placeholder="What it should not show",
            lines=1,
            max_lines=4,
            elem_id="ditc-negative",
            **negative,
        ),
        gr.Dropdown(label="Size, width × height", elem_id="ditc-size", **size),
    ]
    with gr.Row():
        made += [
            gr.Slider(label="Width", min_width=140, buttons=[], elem_id="ditc-width", **width),
            gr.Slider(label="Height", min_width=140, buttons=[], elem_id="ditc-height", **height),
        ]
    with gr.Row():
        made += [
            gr.Slider(
                label="Steps", minimum=1, step=1, min_width=140, buttons=[], elem_id="ditc-steps", **steps
            ),
            gr.Slider(
                label="Guidance",
                minimum=0,
                maximum=20,
                step=0.1,
                min_width=140,
                buttons=[],
                elem_id="ditc-guidance",
                **guidance,
            ),
        ]
    return [
        *made,
        gr.Slider(label="Number of pictures", minimum=1, step=1, buttons=[], elem_id="ditc-count", **count),
    ]


def _updates(form: Form, limits: RequestLimits) -> list[Any]:
    return [gr.update(**values) for values in _values(form, limits)]


def _values(form: Form, limits: RequestLimits) -> list[dict[str, Any]]:
    """What those components show for a model."""
    defaults, free = form.defaults, not form.sizes
    sizes = [(f"{width} × {height}", f"{width}x{height}") for height, width in form.sizes]
    return [
        {"visible": form.has_negative_prompt},
        {
            "choices": sizes,
            "value": None if free else f"{defaults.width}x{defaults.height}",
            "visible": not free,
        },
        {"value": defaults.width, "visible": free, **_range(form.width)},
        {"value": defaults.height, "visible": free, **_range(form.height)},
        {"value": min(defaults.num_inference_steps, limits.max_steps), "maximum": limits.max_steps},
        {"value": defaults.guidance_scale, "visible": form.has_guidance},
        {"value": 1, "maximum": limits.max_images},
    ]


def _range(side: Range) -> dict[str, int]:
    return {"minimum": side.min, "maximum": side.max, "step": side.multiple_of}
