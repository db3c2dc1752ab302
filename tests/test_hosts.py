"""Hosts meet before JAX connects them: whoever is missing, differs or is lost has a name."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import portpicker
import pytest

from plan_jax.parallel import hosts
from plan_jax.types import UserError

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = {"jax": "0.10.2", "plan_jax's code": "12345678"}


def hello(index, count=2, **changes):
    """Returns what a host says of itself."""
    values = {"index": index, "count": count, "name": f"node{index}", "process": 100 + index}
    return {**values, "versions": VERSIONS, **changes}


def meet(*hellos, timeout=10.0):
    """Lets hosts meet, each in a thread; returns the watch or the sentence of each of them."""
    address = f"127.0.0.1:{portpicker.pick_unused_port()}"
    results = [None] * len(hellos)

    def run(position):
        own = hellos[position]
        try:
            results[position] = hosts.meet(address, own["count"], own["index"], timeout, own)
        except UserError as error:
            results[position] = str(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(hellos))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def fast(monkeypatch):
    """Signs of life in quick succession, so that silence is soon noticed."""
    monkeypatch.setattr(hosts, "PERIOD", 0.05)
    monkeypatch.setattr(hosts, "SILENCE", 1.0)
    monkeypatch.setattr(hosts, "GRACE", 0.2)


def start(watches):
    """Starts watches; returns the reasons with which they end, which grow from now on."""
    reasons = [[] for _ in watches]
    for watch, found in zip(watches, reasons, strict=True):
        watch.start(found.append)
    return reasons


def wait_for(condition, seconds=10):
    """Waits until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_hosts_know_each_other_in_their_order():
    watches = meet(hello(2, 3), hello(0, 3), hello(1, 3))
    names = [f"host {i} (node{i}, process {100 + i})" for i in range(3)]
    assert [watch.names for watch in watches] == [names] * 3


@pytest.mark.parametrize(
    ("hellos", "sentence"),
    [
        ([hello(0)], "of 2 hosts, 1 has not started within 1 s; start the same command on all"),
        ([hello(0, 4), hello(2, 4)], "of 4 hosts, 1, 3 have not started within 1 s"),
        ([hello(1)], "host 0 of 2 does not answer at 127.0.0.1:"),
        (
            [hello(0), hello(1, 3)],
            r"host 1 \(node1, process 101\) belongs to a run of 3 hosts and host 0 \(node0, pro.* "
            "one of 2; set JAX_NUM_PROCESSES",
        ),
        (
            [hello(0, 3), hello(1, 3), hello(1, 3, name="b", process=7)],
            r"host 1 \(\w+, process \d+\) and host 1 \(\w+, process \d+\) have the same number; ",
        ),
        (
            [hello(0), hello(1, versions={**VERSIONS, "jax": "0.9.0"})],
            r"jax is 0.9.0 on host 1 \(node1, process 101\) and 0.10.2 on host 0 \(node0, .*; in",
        ),
        (
            [hello(0), hello(1, versions={"jax": "0.10.2"})],
            r"plan_jax's code is None on host 1 .* and 12345678 on host 0",
        ),
    ],
)
def test_who_is_missing_or_differs_is_named_to_all(hellos, sentence):
    for result in meet(*hellos, timeout=1.0):
        assert isinstance(result, str)
        assert re.search(sentence, result), result


def test_strangers_are_no_hosts():
    port, result = portpicker.pick_unused_port(), []

    def run():
        result.append(hosts.meet(f"127.0.0.1:{port}", 3, 0, 10.0, hello(0, 3)))

    thread = threading.Thread(target=run)
    thread.start()
    for line in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"[1]\n",
        b"[" * 5000 + b"\n",
        b'{"index": 1}\n',
        json.dumps(hello(3, 3)).encode() + b"\n",
        b"\n",
    ):
        wait_for(lambda: is_listening(port))
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(line)
    with socket.create_connection(("127.0.0.1", port)) as first:  # it ends, and is started again
        first.sendall(json.dumps(hello(1, 3, process=7)).encode() + b"\n")
    others = []

    def join(index):
        others.append(hosts.meet(f"127.0.0.1:{port}", 3, index, 10.0, hello(index, 3)))

    threads = [threading.Thread(target=join, args=(1,))]
    threads[0].start()
    time.sleep(0.5)
    join(2)
    for running in (*threads, thread):
        running.join()
    assert [watch.names for watch in others] == [result[0].names] * 2
    assert result[0].names[1] == "host 1 (node1, process 101)"


