"""The hosts of one run: they meet before JAX connects them, and each notices the end of another.

JAX says neither which host is missing nor which one has ended, and it waits for minutes. Here every
host connects to host 0 by TCP, at the address where JAX's coordinator will listen afterwards. Host
0 compares what they say of themselves, and answers all of them once they are complete. The
connections stay open: the system closes that of a process however it ends, and a frozen process
sends no signs of life. Messages are lines of JSON. Nothing is executed, and no address other than
the coordinator's is used.
"""

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from plan_jax.types import UserError

START_TIMEOUT = 100.0  # seconds until a host counts as missing
SILENCE = 90.0  # seconds without a sign of life; JAX's own limit is 100
PERIOD = 5.0  # seconds between signs of life
GRACE = 10.0  # seconds in which the main thread may report a loss itself
NEWS = 3.0  # seconds that it waits for the watch to know which host it is
RETRY = 0.2  # seconds between attempts to connect
MAX_LINE = 1 << 18  # bytes; the names of 1000 hosts are some 50 kB
LOST = "another host of this run has ended or cannot be reached"
REMEDY = (
    "look at its output, then repeat the command on all hosts to resume from the last checkpoint"
)
START_REMEDY = (
    "start the same command on all hosts, or set JAX_DISTRIBUTED=off if this process is alone"
)

Hello = Mapping[str, Any]


def lost_sentence(reason: str = "") -> str:
    """Returns the sentence of a run that has lost a host, with the reason if it is known."""
    return f"{LOST}: {reason}; {REMEDY}" if reason else f"{LOST}; {REMEDY}"


def describe_self(index: int, count: int) -> dict[str, Any]:
    """Returns what a host says of itself: its place in the run, its name and its versions."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "index": index,
        "count": count,
        "name": socket.gethostname(),
        "process": os.getpid(),
        "versions": {"plan_jax's code": digest_code(), **versions},
    }


@functools.cache
def digest_code() -> str:
    """Returns eight digits that differ if any module of this package does."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def meet(
    address: str, count: int, index: int, timeout: float = START_TIMEOUT, hello: Hello | None = None
) -> "Watch":
    """Waits until all hosts of a run have started, and returns the watch over them.

    Args:
      address: `host:port` of host 0, where JAX's coordinator will listen.
      count: the number of hosts.
      index: the number of this one.
      timeout: seconds until a host counts as missing.
      hello: what this host says of itself; by default `describe_self`.

    Raises:
      UserError: a host is missing, two have the same number, or they differ in count or versions;
        in every host, and the sentence names it.
    """
    hello = hello or describe_self(index, count)
    deadline = time.monotonic() + timeout
    if index == 0:
        names, peers = _gather(address, hello, deadline, timeout)
    else:
        names, peers = _register(address, hello, deadline, timeout)
    return Watch(names, index, peers)


# The meeting -------------------------------------------------------------------------------------


def _gather(
    address: str, hello: Hello, deadline: float, timeout: float
) -> tuple[list[str], dict[int, socket.socket]]:
    """Waits for the other hosts as host 0; returns the names of all, and their connections."""
    hellos: dict[int, Hello] = {0: hello}
    peers: dict[int, socket.socket] = {}
    refusal = ""
    with _listen(address) as listener:
        while len(hellos) < hello["count"] and not refusal:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                missing = [i for i in range(hello["count"]) if i not in hellos]
                refusal = _describe_missing(missing, hello["count"], timeout)
                break
            listener.settimeout(remaining)
            try:
                peer, _ = listener.accept()
            except TimeoutError:
                continue
            other = _receive_hello(peer)
            if other is None:  # not one of us: another program asks what listens here
                peer.close()
                continue
            position = other["index"]
            if position in peers and _is_closed(peers[position]):  # it has been started again
                peers.pop(position).close()
                del hellos[position]
            refusal = _compare(hellos, other)
            # A host that is refused is told why, like the others.
            peers[-1 if refusal else position] = peer
            hellos.setdefault(position, other)
    names = [_label(hellos[i]) for i in sorted(hellos)]
    _answer(peers.values(), {"refusal": refusal} if refusal else {"hosts": names})
    if refusal:
        for peer in peers.values():
            peer.close()
        raise UserError(refusal)
    return names, peers


