"""The prompts of an engine. Texts become token ids during export, so that the runtime needs no tokenizer."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from moesr.runtime.errors import UsageError
from moesr.training.config import NEGATIVE_PROMPT, POSITIVE_PROMPT, TextConfig, prompt_ids

PUBLISHED = {
    "": prompt_ids(""),
    "(masterpiece:2), (best quality:2), (realistic:2), (very clear:2)": POSITIVE_PROMPT,
    "3d, cartoon, anime, sketches, (worst quality:2), (low quality:2)": NEGATIVE_PROMPT,
}
"""Published texts, whose tokens are known without a vocabulary."""

GUIDANCE = 7.0
"""The strength of guidance in the published scripts."""

Ids = tuple[int, ...]  # of tokens, from start to end


@dataclass(frozen=True)
class PromptOptions:
    """A user's choice of prompts and of the default strength of guidance; None is the model's own."""

    prompt: str | None = None
    negative_prompt: str | None = None
    guidance: float | None = None

    @property
    def guided(self) -> bool:
        """True if guidance is wanted."""
        return self.negative_prompt is not None or self.guidance not in (None, 1.0)

    @property
    def empty(self) -> bool:
        """True if the user chose nothing."""
        return self == PromptOptions()


@dataclass(frozen=True)
class Prompts:
    """One prompt, or with guidance a prompt and a negative prompt, and the default strength."""

    texts: tuple[str, ...]  # for readers of the manifest
    ids: tuple[Ids, ...]
    guidance: float


def choose(config: TextConfig, wish: PromptOptions) -> Prompts:
    """Return the prompts of an engine, with the model's own for those that the user did not choose.

    UsageError is raised if a text is too long, or if no tokenizer is installed for it.
    """
    usual = config.guided_prompt if wish.guided else config.prompt
    ids = [usual if wish.prompt is None else tokens(wish.prompt, config)]
    if wish.guided:
        text = wish.negative_prompt
        ids.append(config.negative_prompt if text is None else tokens(text, config))
    strength = GUIDANCE if wish.guidance is None else wish.guidance
    return Prompts(tuple(map(text_of, ids)), tuple(ids), strength if wish.guided else 1.0)


def tokens(text: str, config: TextConfig) -> Ids:
    """Return the token ids of a text: CLIP's byte-pair encoding; "(x:2)" has no special meaning."""
    if text in PUBLISHED:
        return PUBLISHED[text]
    found = prompt_ids(" ".join(map(str, _library(text).encode(text))))
    if len(found) > config.tokens:
        raise UsageError(
            f"the prompt {text!r:.60} has {len(found) - 2} tokens, expected at most {config.tokens - 2}; "
            "shorten it"
        )
    if max(found) >= config.vocabulary:
        raise UsageError(
            f"the prompt {text!r:.60} has token {max(found)}, the model knows {config.vocabulary}; "
            "use other words"
        )
    return found


def text_of(ids: Ids) -> str:
    """Return the text of token ids, or the ids as text if no tokenizer is installed."""
    known = {tokens: text for text, tokens in PUBLISHED.items()}
    if ids in known:
        return known[ids]
    try:
        return _library(f"tokens {ids}").decode(list(ids[1:-1])).strip()
    except UsageError:
        return f"tokens {' '.join(map(str, ids[1:-1]))}"


def _library(text: str) -> Any:
    """CLIP's tokenizer with its vocabulary; UsageError if it is not installed."""
    try:
        return importlib.import_module("instant_clip_tokenizer").Tokenizer()
    except ImportError as error:
        raise UsageError(
            f"the prompt {text!r:.60} needs CLIP's vocabulary ({error}); install it with: pip install "
            "instant-clip-tokenizer (built for Python 3.12 and earlier), or use a published prompt"
        ) from error
