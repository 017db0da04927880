"""One URL: its normal form, its registrable domain, its shard.

Normal form: the URL standard's parser and serializer for http and https (url.spec.whatwg.org, section 4.4), and beyond
it what tells no two pages apart: no fragment, no user name or password (a secret has no place in a corpus), no final
dot of the host, no empty query, and, by choice, no tracking parameters. It is idempotent, and it decides identity:
two URLs with the same normal form are fetched once.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from functools import lru_cache

import idna
import tldextract

from data_pipeline.config import UrlListConfig

DEFAULT_PORTS = {"http": 80, "https": 443}

# Click identifiers of advertising and newsletter systems. They name the click, never the page.
TRACKING_PREFIXES = ("utm_", "pk_", "mtm_", "hsa_", "stm_")
TRACKING_PARAMETERS = frozenset(
    (
        "gclid", "gclsrc", "dclid", "gbraid", "wbraid", "fbclid", "msclkid", "yclid", "ymclid", "twclid", "ttclid",
        "li_fat_id", "igshid", "igsh", "mc_cid", "mc_eid", "mkt_tok", "vero_id", "vero_conv", "_hsenc", "_hsmi",
        "__hssc", "__hstc", "__hsfp", "hsctatracking", "oly_anon_id", "oly_enc_id", "rb_clickid", "s_cid", "wickedid",
        "epik", "srsltid", "_openstat", "ref_src", "_ga", "_gl", "_branch_match_id", "cmpid", "ncid", "sr_share",
    )
)  # fmt: skip

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_NORMAL_START = re.compile(r"https?://(?:\[[0-9a-f:.]+\]|[^\s/?#@:\\\[\]]+)(?::[0-9]{1,5})?(?:[/?]|\Z)")
_CREDENTIALS = re.compile(  # as `normalize` reads them: http(s) with any number of slashes, blanks about and within
    r"^([\s\x00-\x20<]*(?:https?:[/\\\t\n\r]*|(?:[A-Za-z][A-Za-z0-9+.-]*:)?[/\\]{2,}))[^/\\?#]*@", re.IGNORECASE
)
_NOT_IN_A_DOMAIN = re.compile(r"[/\\@?#*:\s]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_C0_OR_SPACE = "".join(map(chr, range(0x21)))
_FORBIDDEN_IN_HOST = frozenset(map(chr, range(0x21))) | frozenset('#/:<>?@[\\]^|%"`{}\x7f')  # "forbidden domain" +
_PATH_SAFE = frozenset(b"!$%&'()*+,-./:;=@[\\]_|~") | frozenset(
    b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
)
_QUERY_SAFE = (_PATH_SAFE | frozenset(b"?^`{}")) - frozenset(b"'")  # the special-query percent-encode set
_DOT = re.compile(r"(?:\.|%2e)", re.IGNORECASE)

_SHARD_VERSION = b"gpt2train domain shard 1"
"""Part of every corpus's identity: change it and every URL moves to another shard."""

_suffixes = tldextract.TLDExtract(  # the Public Suffix List as packaged, private domains too; never the network
    cache_dir=None, suffix_list_urls=(), include_psl_private_domains=True
)


class InvalidUrl(ValueError):
    """`reason` is `invalid_url`, `scheme_not_allowed` or `url_too_long`; the message says what is wrong."""

    def __init__(self, message: str, reason: str = "invalid_url") -> None:
        super().__init__(message)
        self.reason = reason


def normalize(url: str, config: UrlListConfig, base: str | None = None) -> str:
    """The normal form of `url`, resolved against `base` (itself in normal form) if that is given.

    >>> normalize(" HTTP://Example.COM:80/a/../b?utm_source=x#top ", UrlListConfig())
    'http://example.com/b'
    """
    if len(url) > config.max_url_bytes and len(url.encode("utf-8", "replace")) > config.max_url_bytes:
        raise InvalidUrl(f"longer than url_list.max_url_bytes={config.max_url_bytes}", "url_too_long")
    text = url if url.isascii() else _SURROGATE.sub("\ufffd", url)  # the standard's input is a scalar value string
    text = text.strip(_C0_OR_SPACE).replace("\t", "").replace("\n", "").replace("\r", "")
    text = text.split("#", 1)[0]
    match = _SCHEME.match(text)
    scheme = match.group(1).lower() if match else None
    if scheme is None and base is None:
        raise InvalidUrl("no scheme; write http:// or https://" if text else "empty")
    if scheme is not None and scheme not in DEFAULT_PORTS:
        # `example.com:8080/` has the form of a scheme, too; so do most typing errors.
        raise InvalidUrl(f"scheme {scheme[:40]}: only http and https are fetched", "scheme_not_allowed")
    rest = text[match.end() :] if match else text
    rest, question, query = rest.partition("?")
    rest = rest.replace("\\", "/")
    if base is not None:
        base_scheme, base_authority, base_path, base_query = _split_normal(base)
        if scheme is None or (scheme == base_scheme and not rest.startswith("/")):
            scheme = base_scheme
            if rest.startswith("//"):
                pass
            elif rest.startswith("/"):
                rest = f"//{base_authority}{rest}"
            elif rest:
                rest = f"//{base_authority}{base_path.rpartition('/')[0]}/{rest}"
            else:
                rest = f"//{base_authority}{base_path}"
                query = query if question else base_query
    assert scheme is not None
    authority, slash, path = rest.lstrip("/").partition("/")  # the standard skips any number of slashes
    host, port = _authority(authority.rpartition("@")[2], scheme)
    query = _query(query, config.strip_tracking)
    normal = f"{scheme}://{host}{port}{_path(slash + path)}{'?' + query if query else ''}"
    if len(normal) > config.max_url_bytes:
        raise InvalidUrl(f"longer than url_list.max_url_bytes={config.max_url_bytes}", "url_too_long")
    return normal


