"""How machines meet and hear of each other: launchers of one process each, on this machine's loopback, in real connections."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from dnc_dist.errors import InputError
from dnc_dist.launch import host, meeting
from dnc_dist.launch.meeting import Meeting, MeetingError, meet
from dnc_dist.launch.network import interface_settings, is_here, parse_endpoint
from dnc_dist.launch.peers import Alarm
from dnc_dist.launch.verdict import Report, verdict


@pytest.fixture
def endpoint() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def wait_for(condition: Callable[[], Any], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def gathered(pool: ThreadPoolExecutor, endpoint: str, count: int) -> list[Meeting]:
    """So many machines, in the order of their numbers."""
    coming: list[Future[Meeting]] = [pool.submit(meet, endpoint, count, {"--nnodes": count}, 20) for _ in range(count)]
    return sorted((one.result() for one in coming), key=lambda one: one.number)


def close(meetings: list[Meeting], pool: ThreadPoolExecutor) -> None:
    list(pool.map(Meeting.close, meetings))


def error(age: float, text: str) -> dict[str, Any]:
    return {"time": time.time() - age, "exit_code": 1, "type": "RuntimeError", "message": text, "traceback": "Traceback\n"}


def test_machines_meet_and_all_hear_how_it_ended(endpoint: str, pool: ThreadPoolExecutor) -> None:
    machines = gathered(pool, endpoint, 3)
    assert [one.number for one in machines] == [0, 1, 2] and len({tuple(one.machines) for one in machines}) == 1
    assert {one.store for one in machines} == {("127.0.0.1", machines[0].store[1])} and {one.address for one in machines} == {"127.0.0.1"}
    for number, one in enumerate(machines):
        assert one.verdict() is None
        one.tell(Report({number: 0}, {}, {number: "tail"}))
    for one in machines:
        wait_for(one.verdict)
        assert one.verdict() == Report({0: 0, 1: 0, 2: 0}, {}, {0: "tail", 1: "tail", 2: "tail"})
    close(machines, pool)
    # The same place is free at once.
    close(gathered(pool, endpoint, 2), pool)


def test_an_alarm_reaches_the_others_only(endpoint: str, pool: ThreadPoolExecutor) -> None:
    machines = gathered(pool, endpoint, 3)
    alarm = Alarm("fire", stop=True, seconds=3.0)
    machines[1].raise_alarm(alarm)
    heard: dict[int, list[Alarm]] = {0: [], 1: [], 2: []}
    wait_for(lambda: [heard[one.number].extend(one.alarms()) for one in machines] and heard[0] and heard[2])
    assert heard == {0: [alarm], 1: [], 2: [alarm]}
    close(machines, pool)


def test_the_earliest_error_is_found_though_clocks_differ(endpoint: str, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second machine's clock is an hour fast; its error came first."""
    machines = gathered(pool, endpoint, 2)
    clock = time.time
    machines[0].tell(Report({0: 1}, {0: error(1.0, "a consequence")}))
    early = error(2.0, "the cause") | {"time": clock() - 2 + 3600}
    monkeypatch.setattr(meeting.time, "time", lambda: clock() + (3600 if threading.current_thread() is threading.main_thread() else 0))
    machines[1].tell(Report({1: 1}, {1: early}))
    monkeypatch.undo()
    for one in machines:
        wait_for(one.verdict)
        whole = one.verdict()
        assert whole is not None
        assert verdict(whole, hosts={0: "a", 1: "b"}) == (1, "Traceback\nrank 1 on b failed: RuntimeError: the cause")
    close(machines, pool)


def test_a_launcher_that_is_gone_is_an_alarm_and_part_of_the_verdict(endpoint: str, pool: ThreadPoolExecutor) -> None:
    machines = gathered(pool, endpoint, 3)
    lost = machines.pop(2)
    name = lost.machines[2]
    lost.close()
    for number, one in enumerate(machines):
        alarms: list[Alarm] = []
        wait_for(lambda one=one, alarms=alarms: alarms.extend(one.alarms()) or alarms)
        (alarm,) = alarms
        assert alarm.stop and alarm.text == f"{name}: its launcher was killed, or has ended"
        one.tell(Report({number: 75}))
    for one in machines:
        wait_for(one.verdict)
        whole = one.verdict()
        assert whole is not None and verdict(whole)[0] == 75 and name in verdict(whole)[1]
    close(machines, pool)


