"""Which address may be connected to, and the connector that enforces it.

Names flow in, sockets connected to vetted addresses flow out. Two checks: of a name's addresses those that are not
public are dropped before one is chosen, and the socket factory looks at the very address that is about to be connected
to, so that a later change to what lies between cannot open a door.

    lookup (hosts file, then DNS) → rules → socket factory → connect(2), to numbers alone
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohappyeyeballs

from data_pipeline.config import FetchConfig
from data_pipeline.records import InputError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Lookup = Callable[[str], Awaitable[list[str]]]
"""Host name → addresses as text; raises OSError when there are none."""

# IANA IPv4 Special-Purpose Address Registry (RFC 6890), the entries that are not globally reachable; multicast
# (RFC 5771) and 240/4 (RFC 1112) with them.
_NOT_PUBLIC_V4 = tuple(
    ipaddress.IPv4Network(n)
    for n in (
        "0.0.0.0/8",  # this network, RFC 791
        "10.0.0.0/8",  # private, RFC 1918
        "100.64.0.0/10",  # carrier NAT, RFC 6598
        "127.0.0.0/8",  # loopback, RFC 1122
        "168.63.129.16/32",  # public by number, but inside Azure it is the host's own agent
        "169.254.0.0/16",  # link-local and cloud metadata, RFC 3927
        "172.16.0.0/12",  # private, RFC 1918
        "192.0.0.0/24",  # IETF protocol assignments, RFC 6890
        "192.0.2.0/24",  # documentation, RFC 5737
        "192.88.99.0/24",  # 6to4 relays, withdrawn by RFC 7526
        "192.168.0.0/16",  # private, RFC 1918
        "198.18.0.0/15",  # benchmarking, RFC 2544
        "198.51.100.0/24",  # documentation, RFC 5737
        "203.0.113.0/24",  # documentation, RFC 5737
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and the broadcast address
    )
)
# Global unicast is 2000::/3 (RFC 4291, 2.4); all else in IPv6 is refused, and of it these (IANA registry).
_GLOBAL_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = tuple(
    ipaddress.IPv6Network(n)
    for n in (
        "2001::/23",  # IETF protocol assignments, Teredo (2001::/32) and ORCHID among them, RFC 2928
        "2001:db8::/32",  # documentation, RFC 3849
        "2002::/16",  # 6to4 wraps any IPv4 address, RFC 3056; nothing of the Web lives there any more
        "3fff::/20",  # documentation, RFC 9637
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: how an IPv6-only network reaches IPv4

# "Port blocking" of the Fetch standard (section 2.9): services that a request could talk to by mistake or malice.
BAD_PORTS = frozenset(
    (
        0, 1, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 25, 37, 42, 43, 53, 69, 77, 79, 87, 95, 101, 102, 103, 104, 109,
        110, 111, 113, 115, 117, 119, 123, 135, 137, 139, 143, 161, 179, 389, 427, 465, 512, 513, 514, 515, 526, 530,
        531, 532, 540, 548, 554, 556, 563, 587, 601, 636, 989, 990, 993, 995, 1719, 1720, 1723, 2049, 3659, 4045, 4190,
        5060, 5061, 6000, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080,
    )
)  # fmt: skip

LOOKUP_THREADS = 64
"""Name look-ups under way at once; a slow name server must not stop the fast ones."""
DNS_CACHE_S = 300
MAX_DNS_ANSWERS = 50_000
"""Answers remembered; the oldest are forgotten first."""
MAX_ADDRESSES_TRIED = 4
"""Of one name's addresses; whoever lists a thousand strangers' addresses must not make us knock at all of them."""
EYEBALLS_DELAY_S = 0.25
"""RFC 8305, 5: the recommended connection attempt delay."""


class BlockedAddressError(OSError):
    """A connection to an address that is neither public nor allow-listed was refused before a socket existed."""


class LookupFailedError(OSError):
    """A name has no address, or nobody could be asked. `passing`: it may be had at the next try."""

    def __init__(self, message: str, *, passing: bool) -> None:
        super().__init__(message)
        self.passing = passing


def is_public(ip: str | Address) -> bool:
    """Whether `ip` is globally reachable unicast. IPv4 inside IPv6 (mapped, NAT64) is judged by the IPv4 address.

    >>> is_public("93.184.216.34"), is_public("127.0.0.1"), is_public("64:ff9b::a00:1")
    (True, False, False)
    """
    address = ipaddress.ip_address(ip) if isinstance(ip, str) else ip
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_V4)
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if address in _NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return address in _GLOBAL_UNICAST_V6 and not any(address in network for network in _NOT_PUBLIC_V6)


def parse_allow(pairs: list[str]) -> set[tuple[str, int]]:
    """`["127.0.0.1:80", "[::1]:80"]` → {(address, port)}. Raises InputError for anything else."""
    allowed = set()
    for pair in pairs:
        host, _, port = pair.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        try:
            address = ipaddress.ip_address(host[1:-1] if bracketed else host)
            number = int(port)
        except ValueError:
            address, number = None, -1
        if address is None or not 0 < number < 65536 or (address.version == 6) is not bracketed:
            raise InputError(f"fetch.allow_addresses={pair}: must be an exact ip:port; write 127.0.0.1:80 or [::1]:80")
        allowed.add((str(address), number))
    return allowed


def read_hosts_file(path: Path) -> dict[str, list[str]]:
    """hosts(5): `address name [name …]`, # comments. Raises InputError, naming the line, for what is not that."""
    names: dict[str, list[str]] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"fetch.hosts_file={path}: cannot be read ({e}); give a file in the form of /etc/hosts") from e
    for number, line in enumerate(text.split("\n"), 1):
        fields = line.split("#", 1)[0].split()
        if not fields:
            continue
        try:
            address = str(ipaddress.ip_address(fields[0]))
        except ValueError:
            raise InputError(f"{path}, line {number}: {fields[0]!r} is no address; write `address name`") from None
        for name in fields[1:]:
            names.setdefault(name.lower().rstrip("."), []).append(address)
    return names


