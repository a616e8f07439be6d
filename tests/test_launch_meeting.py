"""How machines meet and hear of each other: launchers of one process each, on this machine's loopback, in real connections."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnc_dist.base.errors import InputError
from dnc_dist.base.files import replacing
from dnc_dist.processes.launch import channel, host, meeting
from dnc_dist.processes.launch.channel import Card, Channel, FromHost, FromMachine
from dnc_dist.processes.launch.meeting import Meeting, MeetingError
from dnc_dist.processes.launch.network import interface_settings, is_here, parse_endpoint
from dnc_dist.processes.launch.peers import Alarm
from dnc_dist.processes.launch.secret import VARIABLE, Secret
from dnc_dist.processes.launch.verdict import Failure, LaunchReport, verdict
from dnc_dist.processes.rendezvous import listen
from tests.strangers import connected, disturb


@pytest.fixture
def endpoint() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


SECRET = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """What all machines here know."""
    monkeypatch.setenv(VARIABLE, SECRET)


def meet(endpoint: str, count: int, terms: dict[str, Any], wait: float, file: Path | None = None) -> Meeting:
    return meeting.meet(endpoint, count, terms, wait, Secret(file))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the machines say while they come."""
    lines: list[str] = []
    monkeypatch.setattr(meeting, "say", lines.append)
    return lines


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


def error(age: float, text: str) -> Failure:
    return Failure(time.time() - age, 1, "RuntimeError", text, "Traceback\n")


def test_machines_meet_and_all_hear_how_it_ended(endpoint: str, pool: ThreadPoolExecutor) -> None:
    machines = gathered(pool, endpoint, 3)
    assert [one.number for one in machines] == [0, 1, 2] and len({tuple(one.machines) for one in machines}) == 1
    assert {one.store for one in machines} == {("127.0.0.1", machines[0].store[1])} and {one.address for one in machines} == {"127.0.0.1"}
    for number, one in enumerate(machines):
        assert one.verdict() is None
        one.tell(LaunchReport({number: 0}, {}, {number: "tail"}))
    for one in machines:
        wait_for(one.verdict)
        assert one.verdict() == LaunchReport({0: 0, 1: 0, 2: 0}, {}, {0: "tail", 1: "tail", 2: "tail"})
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
    machines[0].tell(LaunchReport({0: 1}, {0: error(1.0, "a consequence")}))
    early = error(2.0 - 3600, "the cause")
    monkeypatch.setattr(meeting.time, "time", lambda: clock() + (3600 if threading.current_thread() is threading.main_thread() else 0))
    machines[1].tell(LaunchReport({1: 1}, {1: early}))
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
        one.tell(LaunchReport({number: 75}))
    for one in machines:
        wait_for(one.verdict)
        whole = one.verdict()
        assert whole is not None and verdict(whole)[0] == 75 and name in verdict(whole)[1]
    close(machines, pool)


