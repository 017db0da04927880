"""robots.txt by RFC 9309, and the robots rules that pages and responses carry themselves.

Bytes of a robots.txt (or the status that came instead of it) flow in; decisions with the rule that made them flow out.
Written from the RFC instead of taken from Protego, which disagrees with 12 of the 142 assertions of Google's published
tests. Where the RFC is silent this reads like Google's parser (lines that are no rule do not end a group; common
misspellings of "disallow" count, since it is plain what their authors mean). One known difference: the RFC's table in
2.2.2 decodes percent-encoded unreserved characters (%62%61%7A is baz), Google's parser does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

MAX_ROBOTS_BYTES = 500 * 1024
"""The parsing limit that RFC 9309, 2.5 asks for at least; what lies beyond is not read."""

_TOKEN = re.compile(r"[A-Za-z_-]+")  # product token, RFC 9309, 2.2.1
_DISALLOW = frozenset(("disallow", "dissallow", "dissalow", "disalow", "diasllow", "disallaw"))
_AGENT = frozenset(("user-agent", "useragent", "user agent"))
_CRAWL_DELAY = frozenset(("crawl-delay", "crawldelay", "crawl delay"))
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-._~")  # RFC 3986, 2.3


@dataclass(frozen=True, slots=True)
class Decision:
    """`rule` says what decided, for the audit log: the robots.txt line, or that none applies."""

    allowed: bool
    rule: str


@dataclass(frozen=True, slots=True)
class _Rule:
    allow: bool
    pattern: bytes  # canonical; its length ranks the rule
    parts: tuple[bytes, ...]  # what stands between the *
    anchored: bool  # ended by $
    line: int

    def matches(self, path: bytes) -> bool:
        """Leftmost match of each part in turn; without backtracking, as only the last part can be tied to the end."""
        parts = self.parts
        if not path.startswith(parts[0]):
            return False
        at = len(parts[0])
        if len(parts) == 1:
            return not self.anchored or at == len(path)
        middle, last = parts[1:-1], parts[-1]
        for part in middle:
            found = path.find(part, at)
            if found < 0:
                return False
            at = found + len(part)
        if self.anchored:
            return len(path) - len(last) >= at and path.endswith(last)
        return path.find(last, at) >= 0


@dataclass
class _Group:
    rules: list[_Rule] = field(default_factory=list)
    crawl_delay_s: float | None = None


class RobotsRules:
    """What one robots.txt says; all groups of a product token count as one (RFC 9309, 2.2.1)."""

    def __init__(self, groups: Mapping[str, _Group], whole: Decision | None = None) -> None:
        """`whole`: a decision for every URL, in place of rules."""
        self._groups = groups
        self._whole = whole
        for group in groups.values():
            # The longest pattern decides, and of equally long ones the one that allows (RFC 9309, 2.2.2).
            group.rules.sort(key=lambda r: (-len(r.pattern), not r.allow, r.line))

    def decide(self, url: str, agent: str) -> Decision:
        """Whether `agent` (a product token) may fetch `url`: an absolute URL, or the path and query of one."""
        if self._whole is not None:
            return self._whole
        # RFC 9309, 2.2.3: a rule names a literal * or $ by its percent-encoding.
        path = _canonical(_target(url)).replace(b"*", b"%2A").replace(b"$", b"%24")
        if path == b"/robots.txt":
            return Decision(True, "/robots.txt itself is always allowed")
        group = self._group(agent)
        for rule in group.rules if group else ():
            if rule.matches(path):
                word = "Allow" if rule.allow else "Disallow"
                return Decision(rule.allow, f"line {rule.line}: {word}: {rule.pattern[:200].decode('latin-1')}")
        return Decision(True, "no rule matches" if group else "no group for this agent")

    def crawl_delay(self, agent: str) -> float | None:
        """Seconds between two requests that the site asks of `agent`; not part of the RFC, but asked for."""
        group = self._group(agent)
        return group.crawl_delay_s if group else None

    def _group(self, agent: str) -> _Group | None:
        return self._groups.get(_product_token(agent)) or self._groups.get("*")


def rules_for_status(status: int, body: bytes = b"") -> RobotsRules:
    """RFC 9309, 2.3.1: 2xx holds rules, 4xx means that there are none, anything else forbids all.

    429 is treated like 5xx: it says "not now", and the RFC only permits, not demands, to go on after a 4xx.
    """
    if 200 <= status < 300:
        return parse_robots(body)
    if 400 <= status < 500 and status != 429:
        return RobotsRules({}, Decision(True, f"robots.txt answered {status}: no rules"))
    return unreachable_rules(f"robots.txt answered {status}")


def unreachable_rules(why: str) -> RobotsRules:
    """Complete disallow (RFC 9309, 2.3.1.4)."""
    return RobotsRules({}, Decision(False, why))


def no_rules(why: str) -> RobotsRules:
    return RobotsRules({}, Decision(True, why))


def parse_robots(body: bytes) -> RobotsRules:
    """Never raises; what is not a rule is skipped. Linear in the body's length."""
    if len(body) > MAX_ROBOTS_BYTES:  # a line cut in two might turn `Disallow: /private` into `Disallow: /`
        body = body[:MAX_ROBOTS_BYTES]
        body = body[: max(body.rfind(b"\n"), body.rfind(b"\r")) + 1]
    for mark in (b"\xef\xbb\xbf", b"\xef\xbb", b"\xff\xfe", b"\xfe\xff"):
        if body.startswith(mark):
            if mark in (b"\xff\xfe", b"\xfe\xff"):  # RFC 9309 demands UTF-8; the rules are plain to read all the same
                body = body.decode("utf-16", "replace").encode()
            else:
                body = body[len(mark) :]
            break
    groups: dict[str, _Group] = {}
    current: list[_Group] = []
    in_rules = False
    for number, line in enumerate(re.split(rb"\r\n|\n|\r", body), 1):
        key, value = _key_and_value(line)
        if key in _AGENT:
            if in_rules:
                current, in_rules = [], False
            token = _product_token(value.decode("utf-8", "replace"))
            if token:
                current.append(groups.setdefault(token, _Group()))
        elif key == "allow" or key in _DISALLOW:
            in_rules = True
            if value and current:  # an empty pattern matches nothing
                rule = _rule(key == "allow", value, number)
                for group in {id(g): g for g in current}.values():
                    group.rules.append(rule)
        elif key in _CRAWL_DELAY and current:
            delay_s = _seconds(value)
            if delay_s is not None:
                for group in current:
                    group.crawl_delay_s = max(delay_s, group.crawl_delay_s or 0.0)
    return RobotsRules(groups)