class AddressRules:
    """May (address, port) be connected to? Public ones need `contact`; others must be allow-listed, port and all."""

    def __init__(self, config: FetchConfig) -> None:
        self.allowed = parse_allow(config.allow_addresses)
        self.public_too = bool(config.contact)

    def refusal(self, ip: str, port: int) -> str | None:
        """Why not, in a few words; None when it may."""
        try:
            address = ipaddress.ip_address(ip.split("%", 1)[0])  # link-local addresses come with a %zone
        except ValueError:
            return f"{ip} is no address"
        if (str(address), port) in self.allowed:
            return None
        if not is_public(address):
            return f"{address} is not public; if it is yours, add {address}:{port} to fetch.allow_addresses"
        if port in BAD_PORTS:
            return f"port {port} belongs to another service than the Web"
        if not self.public_too:
            return f"{address} is not in fetch.allow_addresses and fetch.contact is empty"
        return None


def system_lookup(hosts: Mapping[str, list[str]]) -> Lookup:
    """Names from `hosts`, then from the system's resolver in threads of its own.

    uvloop's getaddrinfo shares four threads with all else in the process: a few dead name servers would stop the fetch.
    """
    threads = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="dns")

    async def lookup(host: str) -> list[str]:
        name = host.lower().rstrip(".")
        if name in hosts:
            return hosts[name]
        # Bytes: for text, getaddrinfo runs Python's IDNA 2003 codec, which raises UnicodeError for long labels.
        encoded = name.encode("ascii", "replace")
        infos = await asyncio.get_running_loop().run_in_executor(
            threads, lambda: socket.getaddrinfo(encoded, None, type=socket.SOCK_STREAM)
        )
        return list(dict.fromkeys(str(info[4][0]) for info in infos))

    return lookup


class VettedConnector:
    """Opens connections to public or allow-listed addresses, and to no others.

    The name is looked up once and the answer kept; each address is vetted with the port; what is connected to are the
    vetted addresses themselves, never the name again. The last look is at the very address handed to connect(2).
    """

    def __init__(self, config: FetchConfig, lookup: Lookup | None = None) -> None:
        """`lookup`: name → addresses, for tests; by default the hosts file, then DNS."""
        self.rules = AddressRules(config)
        if lookup is None:
            lookup = system_lookup(read_hosts_file(Path(config.hosts_file)) if config.hosts_file else {})
        self._lookup = lookup
        self._answers: OrderedDict[str, tuple[float, list[str]]] = OrderedDict()

    async def connect(self, host: str, port: int) -> tuple[socket.socket, str]:
        """(a connected socket that does not block, the address it is connected to).

        Raises BlockedAddressError, LookupFailedError, OSError.
        """
        found = await self.addresses(host)
        refusals = {ip: self.rules.refusal(ip, port) for ip in found}
        good = [ip for ip, refusal in refusals.items() if refusal is None]
        if not good:
            raise BlockedAddressError(f"{host}: {next(iter(refusals.values()))}")
        # Of several addresses the next is tried after a quarter of a second, IPv6 and IPv4 in turn (RFC 8305).
        connected = await aiohappyeyeballs.start_connection(
            [_numeric(ip, port) for ip in good[:MAX_ADDRESSES_TRIED]],
            happy_eyeballs_delay=EYEBALLS_DELAY_S if len(good) > 1 else None,
            interleave=1,
            socket_factory=self._socket,
        )
        try:
            return connected, str(connected.getpeername()[0])
        except OSError:  # reset in between
            connected.close()
            raise

    async def addresses(self, host: str) -> list[str]:
        """All addresses of `host`, vetted or not; of a literal address itself. Raises LookupFailedError."""
        try:
            return [str(ipaddress.ip_address(host))]
        except ValueError:
            pass
        now = time.monotonic()
        known = self._answers.get(host)
        if known is not None and known[0] > now:
            return known[1]
        try:
            found = [ip.split("%", 1)[0] for ip in await self._lookup(host)]
        except (OSError, UnicodeError) as e:
            again = isinstance(e, socket.gaierror) and e.errno == socket.EAI_AGAIN
            raise LookupFailedError(f"{host}: {e}", passing=again) from e
        if not found:
            raise LookupFailedError(f"{host}: no address", passing=False)
        self._answers[host] = (now + DNS_CACHE_S, found)
        self._answers.move_to_end(host)
        if len(self._answers) > MAX_DNS_ANSWERS:
            self._answers.popitem(last=False)
        return found

    def _socket(self, info: aiohappyeyeballs.AddrInfoType) -> socket.socket:
        family, kind, protocol, _, target = info
        refusal = self.rules.refusal(str(target[0]), int(target[1]))
        if refusal is not None:
            raise BlockedAddressError(refusal)
        return socket.socket(family=family, type=kind, proto=protocol)


def _numeric(ip: str, port: int) -> aiohappyeyeballs.AddrInfoType:
    """What getaddrinfo would say of an address and a port."""
    if ":" in ip:
        return socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (ip, port, 0, 0)
    return socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (ip, port)
