"""What is masked as personal data, what is not, and how long that takes."""

from __future__ import annotations

import time

import pytest

from data_pipeline.clean import personal


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("<a.b+c@mail.example.co.uk>", "<email@example.com>"),
        ("a@b", "a@b"),
        ("user@host.example.", "email@example.com."),
        ("1.2.3.4.5 and v1.1.1.1 and 1.1.1.999 and 127.0.0.1", "1.2.3.4.5 and v1.1.1.1 and 1.1.1.999 and 127.0.0.1"),
        ("from 1.1.1.1.", "from 22.214.171.124."),
        ("+49 (0) 30 1234567", "+1 202-555-0100"),
        ("1-800-555-1234; 2024-11-23; 123-456-7890", "+1 202-555-0100; 2024-11-23; 123-456-7890"),
        ("in 1969 415 people, 12345678901 stars, 3.14159 2653", "in 1969 415 people, 12345678901 stars, 3.14159 2653"),
    ],
)  # fmt: skip
def test_what_is_personal_and_what_is_not(text: str, masked: str) -> None:
    assert personal.mask(text)[0] == masked
    assert personal.mask(masked)[0] == personal.mask(personal.mask(masked)[0])[0]


def test_masking_takes_linear_time() -> None:
    for piece in ("a@", "a.", "1.", "1.1.1.", "+1 22", "(415) ", "!." * 3, "a-@b."):
        small, large = piece * 5_000, piece * 40_000
        started = time.process_time()
        personal.mask(small)
        once = time.process_time() - started
        started = time.process_time()
        personal.mask(large)
        assert time.process_time() - started < 40 * max(once, 0.01), piece