def test_the_names_of_many_hosts_fit_into_an_answer():
    long_name, count = "node." + "x" * 58, 300
    port, results = portpicker.pick_unused_port(), []

    def run():
        own = hello(0, count, name=long_name)
        results.append(hosts.meet(f"127.0.0.1:{port}", count, 0, 30.0, own))

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(lambda: is_listening(port))
    peers = []
    for index in range(1, count):
        peers.append(socket.create_connection(("127.0.0.1", port)))
        peers[-1].sendall(json.dumps(hello(index, count, name=long_name)).encode() + b"\n")
    answer = json.loads(hosts._receive_line(peers[-1]))
    thread.join()
    assert answer["hosts"] == results[0].names and len(answer["hosts"]) == count
    for peer in (*peers, *results[0]._peers.values()):
        peer.close()


def is_listening(port):
    """Returns whether a port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"cannot meet at {address} .*; set another port"):
            hosts.meet(address, 2, 0, 1.0, hello(0))


@pytest.mark.parametrize("address", ["node1", ":80", "node1:", "node1:0", "node1:70000", "a:b"])
def test_an_address_needs_a_host_and_a_port(address):
    with pytest.raises(UserError, match=f"JAX_COORDINATOR_ADDRESS is {address}; must be"):
        hosts.split_address(address)
    assert hosts.split_address("[::1]:80") == ("::1", 80)


@pytest.mark.parametrize("lost", [0, 2])
def test_the_end_of_a_host_is_known_to_all(fast, lost):
    watches = meet(*(hello(i, 3) for i in range(3)))
    others = [watch for i, watch in enumerate(watches) if i != lost]
    reasons = start(others)
    for peer in watches[lost]._peers.values():
        peer.close()
    name = f"host {lost} (node{lost}, process {100 + lost}) has ended"
    wait_for(lambda: all(found == [name] for found in reasons))
    assert [watch.find_reason(0.0) for watch in others] == [name] * 2


def test_a_host_that_is_silent_is_lost_and_one_that_leaves_is_not(fast):
    watches = meet(*(hello(i, 3) for i in range(3)))
    reasons = start(watches[:2])  # the third has no thread, as if it were frozen
    watches[1].leave()
    name = "host 2 (node2, process 102) has not answered for 1 s"
    wait_for(lambda: reasons[0] == [name])
    for peer in watches[1]._peers.values():
        peer.close()
    assert reasons[0] == [name]

    watches = meet(hello(0), hello(1))
    (reasons,) = start(watches[:1])
    watches[1].leave()
    for peer in watches[1]._peers.values():
        peer.close()
    time.sleep(0.3)
    assert reasons == []


FROZEN = """
import sys, time
from plan_jax.parallel import hosts
hosts.PERIOD, hosts.SILENCE, hosts.GRACE = 0.1, 2.0, 0.5
watch = hosts.meet(sys.argv[1], 2, int(sys.argv[2]), 60)
watch.start(lambda reason: print(reason, flush=True))
print("ready", flush=True)
time.sleep(float(sys.argv[3]))
watch.leave()
"""


def test_a_short_pause_is_forgiven():
    """A process that was stopped and continues counts the time of its own absence for nothing."""
    address = f"127.0.0.1:{portpicker.pick_unused_port()}"
    command = [sys.executable, "-c", FROZEN, address]
    runs = [
        subprocess.Popen([*command, str(i), "6"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    assert [run.stdout.readline() for run in runs] == ["ready\n"] * 2
    for run in runs:  # both, for longer than the silence that is allowed
        os.kill(run.pid, signal.SIGSTOP)
    time.sleep(3)
    for run in runs:
        os.kill(run.pid, signal.SIGCONT)
    assert [run.communicate()[0] for run in runs] == ["", ""]
