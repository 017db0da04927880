"""Which addresses may be connected to: the tables against Python's own, and the connector against tricky hosts."""

from __future__ import annotations

import asyncio
import ipaddress
import random
import socket
from pathlib import Path

import pytest
import uvloop

from data_pipeline.config import FetchConfig
from data_pipeline.crawl import addresses
from data_pipeline.crawl.addresses import (
    AddressRules,
    BlockedAddressError,
    LookupFailedError,
    VettedConnector,
    is_public,
    parse_allow,
    read_hosts_file,
)
from data_pipeline.records import InputError


@pytest.mark.parametrize(
    "ip",
    [
        "8.8.8.8",
        "93.184.216.34",
        "100.63.255.255",
        "100.128.0.0",
        "172.15.0.1",
        "172.32.0.1",
        "192.0.1.1",
        "223.255.255.255",
        "2606:2800:220:1::1",
        "2001:4860:4860::8888",
        "2a00::1",
        "::ffff:8.8.8.8",
        "64:ff9b::8.8.8.8",
    ],
)
def test_public(ip: str) -> None:
    assert is_public(ip)


@pytest.mark.parametrize(
    "ip",
    [
        "0.0.0.0",
        "0.1.2.3",
        "10.255.255.255",
        "100.64.0.1",
        "100.127.255.255",
        "127.0.0.1",
        "127.255.255.254",
        "169.254.169.254",
        "172.16.0.0",
        "172.31.255.255",
        "192.0.0.8",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.0.1",
        "198.18.0.1",
        "198.19.255.255",
        "198.51.100.7",
        "203.0.113.7",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "168.63.129.16",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::169.254.169.254",
        "64:ff9b:1::808:808",
        "100::1",
        "2001::1",
        "2001:db8::1",
        "2001:10::1",
        "2001:20::1",
        "2002:7f00:1::1",
        "2002:808:808::1",
        "3fff::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fec0::1",
        "ff02::1",
        "5f00::1",
        "4000::1",
    ],
)
def test_not_public(ip: str) -> None:
    assert not is_public(ip)


