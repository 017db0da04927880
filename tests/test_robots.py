"""robots.txt: the examples of RFC 9309, the points that Google's parser documents, real files, hostile ones."""

from __future__ import annotations

import gc
import os
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import SHARED
from protego import Protego

from data_pipeline.crawl.robots import (
    MAX_ROBOTS_BYTES,
    parse_robots,
    refusal_in_headers,
    refusal_in_html,
    rules_for_status,
)


def allowed(robots: str | bytes, path: str, agent: str = "FooBot") -> bool:
    body = robots.encode() if isinstance(robots, str) else robots
    return parse_robots(body).decide(f"http://foo.bar{path}", agent).allowed


RFC_5_1 = """
User-Agent: *
Disallow: *.gif$
Disallow: /example/
Allow: /publications/

User-Agent: foobot
Disallow:/
Allow:/example/page.html
Allow:/example/allowed.gif

User-Agent: barbot
User-Agent: bazbot
Disallow: /example/page.html

User-Agent: quxbot
"""


@pytest.mark.parametrize(
    ("agent", "path", "expected"),
    [
        # RFC 9309, section 5.1
        ("foobot", "/", False),
        ("foobot", "/example/page.html", True),
        ("foobot", "/example/allowed.gif", True),
        ("foobot", "/publications/x", False),
        ("barbot", "/example/page.html", False),
        ("bazbot", "/example/page.html", False),
        ("barbot", "/x.gif", True),
        ("quxbot", "/x.gif", True),
        ("quxbot", "/example/", True),
        ("other", "/x.gif", False),
        ("other", "/x.gif?", True),
        ("other", "/example/", False),
        ("other", "/publications/", True),
        ("other", "/robots.txt", True),
    ],
)
def test_the_simple_example_of_the_rfc(agent: str, path: str, expected: bool) -> None:
    assert allowed(RFC_5_1, path, agent) is expected


def test_the_longest_match_of_the_rfc() -> None:
    robots = "User-Agent: foobot\nAllow: /example/page/\nDisallow: /example/page/disallowed.gif\n"  # section 5.2
    assert not allowed(robots, "/example/page/disallowed.gif")
    assert allowed(robots, "/example/page/other.gif")


@pytest.mark.parametrize(
    ("rule", "path", "matches"),
    [
        # RFC 9309, 2.2.2: what is compared
        ("/foo/bar?baz=quz", "/foo/bar?baz=quz", True),
        ("/foo/bar?baz=https://foo.bar", "/foo/bar?baz=https://foo.bar", True),
        ("/foo/bar/ツ", "/foo/bar/%E3%83%84", True),
        ("/foo/bar/%E3%83%84", "/foo/bar/ツ", True),
        ("/foo/bar/%e3%83%84", "/foo/bar/%E3%83%84", True),
        ("/foo/bar/%62%61%7A", "/foo/bar/baz", True),
        ("/foo/bar/%62%61%7A", "/foo/bar/%62%61%7A", True),
        ("/a%2Fb", "/a/b", False),  # a reserved character is not its encoding
        # RFC 9309, 2.2.3: special characters
        ("/allow$", "/allow", True),
        ("/allow$", "/allow/", False),
        ("/this/*/exactly", "/this/path/exactly", True),
        ("/this/*/exactly", "/this/exactly", False),
        ("/path/file-with-a-%2A.html", "/path/file-with-a-*.html", True),
        ("/path/foo-%24", "/path/foo-$", True),
        ("/a$b", "/a$b", True),  # $ is special at the end only
        # As Google documents it (developers.google.com, "How Google interprets robots.txt")
        ("/", "/anything", True),
        ("/*", "/", True),
        ("/$", "/", True),
        ("/$", "/x", False),
        ("/fish", "/fishheads/yummy.html", True),
        ("/fish", "/Fish.asp", False),
        ("/fish", "/catfish", False),
        ("/fish*", "/fish.php?id=anything", True),
        ("/fish/", "/fish", False),
        ("/fish/", "/fish/?id=anything", True),
        ("/*.php", "/folder/any.php.file.html", True),
        ("/*.php", "/windows.PHP", False),
        ("/*.php$", "/filename.php", True),
        ("/*.php$", "/filename.php?parameters", False),
        ("/*.php$", "/filename.php5", False),
        ("/fish*.php", "/fishheads/catfish.php?parameters", True),
        ("/fish*.php", "/Fish.PHP", False),
        ("*", "/x", True),
        ("***/x", "/a/x", True),
        ("/a*a$", "/a", False),
        ("/a*a$", "/aa", True),
        ("/a*b*a$", "/abba", True),
    ],
)
def test_patterns(rule: str, path: str, matches: bool) -> None:
    assert allowed(f"user-agent: *\ndisallow: {rule}\n", path) is not matches
    assert allowed(f"user-agent: *\ndisallow: /\nallow: {rule}\n", path) is matches or rule in ("/", "*")