def test_a_silent_machine_is_gone(endpoint: str, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(host, "SILENCE_SECONDS", 1.0)
    first = pool.submit(meet, endpoint, 2, {}, 20)
    address, port = endpoint.split(":")
    wait_for(lambda: socket.socket().connect_ex((address, int(port))) == 0)
    with socket.create_connection((address, int(port))) as silent, silent.makefile("rw") as lines:
        lines.readline()
        lines.write(json.dumps({"card": {"id": "x", "host": "sleepy", "terms": {}}}) + "\n")
        lines.flush()
        machine = first.result()
        alarms: list[Alarm] = []
        wait_for(lambda: alarms.extend(machine.alarms()) or alarms)
        assert alarms == [Alarm("sleepy (127.0.0.1): nothing was heard of it for 1 s; it is down, or the network between", False, 0.0)]
        machine.tell(Report({0: 0}))
        wait_for(machine.verdict)
        machine.close()


def test_different_runs_are_refused_on_all_machines(endpoint: str, pool: ThreadPoolExecutor) -> None:
    name = socket.gethostname()
    first = pool.submit(meet, endpoint, 3, {"--nproc": 2, "optim.lr": 0.1}, 20)
    time.sleep(0.3)
    second = pool.submit(meet, endpoint, 3, {"--nproc": 1, "optim.lr": 0.1, "loss.nu": 0}, 20)
    for one in (first, second):
        with pytest.raises(InputError) as caught:
            one.result()
        assert str(caught.value) == (
            f"the machines do not start the same: --nproc is 2 on {name} and 1 on {name} (127.0.0.1), "
            f"loss.nu is None on {name} and 0 on {name} (127.0.0.1); start the same command on all of them"
        )


def test_too_few_machines(endpoint: str, capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    with pytest.raises(
        MeetingError, match=rf"1 of 2 machines is here \(.*\) at {endpoint} after 1 s; start the same command on the others, too"
    ):
        meet(endpoint, 2, {}, 1)
    assert time.monotonic() - start < 5
    assert "1 of 2 machines is here" in capfd.readouterr().err


def test_a_late_machine_waits_for_the_end_of_the_run_before(
    endpoint: str, pool: ThreadPoolExecutor, capfd: pytest.CaptureFixture[str]
) -> None:
    machines = gathered(pool, endpoint, 2)
    late = pool.submit(meet, endpoint, 2, {"--nnodes": 2}, 20)
    err = ""
    while "has not ended there" not in err:
        err += capfd.readouterr().err
    for number, one in enumerate(machines):
        one.tell(Report({number: 0}))
    wait_for(lambda: all(one.verdict() for one in machines))
    close(machines, pool)
    again = pool.submit(meet, endpoint, 2, {"--nnodes": 2}, 20)
    assert {late.result().number, again.result().number} == {0, 1}
    close([late.result(), again.result()], pool)


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.2\r\n", b"3\n", b""])
def test_a_port_of_another_program(greeting: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_HELLO_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: server.accept()[0].sendall(greeting) or time.sleep(2), daemon=True).start()
        place = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(InputError, match=f"--rdzv {place}: the port is used by another program; choose a free one"):
            meet(place, 2, {}, 5)


@pytest.mark.parametrize("text", ["host", "host:", ":1", "host:http", "host:0", "host:65536", "fd00::1:29500"])
def test_wrong_endpoints(text: str) -> None:
    with pytest.raises(InputError, match="expected HOST:PORT"):
        parse_endpoint(text)


def test_addresses_and_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_endpoint("node1:29500") == ("node1", 29500) and parse_endpoint("[fd00::1]:1") == ("fd00::1", 1)
    # An address for documentation, which nobody has.
    assert is_here("127.0.0.1") and is_here("localhost") and not is_here("192.0.2.1")
    with pytest.raises(InputError, match=r"cannot resolve no\.such\.invalid"):
        is_here("no.such.invalid")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    assert interface_settings("127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    with pytest.raises(InputError, match=r"has the address 192\.0\.2\.1.*; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"):
        interface_settings("192.0.2.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    assert interface_settings("127.0.0.1") == {"GLOO_SOCKET_IFNAME": "mine", "NCCL_SOCKET_IFNAME": "=lo"}
