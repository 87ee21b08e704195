"""The texts of the OpenAPI description: what each route accepts and returns, with examples."""

from __future__ import annotations

from typing import Any

from moesr.runtime.images.color import COLOR_FIXES
from moesr.runtime.loop.settings import takes_fidelity
from moesr.runtime.loop.tile_layout import TILINGS
from moesr.runtime.loop.work import PRIORITIES
from moesr.runtime.sampling.samplers import SAMPLERS
from moesr.runtime.serve.result_format import FORMATS
from moesr.runtime.upscaler import Upscaler

ABOUT = (
    "Super-resolution of images. POST /v1/upscale answers with the result; POST /v1/jobs answers at once and "
    "the result is fetched later. Errors are JSON problem details (RFC 9457)."
)


def _option(name: str, kind: str, text: str, example: Any, **more: Any) -> dict[str, Any]:
    schema = {"type": kind, **more}
    return {
        "name": name,
        "in": "query",
        "required": False,
        "description": text,
        "schema": schema,
        "example": example,
    }


OPTIONS = [
    _option("engine", "string", "Name of an engine (GET /v1/engines); default: the first one", "demo-x4"),
    _option("steps", "integer", "Sampling steps; default: the engine's", 20, minimum=1),
    _option("sampler", "string", "Sampler; default: the engine's", "ddpm", enum=list(SAMPLERS)),
    _option("seed", "integer", "Seed of the noise: the same seed gives the same result", 42, minimum=0),
    _option(
        "fidelity",
        "number",
        "From 0 (free) to 1 (close to the input)",
        1.0,
        minimum=0,
        maximum=1,
    ),
    _option("guidance", "number", "Strength of the prompts, for engines that have them", 1.0, minimum=0),
    _option("reuse", "integer", "Interval of the steps that compute deep features", 1, minimum=1),
    _option("start_step", "integer", "Steps to leave out, from the noised input", 0, minimum=0),
    _option(
        "tiling", "string", "Tiles of large images; default: the engine's", "shifted", enum=list(TILINGS)
    ),
    _option("tileable", "boolean", "Opposite sides of the image meet, in the result too", False),
    _option("keep_colors_under_alpha", "boolean", "Keep colors of transparent pixels", False),
    _option("color_fix", "string", "Correction towards the input's colors", "adain", enum=list(COLOR_FIXES)),
    _option(
        "priority", "string", "Share of the machine relative to other images", "normal", enum=list(PRIORITIES)
    ),
    _option(
        "format",
        "string",
        "Format of the result; default: that of the header Accept, else PNG",
        "png",
        enum=list(FORMATS),
    ),
    _option("quality", "integer", "Quality of JPEG and WebP", 95, minimum=1, maximum=100),
]

_IMAGE = {"schema": {"type": "string", "format": "binary"}}
_FORM = {
    "schema": {
        "type": "object",
        "required": ["image"],
        "properties": {
            "image": {"type": "string", "format": "binary", "description": "The image file"},
            **{option["name"]: option["schema"] for option in OPTIONS},
        },
    }
}
_BODY = {
    "requestBody": {
        "required": True,
        "description": "The bytes of an image file, or a form whose fields may hold the options",
        "content": {"image/*": _IMAGE, "application/octet-stream": _IMAGE, "multipart/form-data": _FORM},
    },
    "parameters": OPTIONS,
}


def _problem(text: str) -> dict[str, Any]:
    example = {"type": "about:blank", "title": "..", "status": 400, "detail": text}
    return {"description": text, "content": {"application/problem+json": {"example": example}}}


_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: _problem("An option is wrong, or the request holds no image"),
    401: _problem("A bearer token is needed"),
    404: _problem("No engine of that name is served"),
    406: _problem("No format of results is acceptable to the client"),
    408: _problem("The upload was too slow"),
    413: _problem("The request, or the image's size in pixels, is larger than allowed"),
    415: _problem("The file is not an image of a supported format"),
    422: _problem("The image is damaged"),
    503: _problem("The queue is full, or too much is being uploaded; see the header Retry-After"),
    507: _problem("The server's disk is full"),
}
_JOB = {
    "id": "0123456789abcdef0123456789abcdef",
    "status": "running",
    "stage": "sampling",
    "fraction": 0.4,
    "seconds_left": 3.2,
    "position": 0,
}
_RESULT = {"description": "The result", "content": dict.fromkeys(FORMATS.values(), _IMAGE)}
_STATE = {"description": "The job", "content": {"application/json": {"example": _JOB}}}
_NO_JOB = {404: _problem("No such job")}

UPSCALE: dict[str, Any] = {
    "summary": "Super-resolve an image and return the result",
    "openapi_extra": _BODY,
    "responses": {**_REFUSALS, 200: _RESULT, 504: _problem("The image took too long")},
}
SUBMIT: dict[str, Any] = {
    "summary": "Accept an image as a job; the job survives a restart of the server",
    "openapi_extra": _BODY,
    "responses": {**_REFUSALS, 202: _STATE},
}
STATUS: dict[str, Any] = {"summary": "The state of a job", "responses": {**_NO_JOB, 200: _STATE}}
EVENTS: dict[str, Any] = {
    "summary": "Server-sent events: the state of a job whenever it changes, until it ends",
    "responses": {**_NO_JOB, 200: {"description": "Events", "content": {"text/event-stream": {}}}},
}
RESULT: dict[str, Any] = {
    "summary": "The result of a job that is done",
    "responses": {**_NO_JOB, 200: _RESULT, 409: _problem("The job is not done yet")},
}
PREVIEW: dict[str, Any] = {
    "summary": "The image as far as it has been sampled, in small; the first request asks for it",
    "responses": {
        **_NO_JOB,
        200: {"description": "A JPEG of at most 512 x 512 pixels", "content": {"image/jpeg": _IMAGE}},
        204: {"description": "There is none: the job is not being sampled, or its next step has not ended"},
    },
}
CANCEL: dict[str, Any] = {
    "summary": "Cancel a job, or remove one that has ended",
    "responses": {**_NO_JOB, 204: {"description": "The job is removed"}},
}
HEALTH: dict[str, Any] = {"summary": "Report that the process responds"}
READY: dict[str, Any] = {"summary": "Report whether images are accepted, and the backend of each engine"}
ENGINES: dict[str, Any] = {"summary": "The engines and their defaults"}
METRICS: dict[str, Any] = {"summary": "Metrics for Prometheus"}


def facts(name: str, upscaler: Upscaler) -> dict[str, Any]:
    """Return the facts about an engine that clients need."""
    m = upscaler.manifest
    return {
        "name": name,
        "model": m.name,
        "scale": m.scale,
        "precision": m.precision,
        "steps": m.steps,
        "most_steps": m.schedule.timesteps,
        "sampler": m.sampler,
        "samplers": list(SAMPLERS),
        "fidelity": m.fidelity,
        "takes_fidelity": takes_fidelity(m),
        "guidance": m.guidance if m.guided else None,
        "color_fixes": list(COLOR_FIXES),
        "reuse": m.deep is not None,
        "backend": upscaler.backend.label,
    }