@pytest.mark.parametrize(
    ("robots", "path", "expected"),
    [
        # the most octets win, and allow at a tie
        ("user-agent: *\nallow: /p\ndisallow: /", "/page", True),
        ("user-agent: *\nallow: /folder\ndisallow: /folder", "/folder/page", True),
        ("user-agent: *\nallow: /page\ndisallow: /*.htm", "/page.htm", False),
        ("user-agent: *\nallow: /page\ndisallow: /*.ph", "/page.php5", True),
        ("user-agent: *\nallow: /$\ndisallow: /", "/", True),
        ("user-agent: *\nallow: /$\ndisallow: /", "/page.htm", False),
        # groups
        ("user-agent: FooBot\ndisallow: /\n", "/x", False),
        ("user-agent: foobot/1.0 (x)\ndisallow: /\n", "/x", False),
        ("user-agent: foo\ndisallow: /\n", "/x", True),
        ("user-agent: foobotlonger\ndisallow: /\n", "/x", True),
        ("user-agent: *\ndisallow: /\nuser-agent: foobot\ndisallow:", "/x", True),
        ("user-agent: *\ndisallow: /\nuser-agent: foobot", "/x", True),
        (
            "user-agent: foobot\ndisallow: /a\n\nuser-agent: b\ndisallow: /\nuser-agent: foobot\ndisallow: /x",
            "/x",
            False,
        ),
        (
            "user-agent: foobot\ndisallow: /a\n\nuser-agent: b\ndisallow: /\nuser-agent: foobot\ndisallow: /x",
            "/a",
            False,
        ),
        ("user-agent: foobot\n\n\ndisallow: /", "/x", False),  # blank lines end nothing
        ("user-agent: barbot\nsitemap: https://foo.bar/s\nuser-agent: *\ndisallow: /", "/x", False),
        ("user-agent: foobot\nunknown: x\nuser-agent: b\ndisallow: /", "/x", False),
        ("disallow: /\nuser-agent: foobot\nallow: /", "/x", True),  # rules before any group count for nobody
        # lines
        ("user-agent: foobot\rdisallow: /", "/x", False),
        ("user-agent: foobot\r\ndisallow: /\r\n", "/x", False),
        ("USER-AGENT: foobot\nDISALLOW: /", "/x", False),
        ("user-agent: foobot # us\ndisallow: / # all", "/x", False),
        ("user-agent : foobot\ndisallow : /", "/x", False),
        ("user-agent foobot\ndisallow /", "/x", False),
        ("user-agent: foobot\ndissallow: /", "/x", False),
        ("user-agent: foobot\ndisallow: /X", "/x", True),
        ("foo: foobot\nbar: /", "/x", True),
        ("", "/x", True),
        ("\ufeffuser-agent: *\ndisallow: /", "/x", False),
        ("<html><body>Disallow: /</body></html>", "/x", True),
    ],
)
def test_groups_and_lines(robots: str, path: str, expected: bool) -> None:
    assert allowed(robots, path) is expected