def _split_normal(url: str) -> tuple[str, str, str, str]:
    """(scheme, authority, path, query) of a URL in normal form."""
    scheme, _, rest = url.partition("://")
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    return scheme, authority, slash + path, query


def starts_normal(url: str) -> bool:
    """Whether scheme, host and port stand as in a normal form, so that `host_of` and `port_of` can tell them. A quick
    look at URLs that are said to be normal, not a check that they are."""
    return _NORMAL_START.match(url) is not None


def host_of(url: str) -> str:
    """The host of a URL in normal form, without brackets."""
    authority = origin_of(url).partition("://")[2]
    if authority.startswith("["):
        return authority[1:].partition("]")[0]
    return authority.partition(":")[0]


def without_credentials(text: str) -> str:
    """A URL that may be none, for a table or a message: without user name and password, of whatever scheme.

    >>> without_credentials("ftp://me:secret@example.com/")
    'ftp://example.com/'
    """
    return _CREDENTIALS.sub(r"\1", text)


def domain_named(entry: str) -> str:
    """The host that an entry of a list of domains names, in normal form; a dot before it is left out.

    Raises InvalidUrl for what is no bare domain: its path, user or pattern would silently count for the whole domain.

    >>> domain_named("Bücher.Example.")
    'xn--bcher-kva.example'
    """
    name = entry.strip().lstrip(".")
    if name.startswith("*."):
        raise InvalidUrl(f"a domain stands for all below it; write {name[2:]}")
    bad = _NOT_IN_A_DOMAIN.search(name.rpartition("]")[2] if name.startswith("[") else name)
    if bad:
        raise InvalidUrl(f"{bad.group()[-1]!r} is in no domain")
    return host_of(normalize(f"http://{name}/", UrlListConfig()))


def is_public_suffix(host: str) -> bool:
    """Whether nobody owns all below `host`: `com`, `co.uk`, a name of one label (localhost excepted)."""
    if host == "localhost" or ":" in host:
        return False
    return "." not in host or _suffixes(host, include_psl_private_domains=False).suffix == host


def origin_of(url: str) -> str:
    """`scheme://host[:port]` of a URL in normal form."""
    end = url.find("/", 8)  # behind https://; a normal form has a path
    return url[:end] if end >= 0 else url.partition("?")[0]


def port_of(url: str) -> int:
    """The port of a URL in normal form."""
    scheme, authority, _, _ = _split_normal(url)
    port = authority.rpartition("]")[2].rpartition(":")[2] if ":" in authority.rpartition("]")[2] else ""
    return int(port) if port else DEFAULT_PORTS[scheme]


def path_and_query(url: str) -> str:
    """What stands on the request line for a URL in normal form; robots.txt rules are matched against it."""
    return url[len(origin_of(url)) :] or "/"


def _authority(text: str, scheme: str) -> tuple[str, str]:
    """(host, ":port" or "")."""
    if text.startswith("["):
        inside, bracket, after = text[1:].partition("]")
        if not bracket or (after and not after.startswith(":")):
            raise InvalidUrl("the IPv6 address in brackets is not closed")
        host, port = f"[{_ipv6(inside)}]", after[1:]
    else:
        name, _, port = text.partition(":")
        host = _host(name)
    if port:
        digits = port.lstrip("0") or "0"
        if not (port.isascii() and port.isdigit()) or len(digits) > 5 or int(digits) > 65535:
            raise InvalidUrl(f"port {port[:20]!r} is not a number up to 65535")
        if int(digits) != DEFAULT_PORTS[scheme]:
            return host, f":{digits}"
    return host, ""


