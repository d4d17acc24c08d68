#!/usr/bin/env python3
"""Measure sendmail.py beside its peers on this machine, against goals for their ratios.

    python3 .ci/bench.py [--quick] [--json] [--only NAME ...] [--module PATH]

The peers are zope.sendmail (by pip, in a venv under ~/.cache/sendmail-bench), Postfix (by apt, where it is missing; a
private instance on 127.0.0.1, which needs root) and bare loops that do the minimum.  What can't be had is left out, and
said on standard error.  Nothing is left behind but the cache.

Absolute figures differ by a factor of three from one run to the next: contenders take turns (ABAB...), and only ratios
of medians within a run count.  Messages have 2 KB.  Rates are from the start of a pass to its end, start of the process
and imports apart; Postfix is timed from the flush of its queue until that is empty.  The relay is Postfix's smtp-sink
where ours would be the limit, else the checking sink: it reads every byte, counts what is lost, duplicated, damaged or
has a bare CR or LF, and answers each *read* after the delay, so that pipelined commands share one.  Before the rounds
that go to smtp-sink, each contender has one, untimed, that is checked.  Nothing is asserted: whatever comes out, the
exit status is 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import importlib.util
import json
import logging
import os
import pathlib
import random
import shutil
import signal
import smtplib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

HOST, SENDER = "127.0.0.1", "app@bench.example"
OURS, ZOPE, POSTFIX, BARE = CONTENDERS = ("sendmail.py", "zope.sendmail", "Postfix", "bare")
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "sendmail-bench"
VENV = CACHE / f"venv-{sys.version_info[0]}.{sys.version_info[1]}"
TROUBLES = ("lost", "duplicated", "damaged", "bare")  # what the checking sink notices
FAILURES = (RuntimeError, OSError, smtplib.SMTPException, subprocess.SubprocessError)  # what one contender may suffer
PATIENCE = 300  # seconds that anything may take

# row: what is measured, its unit, and the goals: relation and bound of our median, or of its ratio to a peer's
ROWS: dict[str, tuple[str, str, list[tuple[str, float, str]]]] = {
    "drain": ("drain, 1 worker", "msg/s", [(">=", 3, ZOPE), (">=", 0.6, BARE)]),
    "drain8p": ("drain, 8 processes", "msg/s", [(">=", 2, ZOPE)]),
    "delay": ("20 ms, 1 worker, 1 recipient", "msg/s", [(">=", 1.45, POSTFIX)]),
    "delay50": ("20 ms, 1 worker, 50 recipients", "msg/s", [(">=", 1.45, POSTFIX)]),
    "delay8t": ("20 ms, 8 threads of one process", "msg/s", [(">=", 1.2, POSTFIX)]),
    "delay8p": ("20 ms, 8 processes", "msg/s", [(">=", 1.2, POSTFIX)]),
    "enqueue": ("enqueue, 1 a commit", "msg/s", [(">=", 0.6, ZOPE)]),
    "enqueue1000": ("enqueue, 1,000 a commit", "msg/s", [(">=", 1, ZOPE)]),
    "fsync": ("commit of many, fsync takes 5 ms", "s", [("<=", 0.2, BARE)]),
    "wake": ("commit to relay, idle daemon", "ms", [("<=", 10, "")]),
    "idle": ("idle CPU over the deferred", "s/min", [("<=", 0.1, "")]),
    "wake_deep": ("commit to relay, over the deferred", "ms", [("<=", 10, "")]),
    "fresh": ("drain over the deferred / alone", "ratio", [(">=", 0.9, "")]),
    "outage": ("relay down: a pass over 2,000", "s", [("<=", 0.5, "")]),
    "outage_deep": ("relay down: a pass over many", "s", [("<=", 0.5, "")]),
    "outage_tries": ("relay down: connections a pass", "", [("<=", 1, "")]),
    "outage_lines": ("relay down: log lines a pass", "", [("<=", 1, "")]),
    "outage_touched": ("relay down: files touched", "", [("<=", 0, "")]),
    "outage_back": ("sent at the first pass after it", "ratio", [(">=", 1, "")]),
    "memory": ("peak memory, many small messages", "MB", [("<=", 45, "")]),
    "memory25": ("peak memory, one of 25 MB", "MB", [("<=", 80, "")]),
    "memory_deep": ("growth of the peak with the depth", "MB", [("<=", 20, "")]),
    "start": ("start of --help", "ms", [("<=", 1, ZOPE)]),
}


def crlf(text: bytes) -> bytes:
    return text.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


def make_message(sequence: int, size: int = 2000) -> bytes:
    """Return a message that the checking sink can recognise, with LF line ends and a line that begins with a dot."""
    line = b"The quick brown fox jumps over the lazy dog, and again, for the benchmark's sake.\n"
    body = b".a line with a dot, %d\n" % sequence + line * max(1, (size - 300) // len(line))
    checksum = zlib.crc32(crlf(body))
    return (
        b"From: Application <%s>\nTo: Ann <r0@bench.example>\nSubject: Message %d of the benchmark\n"
        b"Date: Tue, 24 Nov 2026 10:00:00 +0000\nX-Bench: %d %d\nMIME-Version: 1.0\n"
        b"Content-Type: text/plain; charset=utf-8\n\n%s" % (SENDER.encode(), sequence, sequence, checksum, body)
    )


def addresses(count: int) -> list[str]:
    return [f"r{i}@bench.example" for i in range(count)]


def fill(queue: pathlib.Path, count: int, recipients: int = 1, size: int = 2000, deferred: str = "") -> pathlib.Path:
    """Put messages in a queue, in the format that both contenders share, as if they had been committed.

    `deferred` names the contender by whose rules they wait: ours by name, zope.sendmail's by a link beside each file.
    """
    for directory in ("", "new", "cur", "tmp"):
        (queue / directory).mkdir(0o700, exist_ok=True)
    envelope = f"X-Zope-From: {SENDER}\nX-Zope-To: {', '.join(addresses(recipients))}\n".encode()
    now = int(time.time())
    for i in range(count):
        name = f"{now}.M{i:06}P{os.getpid()}Q{i}Rbench.localhost" + (f",due={now + 1800}" if deferred == OURS else "")
        with open(f"{queue}/new/{name}", "wb") as file:
            file.write(envelope + b"Message-Id: <%d@bench.example>\n" % i + make_message(i, size))
        if deferred == ZOPE:
            os.link(f"{queue}/new/{name}", f"{queue}/new/.sending-{name}")
    return queue


def snapshot(queue: pathlib.Path) -> set[tuple[str, int, int]]:
    """Return what any change of a file in the queue changes."""
    found = ((entry.path, entry.stat()) for path in ("new", "cur", "tmp") for entry in os.scandir(queue / path))
    return {(path, status.st_ino, status.st_ctime_ns) for path, status in found}


class SinkProtocol(asyncio.Protocol):
    """SMTP, as far as it is needed; all replies to what came in one read go out together, after the delay."""

    delay, down = 0.0, False
    seen: set[tuple[int, str]] = set()
    arrivals: dict[int, float] = {}
    counts: dict[str, int] = {}

    @classmethod
    def reset(cls, delay: float, down: bool) -> None:
        cls.delay, cls.down, cls.seen, cls.arrivals = delay, down, set(), {}
        cls.counts = dict.fromkeys(("messages", "connections", "duplicated", "damaged", "bare"), 0)

    @classmethod
    def report(cls, messages: int, recipients: int) -> dict[str, Any]:
        """Return what was taken, and how many recipients of the messages that should have come did not get theirs."""
        due = {(sequence, address) for sequence in range(messages) for address in addresses(recipients)}
        return {**cls.counts, "lost": len(due - cls.seen), "arrivals": cls.arrivals}

    def connection_made(self, transport: Any) -> None:
        self.transport, self.buffer, self.in_data, self.scanned = transport, bytearray(), False, 0
        self.recipients: list[str] = []
        self.counts["connections"] += 1
        self.reply(b"421 down\r\n" if self.down else b"220 sink ESMTP\r\n")

    def reply(self, text: bytes) -> None:
        if self.delay:
            asyncio.get_running_loop().call_later(self.delay, self.transport.write, text)
        else:
            self.transport.write(text)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        replies = b""
        while (end := self.buffer.find(b"\r\n.\r\n" if self.in_data else b"\n", self.scanned)) >= 0:
            self.scanned = 0
            if self.in_data:
                self.take(bytes(self.buffer[2 : end + 2]))
                del self.buffer[: end + 5]
                self.in_data = False
                replies += b"250 2.0.0 Ok\r\n"
            else:
                line = self.buffer[: end + 1].decode()
                del self.buffer[: end + 1]
                replies += self.command(line)
        self.scanned = max(0, len(self.buffer) - 4) if self.in_data else 0
        if replies:
            self.reply(replies)

    def command(self, line: str) -> bytes:
        verb = line[:4].upper()
        if verb == "EHLO":
            return b"250-sink\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 SIZE 100000000\r\n"
        if verb == "MAIL":
            self.recipients = []
        elif verb == "RCPT":
            self.recipients.append(line.partition("<")[2].partition(">")[0])
        elif verb == "DATA":
            self.in_data = True
            self.buffer[:0] = b"\r\n"  # so that the end of an empty message is found as any other
            return b"354 Go on\r\n"
        elif verb == "QUIT":  # the other side closes
            return b"221 Bye\r\n"
        elif verb == "XTAK":  # what was taken
            return b"250 %s\r\n" % json.dumps(self.report(*json.loads(line[5:]))).encode()
        elif verb == "XRES":
            self.reset(*json.loads(line[5:]))
        return b"250 2.1.0 Ok\r\n"

    def take(self, message: bytes) -> None:
        bare = not message.count(b"\n") == message.count(b"\r") == message.count(b"\r\n")
        headers, _, body = crlf(message).replace(b"\r\n.", b"\r\n").partition(b"\r\n\r\n")
        numbers = headers.partition(b"\r\nX-Bench: ")[2].partition(b"\r\n")[0].split() or (b"-1", b"-1")
        sequence, checksum = map(int, numbers)
        self.counts["messages"] += 1
        self.counts["bare"] += bare
        self.counts["damaged"] += not bare and zlib.crc32(body) != checksum
        self.arrivals.setdefault(sequence, time.time())
        for recipient in self.recipients:
            self.counts["duplicated"] += (sequence, recipient) in self.seen
            self.seen.add((sequence, recipient))


async def serve_sink() -> None:
    """Serve on a free port, whose number is printed, until standard input is closed."""
    SinkProtocol.reset(0, False)
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    server = await loop.create_server(SinkProtocol, HOST, 0, backlog=1000)
    print(server.sockets[0].getsockname()[1], flush=True)
    loop.add_reader(0, ended.set)
    await ended.wait()


class Sink:
    """The checking sink, seen from outside."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, "--sink"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())

    def ask(self, line: str) -> str:
        with socket.create_connection((HOST, self.port)) as sock, sock.makefile("rb") as file:
            file.readline()
            sock.sendall(line.encode() + b"\r\n")
            return file.readline().decode()[4:]

    def reset(self, delay: float = 0.0, down: bool = False) -> None:
        self.ask(f"XRES {json.dumps([delay, down])}")

    def taken(self, messages: int, recipients: int = 1) -> dict[str, Any]:
        """Return what was taken since the reset, of so many that should have come; we do not count as a connection."""
        report: dict[str, Any] = json.loads(self.ask(f"XTAK {json.dumps([messages, recipients])}"))
        report["connections"] -= 1
        return report

    def check_itself(self) -> None:
        """Raise `RuntimeError` if it misses a trouble, or sees one where there is none."""
        first, second = (crlf(make_message(i)).replace(b"\r\n.", b"\r\n..") for i in range(2))
        for trouble, messages, expected in (
            ("well", [(first, 2), (second, 2)], (0, 0, 0, 0)),
            ("a lost message", [(second, 2)], (2, 0, 0, 0)),
            ("a lost recipient", [(first, 2), (second, 1)], (1, 0, 0, 0)),
            ("lost behind a duplicate", [(first, 2), (first, 2)], (2, 2, 0, 0)),
            ("a duplicate", [(first, 2), (second, 2), (second, 1)], (0, 1, 0, 0)),
            ("damage", [(first, 2), (second.replace(b"fox", b"ox", 1), 2)], (0, 0, 1, 0)),
            ("a bare LF", [(first, 2), (second.replace(b"\r\n", b"\n", 1), 2)], (0, 0, 0, 1)),
        ):
            self.reset()
            with smtplib.SMTP(HOST, self.port) as smtp:
                for data, recipients in messages:
                    for command in ("MAIL FROM:<>", *(f"RCPT TO:<{to}>" for to in addresses(recipients)), "DATA"):
                        smtp.docmd(command)
                    smtp.send(data + b".\r\n")
                    smtp.getreply()
            taken = self.taken(2, 2)
            if tuple(taken[key] for key in TROUBLES) != expected:
                raise RuntimeError(f"the sink is wrong about {trouble}: {taken}")