def _listen(address: str) -> socket.socket:
    """Returns a socket that listens at the port of an address; on loopback alone if that is it."""
    host, port = split_address(address)
    try:
        if host in ("localhost", "127.0.0.1", "::1"):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host, port), family=family)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL):
            raise
        raise UserError(
            f"the hosts cannot meet at {address} ({error.strerror}); set another port in"
            " JAX_COORDINATOR_ADDRESS or JAX_COORDINATOR_PORT, the same on all hosts"
        ) from None


def _register(
    address: str, hello: Hello, deadline: float, timeout: float
) -> tuple[list[str], dict[int, socket.socket]]:
    """Introduces this host to host 0; returns the names of all hosts, and the connection."""
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            peer = socket.create_connection(split_address(address), timeout=remaining)
        except OSError:  # it has not started yet, or its name is not known yet
            time.sleep(min(RETRY, remaining))
            continue
        try:
            peer.sendall(_encode(hello))
            # Host 0 answers when its own time is over, which began at another moment.
            peer.settimeout(timeout + GRACE)
            answer = _decode(_receive_line(peer))
        except OSError:
            answer = None
        if not isinstance(answer, dict) or not ("hosts" in answer or "refusal" in answer):
            peer.close()  # JAX's coordinator of an earlier run, or another program
            time.sleep(RETRY)
            continue
        if answer.get("refusal"):
            peer.close()
            raise UserError(str(answer["refusal"]))
        return answer["hosts"], {0: peer}
    raise UserError(
        f"{LOST}: host 0 of {hello['count']} does not answer at {address} within {timeout:.0f} s;"
        f" {START_REMEDY}"
    )


def _receive_hello(peer: socket.socket) -> Hello | None:
    """Returns what a host says of itself; None if it does not speak this language."""
    peer.settimeout(GRACE)
    with contextlib.suppress(OSError):
        hello = _decode(_receive_line(peer))
        kinds = {"index": int, "count": int, "name": str, "process": int, "versions": dict}
        if isinstance(hello, dict) and all(
            isinstance(hello.get(name), kind) for name, kind in kinds.items()
        ):
            return hello if 0 <= hello["index"] < hello["count"] else None
    return None


def _compare(hellos: Mapping[int, Hello], other: Hello) -> str:
    """Returns the sentence that refuses a host, or ""."""
    first = hellos[0]
    if other["count"] != first["count"]:
        return (
            f"{_label(other)} belongs to a run of {other['count']} hosts and {_label(first)} to one"
            f" of {first['count']}; set JAX_NUM_PROCESSES to the same number on all hosts"
        )
    if other["index"] in hellos:
        return (
            f"{_label(hellos[other['index']])} and {_label(other)} have the same number; give each"
            " process a JAX_PROCESS_ID of its own"
        )
    for package, version in first["versions"].items():
        if other["versions"].get(package) != version:
            return (
                f"{package} is {other['versions'].get(package)} on {_label(other)} and {version} on"
                f" {_label(first)}; install the same versions on all hosts"
            )
    return ""


def _describe_missing(missing: list[int], count: int, timeout: float) -> str:
    names = ", ".join(map(str, missing[:8])) + (" and more" if len(missing) > 8 else "")
    verb = "has" if len(missing) == 1 else "have"
    return (
        f"{LOST}: of {count} hosts, {names} {verb} not started within {timeout:.0f} s;"
        f" {START_REMEDY}"
    )


def _label(hello: Hello) -> str:
    return f"host {hello['index']} ({hello['name']}, process {hello['process']})"


# The watch ---------------------------------------------------------------------------------------