def test_byte_order_marks() -> None:
    text = "user-agent: *\ndisallow: /"
    for body in (
        b"\xef\xbb" + text.encode(),
        text.encode("utf-16"),
        "\ufeff".encode("utf-16-be") + text.encode("utf-16-be"),
    ):
        assert not allowed(body, "/x")


@pytest.mark.parametrize("url", ["http://foo.bar", "http://foo.bar?x", "/x", "http://foo.bar/x#/allowed", "foo.bar/x"])
def test_urls_of_any_form(url: str) -> None:
    rules = parse_robots(b"user-agent: *\ndisallow: /\nallow: /allowed")
    assert not rules.decide(url, "FooBot").allowed


def test_the_rule_is_named() -> None:
    rules = parse_robots(b"user-agent: *\n\ndisallow: /private*\n")
    assert rules.decide("http://h/private/x", "a").rule == "line 3: Disallow: /private*"
    assert rules.decide("http://h/x", "a").rule == "no rule matches"


@pytest.mark.parametrize(
    ("status", "expected"),
    [(404, True), (401, True), (403, True), (410, True), (429, False), (500, False), (503, False)],
)
def test_what_a_status_means(status: int, expected: bool) -> None:
    decision = rules_for_status(status, b"user-agent: *\ndisallow: /x").decide("http://h/x", "a")
    assert decision.allowed is expected
    assert str(status) in decision.rule
    assert not rules_for_status(200, b"user-agent: *\ndisallow: /x").decide("http://h/x", "a").allowed


def test_crawl_delay() -> None:
    rules = parse_robots(
        b"user-agent: a\ncrawl-delay: 2.5\ncrawl-delay: 1\ndisallow: /x\nuser-agent: *\ncrawl-delay: .5 # s\n"
        b"user-agent: bad\ncrawl-delay: soon\ncrawl-delay: -3\ncrawl-delay: 1e9\ndisallow:"
    )
    assert [rules.crawl_delay(agent) for agent in ("a", "A/1", "other", "bad")] == [2.5, 2.5, 0.5, None]


def test_what_lies_beyond_the_limit_is_not_read_and_no_line_is_cut_in_two() -> None:
    filler = b"#" * (MAX_ROBOTS_BYTES - 40) + b"\n"
    body = b"user-agent: *\n" + filler + b"disallow: /private-and-a-long-name\n"
    rules = parse_robots(body)
    assert rules.decide("http://h/private-and-a-long-name", "a").allowed
    assert rules.decide("http://h/public", "a").allowed  # `disallow: /p`, cut, would forbid it


def test_real_files_are_read_fast_and_as_protego_reads_them() -> None:
    folder = SHARED / "robots"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    paths = ["/", "/search?q=1", "/admin/x", "/wp-admin/", "/a/b/c.html", "/user/login", "/%7Euser/a", "/tag/x.php?x=1"]
    files = sorted(folder.iterdir())
    slowest, ours = 0.0, {}
    gc.disable()  # a collection over all that a test process holds takes longer than any file, and is nobody's parsing
    try:
        for file in files:
            body = file.read_bytes()
            begin = time.thread_time()
            rules = parse_robots(body)
            ours[file] = [rules.decide(f"http://h{p}", "gpttrain").allowed for p in paths]
            slowest = max(slowest, time.thread_time() - begin)
    finally:
        gc.enable()
    assert len(ours) > 1000
    assert slowest < 0.05
    differing = set()
    for file in files:
        other = Protego.parse(file.read_bytes().decode("utf-8", "replace"))
        if ours[file] != [bool(other.can_fetch(f"http://h{p}", "gpttrain")) for p in paths]:
            differing.add(file.name)
    # Two begin with a byte-order mark, and in one a Sitemap line stands between two user-agent lines of one group.
    assert differing <= {"www.frontiersin.org", "www.iherb.com", "www.jimmyjohns.com"}