@lru_cache(maxsize=65_536)
def _host(text: str) -> str:
    """The standard's host parser: percent-decoding, IDNA, IPv4 in all its spellings."""
    if "%" in text:
        text = re.sub(
            rb"%([0-9A-Fa-f]{2})", lambda m: bytes([int(m.group(1), 16)]), text.encode()
        ).decode("utf-8", "replace")  # fmt: skip
    if not text.isascii():
        text = _to_ascii(text)
    text = text.lower().rstrip(".")
    if not text:
        raise InvalidUrl("no host")
    bad = _FORBIDDEN_IN_HOST.intersection(text)
    if bad:
        raise InvalidUrl(f"{min(bad)!r} in the host")
    last = text.rpartition(".")[2]
    if last.isdigit() or re.fullmatch(r"0x[0-9a-f]*", last):
        return _ipv4(text)
    labels = text.split(".")
    if len(text) > 253 or not all(0 < len(label) <= 63 for label in labels):  # RFC 1035, 2.3.4
        raise InvalidUrl("a host has at most 253 characters, and a label of it 1 to 63")
    return text


def _to_ascii(text: str) -> str:
    """UTS 46, non-transitional; labels beyond IDNA 2008 (emoji) get plain Punycode, as browsers do."""
    try:
        mapped = idna.uts46_remap(text, std3_rules=False, transitional=False)
    except (idna.IDNAError, UnicodeError) as e:
        raise InvalidUrl(f"the host is not a valid international name ({e})") from e
    labels = []
    for label in mapped.split("."):
        if label.isascii():
            labels.append(label)
        elif "\ufffd" in label:
            raise InvalidUrl("the host holds bytes that are not UTF-8")
        else:
            labels.append("xn--" + label.encode("punycode").decode("ascii"))
    return ".".join(labels)


def _ipv4(text: str) -> str:
    """The standard's IPv4 parser: one to four parts, decimal, octal or hexadecimal; the last fills what is left."""
    parts = text.split(".")
    numbers = []
    for part in parts:
        if re.fullmatch(r"0x[0-9a-f]*", part):
            numbers.append(int(part[2:] or "0", 16))
        elif re.fullmatch(r"0[0-7]*", part):
            numbers.append(int(part, 8))
        else:
            numbers.append(int(part) if re.fullmatch(r"[1-9][0-9]{0,11}", part) else -1)
    if len(parts) > 4 or any(n < 0 or n > 255 for n in numbers[:-1]) or not 0 <= numbers[-1] < 256 ** (5 - len(parts)):
        raise InvalidUrl(f"{text[:60]!r} ends in a number but is no IPv4 address")
    value = numbers[-1] + sum(n << (8 * (3 - i)) for i, n in enumerate(numbers[:-1]))
    return str(ipaddress.IPv4Address(value))


def _ipv6(text: str) -> str:
    """Compressed as in RFC 5952, an embedded IPv4 address in hexadecimal (the standard's serializer)."""
    try:
        if "%" in text:
            raise ValueError
        address = ipaddress.IPv6Address(text)
    except ValueError:
        raise InvalidUrl(f"{text[:60]!r} is no IPv6 address") from None
    if address.ipv4_mapped is None:
        return str(address)
    value = int(address)  # str() writes mapped addresses differently from Python 3.13 on
    return f"::ffff:{value >> 16 & 0xFFFF:x}:{value & 0xFFFF:x}"


def _path(text: str) -> str:
    segments: list[str] = []
    parts = text.split("/")[1:] if text else [""]
    for place, part in enumerate(parts):
        dots = _DOT.sub(".", part) if len(part) <= 6 else part
        last = place == len(parts) - 1
        if dots == "..":
            if segments:
                segments.pop()
            if last:
                segments.append("")
        elif dots == ".":
            if last:
                segments.append("")
        else:
            segments.append(part)
    return "/" + _percent_encode("/".join(segments), _PATH_SAFE)


def _query(text: str, strip_tracking: bool) -> str:
    if strip_tracking and text:
        text = "&".join(p for p in text.split("&") if not _is_tracking(p))
    return _percent_encode(text, _QUERY_SAFE)


def _is_tracking(parameter: str) -> bool:
    name = parameter.partition("=")[0].lower()
    return name in TRACKING_PARAMETERS or name.startswith(TRACKING_PREFIXES)


def _percent_encode(text: str, safe: frozenset[int]) -> str:
    raw = text.encode()
    if safe.issuperset(raw):
        return text
    return "".join(chr(b) if b in safe else f"%{b:02X}" for b in raw)


@lru_cache(maxsize=65_536)
def registrable_domain(host: str) -> str:
    """The domain that someone registered (`bbc.co.uk` of `news.bbc.co.uk`), by the packaged Public Suffix List.

    An address, a public suffix or a name without one (localhost) is its own domain.
    """
    return _suffixes(host).top_domain_under_public_suffix or host


def shard_of(domain: str, shards: int) -> int:
    """The shard of a domain: the same on every machine and in every release of this format."""
    digest = hashlib.blake2b(domain.encode(), digest_size=8, key=_SHARD_VERSION).digest()
    return int.from_bytes(digest, "big") % shards