def load_module(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("sendmail", path)
    assert spec and spec.loader
    module = sys.modules["sendmail"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drain_worker(
    contender: str, module: str, queue: str, port: int, workers: int = 1, batch: int | None = None, daemon: bool = False
) -> Callable[[], object]:
    """One pass, or a daemon until a line comes.  Bare: the same messages by one connection of smtplib, and no queue."""
    if contender == OURS:
        sendmail = load_module(module)
        ours = sendmail.QueueProcessorThread(queue, sendmail.SMTPMailer(HOST, port), workers=workers, batch=batch)
        action, start = cast(Callable[[], object], ours.process), ours.start
    elif contender == ZOPE:
        zope = importlib.import_module("zope.sendmail.queue").QueueProcessorThread()
        zope.setMailer(importlib.import_module("zope.sendmail.mailer").SMTPMailer(HOST, port))
        zope.setQueuePath(queue)
        start = zope.start

        def action() -> None:
            while True:  # its listing does not bear that another process takes a message meanwhile
                with contextlib.suppress(FileNotFoundError):
                    zope.run(forever=False)
                    return
    else:
        files = sorted(pathlib.Path(queue, "new").iterdir())
        messages = [crlf(path.read_bytes().split(b"\n", 2)[2]) for path in files]  # smtplib sends a bare LF as it is

        def action() -> None:
            with smtplib.SMTP(HOST, port) as smtp:
                for message in messages:
                    smtp.sendmail(SENDER, addresses(1), message)

    if not daemon:
        return action
    start()
    return sys.stdin.readline


def enqueue_worker(
    contender: str, module: str, queue: str, port: int, count: int, per_commit: int = 1, pause: Sequence[float] = ()
) -> Callable[[], object]:
    """Queue messages; return when each was begun.  Bare: files made durable one after the other."""
    messages = [make_message(i) for i in range(count)]
    commit: Callable[[], object] = int  # nothing
    if contender == POSTFIX:
        smtp = smtplib.SMTP(HOST, port)

        def put(message: bytes) -> None:
            smtp.sendmail(SENDER, addresses(1), crlf(message))
    elif contender == BARE:

        def put(message: bytes) -> None:
            name = str(time.time_ns())
            with open(f"{queue}/tmp/{name}", "xb") as file:
                file.write(message)
                file.flush()
                os.fsync(file.fileno())
            os.rename(f"{queue}/tmp/{name}", f"{queue}/new/{name}")
    else:
        commit = importlib.import_module("transaction").commit
        library = load_module(module) if contender == OURS else importlib.import_module("zope.sendmail.delivery")
        delivery = library.QueuedMailDelivery(queue)

        def put(message: bytes) -> None:
            delivery.send(SENDER, addresses(1), message)

    def enqueue() -> list[float]:
        began = []
        for i, message in enumerate(messages, 1):
            if pause:
                time.sleep(random.uniform(*pause))
            began.append(time.time())
            put(message)
            if i % per_commit == 0 or i == count:
                commit()
        return began

    return enqueue


def work(role: str, arguments: dict[str, Any]) -> None:
    """Be a worker: get ready, say so, wait for the word, do it, and print what it took."""
    lines = 0

    class Counter(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            nonlocal lines
            lines += self.format(record).count("\n") + 1

    logging.getLogger().addHandler(Counter())
    action: Callable[[], object] = (drain_worker if role == "drain" else enqueue_worker)(**arguments)
    print("ready", flush=True)
    if not sys.stdin.readline():  # the bench is gone
        os._exit(1)
    begin = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - begin
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]  # kB
    report = {"seconds": seconds, "peak": int(peak) / 1000, "lines": lines}
    print(json.dumps({**report, "began": result if isinstance(result, list) else None}), flush=True)
    os._exit(0)  # a daemon of zope.sendmail would be waited for


class Worker:
    """A worker, seen from outside."""

    def __init__(self, role: str, prefix: Sequence[str] = (), **arguments: Any) -> None:
        command = [*prefix, str(VENV / "bin/python"), __file__, "--worker", role, json.dumps(arguments, default=str)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ready(self) -> None:
        assert self.process.stdout
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError(f"a worker failed: {self.process.args!r}")

    def go(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def result(self) -> dict[str, Any]:
        output, _ = self.process.communicate("\n", timeout=PATIENCE)
        if self.process.returncode:
            raise RuntimeError(f"a worker failed: {self.process.args!r}")
        return cast(dict[str, Any], json.loads(output))

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def run(*workers: Worker) -> dict[str, Any]:
    """Let workers go together; return what the slowest reports."""
    for worker in workers:
        worker.ready()
    for worker in workers:
        worker.go()
    return max((worker.result() for worker in workers), key=lambda result: result["seconds"])


def free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


class Postfix:
    """A private instance, that listens on one port for what it keeps on hold and on another for what it relays."""

    SERVICES = (  # name, seconds between wake-ups, limit of processes, program if it has another name
        "pickup 60 1", "cleanup - 0", "qmgr 300 1", "rewrite - - trivial-rewrite", "bounce - 0", "defer - 0 bounce",
        "trace - 0 bounce", "flush 1000? 0", "proxymap - -", "smtp - 100", "showq - -", "error - -", "retry - - error",
        "anvil - 1", "scache - 1",
    )  # fmt: skip

    def __init__(self, root: pathlib.Path) -> None:
        self.config, self.queue = root / "etc", root / "queue"
        self.hold, self.relay = free_port(), free_port()
        for directory in (root, self.config, self.queue, root / "data"):
            directory.mkdir(0o755)
        shutil.chown(root / "data", "postfix")
        services = [f"{HOST}:{self.hold} inet n - n - - smtpd -o smtpd_client_restrictions=static:HOLD",
                    f"{HOST}:{self.relay} inet n - n - - smtpd"]  # fmt: skip
        for name, wakeup, limit, *other in map(str.split, self.SERVICES):
            private = "n" if name in ("pickup", "cleanup", "qmgr", "flush", "showq") else "-"
            services.append(f"{name} unix {private} - n {wakeup} {limit} {(*other, name)[0]}")
        (self.config / "master.cf").write_text("\n".join(services) + "\n")
        (self.config / "main.cf").write_text("\n".join((
            "compatibility_level = 3.6", f"queue_directory = {self.queue}", f"data_directory = {root}/data",
            f"inet_interfaces = {HOST}", "inet_protocols = ipv4", f"mynetworks = {HOST}/32",
            "myhostname = bench.example", "mydestination =", "alias_maps =", "notify_classes =", "in_flow_delay = 0",
            "smtp_dns_support_level = disabled", "smtpd_peername_lookup = no",
            "smtpd_relay_restrictions = permit_mynetworks, reject", "",
        )))  # fmt: skip
        self.start()

    def start(self) -> None:
        self.run("postfix", "start")
        self.pid = int((self.queue / "pid/master.pid").read_text())
        self.relays_to = (0, 0)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        self.wait_until(lambda: not pathlib.Path(f"/proc/{self.pid}").exists(), 10)

    def run(self, program: str, *arguments: str) -> str:
        command = [program, "-c", str(self.config), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout.strip()

    def relay_to(self, port: int, workers: int = 1) -> None:
        if self.relays_to != (port, workers):
            limits = ("smtp_destination_concurrency_limit", "initial_destination_concurrency")
            self.run("postconf", "-e", f"relayhost=[{HOST}]:{port}", *(f"{limit}={workers}" for limit in limits))
            os.kill(self.pid, signal.SIGHUP)  # as `postfix reload`, which takes two seconds more
            time.sleep(0.5)
            self.relays_to = (port, workers)

    @staticmethod
    def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
        deadline = time.perf_counter() + seconds
        while not (done := condition()) and time.perf_counter() < deadline:
            time.sleep(0.01)
        return done

    def idle(self) -> bool:
        """Look twice: a file may have been on its way between two directories."""
        parts = [self.queue / part for part in ("incoming", "active", "deferred")] * 2
        return not any(files for part in parts for _, _, files in os.walk(part))

    @contextlib.contextmanager
    def emptied(self) -> Iterator[None]:
        """However the block ends, leave no message that would be sent during a later measurement."""
        try:
            yield
        finally:
            idle = self.wait_until(self.idle, 1)
            if not idle:  # what an agent has in hand would be sent all the same
                self.close()
            self.run("postsuper", "-d", "ALL")
            if not idle:
                self.start()

    def drain(self, port: int, count: int, workers: int = 1, recipients: int = 1) -> float:
        """Put messages on hold; return the seconds from a flush until all are gone."""
        self.relay_to(port, workers)
        with self.emptied():
            with smtplib.SMTP(HOST, self.hold) as smtp:
                for i in range(count):
                    smtp.sendmail(SENDER, addresses(recipients), crlf(make_message(i)))
            self.run("postsuper", "-H", "ALL")
            begin = time.perf_counter()
            self.run("postqueue", "-f")
            if not self.wait_until(self.idle, PATIENCE):
                raise RuntimeError("Postfix does not get its queue empty")
            return time.perf_counter() - begin


class Bench:
    def __init__(self, root: pathlib.Path, module: str, quick: bool, stack: contextlib.ExitStack) -> None:
        self.root, self.module, self.quick = root, module, quick
        self.samples: dict[str, dict[str, list[float]]] = {}
        self.checked_by_sink: dict[str, dict[str, int]] = {}
        self.queues, self.workers = 0, list[Worker]()
        stack.callback(self.end_workers)
        self.sink = Sink()
        stack.callback(self.sink.process.communicate)  # closes its standard input, and waits
        self.sink.check_itself()
        self.smtp_sink = self.sink.port
        self.postfix: Postfix | None = None
        if shutil.which("smtp-sink"):
            self.smtp_sink = free_port()
            user = ("-u", "nobody") if os.getuid() == 0 else ()
            process = subprocess.Popen(["smtp-sink", *user, f"{HOST}:{self.smtp_sink}", "1000"])
            stack.callback(process.wait)
            stack.callback(process.terminate)
        if shutil.which("postfix") and os.getuid() == 0:
            try:
                self.postfix = Postfix(self.root / "postfix")
                stack.callback(self.postfix.close)
            except (*FAILURES, LookupError) as error:
                say(f"without Postfix: it does not start: {error}")
        else:
            say("without Postfix: it needs root, and the package postfix")

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def add(self, row: str, contender: str, value: float) -> None:
        self.samples.setdefault(row, {}).setdefault(contender, []).append(value)

    def queue(self, *args: Any, **options: Any) -> pathlib.Path:
        self.queues += 1
        return fill(self.root / f"queue{self.queues}", *args, **options)

    def worker(self, role: str, who: str, queue: pathlib.Path, port: int = 0, **options: Any) -> Worker:
        self.workers.append(Worker(role, contender=who, module=self.module, queue=queue, port=port, **options))
        return self.workers[-1]

    def end_workers(self) -> None:
        """End what a failed measurement may have left."""
        while self.workers:
            self.workers.pop().end()

    @contextlib.contextmanager
    def checked(self, contender: str, count: int, recipients: int = 1, delay: float = 0.0) -> Iterator[None]:
        """Let the checking sink watch the block, in which so many messages should come."""
        self.sink.reset(delay)
        yield
        taken = self.sink.taken(count, recipients)
        counts = self.checked_by_sink.setdefault(contender, dict.fromkeys(("messages", *TROUBLES), 0))
        for key in counts:
            counts[key] += taken[key]

    def drain(self, who: str, count: int, port: int, recipients: int, processes: int, workers: int) -> float:
        """Return the messages per second of one drain."""
        if who == POSTFIX:
            assert self.postfix
            return count / self.postfix.drain(port, count, workers * processes, recipients)
        queue = self.queue(count, recipients)
        together = [self.worker("drain", who, queue, port, workers=workers) for _ in range(processes)]
        return count / float(run(*together)["seconds"])

    def drains(
        self, plan: Sequence[tuple[str, str, int]], rounds: int, delay: float = 0.0, recipients: int = 1
    ) -> None:
        """Drain in turns, as in the plan: row, contender, number of messages."""
        rest = [entry for entry in plan if entry[1] != POSTFIX or self.postfix]
        for turn in range(rounds if delay else rounds + 1):
            for entry in list(rest):
                row, who, count = entry
                shape = (recipients, 8 if row.endswith("8p") else 1, 8 if row.endswith("8t") else 1)
                try:
                    if delay:
                        with self.checked(who, count, recipients, delay):
                            self.add(row, who, self.drain(who, count, self.sink.port, *shape))
                    elif turn == 0:
                        with self.checked(who, 200):
                            self.drain(who, 200, self.sink.port, *shape)
                    else:
                        self.add(row, who, self.drain(who, count, self.smtp_sink, *shape))
                except FAILURES as error:  # the others go on
                    say(f"{row}, {who} failed: {error}")
                    rest.remove(entry)
                    self.end_workers()


def measure_drain(bench: Bench) -> None:
    count = bench.size(5000, 1000)
    plan = [(who, count if who != POSTFIX else bench.size(2000, 200)) for who in (OURS, BARE, ZOPE, POSTFIX)]
    bench.drains([("drain", *entry) for entry in plan], rounds=bench.size(5, 3))


def measure_drain8(bench: Bench) -> None:
    count = bench.size(5000, 1000)
    plan = [("drain8p", OURS, count), ("drain8p", ZOPE, count), ("drain8p", POSTFIX, bench.size(2000, 200))]
    bench.drains(plan, rounds=bench.size(5, 2))


def measure_delay(bench: Bench) -> None:
    count, rounds = bench.size(100, 12), bench.size(3, 2)
    for row, recipients, few in (("delay", 1, count // 3), ("delay50", 50, bench.size(6, 1))):
        bench.drains([(row, OURS, count), (row, POSTFIX, count)], rounds, 0.02, recipients)
        bench.drains([(row, ZOPE, few)], 1, 0.02, recipients)


def measure_delay8(bench: Bench) -> None:
    count = bench.size(800, 120)
    plan = [("delay8t", OURS, count), ("delay8p", OURS, count), ("delay8p", POSTFIX, count)]
    bench.drains(plan, rounds=bench.size(3, 2), delay=0.02)
    bench.drains([("delay8p", ZOPE, bench.size(200, 40))], rounds=1, delay=0.02)
    for value in bench.samples.get("delay8p", {}).get(POSTFIX, []):  # it knows but one kind of worker
        bench.add("delay8t", POSTFIX, value)


def measure_enqueue(bench: Bench) -> None:
    count = bench.size(2000, 400)
    for _ in range(bench.size(7, 3)):
        for who in (OURS, ZOPE, BARE):
            bench.add("enqueue", who, count / run(bench.worker("enqueue", who, bench.queue(0), count=count))["seconds"])
        if bench.postfix:
            with bench.postfix.emptied():
                worker = bench.worker("enqueue", POSTFIX, bench.root, bench.postfix.hold, count=count // 5)
                bench.add("enqueue", POSTFIX, count // 5 / run(worker)["seconds"])
        for who in (OURS, ZOPE):
            worker = bench.worker("enqueue", who, bench.queue(0), count=1000, per_commit=1000)
            bench.add("enqueue1000", who, 1000 / run(worker)["seconds"])


def measure_fsync(bench: Bench) -> None:
    """One commit of many, and as many files made durable one after the other, where an fsync takes 5 ms."""
    strace = ["strace", "-f", "-qq", "-o", "/dev/null", "--seccomp-bpf", "-e", "trace=fsync,fdatasync",
              "-e", "inject=fsync,fdatasync:delay_enter=5000"]  # fmt: skip
    if not shutil.which("strace") or subprocess.run([*strace, "true"], capture_output=True, check=False).returncode:
        return say("without fsync: strace is missing, or not allowed here")
    count = bench.size(1000, 400)
    for _ in range(bench.size(3, 1)):
        for who in (OURS, BARE):
            worker = bench.worker("enqueue", who, bench.queue(0), prefix=strace, count=count, per_commit=count)
            bench.add("fsync", who, run(worker)["seconds"])
    return None


def wakes(bench: Bench, row: str, who: str, count: int, pause: tuple[float, float], queue: pathlib.Path) -> None:
    """Commit messages at random times, and look when each arrives."""
    with contextlib.ExitStack() as stack, bench.checked(who, count):
        port = bench.sink.port
        if who == POSTFIX:
            assert bench.postfix
            bench.postfix.relay_to(port)
            stack.enter_context(bench.postfix.emptied())
            port = bench.postfix.relay
        else:
            daemon = bench.worker("drain", who, queue, port, daemon=True)
            stack.callback(daemon.end)
            daemon.ready()
            time.sleep(1)
        began = run(bench.worker("enqueue", who, queue, port, count=count, pause=pause))["began"]
        deadline = time.time() + 10
        while len(arrivals := bench.sink.taken(count)["arrivals"]) < count and time.time() < deadline:
            time.sleep(0.1)
    for sequence, arrival in arrivals.items():
        bench.add(row, who, (arrival - began[int(sequence)]) * 1000)


def measure_wake(bench: Bench) -> None:
    often, seldom, count = (0.1, 0.4), (0.5, 3.5), bench.size(10, 6)
    for _ in range(bench.size(3, 1)):
        wakes(bench, "wake", OURS, count, often, bench.queue(0))
        wakes(bench, "wake", ZOPE, bench.size(5, 2), seldom, bench.queue(0))
        if bench.postfix:
            wakes(bench, "wake", POSTFIX, count, often, bench.root)


def measure_idle(bench: Bench) -> None:
    """Daemons over many deferred messages, both at the same time; then fresh mail on top of those."""
    depth, seconds, count = bench.size(100_000, 8000), bench.size(60, 6), bench.size(3000, 1000)

    def cpu(worker: Worker) -> float:
        return time.clock_gettime((~worker.process.pid << 3) | 2)  # clock_getcpuclockid(3): /proc is too coarse

    queues = {who: bench.queue(depth, size=300, deferred=who) for who in (OURS, ZOPE)}
    daemons = {who: bench.worker("drain", who, queues[who], bench.sink.port, daemon=True) for who in queues}
    for daemon in daemons.values():
        daemon.ready()
    time.sleep(bench.size(15, 5))  # they look again at a directory that just changed
    before = {who: cpu(daemon) for who, daemon in daemons.items()}
    time.sleep(seconds)
    for who, daemon in daemons.items():
        bench.add("idle", who, (cpu(daemon) - before[who]) * 60 / seconds)
        daemon.result()
    for _ in range(bench.size(5, 2)):
        alone, on_top = (
            run(bench.worker("drain", OURS, queue, bench.smtp_sink))["seconds"]
            for queue in (bench.queue(count), fill(queues[OURS], count))
        )
        bench.add("fresh", OURS, alone / on_top)
    wakes(bench, "wake_deep", OURS, bench.size(20, 5), (0.1, 0.4), queues[OURS])


def measure_outage(bench: Bench) -> None:
    refused = free_port()  # nobody listens there
    for row, who, count in (
        ("outage", OURS, 2000), ("outage", ZOPE, 2000), ("outage_deep", OURS, bench.size(100_000, 5000)),
    ):  # fmt: skip
        queue = bench.queue(count, size=300)
        before = snapshot(queue)
        result = run(bench.worker("drain", who, queue, refused))
        bench.add(row, who, result["seconds"])
        bench.add("outage_lines", who, result["lines"])
        bench.add("outage_touched", who, len({entry[0] for entry in before ^ snapshot(queue)}))
        if row == "outage":
            bench.sink.reset()
            run(bench.worker("drain", who, queue, bench.sink.port))
            bench.add("outage_back", who, 1 - bench.sink.taken(count)["lost"] / count)
            bench.sink.reset(down=True)  # it says 421, and counts who comes
            run(bench.worker("drain", who, bench.queue(count, size=300), bench.sink.port))
            bench.add("outage_tries", who, bench.sink.taken(0)["connections"])


def measure_memory(bench: Bench) -> None:
    def peak(who: str, port: int, count: int, size: int = 2000, batch: int | None = None) -> float:
        worker = bench.worker("drain", who, bench.queue(count, size=size), port, batch=batch)
        return float(run(worker)["peak"])

    for who in (OURS, ZOPE):
        bench.add("memory", who, peak(who, bench.smtp_sink, bench.size(10_000, 2000)))
        with bench.checked(who, 1):
            bench.add("memory25", who, peak(who, bench.sink.port, 1, 25_000_000))
    depths = (bench.size(100_000, 5000), 500)
    deep, shallow = (peak(OURS, bench.smtp_sink, depth, 300, batch=500) for depth in depths)
    bench.add("memory_deep", OURS, deep - shallow)


def measure_start(bench: Bench) -> None:
    python, module = VENV / "bin/python", pathlib.Path(bench.module)
    commands: dict[str, list[object]] = {
        OURS: [python, "-m", module.stem, "--help"],
        ZOPE: [VENV / "bin/zope-sendmail", "--help"],
        BARE: [python, "-c", ""],
    }
    for turn in range(bench.size(41, 11)):
        for who, command in commands.items():
            begin = time.perf_counter()
            subprocess.run(list(map(str, command)), cwd=module.parent, stdout=subprocess.DEVNULL, check=True)
            if turn:  # the first one compiles
                bench.add("start", who, (time.perf_counter() - begin) * 1000)


MEASUREMENTS = {name[8:]: function for name, function in list(globals().items()) if name.startswith("measure_")}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def install_peers() -> None:
    """Install what is missing; zope.sendmail is needed (it brings `transaction`), the others are not."""
    if not (VENV / "bin/zope-sendmail").exists():
        say(f"installing zope.sendmail into {VENV} ...")
        try:
            subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
            subprocess.run([VENV / "bin/pip", "install", "-q", "zope.sendmail"], check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(f"bench: zope.sendmail could not be installed: {error}")
    os.environ["PATH"] += ":/usr/sbin"
    missing = [package for package in ("postfix", "strace") if not shutil.which(package)]
    if missing and shutil.which("apt-get") and os.getuid() == 0:
        say(f"installing {', '.join(missing)} by apt ...")
        os.environ["DEBIAN_FRONTEND"] = "noninteractive"
        command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            say(f"apt could not install {', '.join(missing)} (apt-get update may help)")
    elif missing:
        say(f"{', '.join(missing)} missing: it takes apt and root to install that")


def report(bench: Bench) -> dict[str, Any]:
    rows = []
    for name, samples in sorted(bench.samples.items(), key=lambda item: list(ROWS).index(item[0])):
        medians = {who: statistics.median(values) for who, values in samples.items() if values}
        goals = []
        for relation, bound, peer in ROWS[name][2]:
            goal: dict[str, Any] = {"relation": relation, "bound": bound, "peer": peer}
            if medians.keys() >= {OURS, peer or OURS}:
                goal["value"] = value = medians[OURS] / (medians[peer] if peer else 1)
                goal["met"] = value >= bound if relation == ">=" else value <= bound
            goals.append(goal)
        what, unit, _ = ROWS[name]
        rows.append({"row": name, "what": what, "unit": unit, "medians": medians, "samples": samples, "goals": goals})
    code = "from importlib.metadata import version; print(version('zope.sendmail'))"
    zope = subprocess.run([VENV / "bin/python", "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    versions = {"Python": sys.version.split()[0], ZOPE: zope}
    if bench.postfix:
        versions[POSTFIX] = bench.postfix.run("postconf", "-h", "mail_version")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"), "command": sys.argv, "quick": bench.quick, "cpus": os.cpu_count(),
        "load": os.getloadavg(), "versions": versions, "rows": rows, "checked": bench.checked_by_sink,
    }  # fmt: skip


def print_table(found: dict[str, Any]) -> None:
    versions = ", ".join(map(" ".join, found["versions"].items()))
    print(f"{found['date']}, {found['cpus']} CPUs, {versions}{', quick' * found['quick']}\n")
    print(f"{'medians':35}{'unit':6}" + "".join(f"{who:>14}" for who in CONTENDERS) + "   goal, and where it stands")
    for row in found["rows"]:
        line = f"{row['what']:35}{row['unit']:6}"
        for who in CONTENDERS:
            value = row["medians"].get(who, "")
            line += f"{value:14,.0f}" if value and value >= 100 else f"{value:14.3g}" if value != "" else " " * 14
        for goal in row["goals"] or [None]:
            if goal:
                bound = f"{goal['relation']} {goal['bound']:g}" + (f" x {goal['peer']}" if goal["peer"] else "")
                verdict = "not measured"
                if "met" in goal:
                    verdict = f"{goal['value']:8.3g}  {'pass' if goal['met'] else 'FAIL'}"
                line = f"{line:97}   {bound:21} {verdict}"
            print(line.rstrip())
            line = ""
    print()
    for who, counts in found["checked"].items():
        print(f"the checking sink, of {who}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))


def main() -> None:
    if sys.argv[1:2] == ["--sink"]:
        return asyncio.run(serve_sink())
    if sys.argv[1:2] == ["--worker"]:
        return work(sys.argv[2], json.loads(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller figures, in under two minutes")
    parser.add_argument("--json", action="store_true", help="print a document with every sample, instead of the table")
    names = list(MEASUREMENTS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=" ".join(names))
    default = pathlib.Path(__file__).resolve().parents[1] / "sendmail.py"
    parser.add_argument("--module", type=os.path.abspath, default=default, help="what to measure: %(default)s")
    options = parser.parse_args()
    if not os.path.isfile(options.module):
        parser.error(f"no module {options.module}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left behind
    install_peers()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each worker would compile all that it imports
    os.environ["PYTHONPYCACHEPREFIX"] = str(CACHE / "pycache")  # nothing is left beside the module
    with tempfile.TemporaryDirectory(prefix="sendmail-bench-") as root, contextlib.ExitStack() as stack:
        os.chmod(root, 0o755)  # Postfix's own user must get in
        # ext4 takes several times longer to make a file where thousands were just deleted: keep the queues far apart,
        # and delete them at the end
        subprocess.run(["chattr", "+T", root], capture_output=True, check=False)
        bench = Bench(pathlib.Path(root), str(options.module), options.quick, stack)
        for name in options.only:
            begin = time.perf_counter()
            try:
                MEASUREMENTS[name](bench)
            except FAILURES as error:
                say(f"{name} failed: {error}")
            bench.end_workers()
            say(f"{name}: {time.perf_counter() - begin:.0f} s")
        found = report(bench)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print_table(found)
    return None


if __name__ == "__main__":
    main()
