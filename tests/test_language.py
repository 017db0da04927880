"""Language identification on the Universal Declaration of Human Rights in 280 languages."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
from places import SHARED

from data_pipeline.clean.language import SAMPLE_CHARACTERS, filter_language, identify, sample
from data_pipeline.config import LanguageConfig
from data_pipeline.records import VERDICT_SCHEMA

UDHR = SHARED / "nltk" / "udhr.zip"
needs_udhr = pytest.mark.skipif(not UDHR.exists(), reason="needs nltk's udhr corpus")

ENGLISH = "Nobody could agree on the color of the door, so the committee asked the neighbors what they thought of it."
FRENCH = "Personne ne pouvait se mettre d'accord sur la couleur de la porte, alors on a demandé l'avis des voisins."


def documents(texts: list[str]) -> pa.Table:
    return pa.table(
        {
            "index": list(range(10, 10 + len(texts))),
            "url": [f"https://example.org/{i}" for i in range(len(texts))],
            "text": pa.array(texts, pa.large_string()),
        }
    )


def udhr() -> dict[str, str]:
    """Name of the translation → text, of those in an encoding that the name tells."""
    texts = {}
    with zipfile.ZipFile(UDHR) as archive:
        for name in archive.namelist():
            encoding = {"-UTF8": "utf-8", "-Latin1": "latin-1"}.get(name[name.rfind("-") :])
            if encoding and "/" in name and not name.endswith("/"):
                texts[Path(name).name] = archive.read(name).decode(encoding, errors="replace")
    return texts


@needs_udhr
def test_english_stays_and_every_other_language_goes() -> None:
    texts = udhr()
    assert len(texts) > 200
    verdicts, codes = filter_language(documents(list(texts.values())), LanguageConfig())
    kept = {name for name, state in zip(texts, verdicts["state"].to_pylist(), strict=True) if state == "kept"}
    english = {name for name in texts if "English" in name}
    assert english <= kept
    # Scots and English-based creoles may pass for English; nothing else should.
    assert len(kept - english) <= 2, kept
    assert verdicts.schema == VERDICT_SCHEMA
    by_name = dict(zip(texts, codes.to_pylist(), strict=True))
    for name, code in {
        "German_Deutsch-Latin1": "de",
        "French_Francais-Latin1": "fr",
        "Spanish_Espanol-Latin1": "es",
        "Finnish_Suomi-Latin1": "fi",
        "Polish-UTF8": "pl",
        "Greek_Ellinika-UTF8": "el",
        "Swedish_Svenska-Latin1": "sv",
    }.items():
        if name in by_name:
            assert by_name[name] == code
    assert sum(n in by_name for n in ("German_Deutsch-Latin1", "French_Francais-Latin1", "Finnish_Suomi-Latin1")) == 3


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (ENGLISH, "en"),
        (ENGLISH.upper(), "en"),
        (FRENCH, "fr"),
        ("Пожалуйста, закройте за собой дверь, а то дует из коридора.", "ru"),
        ("吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。", "ja"),
        ("12:30 — 14:45 (50 %) …", "und"),
        ("", "und"),
    ],
)
def test_identify(text: str, code: str) -> None:
    found, score = identify(text)
    assert found == code
    assert 0 <= score <= 1
    assert (score > 0.9) == (code != "und")


def test_a_long_text_is_judged_by_its_beginning_and_middle() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(20_000))
    looked_at = sample(text)
    assert len(looked_at) == SAMPLE_CHARACTERS + 1
    first, middle = looked_at.split(" ")
    assert text.startswith(first)
    assert text.index(middle) > len(text) // 3
    assert sample(text[:SAMPLE_CHARACTERS]) == text[:SAMPLE_CHARACTERS]
    # Sizes between one and two samples: the parts do not overlap.
    first, middle = sample(text[: SAMPLE_CHARACTERS + 100]).split(" ")
    assert not set(first) & set(middle)


def test_bounds_and_numbers() -> None:
    table = documents([ENGLISH, FRENCH])
    _, score = identify(ENGLISH)
    everything, codes = filter_language(table, LanguageConfig(keep=[]))
    assert everything["state"].to_pylist() == ["kept", "kept"]
    assert codes.to_pylist() == ["en", "fr"]
    both, _ = filter_language(table, LanguageConfig(keep=["fr", "en"], min_score=0.9))
    assert both["state"].to_pylist() == ["kept", "kept"]
    one, _ = filter_language(table, LanguageConfig(keep=["fr"]))
    assert one["reason"].to_pylist() == ["language", None]
    assert one["index"].to_pylist() == [10, 11]
    assert one["detail"][0].as_py().startswith("en ")
    assert f'"language_score": {round(score, 6)}' in everything["numbers"][0].as_py()


def test_a_score_below_the_bound_drops() -> None:
    text = "Ok. Sorry!"
    code, score = identify(text)
    assert 0.1 < score < 0.99  # a short text leaves doubt
    under = LanguageConfig(keep=[code], min_score=score - 0.01)
    over = LanguageConfig(keep=[code], min_score=score + 0.01)
    assert filter_language(documents([text]), under)[0]["state"].to_pylist() == ["kept"]
    assert filter_language(documents([text]), over)[0]["state"].to_pylist() == ["dropped"]
