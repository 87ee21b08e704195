"""The settings of one image: the options that callers give, their defaults, and all checks of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypedDict, Unpack

from moesr.runtime.engine.graph_io import DECODER
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.errors import UsageError
from moesr.runtime.images.color import COLOR_FIXES
from moesr.runtime.loop.tile_layout import TILINGS, TileLayout, usual_tiling
from moesr.runtime.options import (
    DEFAULT_COLOR_FIX,
    DEFAULT_SEED,
    check_fidelity,
    check_flag,
    check_guidance,
    check_reuse,
    check_seed,
    one_of,
    whole,
)
from moesr.runtime.sampling.samplers import SAMPLERS
from moesr.runtime.sampling.schedule import MAX_TIMESTEPS as MAX_STEPS


class Options(TypedDict, total=False):
    """Options of one image. An option that is left out or None takes its default.

    `steps` (1 to the schedule's number of timesteps), `sampler` ("ddpm", "ddim" or "dpm++2m"), `fidelity` (0,
    a free result, to 1, one that follows the LR image) and `guidance` (0 to 100, for engines with a negative
    prompt) default to the engine's values. `seed` (0 to 2**64 - 1) defaults to 42 and `color_fix` ("adain",
    "wavelet" or "none") to "adain". With `reuse` N, 1 by default, an expert computes its deep levels at one
    step in N, and the other steps reuse those features; the engine must have been exported for that.
    `start_step` K, 0 by default, leaves out the first K steps and begins with the latent of the LR image and
    as much noise as step K expects; without an encoder the LR image itself stands for its latent. `tiling` of
    large images is "overlap", the wide overlap of the published samplers, or "shifted", a narrow overlap on a
    grid that moves from step to step; the default is the engine's. With `tileable` (False by default) the
    image is a texture whose opposite sides meet, and so do those of the result. `checkpoint_every` N, 0 by
    default, saves the latent in the cache directory after every N steps, so that the same call goes on there
    if the process was killed.
    `keep_colors_under_alpha` (False by default) keeps the colors of fully transparent pixels, for textures
    that have a mask in alpha.
    """

    steps: int | None
    sampler: str | None
    seed: int | None
    color_fix: str | None
    fidelity: float | None
    guidance: float | None
    reuse: int | None
    start_step: int | None
    tiling: str | None
    tileable: bool | None
    checkpoint_every: int | None
    keep_colors_under_alpha: bool | None


@dataclass(frozen=True)
class Settings:
    """Options with their defaults filled in and checked, as `resolve` makes them."""

    steps: int
    sampler: str
    seed: int
    fidelity: float
    guidance: float = 1.0  # strength of classifier-free guidance; 1 means none
    reuse: int = 1  # all levels are computed at one step in `reuse`
    color_fix: str = DEFAULT_COLOR_FIX
    start_step: int = 0
    tiling: str = "overlap"
    tileable: bool = False
    checkpoint_every: int = 0  # steps after which the latent is saved; 0: never
    keep_colors_under_alpha: bool = False

    def recorded(self) -> dict[str, Any]:
        """Return the settings as results record them, without those that have no effect, as before."""
        values = asdict(self)
        del values["checkpoint_every"]  # it changes no result
        for name in ("guidance", "reuse"):
            if values[name] == 1:
                del values[name]
        for name in ("start_step", "tileable", "keep_colors_under_alpha"):
            if not values[name]:
                del values[name]
        if values["tiling"] == "overlap":
            del values["tiling"]
        return values

    def layout(self, manifest: Manifest, height: int, width: int) -> TileLayout:
        """The tiles of an image of so many LR pixels."""
        return TileLayout(manifest, height, width, self.tiling, self.tileable)


OPTION_NAMES = tuple(Options.__annotations__)
_CHECKS = {"seed": check_seed, "fidelity": check_fidelity, "guidance": check_guidance, "reuse": check_reuse}


def check_options(options: Mapping[str, Any]) -> None:
    """Check the options that can be checked without an engine; UsageError names the wrong option."""
    for name, check in _CHECKS.items():
        if options.get(name) is not None:
            check(options[name])


def resolve(manifest: Manifest, **options: Unpack[Options]) -> Settings:
    """Fill in an engine's defaults and check all options; UsageError names the wrong option."""
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := given.keys() - set(OPTION_NAMES):
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}, expected {', '.join(OPTION_NAMES)}")
    m = manifest
    steps = whole("steps", given.get("steps", m.steps), 1, m.schedule.timesteps)
    settings = Settings(
        steps=steps,
        sampler=one_of("sampler", given.get("sampler", m.sampler), SAMPLERS),
        seed=check_seed(given.get("seed", DEFAULT_SEED)),
        fidelity=check_fidelity(given.get("fidelity", m.fidelity)),
        guidance=check_guidance(given.get("guidance", m.guidance)),
        reuse=check_reuse(given.get("reuse", 1)),
        color_fix=one_of("color_fix", given.get("color_fix", DEFAULT_COLOR_FIX), COLOR_FIXES),
        start_step=whole("start_step", given.get("start_step", 0), 0, steps - 1),
        tiling=one_of("tiling", given.get("tiling", usual_tiling(m)), TILINGS),
        tileable=check_flag("tileable", given.get("tileable", False)),
        checkpoint_every=whole("checkpoint_every", given.get("checkpoint_every", 0), 0, MAX_STEPS),
        keep_colors_under_alpha=check_flag(
            "keep_colors_under_alpha", given.get("keep_colors_under_alpha", False)
        ),
    )
    check_settings(m, settings)
    return settings


def check_settings(manifest: Manifest, settings: Settings) -> None:
    """Raise UsageError if the engine does not support the settings."""
    m = manifest
    if settings.guidance != 1.0 and not m.guided:
        raise UsageError(
            f"guidance is {settings.guidance:g}, but {m.name} has no negative prompt: export the engine "
            "with moesr-export --guidance S, or leave guidance at 1"
        )
    if settings.reuse > 1 and not m.deep:
        raise UsageError(
            f"reuse is {settings.reuse}, but {m.name} has no shallow graphs: export the engine with "
            "moesr-export --reuse, or leave reuse at 1"
        )
    if settings.start_step and m.condition == "image" and m.latent_channels != 3:
        raise UsageError(
            f"start_step is {settings.start_step}, but {m.name} has no encoder to make a latent of "
            f"{m.latent_channels} channels; leave start_step at 0"
        )
    if settings.fidelity != m.fidelity and not takes_fidelity(m):
        raise UsageError(
            f"fidelity is {settings.fidelity:g}, but the decoder of {m.name} takes no features of the LR "
            "image: leave fidelity out, or use a model with such a decoder (StableSR: import it with --cfw "
            "FILE; plain latent diffusion has none)"
        )


def takes_fidelity(manifest: Manifest) -> bool:
    """Whether the engine's decoder takes features of the LR image, so that fidelity has an effect."""
    decoder = manifest.graphs.get(DECODER)
    return decoder is not None and any(spec.name == "fidelity" for spec in decoder.inputs)
