"""The prompts of an exported engine: defaults, and token ids of given texts."""

from __future__ import annotations

import sys

import pytest
from graphs import write_checkpoint

from moesr.export import cli
from moesr.export.prompts import GUIDANCE, PUBLISHED, PromptOptions, Prompts, choose, tokens
from moesr.runtime import UsageError
from moesr.training.config import NEGATIVE_PROMPT, POSITIVE_PROMPT, TextConfig

EMPTY, POSITIVE, NEGATIVE = PUBLISHED
CONFIG = TextConfig()


@pytest.fixture
def library():
    """CLIP's tokenizer; the test is skipped if it is not installed, as on the newest versions of Python."""
    return pytest.importorskip("instant_clip_tokenizer").Tokenizer()


@pytest.mark.parametrize(
    ("wish", "texts", "guidance"),
    [
        (PromptOptions(), (EMPTY,), 1.0),
        (PromptOptions(guidance=1.0), (EMPTY,), 1.0),
        (PromptOptions(guidance=5.5), (POSITIVE, NEGATIVE), 5.5),
        (PromptOptions(guidance=0.0), (POSITIVE, NEGATIVE), 0.0),
        (PromptOptions(prompt=POSITIVE), (POSITIVE,), 1.0),
        (PromptOptions(negative_prompt=EMPTY), (POSITIVE, EMPTY), GUIDANCE),
        (PromptOptions(EMPTY, NEGATIVE, 1.0), (EMPTY, NEGATIVE), 1.0),
    ],
)
def test_default_prompts_are_the_published_ones(wish: PromptOptions, texts: tuple[str, ...], guidance: float):
    ids = tuple(PUBLISHED[text] for text in texts)
    assert choose(CONFIG, wish) == Prompts(texts, ids, guidance)


def test_published_prompts_need_no_tokenizer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "instant_clip_tokenizer", None)
    assert choose(CONFIG, PromptOptions(guidance=7.0)).ids == (POSITIVE_PROMPT, NEGATIVE_PROMPT)
    with pytest.raises(UsageError, match=r"'a photo' needs CLIP's vocabulary .*pip install instant-clip"):
        tokens("a photo", CONFIG)


def test_tokenizer_gives_the_published_ids(library):
    for text, ids in PUBLISHED.items():
        assert tuple(library.encode(text)) == ids[1:-1]


def test_prompts_of_the_checkpoint_are_decoded_if_the_tokenizer_is_installed(library, monkeypatch):
    config = TextConfig(prompt=(49406, 320, 1125, 49407))
    assert choose(config, PromptOptions()).texts == ("a photo",)
    monkeypatch.setitem(sys.modules, "instant_clip_tokenizer", None)
    assert choose(config, PromptOptions()).texts == ("tokens 320 1125",)


def test_texts_are_encoded_in_lower_case(library):
    assert tokens("A  Photo", CONFIG) == (49406, 320, 1125, 49407)


def test_texts_that_the_model_cannot_encode_are_refused(library):
    with pytest.raises(UsageError, match="has 76 tokens, expected at most 75; shorten it"):
        tokens("photo " * 76, CONFIG)
    assert len(tokens("photo " * 75, CONFIG)) == 77
    with pytest.raises(UsageError, match="has token 49407, the model knows 100"):
        tokens("photo", TextConfig(vocabulary=100))


@pytest.mark.parametrize("flag", ["--prompt", "--negative-prompt", "--guidance"])
def test_models_without_text_refuse_prompts(flag: str, tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "tiny")
    value = "7" if flag == "--guidance" else "photo"
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "engine"), "--tile", "32", flag, value]) == 2
    assert "tiny has no text encoder; leave out --prompt" in capsys.readouterr().err
    assert not (tmp_path / "engine").exists()