def _key_and_value(line: bytes) -> tuple[str, bytes]:
    line = line.split(b"#", 1)[0].strip(b" \t\0\x0b\x0c")
    key, colon, value = line.partition(b":")
    if not colon:  # "disallow /x": the colon is forgotten often enough that Google's parser reads it, too
        words = line.split()
        if len(words) != 2:
            return "", b""
        key, value = words
    return key.strip().lower().decode("latin-1"), value.strip(b" \t\0\x0b\x0c")


def _product_token(text: str) -> str:
    """`FooBot/2.1` → `foobot`; `*` stays. "" for what is neither."""
    text = text.strip()
    if text == "*" or text.startswith(("* ", "*\t")):
        return "*"
    match = _TOKEN.match(text)
    return match.group().lower() if match else ""


def _seconds(value: bytes) -> float | None:
    match = re.fullmatch(rb"(\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})", value.split(None, 1)[0] if value else b"")
    return float(match.group()) if match else None


def _rule(allow: bool, value: bytes, line: int) -> _Rule:
    pattern = re.sub(rb"\*+", b"*", _canonical(value))
    anchored = pattern.endswith(b"$")
    literal = pattern.removesuffix(b"$").replace(b"$", b"%24")  # special at the end only
    return _Rule(allow, pattern, tuple(literal.split(b"*")), anchored, line)


def _target(url: str) -> bytes:
    """Path and query of an absolute URL or of one that is that already; without the fragment."""
    url = url.split("#", 1)[0]
    if not url.startswith("/"):
        after = url.partition("//")[2] if "//" in url else url
        match = re.search(r"[/?;]", after)
        url = after[match.start() :] if match else "/"
    if not url.startswith("/"):
        url = "/" + url
    return url.encode("utf-8", "replace")


