"""Formats of results, and the choice between them from the option `format` and the header `Accept`."""

from __future__ import annotations

from moesr.runtime.serve.problems import Problem

FORMATS = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "tiff": "image/tiff",
}
"""Formats of results, by the name in `format`, with their media types."""

SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "tiff": ".tif"}

_OTHER_NAMES = {"jpg": "jpeg", "tif": "tiff"}


def choose(asked: str | None, accept: str, *, described: bool = False) -> str:
    """Return the format of a result: the option `format` if there is one, else the best for `Accept`.

    `described` means that the response itself is JSON, so a client that accepts JSON accepts a PNG as well.
    Problem 400 is raised if the option is not a format, and 406 if the client accepts none.
    """
    if asked is not None:
        name = _OTHER_NAMES.get(asked.lower(), asked.lower())
        if name not in FORMATS:
            raise Problem(400, f"format is {asked[:40]!r}, expected one of {', '.join(FORMATS)}")
        return name
    ranges = _media_ranges(accept)
    if not ranges:
        return "png"
    best = max(FORMATS, key=lambda name: _quality(ranges, FORMATS[name]))
    if _quality(ranges, FORMATS[best])[0] > 0:
        return best
    if described and any(media == "application/json" and weight > 0 for media, weight in ranges):
        return "png"
    raise Problem(406, f"the possible formats of a result are {', '.join(FORMATS.values())}")


def _media_ranges(accept: str) -> list[tuple[str, float]]:
    """Return the media ranges of an `Accept` header with their weights, in order (RFC 9110, 12.5.1)."""
    ranges: list[tuple[str, float]] = []
    for part in accept.split(","):
        media, *parameters = (word.strip().lower() for word in part.split(";"))
        values = {
            name.strip(): value.strip() for name, _, value in (text.partition("=") for text in parameters)
        }
        if media:
            ranges.append((media, _weight(values.get("q", "1"))))
    return ranges


def _weight(text: str) -> float:
    """Return a weight from 0 to 1; an invalid weight counts as 0, not acceptable."""
    try:
        weight = float(text)
    except ValueError:
        return 0.0
    return weight if 0.0 <= weight <= 1.0 else 0.0


def _quality(ranges: list[tuple[str, float]], media_type: str) -> tuple[float, int, int]:
    """Return the weight of the most specific range that matches a media type, then keys that break ties."""
    patterns = ("*/*", f"{media_type.partition('/')[0]}/*", media_type)
    found = [
        (patterns.index(media), weight, -place)
        for place, (media, weight) in enumerate(ranges)
        if media in patterns
    ]
    if not found:
        return 0.0, 0, 0
    specific, weight, place = max(found)
    return weight, specific, place