@pytest.mark.parametrize(
    "body",
    [
        b"user-agent: *\ndisallow: /" + b"*a" * 200_000,
        b"user-agent: *\n" + b"disallow: /*a*b\n" * 30_000,
        b"user-agent: a\n" * 30_000 + b"disallow: /\n",
        b"\r" * 500_000,
        b":" * 500_000,
        b"user-agent: *\nallow: /" + b"%41" * 150_000,
        os.urandom(500_000),
    ],
    ids=["stars", "rules", "agents", "returns", "colons", "escapes", "noise"],
)
def test_hostile_files_cost_no_more_than_their_length(body: bytes) -> None:
    begin = time.thread_time()
    parse_robots(body).decide("http://h/" + "a" * 8000, "gpttrain")
    assert time.thread_time() - begin < 1.0


@settings(deadline=None)  # a busy machine is no fault of the code
@given(st.binary(max_size=300), st.text(max_size=50))
def test_nothing_raises(body: bytes, url: str) -> None:
    parse_robots(body).decide(url, "gpttrain")
    parse_robots(b"user-agent: *\ndisallow: " + body).decide(url, "gpttrain")
    refusal_in_html(body, "gpttrain")


# ---- what responses say -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        (["noindex"], True),
        (["nofollow, NOINDEX"], True),
        (["none"], True),
        (["noai, noimageai"], True),
        (["noimageai"], False),
        (["nofollow", "noindex"], True),
        (["gpttrain: noindex"], True),
        (["otherbot: noindex, nofollow"], False),
        (["noindex, otherbot: nofollow"], True),
        (["max-snippet: 20, noindex"], True),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noindex"], True),
        (["index, follow"], False),
        ([], False),
    ],
)
def test_x_robots_tag(values: list[str], refused: bool) -> None:
    fields = {"x-robots-tag": values}
    assert (refusal_in_headers(lambda name: fields.get(name, []), "gpttrain") is not None) is refused


@pytest.mark.parametrize(("value", "refused"), [("1", True), (" 1 ", True), ("0", False), ("", False), ("yes", False)])
def test_tdm_reservation_as_a_header(value: str, refused: bool) -> None:
    fields = {"tdm-reservation": [value]}
    assert (refusal_in_headers(lambda name: fields.get(name, []), "gpttrain") is not None) is refused


@pytest.mark.parametrize(
    ("html", "refused"),
    [
        ('<meta name="robots" content="noindex,follow">', True),
        ("<META CONTENT=noindex NAME=ROBOTS />", True),
        ("<meta name='gpttrain' content='noai'>", True),
        ("<meta name=googlebot content=noindex>", False),
        ("<meta name=robots content='index, follow'>", False),
        ("<meta property=robots content=noindex>", False),
        ("<!-- <meta name=robots content=noindex> -->", False),
        ("<script>'<meta name=robots content=noindex>'</script>", False),
        ("<script>x</script><meta name=robots content=noindex>", True),
        ("<p>noindex <meta name=author content=x>", False),
        ("<meta name='tdm-reservation' content='1'>", True),
        ("<meta content=1 name=TDM-Reservation>", True),
        ("<meta name='tdm-reservation' content='0'>", False),
        ("<meta name='tdm-policy' content='1'><p>tdm-reservation", False),
    ],
)
def test_meta_robots(html: str, refused: bool) -> None:
    assert (refusal_in_html(html.encode(), "gpttrain") is not None) is refused
    assert (refusal_in_html(("<html>" + html).encode("utf-16"), "gpttrain") is not None) is refused


@pytest.mark.parametrize(
    "page",
    [
        b"<meta " * 500_000 + b"noindex",
        b"<meta noindex " + b"a" * 2_000_000,
        b"<meta noindex name" + b" " * 2_000_000,
        (b"<meta noindex " + b"a" * 1900 + b">") * 1000,
        b"<!--" * 500_000 + b"<meta noindex",
        b"<script" * 300_000 + b"<meta noindex",
        b"<meta noindex " + b"a='" * 500_000,
    ],
)
def test_hostile_pages_cost_no_more_than_their_length(page: bytes) -> None:
    begin = time.thread_time()
    refusal_in_html(page, "gpttrain")
    assert time.thread_time() - begin < 0.5