def test_a_silent_machine_is_gone(endpoint: str, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(host, "SILENCE_SECONDS", 1.0)
    first = pool.submit(meet, endpoint, 2, {}, 20)
    with connected(endpoint) as silent:
        prove(silent, SECRET.encode()).send(FromMachine(card=Card("x", "sleepy", {})))
        machine = first.result()
        alarms: list[Alarm] = []
        wait_for(lambda: alarms.extend(machine.alarms()) or alarms)
        assert alarms == [Alarm("sleepy (127.0.0.1): nothing was heard of it for 1 s; it is down, or the network between", False, 0.0)]
        machine.tell(LaunchReport({0: 0}))
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


def test_a_late_machine_waits_for_the_end_of_the_run_before(endpoint: str, pool: ThreadPoolExecutor, said: list[str]) -> None:
    machines = gathered(pool, endpoint, 2)
    late = pool.submit(meet, endpoint, 2, {"--nnodes": 2}, 20)
    wait_for(lambda: any("has not ended there" in line for line in said))
    for number, one in enumerate(machines):
        one.tell(LaunchReport({number: 0}))
    wait_for(lambda: all(one.verdict() for one in machines))
    close(machines, pool)
    again = pool.submit(meet, endpoint, 2, {"--nnodes": 2}, 20)
    assert {late.result().number, again.result().number} == {0, 1}
    close([late.result(), again.result()], pool)


def prove(connection: socket.socket, key: bytes) -> meeting._Line:
    """What a launcher does first, with this key."""
    return meeting._greet(connection, ("127.0.0.1", 0), Secret(None), key)


@pytest.mark.parametrize(
    ("greeting", "error", "message"),
    [
        (
            b"SSH-2.0-OpenSSH_9.2\r\n",
            InputError,
            "the port is used by another program, or by another version of dnc-dist; choose a free one",
        ),
        (b'{"hello": "dnc-dist launch 1"}\n', InputError, "the port is used by another program, or by another version of dnc-dist"),
        (b"3\n", MeetingError, "no start at .* within 1 s: timed out"),
        (b"", MeetingError, "no start at .* within 1 s: timed out"),
        (
            channel.MAGIC + bytes(32 + 32),
            MeetingError,
            r"the launcher there does not know the secret of this machine \(DNC_LAUNCH_SECRET of",
        ),
    ],
)
def test_a_port_of_another_program(greeting: bytes, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of one that plays the host: it hears a proof, and nothing about the run."""
    monkeypatch.setattr(meeting, "_HELLO_SECONDS", 0.3)
    heard: list[bytes] = []

    def serve(server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection = server.accept()[0]
                connection.sendall(greeting)
                connection.settimeout(5)
                while part := connection.recv(1000):
                    heard.append(part)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        place = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(error, match=message):
            meet(place, 2, {"seed": 1}, 1)
        server.shutdown(socket.SHUT_RDWR)
    assert {len(part) for part in heard} <= {channel.ANSWER_BYTES} and b"seed" not in b"".join(heard)


@pytest.mark.parametrize("text", ["host", "host:", ":1", "host:http", "host:0", "host:65536", "fd00::1:29500"])
def test_wrong_endpoints(text: str) -> None:
    with pytest.raises(InputError, match="expected HOST:PORT"):
        parse_endpoint(text)


def test_addresses_and_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_endpoint("node1:29500") == ("node1", 29500) and parse_endpoint("[fd00::1]:1") == ("fd00::1", 1)
    # An address for documentation, which nobody has.
    assert is_here("127.0.0.1") and is_here("localhost") and not is_here("192.0.2.1")
    for name in ("no.such.invalid", "a" * 70 + ".invalid"):
        with pytest.raises(InputError, match=r"cannot resolve \S+\.invalid \(.*\); use an IP address"):
            is_here(name)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    assert interface_settings("127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    with pytest.raises(InputError, match=r"has the address 192\.0\.2\.1.*; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"):
        interface_settings("192.0.2.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    assert interface_settings("127.0.0.1") == {"GLOO_SOCKET_IFNAME": "mine", "NCCL_SOCKET_IFNAME": "=lo"}


def sealed(line: meeting._Line, payload: bytes) -> bytes:
    """Any bytes as a message with its right code."""
    ours = line._channel
    ours.sent += 1
    return channel.HEADER.pack(len(payload), channel._code(ours.sending, ours.sent, payload)) + payload


def test_strangers_change_nothing(
    endpoint: str, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Garbage, a recorded session, a flood, long and deep lines, connections that stay: the machines meet, speak and end as if alone."""
    sent: list[bytes] = []
    answer, seal = channel.answer, channel.Channel.seal

    def recording(self: channel.Channel, message: Any) -> bytes:
        sent.append(seal(self, message))
        return sent[-1]

    with monkeypatch.context() as patched:
        patched.setattr(meeting, "answer", lambda *args: sent.append(answer(*args)) or sent[-1])
        patched.setattr(channel.Channel, "seal", recording)
        close(gathered(pool, endpoint, 2), pool)
    proof = next(part for part in sent if len(part) == channel.ANSWER_BYTES)
    card = next(part for part in sent if b'"card": {' in part)

    over = threading.Event()
    with ExitStack() as stack:
        stack.callback(over.set)
        attacks = [pool.submit(disturb, endpoint, proof + card, over.is_set) for _ in range(3)]
        time.sleep(0.2)
        try:
            machines = gathered(pool, endpoint, 2)
            machines[1].raise_alarm(Alarm("fire", stop=True, seconds=3.0))
            heard: list[Alarm] = []
            wait_for(lambda: heard.extend(machines[0].alarms()) or heard)
            time.sleep(0.5)
            for number, one in enumerate(machines):
                assert list(one.alarms()) == []
                one.tell(LaunchReport({number: 0}))
            for one in machines:
                wait_for(one.verdict)
                assert one.verdict() == LaunchReport({0: 0, 1: 0})
        finally:
            over.set()
        assert [attack.result()[1] for attack in attacks] == [0, 0, 0]
        close(machines, pool)
    said = capfd.readouterr().err.splitlines()
    refused = (
        "refused 127.0.0.1, which does not know the secret of this launch (DNC_LAUNCH_SECRET of this machine); more of that is not reported"
    )
    assert said.count(refused) == 1


def test_strangers_do_not_stay_and_are_few(endpoint: str, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_STRANGER_SECONDS", 1.0)
    first = pool.submit(meet, endpoint, 2, {"--nnodes": 2}, 20)
    with ExitStack() as stack:
        waiting = [stack.enter_context(connected(endpoint)) for _ in range(3 * host._MOST_STRANGERS)]
        started = time.monotonic()
        for one in waiting:
            with suppress(ConnectionError):
                while one.recv(100):
                    pass
        assert time.monotonic() - started < 10
    second = pool.submit(meet, endpoint, 2, {"--nnodes": 2}, 20)
    close([first.result(), second.result()], pool)


def test_a_burst_of_strangers_takes_few_files(endpoint: str, pool: ThreadPoolExecutor, capfd: pytest.CaptureFixture[str]) -> None:
    """They come at once, not one after the other: the launcher must have files left to start workers with."""
    first = pool.submit(meet, endpoint, 2, {"--nnodes": 2}, 20)
    with connected(endpoint):
        pass
    address, _, port = endpoint.rpartition(":")
    with ExitStack() as stack:
        ours = set(os.listdir("/proc/self/fd"))
        most = 0
        for _ in range(2000):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex((address, int(port)))
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            most = max(most, len(os.listdir("/proc/self/fd")) - len(ours) - 2000)
        assert most < 10 * host._MOST_STRANGERS
    second = pool.submit(meet, endpoint, 2, {"--nnodes": 2}, 20)
    close([first.result(), second.result()], pool)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "payload",
    [
        b"5",
        b"[" * 100_000,
        b'{"card": {"id": "x", "host": "y", "terms": 5}}',
        b'{"card": {"id": 1, "host": "y", "terms": {}}}',
        b'{"card": {"id": "x", "host": "y", "terms": {}}, "report": {"codes": {"a": 0}}}',
        b"\xff\x00",
        None,
        b"forged",
        b"endless",
    ],
    ids=["number", "deep", "terms", "id", "ranks", "no text", "leaves", "forged", "endless"],
)
def test_odd_messages_leave_no_ghost(
    payload: bytes | None, endpoint: str, pool: ThreadPoolExecutor, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of somebody who knows the secret, too: nothing has changed before a message is found to be right."""
    first = pool.submit(meet, endpoint, 2, {"--nnodes": 2}, 20)
    with connected(endpoint) as odd:
        line = prove(odd, SECRET.encode())
        if payload == b"forged":
            message = bytearray(sealed(line, b'{"card": {"id": "x", "host": "y", "terms": {}}}'))
            message[-3] ^= 1
            odd.sendall(message)
        elif payload == b"endless":
            odd.sendall(channel.HEADER.pack(0xFFFFFFFF, bytes(32)) + bytes(100))
        elif payload is not None:
            odd.sendall(sealed(line, payload))
        if payload is not None:
            with suppress(ConnectionError):
                assert odd.recv(100) == b""
    second = pool.submit(meet, endpoint, 2, {"--nnodes": 2}, 20)
    machines = [first.result(), second.result()]
    assert len(machines[0].machines) == 2 and "y (" not in "".join(machines[0].machines)
    close(machines, pool)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["card", "id", "terms", "report", "codes", "0"]), inner),
    max_leaves=8,
)


@given(st.binary(max_size=50) | json_values.map(lambda value: json.dumps(value).encode()), st.sampled_from([FromMachine, FromHost]))
@settings(max_examples=60, deadline=None)
def test_a_message_is_what_it_must_be_or_wrong_input(payload: bytes, shape: type[FromMachine] | type[FromHost]) -> None:
    header = channel.HEADER.pack(len(payload), channel._code(b"key", 1, payload))
    with suppress(InputError):
        assert isinstance(Channel(b"", b"key").open(header, payload, shape), shape)


def test_a_message_cannot_be_repeated_or_turned_around() -> None:
    number, mine = channel.nonce(), channel.nonce()
    key = SECRET.encode()
    proof, at_host = channel.admit(key, number, channel.answer(key, number, mine))
    at_machine = channel.trust(key, number, mine, proof)
    message = at_machine.seal(FromMachine(alarm=Alarm("fire", True, 1.0)))
    header, payload = message[: channel.HEADER.size], message[channel.HEADER.size :]
    assert json.loads(payload)["alarm"]["text"] == "fire"
    with pytest.raises(channel.Forged):
        at_machine.open(header, payload, FromMachine)
    assert at_host.open(header, payload, FromMachine).alarm == Alarm("fire", True, 1.0)
    with pytest.raises(channel.Forged):
        at_host.open(header, payload, FromMachine)
    # A recorded answer to another number, and the machine's own proof as that of a host.
    with pytest.raises(channel.Forged):
        channel.admit(key, channel.nonce(), channel.answer(key, number, mine))
    with pytest.raises(channel.Forged):
        channel.trust(key, number, mine, channel.answer(key, number, mine)[channel.NONCE_BYTES :])


def test_the_secret_is_in_a_private_file_while_the_launch_lasts(
    endpoint: str, pool: ThreadPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """One that an earlier launch left behind is no obstacle; who waits reads again until it is the right one."""
    monkeypatch.delenv(VARIABLE)
    file = tmp_path / "runs" / ".mine.launch-secret"
    stale = tmp_path / "stale"
    stale.write_text("of a launcher that was killed")
    stale.chmod(0o600)
    first = pool.submit(meet, endpoint, 2, {"--nnodes": 2}, 20, file)
    wait_for(file.exists)
    fresh = file.read_bytes()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and len(fresh) == 64
    second = pool.submit(meet, endpoint, 2, {"--nnodes": 2}, 20, stale)
    wait_for(lambda: any(f"the launcher there does not know the secret of this machine ({stale})" in line for line in said))
    stale.write_bytes(fresh)
    machines = [first.result(), second.result()]
    assert file.exists()
    close(machines, pool)
    assert not file.exists() and list(file.parent.iterdir()) == [] and stale.exists()


def test_no_secret_is_one_message(endpoint: str, pool: ThreadPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "short")
    with pytest.raises(InputError, match="DNC_LAUNCH_SECRET has 5 characters; set it to 16 or more that nobody can guess"):
        Secret(None)
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(InputError, match=r"several machines need a secret .*; set DNC_LAUNCH_SECRET to the same random text on all"):
        Secret(None)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written to .* \(.*\); make its folder writable, or set DNC_LAUNCH_SECRET to the same"):
        meet(endpoint, 2, {}, 5, tmp_path / "file" / "secret")
    first = pool.submit(meet, endpoint, 2, {}, 3, tmp_path / "shared" / "secret")
    connected(endpoint).close()
    with pytest.raises(
        MeetingError, match=r"no start at .* within 1 s: no secret in .*elsewhere/secret \(No such file.*\); run.dir must be a"
    ):
        meet(endpoint, 2, {}, 1, tmp_path / "elsewhere" / "secret")
    (tmp_path / "open").write_text(SECRET)
    (tmp_path / "open").chmod(0o644)
    with pytest.raises(InputError, match=r"open can be read by others, .* \(mode 644\): it is no secret, remove it"):
        meet(endpoint, 2, {}, 1, tmp_path / "open")
    with pytest.raises(MeetingError):
        first.result()


def test_a_file_system_without_permissions_gets_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr("dnc_dist.processes.launch.secret.replacing", lambda path, mode: replacing(path, mode=0o644))
    with pytest.raises(InputError, match=r"shared is on a file system where every file can be read by others; use another run\.dir"):
        Secret(tmp_path / "shared" / "secret").renew()
    assert list((tmp_path / "shared").iterdir()) == []


def test_only_the_named_address_is_open() -> None:
    with listen("127.0.0.1", 0) as ours:
        assert ours.getsockname()[0] == "127.0.0.1"
    with listen("localhost", 0) as ours:
        assert ours.getsockname()[0] in ("127.0.0.1", "::1")
    # An address for documentation, which nobody has, stands for one that another device translates to ours.
    with listen("192.0.2.1", 0) as ours:
        assert ours.getsockname()[0] in ("::", "0.0.0.0")