def _canonical(raw: bytes) -> bytes:
    """RFC 9309, 2.2.2: octets beyond ASCII percent-encoded, encoded unreserved ones decoded, hex digits in capitals."""

    def unescape(match: re.Match[bytes]) -> bytes:
        octet = int(match.group(1), 16)
        return bytes([octet]) if octet in _UNRESERVED else match.group().upper()

    if b"%" in raw:
        raw = _ESCAPE.sub(unescape, raw)
    if not raw.isascii():
        raw = b"".join(bytes([b]) if b < 0x80 else b"%%%02X" % b for b in raw)
    return raw


# ---- what a response says of itself -----------------------------------------------------------------------------

_REFUSING = frozenset(("noindex", "none", "noai"))
"""`none` is noindex and nofollow; `noai` is what artists' sites write against use as training data."""
TDM_RESERVATION = "tdm-reservation"
"""TDM Reservation Protocol (W3C community group, TDMRep 1.0, sections 3.2 and 3.3): 1, as a response header or as the
content of a `<meta>` of that name, keeps the right to text and data mining."""
_VALUED = frozenset(("max-snippet", "max-image-preview", "max-video-preview"))
_DATED = re.compile(r"unavailable_after\s*:[^,]*(?:,\s*\d[^,]*)?", re.IGNORECASE)  # RFC 850 dates hold a comma
# Neither may run over the next tag: a page of a hundred thousand `<meta` must cost no more than its length.
_META = re.compile(rb"<meta\b([^<>]{0,2000})>", re.IGNORECASE)
_META_START = re.compile(rb"<[mM][eE][tT][aA]")  # ten times as fast as with IGNORECASE
_META_BYTES = 2010
"""No match of `_META` is longer."""
_WORDS = tuple(word.encode() for word in (*sorted(_REFUSING), TDM_RESERVATION))
_ATTRIBUTE = re.compile(
    rb"""(?<![A-Za-z:-])([A-Za-z:-]+)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""",
)
_HIDDEN = re.compile(
    rb"<!--.*?(?:-->|\Z)|<(script|style|noscript|template)\b.*?(?:</\1\s*>|\Z)", re.IGNORECASE | re.DOTALL
)
_HEAD_BYTES = 256 << 10
"""`<meta name=robots>` stands in the head; no more than this is searched."""


def refusal_in_headers(values: Callable[[str], list[str]], agent: str) -> str | None:
    """The X-Robots-Tag or TDM-Reservation that keeps a page out of a corpus, if any; words for other agents do not
    count. `values`: the header fields of a name (in small letters)."""
    if any(value.strip() == "1" for value in values(TDM_RESERVATION)):
        return "TDM-Reservation: 1"
    for value in values("x-robots-tag"):
        scope = ""
        for item in _DATED.sub("", value).split(","):
            name, colon, rest = item.partition(":")
            if name.strip().lower() in _VALUED:
                continue
            if colon:  # `otherbot: noindex, nofollow`: the agent's name holds for the words after it
                scope, item = name.strip().lower(), rest
            if scope in ("", "*", agent.lower(), "robots") and item.strip().lower() in _REFUSING:
                return f"X-Robots-Tag: {value.strip()[:200]}"
    return None


def refusal_in_html(body: bytes, agent: str) -> str | None:
    """The `<meta>` named robots, `agent` or tdm-reservation that keeps a page out of a corpus, if any."""
    head = body[:_HEAD_BYTES]
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        head = head.decode("utf-16", "replace").encode()
    tags = (head[m.start() : m.start() + _META_BYTES].partition(b">")[0].lower() for m in _META_START.finditer(head))
    if not any(word in tag for tag in tags for word in _WORDS):  # a cheap look before the careful one
        return None
    for match in _META.finditer(_HIDDEN.sub(b"", head)):
        attributes = {
            m.group(1).lower(): (m.group(2) or m.group(3) or m.group(4) or b"").decode("latin-1").strip().lower()
            for m in _ATTRIBUTE.finditer(match.group(1))
        }
        name, content = attributes.get(b"name"), attributes.get(b"content", "")
        refused = name in ("robots", agent.lower()) and not _REFUSING.isdisjoint(w.strip() for w in content.split(","))
        if refused or (name == TDM_RESERVATION and content == "1"):
            return f"<meta name={name} content={content[:200]}>"
    return None