class Watch:
    """Looks at the connections to the other hosts, in a thread of its own.

    Host 0 is connected with all others, and each of them with host 0, which passes on what it sees.

    Attributes:
      names: the hosts in their order, as `host 1 (name, process 12)`.
      reason: which host has been lost and how; "" while none has.
      farewell: which connected host has ended after its work was done; "" while none has.
    """

    def __init__(self, names: list[str], index: int, peers: Mapping[int, socket.socket]) -> None:
        """Takes over the connections by the number of their host."""
        self.names, self.index, self.reason, self.farewell = names, index, "", ""
        self._peers = dict(peers)
        self._is_lost = threading.Event()
        self._lock = threading.Lock()  # of what is sent: signs of life and farewells

    def start(self, end: Callable[[str], None]) -> None:
        """Watches from now on, and calls `end` in the thread of the watch when a host is lost."""
        for peer in self._peers.values():
            peer.setblocking(False)
        threading.Thread(target=self._watch, args=(end,), name="hosts", daemon=True).start()

    def find_reason(self, timeout: float = NEWS) -> str:
        """Returns which host has been lost, and waits for the news; "" if none is known to be."""
        self._is_lost.wait(timeout)
        return self.reason

    def leave(self) -> None:
        """Tells the others that this host is done, so that its end is no loss."""
        self._send({"leaves": True})

    def _watch(self, end: Callable[[str], None]) -> None:
        peers, buffers = dict(self._peers), dict.fromkeys(self._peers, b"")
        last_seen, next_sign = dict.fromkeys(peers, time.monotonic()), 0.0
        selector = selectors.DefaultSelector()
        for position, peer in peers.items():
            selector.register(peer, selectors.EVENT_READ, position)
        while peers:
            now = time.monotonic()
            if now >= next_sign:
                self._send({})
                next_sign = now + PERIOD
            for key, _ in selector.select(min(1.0, PERIOD)):
                position = key.data
                try:
                    data = peers[position].recv(MAX_LINE)
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                if not data:
                    return self._lose(f"{self.names[position]} has ended", end)
                last_seen[position] = time.monotonic()
                *lines, rest = (buffers[position] + data).split(b"\n")
                buffers[position] = rest[-MAX_LINE:]
                for message in map(_decode, lines):
                    if not isinstance(message, dict):
                        continue
                    if message.get("lost"):
                        return self._lose(str(message["lost"]), end)
                    if message.get("leaves"):
                        self.farewell = f"{self.names[position]} has ended"
                        selector.unregister(peers.pop(position))
                        break
            now = time.monotonic()
            for position in peers:
                if now - last_seen[position] > SILENCE:
                    # A process that was frozen itself has not read what had arrived.
                    if now - next_sign > PERIOD + GRACE:
                        last_seen = dict.fromkeys(peers, now)
                        break
                    silent = f"has not answered for {SILENCE:.0f} s"
                    return self._lose(f"{self.names[position]} {silent}", end)

    def _lose(self, reason: str, end: Callable[[str], None]) -> None:
        self.reason = reason
        self._send({"lost": reason})
        self._is_lost.set()
        end(reason)

    def _send(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            for peer in self._peers.values():
                with contextlib.suppress(OSError):  # its end is seen where it is read
                    peer.sendall(_encode(message))


# Messages ----------------------------------------------------------------------------------------


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port of an address, as `node1:1234` or `[::1]:1234`.

    Raises:
      UserError: it has no host, or no port from 1 to 65535.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS is {address}; must be the host 0 and a port, as node1:12345"
        )
    return host.strip("[]"), int(port)


def _answer(peers: Iterable[socket.socket], message: Mapping[str, Any]) -> None:
    for peer in peers:
        with contextlib.suppress(OSError):
            peer.sendall(_encode(message))


def _encode(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _decode(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _receive_line(peer: socket.socket) -> bytes:
    """Returns the next line, byte by byte: what follows it is not read."""
    line = b""
    while not line.endswith(b"\n") and len(line) < MAX_LINE:
        byte = peer.recv(1)
        if not byte:
            break
        line += byte
    return line


def _is_closed(peer: socket.socket) -> bool:
    """Returns whether the other side has closed a connection."""
    with contextlib.suppress(BlockingIOError, TimeoutError):
        peer.setblocking(False)
        try:
            return not peer.recv(1, socket.MSG_PEEK)
        except ConnectionError:
            return True
    return False
