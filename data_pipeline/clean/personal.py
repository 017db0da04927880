"""Texts → the same texts with e-mail addresses, public IP addresses and telephone numbers replaced.

In: a text. Out: the text, and how many of each were replaced. The replacements of addresses are FineWeb's (Penedo et
al., arXiv:2406.17557, section 3.7; datatrove's PIIFormatter); they are taken in turn from the beginning of each text,
so that the result depends on the text alone. A telephone number becomes one of those that the North American numbering
plan sets aside for fiction (555-0100 to 555-0199).

What is told apart: a dotted quad that is a global address, not a version or a private one; a number that is written as
telephone numbers are (a country code, or an area code set off, seven digits or more), not any long number. Names,
street addresses and numbers of other forms stay. Cost: 20 MB of text a second.
"""

from __future__ import annotations

import ipaddress
import itertools
import re
from collections.abc import Iterator

EMAIL_REPLACEMENTS = ("email@example.com", "firstname.lastname@example.org")
# FineWeb's: random addresses that did not answer when its list was made.
IP_REPLACEMENTS = (
    "22.214.171.124",
    "126.96.36.199",
    "188.8.131.52",
    "184.108.40.206",
    "220.127.116.11",
    "18.104.22.168",
)
PHONE_REPLACEMENTS = ("+1 202-555-0100", "+1 202-555-0199")

# RFC 5322's atoms (3.2.3), bounded at RFC 5321's 64 and 255 octets (4.5.3.1), before a dotted name with a letter last.
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"
_EMAIL = re.compile(
    rf"(?<![\w.+-]){_ATOM}{{1,64}}(?:\.{_ATOM}{{1,64}}){{0,8}}@(?:[A-Za-z0-9][A-Za-z0-9-]{{0,62}}\.){{1,8}}[A-Za-z]{{2,24}}\b"
)
_IP = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_PHONE = re.compile(
    r"""(?<![\w.+/-])
    (?: \+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}  # E.164 with its plus
      | (?:1[ .-])?\(\d{3}\)[ .-]?\d{3}[ .-]\d{4}                           # (202) 555-0123
      | (?:1[ .-])?[2-9]\d{2}([ .-])[2-9]\d{2}\1\d{4}                       # 202-555-0123
    )(?![\w-]|\.\d)""",
    re.VERBOSE,
)


KINDS = ("emails", "phones")
"""What `find` tells of."""


def find(text: str) -> list[tuple[str, int, int]]:
    """(kind, start, stop) of each e-mail address and telephone number in `text`, in characters, by place."""
    found = [("emails", m.start(), m.end()) for m in _EMAIL.finditer(text)] if "@" in text else []
    found += [("phones", m.start(), m.end()) for m in _PHONE.finditer(text) if _has_phone_digits(m[0])]
    return sorted(found, key=lambda span: span[1:])


def mask(text: str) -> tuple[str, dict[str, int]]:
    """`text` with personal data replaced, and {"masked_emails", "masked_ips", "masked_phones"}."""
    counts = {"masked_emails": 0, "masked_ips": 0, "masked_phones": 0}

    def replacer(name: str, replacements: tuple[str, ...]) -> Iterator[str]:
        for replacement in itertools.cycle(replacements):
            counts[name] += 1
            yield replacement

    if "@" in text:
        emails = replacer("masked_emails", EMAIL_REPLACEMENTS)
        text = _EMAIL.sub(lambda m: next(emails), text)
    ips, phones = replacer("masked_ips", IP_REPLACEMENTS), replacer("masked_phones", PHONE_REPLACEMENTS)
    text = _IP.sub(lambda m: next(ips) if _is_public(m[0]) else m[0], text)
    text = _PHONE.sub(lambda m: next(phones) if _has_phone_digits(m[0]) else m[0], text)
    return text, counts


def _has_phone_digits(number: str) -> bool:
    return 7 <= sum(c.isdigit() for c in number) <= 15


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:  # 1.2.3.999, or an octet with leading zeros
        return False