def test_never_more_lenient_than_the_standard_library() -> None:
    chance = random.Random(6890)
    edges = [n.network_address for n in map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"))]
    v4 = [ipaddress.IPv4Address(chance.getrandbits(32)) for _ in range(20_000)] + edges
    v6 = [ipaddress.IPv6Address(chance.getrandbits(128)) for _ in range(5_000)]
    v6 += [ipaddress.IPv6Address(0x2001 << 112 | chance.getrandbits(112)) for _ in range(5_000)]
    for address in (*v4, *v6):
        if is_public(address):
            assert address.is_global, address
    # And hardly stricter: a random IPv4 address is public about as often as Python says it is.
    ours, theirs = sum(map(is_public, v4)), sum(a.is_global and not a.is_multicast for a in v4)
    assert abs(ours - theirs) < 20


def test_allow_list() -> None:
    assert parse_allow(["127.0.0.1:80", "[::1]:8080", "[0:0::1]:1"]) == {("127.0.0.1", 80), ("::1", 8080), ("::1", 1)}
    for wrong in (
        "127.0.0.1",
        "127.0.0.1:0",
        "127.0.0.1:99999",
        "localhost:80",
        "::1:80",
        "[127.0.0.1]:80",
        "10.0.0.0/8:1",
    ):
        with pytest.raises(InputError, match="must be an exact ip:port"):
            parse_allow([wrong])


def test_rules_look_at_address_and_port() -> None:
    rules = AddressRules(FetchConfig(contact="a@b.org", allow_addresses=["127.0.0.1:8000"]))
    assert rules.refusal("127.0.0.1", 8000) is None
    assert rules.refusal("8.8.8.8", 443) is None
    assert rules.refusal("127.0.0.1", 8001)
    assert rules.refusal("8.8.8.8", 25)
    assert rules.refusal("fe80::1%eth0", 80)
    assert AddressRules(FetchConfig()).refusal("8.8.8.8", 443) == (
        "8.8.8.8 is not in fetch.allow_addresses and fetch.contact is empty"
    )


def test_hosts_file(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# names\n127.0.0.1 a.test B.test # two\n\n::1\ta.test\n")
    assert read_hosts_file(file) == {"a.test": ["127.0.0.1", "::1"], "b.test": ["127.0.0.1"]}
    file.write_text("127.0.0.1 a.test\nlocalhost b.test\n")
    with pytest.raises(InputError, match="line 2: 'localhost' is no address"):
        read_hosts_file(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_hosts_file(tmp_path / "missing")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "2130706433",
        "0x7f000001",
        "017700000001",
        "127.1",
        "0x7f.1",
        "0",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "localhost",
        "localhost.",
        "169.254.169.254",
        "10.1",
        "[fe80::1]",
        "[64:ff9b::7f00:1]",
    ],
)
def test_the_connector_refuses_hosts_that_were_never_normalized(host: str) -> None:
    """Spelled so that the system's resolver, or nobody, has to make an address of them."""

    async def connect() -> None:
        await VettedConnector(FetchConfig(contact="a@b.org")).connect(host.strip("[]"), 8123)

    with pytest.raises(OSError) as caught:  # noqa: PT011 (a name that is no name may also end as one without address)
        uvloop.run(connect())
    assert isinstance(caught.value, (BlockedAddressError, LookupFailedError))


def test_a_name_reaches_the_allowed_one_of_its_addresses() -> None:
    asked: list[str] = []

    async def lookup(host: str) -> list[str]:
        asked.append(host)
        return ["10.0.0.1", "::1", "127.0.0.1", "169.254.169.254"]

    async def connect() -> None:
        server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        config = FetchConfig(contact="a@b.org", allow_addresses=[f"127.0.0.1:{port}"])
        connector = VettedConnector(config, lookup)
        async with server:
            for _ in range(3):
                connected, ip = await connector.connect("name.test", port)
                assert connected.getpeername() == ("127.0.0.1", port)
                assert ip == "127.0.0.1"
                connected.close()

    uvloop.run(connect())
    assert asked == ["name.test"]  # the answer is kept, so that a later one cannot differ


def test_of_a_thousand_addresses_a_few_are_knocked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may list a thousand strangers; each look-up must not become a thousand connections."""
    monkeypatch.setattr(addresses, "EYEBALLS_DELAY_S", 0.001)
    tried: list[tuple[str, int]] = []

    async def lookup(host: str) -> list[str]:
        return [f"127.0.{i // 250}.{i % 250 + 1}" for i in range(1000)]

    def refuse(info: tuple[object, ...]) -> socket.socket:
        tried.append(info[4])  # type: ignore[arg-type]
        raise ConnectionRefusedError

    config = FetchConfig(contact="a@b.org", allow_addresses=[f"127.0.{i // 250}.{i % 250 + 1}:81" for i in range(1000)])
    connector = VettedConnector(config, lookup)
    monkeypatch.setattr(connector, "_socket", refuse)
    with pytest.raises(ConnectionRefusedError):
        uvloop.run(connector.connect("many.test", 81))
    assert len(tried) == addresses.MAX_ADDRESSES_TRIED


def test_look_ups_fail_typed() -> None:
    async def lookup(host: str) -> list[str]:
        if host == "busy.test":
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        if host == "long.test":
            raise UnicodeError("label too long")
        return []

    async def ask(host: str) -> None:
        await VettedConnector(FetchConfig(contact="a@b.org"), lookup).connect(host, 80)

    for host, passing in (("busy.test", True), ("long.test", False), ("empty.test", False)):
        with pytest.raises(LookupFailedError, match=host) as caught:
            uvloop.run(ask(host))
        assert caught.value.passing is passing
