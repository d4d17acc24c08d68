#!/usr/bin/env python3
"""Measure sendmail.py beside its peers on this machine, against aims for their ratios.

    python3 .ci/bench.py [--quick] [--json] [--only NAME ...] [--module PATH] [--before PATH]
    python3 .ci/bench.py --check

The peers are zope.sendmail (by pip, in a venv under ~/.cache/sendmail-bench), Postfix (a private instance, where it is
installed, for root), another version of this module (`--before`), and a baseline that does the minimum.  What is not
there is left out, and said.  Nothing is left behind but the cache.

Absolute figures differ by a factor of three from run to run: contenders take turns (ABBA...), and ratios of medians
within a run count.  Messages have 2 KB.  Rates are those of a pass; Postfix's, from a flush until its queue is empty.

The relay is a sink of our own, the same for all, which offers PIPELINING, CHUNKING, SIZE and 8BITMIME, counts what is
lost, duplicated, damaged or has a bare CR or LF, and counts turns: how often it had answered all that had come, and had
to wait.  Where a row says so, it answers 20 ms after each *read*, so that pipelined commands share one delay, or writes
each reply by itself, as Haraka does.

`--check` needs no peers and less than a minute.  It judges counts, no times: the exit status is 1 if something was
lost, sent twice or damaged, or if the turns are wrong.  Otherwise nothing is asserted, and the exit status is 0.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import importlib
import importlib.metadata
import io
import json
import logging
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import smtplib
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

HOST, SENDER, SPITE = "127.0.0.1", "app@bench.example", "421@bench.example"
OURS, BEFORE, ZOPE, POSTFIX, BASE = CONTENDERS = ("sendmail.py", "before", "zope.sendmail", "Postfix", "baseline")
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "sendmail-bench"
VENV = CACHE / f"venv-{sys.version_info[0]}.{sys.version_info[1]}"
TROUBLES = ("lost", "duplicated", "damaged", "bare")  # what the sink notices
FAILURES = (RuntimeError, OSError, EOFError, smtplib.SMTPException, subprocess.SubprocessError)  # of one contender
PATIENCE = 300  # seconds that anything may take
FORK = multiprocessing.get_context("fork")
say = functools.partial(print, file=sys.stderr, flush=True)

# row: what is measured, its unit (counts have none), and the aims: bounds of our figure, or of its ratio to a peer's
ROWS: dict[str, tuple[str, str, list[tuple[str, float, str]]]] = {
    "turns": ("turns for 100 messages, with EHLO and QUIT", "", [("≤", 102, "")]),
    "turns50": ("the same, 50 recipients a message", "", [("≤", 102, "")]),
    "turns_60k": ("the same, 60 KB a message", "", [("≤", 102, "")]),
    "turns_plain": ("the same, a relay without CHUNKING", "", [("≤", 202, "")]),
    "delay": ("drain, replies 20 ms late", "msg/s", [("≥", 2.8, POSTFIX)]),
    "delay50": ("the same, 50 recipients a message", "msg/s", [("≥", 2.6, POSTFIX)]),
    "delay8t": ("the same, 8 processors in one process", "msg/s", [("≥", 1.2, POSTFIX)]),
    "delay8p": ("the same, 8 processes", "msg/s", [("≥", 1.2, POSTFIX)]),
    "apart": ("a relay that writes each reply by itself (baseline: without TCP_QUICKACK)", "msg/s", [("≥", 1, BASE)]),
    "drain": ("drain of 5,000 (baseline: a bare loop of smtplib)", "msg/s", [("≥", 3.5, ZOPE)]),
    "drain_plain": ("the same, a relay without CHUNKING", "msg/s", [("≥", 1, BEFORE)]),
    "drain_postfix": ("the same into Postfix, with CHUNKING", "msg/s", [("≥", 1, BASE)]),
    "drain8t": ("drain of 5,000, 8 processors in one process", "msg/s", []),
    "drain8p": ("the same, 8 processes", "msg/s", [("≥", 2, ZOPE)]),
    "enqueue": ("queueing, 1 a commit (baseline: the bare fsyncs)", "msg/s", [("≥", 0.75, BASE)]),
    "enqueue16": ("the same, 16 threads at once", "msg/s", [("≥", 0.9, BASE)]),
    "enqueue1000": ("queueing, 1,000 a commit", "msg/s", [("≥", 0.9, BASE)]),
    "wake": ("from commit to relay, idle daemon", "ms", [("≤", 10, "")]),
    "wake_10k": ("the same over 10,000 deferred (baseline: over none)", "ms", [("≤", 2, BASE)]),
    "wake_100k": ("over 100,000", "ms", [("≤", 2, BASE)]),
    "wake_1m": ("over 1,000,000", "ms", [("≤", 2, BASE)]),
    "idle": ("idle CPU over 100,000 deferred", "s/min", [("≤", 0.1, "")]),
    "idle_1m": ("idle CPU over 1,000,000: one look at them", "s/min", []),
    "memory_1m": ("peak memory over 1,000,000 (baseline: over none)", "MB", []),
    "retries": ("fresh mail while 2,000 retries are due, 20 ms: worst of 10", "ms", [("≤", 250, "")]),
    "batch": ("batch=10, interval=5, mail every 0.2 s: most in 5 s", "", [("≤", 10, "")]),
    "poison": ("421 to one MAIL: others of 5 sent in that pass", "", [("≥", 4, "")]),
    "outage": ("relay down: a pass over 2,000", "ms", [("≤", 500, "")]),
    "outage_tries": ("its connections", "", [("≤", 1, "")]),
    "outage_lines": ("its log lines", "", [("≤", 1, "")]),
    "outage_back": ("not sent at the first pass after it", "", [("≤", 0, "")]),
    "memory": ("peak memory, 10,000 small messages", "MB", [("≤", 26, "")]),
    "memory_25m": ("peak memory, one of 25 MB", "MB", [("≤", 49, "")]),
    "start": ("start of --help (baseline: Python alone)", "ms", [("≤", 1, ZOPE)]),
    "start_inject": ("queueing one by the command line", "ms", []),
}
CHECKED = ("turns", "poison", "outage")  # the measurements of --check


def crlf(text: bytes) -> bytes:
    return text.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


def make_message(sequence: int, size: int = 2000) -> bytes:
    """Return a message that the sink can recognise, with LF line ends and a line that begins with a dot."""
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


def fill(
    queue: pathlib.Path, count: int, recipients: int = 1, size: int = 2000, wait: int | None = None, who: str = OURS
) -> pathlib.Path:  # fmt: skip
    """Put messages in a queue as if they had been committed, in the format that ours and zope.sendmail share.

    Where they `wait` for so many seconds, it is by the rules of a contender: ours stand in deferred/, zope.sendmail's
    have a link beside them.  Many of these are links to one file, for nobody reads them.
    """
    deferred = wait is not None and who == OURS
    for directory in ("", "new", "cur", "tmp", *["deferred"] * deferred):
        (queue / directory).mkdir(0o700, exist_ok=True)
    now, to, written = int(time.time()), ", ".join(addresses(recipients)), ""
    for i in range(count):
        name = f"{now}.M{i % 10**6:06}P{os.getpid()}Q{i}Rbench.localhost"
        path = f"{queue}/deferred/{now + (wait or 0):010}.{name}" if deferred else f"{queue}/new/{name}"
        if wait and wait > 0 and i % 20_000:
            os.link(written, path)
        else:
            envelope = f"X-Zope-From: {SENDER}\nX-Zope-To: {to}\nMessage-Id: <{i}@bench.example>\n"
            written = path
            with open(path, "wb") as file:
                file.write(envelope.encode() + make_message(i, size))
        if wait and who == ZOPE:
            os.link(path, f"{queue}/new/.sending-{name}")
    return queue


def free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.perf_counter() + seconds
    while not (done := condition()) and time.perf_counter() < deadline:
        time.sleep(0.01)
    return done


class Relay:
    """What the sink is to do, and what it has seen."""

    lock, open = threading.Lock(), 0  # of the counts, connections

    def reset(self, delay: float = 0, apart: bool = False, down: bool = False, chunking: bool = True) -> None:
        self.delay, self.apart, self.down = delay, apart, down
        self.extensions = b"250-sink\r\n250-PIPELINING\r\n%s250-8BITMIME\r\n250 SIZE 100000000\r\n"
        self.extensions %= b"250-CHUNKING\r\n" if chunking else b""
        self.seen: set[tuple[int, str]] = set()
        self.arrivals: dict[int, float] = {}
        self.counts = dict.fromkeys(("messages", "connections", "turns", "duplicated", "damaged", "bare"), 0)

    def take(self, message: bytes, recipients: Sequence[str]) -> None:
        bare = not message.count(b"\n") == message.count(b"\r") == message.count(b"\r\n")
        headers, _, body = (crlf(message) if bare else message).partition(b"\r\n\r\n")
        numbers = headers.partition(b"\r\nX-Bench: ")[2].partition(b"\r\n")[0].split() or (b"-1", b"-1")
        sequence, checksum = map(int, numbers)
        with self.lock:
            self.counts["messages"] += 1
            self.counts["bare"] += bare
            self.counts["damaged"] += not bare and zlib.crc32(body) != checksum
            self.arrivals.setdefault(sequence, time.monotonic())
            for recipient in recipients:
                self.counts["duplicated"] += (sequence, recipient) in self.seen
                self.seen.add((sequence, recipient))

    def report(self, first: int, count: int, recipients: int) -> dict[str, Any]:
        """Return what was taken, and how many recipients of the messages that should have come did not get theirs."""
        wait_until(lambda: not self.open, 0.3)  # a QUIT may be on its way; Postfix keeps its connections
        due = {(sequence, address) for sequence in range(first, first + count) for address in addresses(recipients)}
        with self.lock:
            return {**self.counts, "lost": len(due - self.seen), "arrivals": dict(self.arrivals)}


class Dialogue(io.RawIOBase):
    """The sink's part of a connection: a stream that is read when all that had come was worked off."""

    def __init__(self, relay: Relay, sock: socket.socket) -> None:
        self.relay, self.sock, self.replies, self.in_chunk = relay, sock, list[bytes](), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.replies and not self.in_chunk:
            with self.relay.lock:
                self.relay.counts["turns"] += 1
            if self.relay.delay:  # a sleep of 0 takes 50 µs
                time.sleep(self.relay.delay)
            for octets in self.replies if self.relay.apart else [b"".join(self.replies)]:
                self.sock.sendall(octets)
            self.replies.clear()
        return self.sock.recv_into(buffer)

    def serve(self) -> None:
        self.sock.sendall(b"421 down\r\n" if self.relay.down else b"220 sink ESMTP\r\n")
        recipients, message, file = list[str](), b"", io.BufferedReader(self, 1 << 16)
        while line := file.readline():
            verb, reply = line[:4].upper(), b"250 2.0.0 Ok\r\n"
            if verb == b"EHLO":
                reply = self.relay.extensions
            elif verb == b"MAIL":
                recipients, message = [], b""
                if SPITE.encode() in line:
                    return self.sock.sendall(b"421 No more\r\n")
            elif verb == b"RCPT":
                recipients.append(line[line.index(b"<") + 1 : line.index(b">")].decode())
            elif verb == b"BDAT":
                self.in_chunk = True
                message += file.read(int(line.split()[1]))
                self.in_chunk = False
                if b"LAST" in line:
                    self.relay.take(message, recipients)
            elif verb == b"DATA":
                self.replies.append(b"354 Go on\r\n")
                lines = iter(file.readline, b".\r\n")
                self.relay.take(b"".join(line[line[:1] == b"." :] for line in lines), recipients)
            elif verb == b"QUIT":
                reply = b"221 Bye\r\n"
            self.replies.append(reply)


class Child:
    """A forked process that calls a function with its end of a pipe; the other end is ours."""

    def __init__(self, function: Callable[..., object], *arguments: Any) -> None:
        def be() -> None:
            self.pipe.close()
            function(theirs, *arguments)

        self.pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=be, daemon=True)
        self.process.start()
        theirs.close()

    def receive(self) -> Any:
        if not self.pipe.poll(PATIENCE):
            raise RuntimeError("a worker hangs")
        return self.pipe.recv()

    def ask(self, question: object = "go") -> Any:
        self.pipe.send(question)
        return self.receive()

    def cpu(self) -> float:
        return time.clock_gettime((~self.process.pid << 3) | 2)  # clock_getcpuclockid(3): /proc is too coarse

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def serve_sink(pipe: Any) -> None:
    """Serve until the bench is gone, and do what it asks for through the pipe."""
    relay, listener = Relay(), socket.create_server((HOST, 0), backlog=1000)
    relay.reset()

    def serve() -> None:
        while True:  # a thread is there before its connection: nobody waits for its start
            sock, _ = listener.accept()
            with relay.lock:
                relay.counts["connections"] += 1
                relay.open += 1
            with sock, contextlib.suppress(ConnectionError):
                Dialogue(relay, sock).serve()
            with relay.lock:
                relay.open -= 1

    for _ in range(64):
        threading.Thread(target=serve, daemon=True).start()
    pipe.send(listener.getsockname()[1])
    with contextlib.suppress(EOFError):
        while True:
            options, *expected = pipe.recv()
            if options is not None:
                relay.reset(**options)
            pipe.send(relay.report(*expected))


class Sink(Child):
    def __init__(self) -> None:
        super().__init__(serve_sink)
        self.port = self.receive()

    def reset(self, **options: Any) -> None:
        self.ask((options, 0, 0, 0))

    def taken(self, count: int = 0, recipients: int = 1, first: int = 0) -> Any:
        """Return what was taken since the reset, of so many that should have come."""
        return self.ask((None, first, count, recipients))

    def check_itself(self) -> None:
        """Raise `RuntimeError` if it misses a trouble, sees one where there is none, or counts turns wrong."""
        first, second = (crlf(make_message(i)) for i in range(2))
        for trouble, messages, expected in (
            ("nothing", [(first, 2), (second, 2)], [0, 0, 0, 0]),
            ("a lost message", [(second, 2)], [2, 0, 0, 0]),
            ("a lost recipient", [(first, 2), (second, 1)], [1, 0, 0, 0]),
            ("lost behind a duplicate", [(first, 2), (first, 2)], [2, 2, 0, 0]),
            ("a duplicate", [(first, 2), (second, 2), (second, 1)], [0, 1, 0, 0]),
            ("damage", [(first, 2), (second.replace(b"fox", b"ox", 1), 2)], [0, 0, 1, 0]),
            ("a bare LF", [(first, 2), (second.replace(b"\r\n", b"\n", 1), 2)], [0, 0, 0, 1]),
        ):
            for chunked in (False, True):
                self.reset()
                with smtplib.SMTP(HOST, self.port) as smtp:
                    for data, count in messages:
                        octets = b"".join(b"RCPT TO:<%s>\r\n" % to.encode() for to in addresses(count))
                        octets = b"MAIL FROM:<>\r\n" + octets
                        if chunked:
                            octets += b"BDAT 9\r\n%sBDAT %d LAST\r\n%s" % (data[:9], len(data) - 9, data[9:])
                        smtp.send(octets)
                        for _ in range(count + 1 + chunked):
                            smtp.getreply()
                        if not chunked:
                            smtp.docmd("DATA")
                            smtp.send(data.replace(b"\r\n.", b"\r\n..") + b".\r\n")
                        smtp.getreply()
                taken = self.taken(2, 2)
                turns = 1 + len(messages) * (1 if chunked else 3)  # with QUIT
                if [taken[key] for key in (*TROUBLES, "turns")] != [*expected, turns]:
                    raise RuntimeError(f"the sink is wrong about {trouble}: {taken}")


def load_module(path: pathlib.Path) -> Any:
    sys.path.insert(0, str(path.parent))
    return importlib.import_module(path.stem)


def at_once(functions: Sequence[Callable[[], object]]) -> None:
    with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
        list(pool.map(lambda function: function(), functions))


def drain(
    who: str, module: pathlib.Path, queue: pathlib.Path, port: int, processors: int = 1, daemon: bool = False,
    apart: bool = False, **options: Any,
) -> Callable[[], object]:  # fmt: skip
    """One pass, or a daemon.  Baseline: the messages by one connection of smtplib; or ours, without TCP_QUICKACK."""
    if who == BASE and apart:
        who = OURS
        del socket.TCP_QUICKACK
    if who in (OURS, BEFORE):
        sendmail = load_module(module)
        mailer = sendmail.SMTPMailer(HOST, port)
        together = [sendmail.QueueProcessorThread(str(queue), mailer, **options) for _ in range(processors)]
        begin, actions = together[0].start, [one.process for one in together]
        action = actions[0] if processors == 1 else lambda: at_once(actions)
    elif who == ZOPE:
        zope = importlib.import_module("zope.sendmail.queue").QueueProcessorThread()
        zope.setMailer(importlib.import_module("zope.sendmail.mailer").SMTPMailer(HOST, port))
        zope.setQueuePath(str(queue))
        begin = zope.start

        def action() -> None:
            while True:  # its listing does not bear that another process takes a message meanwhile
                with contextlib.suppress(FileNotFoundError):
                    return zope.run(forever=False)
    else:
        files = [path.read_bytes() for path in sorted(queue.glob("new/*"))]
        messages = [crlf(file.split(b"\n", 2)[2]) for file in files]  # smtplib sends a bare LF as it is

        def action() -> None:
            with smtplib.SMTP(HOST, port) as smtp:
                for message in messages:
                    smtp.sendmail(SENDER, addresses(1), message)

    if daemon:
        begin()
        return int  # nothing more
    return action


def enqueue(
    who: str, module: pathlib.Path, queue: pathlib.Path, port: int, count: int, per_commit: int = 1, threads: int = 1,
    pause: tuple[float, float] | None = None, first: int = 0,
) -> Callable[[], object]:  # fmt: skip
    """Queue messages, in equal parts by each thread, or with pauses; return when each commit was begun.

    Baseline: bare writes, fsyncs and renames; where one commit has many, side by side.
    """
    pool = concurrent.futures.ThreadPoolExecutor(16)

    def write(message: bytes) -> str:
        name = f"{time.time_ns()}.{threading.get_ident()}"
        descriptor = os.open(f"{queue}/tmp/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(descriptor, message)
        os.fsync(descriptor)
        os.close(descriptor)
        return name

    def commit(messages: Sequence[bytes]) -> None:
        for name in [write(messages[0])] if len(messages) == 1 else list(pool.map(write, messages)):
            os.rename(f"{queue}/tmp/{name}", f"{queue}/new/{name}")
        descriptor = os.open(f"{queue}/new", os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    if who == POSTFIX:
        smtp = smtplib.SMTP(HOST, port)
        def commit(messages: Sequence[bytes]) -> None:
            for message in messages:
                smtp.sendmail(SENDER, addresses(1), crlf(message))
    elif who != BASE:
        library = importlib.import_module("zope.sendmail.delivery") if who == ZOPE else load_module(module)
        delivery, transaction = library.QueuedMailDelivery(str(queue)), importlib.import_module("transaction")

        def commit(messages: Sequence[bytes]) -> None:
            for message in messages:
                delivery.send(SENDER, addresses(1), message)
            transaction.commit()

    messages = [make_message(first + i) for i in range(count)]
    began: dict[int, float] = {}

    def part(start: int) -> None:
        for i in range(start, count, threads * per_commit):
            if pause:
                time.sleep(random.uniform(*pause))
            began[first + i] = time.monotonic()
            commit(messages[i : i + threads * per_commit : threads])

    def action() -> dict[int, float]:
        at_once([functools.partial(part, start) for start in range(threads)])
        return began

    return action


def work(pipe: Any, prepare: Callable[..., Callable[[], object]], arguments: Mapping[str, Any]) -> None:
    """Get ready, say so, wait for the word, do it, and report."""
    log = io.StringIO()
    logging.basicConfig(stream=log)
    action = prepare(**arguments)
    pipe.send("ready")
    pipe.recv()
    begin = time.perf_counter()
    began = action()
    seconds = time.perf_counter() - begin
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]  # kB
    found = {"seconds": seconds, "peak": int(peak) / 1000, "lines": log.getvalue().count("\n")}
    pipe.send({**found, "began": began if isinstance(began, dict) else {}})


def run(*workers: Child) -> dict[str, Any]:
    """Let workers go together; return what the slowest reports."""
    for worker in workers:
        worker.receive()
    for worker in workers:
        worker.pipe.send("go")
    return max((worker.receive() for worker in workers), key=lambda result: result["seconds"])


class Bench:
    def __init__(self, root: pathlib.Path, options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
        self.root, self.quick, self.modules = root, options.quick or options.check, {OURS: options.module.resolve(True)}
        self.samples: dict[str, dict[str, list[float]]] = {}
        self.watched: dict[str, dict[str, int]] = {}
        self.queues, self.failed, self.workers = 0, list[tuple[str, str]](), list[Child]()
        self.sink = Sink()
        stack.callback(self.sink.end)
        stack.callback(self.end_workers)
        self.sink.check_itself()
        self.contenders = {OURS} if options.check else {OURS, ZOPE, BASE}
        if options.before:
            self.contenders.add(BEFORE)
            self.modules[BEFORE] = options.before.resolve(True)
        if shutil.which("postfix") and os.getuid() == 0 and not options.check:
            self.contenders.add(POSTFIX)
        elif not options.check:
            say("without Postfix: it needs root, and the package postfix")

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def add(self, row: str, who: str, *values: float) -> None:
        self.samples.setdefault(row, {}).setdefault(who, []).extend(values)

    def queue(self, *args: Any, **options: Any) -> pathlib.Path:
        self.queues += 1
        return fill(self.root / f"queue{self.queues}", *args, **options)

    @contextlib.contextmanager
    def postfix(self, workers: int = 1) -> Iterator[types.SimpleNamespace]:
        """Run a new instance, which keeps on hold what comes at one port, and passes on what comes at another."""
        def run(program: str, *arguments: str) -> str:
            command = [program, "-c", str(root / "etc"), *arguments]
            return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout.strip()

        def files(*parts: str) -> int:
            return sum(len(names) for part in parts for _, _, names in os.walk(root / "queue" / part))

        self.queues += 1
        root, hold, pass_on = self.root / f"postfix{self.queues}", free_port(), free_port()
        for directory in (root, root / "etc", root / "queue", root / "data"):
            directory.mkdir(0o755)
        shutil.chown(root / "data", "postfix")
        services = pathlib.Path("/usr/share/postfix/master.cf.dist").read_text()
        services = re.sub(r"(?m)^(\w+ +unix +\S+ +\S+ +)y", r"\1n", services)  # no chroot
        services = re.sub(r"(?m)^smtp +inet.*", f"{HOST}:{pass_on} inet n - n - - smtpd", services)
        services += f"{HOST}:{hold} inet n - n - - smtpd -o smtpd_client_restrictions=static:HOLD\n"
        (root / "etc/master.cf").write_text(services)
        (root / "etc/main.cf").write_text("\n".join((
            "compatibility_level = 3.6", f"queue_directory = {root}/queue", f"data_directory = {root}/data",
            f"inet_interfaces = {HOST}", "inet_protocols = ipv4", f"mynetworks = {HOST}/32",
            "myhostname = bench.example", "mydestination =", "alias_maps =", "notify_classes =", "in_flow_delay = 0",
            "smtp_dns_support_level = disabled", "smtpd_peername_lookup = no", f"relayhost = [{HOST}]:{self.sink.port}",
            f"smtp_destination_concurrency_limit = {workers}", f"initial_destination_concurrency = {workers}",
            "smtpd_relay_restrictions = permit_mynetworks, reject", "",
        )))  # fmt: skip
        run("postfix", "start")
        pid = int((root / "queue/pid/master.pid").read_text())
        try:
            yield types.SimpleNamespace(hold=hold, pass_on=pass_on, run=run, files=files)
        finally:
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not pathlib.Path(f"/proc/{pid}").exists(), 10)

    def worker(self, prepare: Any, who: str, queue: pathlib.Path, port: int = 0, **options: Any) -> Child:
        """Start a child that gets ready to drain, or to enqueue; the default port is the sink's."""
        options.update(who=who, queue=queue, port=port or self.sink.port)
        options["module"] = self.modules.get(who, self.modules[OURS])
        self.workers.append(Child(work, prepare, options))
        return self.workers[-1]

    def end_workers(self) -> None:
        while self.workers:
            self.workers.pop().end()

    def in_turns(self, row: str, rounds: int, contenders: Sequence[str], figure: Any, *arguments: Any) -> None:
        """Take a figure of each contender that is to be had, in each round; where one fails, the others go on."""
        for who in [who for turn in range(rounds) for who in contenders[:: 1 - 2 * (turn % 2)]]:
            if who in self.contenders and (row, who) not in self.failed:
                os.sync()  # or one would pay for what another has left to the disk
                try:
                    self.add(row, who, figure(who, *arguments))
                except FAILURES as error:
                    say(f"{row}, {who} failed: {error!r}")
                    self.failed.append((row, who))
                self.end_workers()

    @contextlib.contextmanager
    def checked(self, who: str, count: int, recipients: int = 1, first: int = 0, **options: Any) -> Iterator[Any]:
        """Let the sink watch the block, in which so many messages should come; after it, what was seen is returned."""
        self.sink.reset(**options)
        taken: dict[str, Any] = {}
        yield taken
        taken.update(self.sink.taken(count, recipients, first))
        counts = self.watched.setdefault(who, dict.fromkeys(("messages", *TROUBLES), 0))
        for key in counts:
            counts[key] += taken[key]

    def drain(
        self, who: str, count: int, recipients: int = 1, size: int = 2000, port: int = 0, processes: int = 1,
        processors: int = 1, **options: Any,
    ) -> float:  # fmt: skip
        """Return the messages per second of one drain."""
        if who == POSTFIX:
            return self.drain_postfix(count, recipients, processes)
        queue, options["processors"] = self.queue(count, recipients, size), processors
        return count / run(*(self.worker(drain, who, queue, port, **options) for _ in range(processes)))["seconds"]

    def drain_postfix(self, count: int, recipients: int, workers: int) -> float:
        """Put messages on hold; take the time from a flush until all are gone."""
        with self.postfix(workers) as postfix:
            with smtplib.SMTP(HOST, postfix.hold) as smtp:
                for i in range(count):
                    smtp.sendmail(SENDER, addresses(recipients), crlf(make_message(i)))
            postfix.run("postsuper", "-H", "ALL")
            begin = time.perf_counter()
            for _ in range(PATIENCE // 10):
                postfix.run("postqueue", "-f")
                if wait_until(lambda: not postfix.files(*("incoming", "active", "deferred") * 2), 10):
                    return count / (time.perf_counter() - begin)
            raise RuntimeError("Postfix does not get its queue empty")

    def drains(self, row: str, rounds: int, counts: Any, relay: Any = (), turns: bool = False, **options: Any) -> None:
        """Drain into the sink in turns, so many messages for each contender; take the rates, or the sink's turns."""
        def figure(who: str) -> float:
            with self.checked(who, counts[who], options.get("recipients", 1), **dict(relay)) as taken:
                rate = self.drain(who, counts[who], **options)
            return float(taken["turns"]) if turns else rate

        self.in_turns(row, rounds, list(counts), figure)

    def measure_turns(self) -> None:
        mailers, plain = dict.fromkeys(CONTENDERS[:4], 100), {"chunking": False}
        self.drains("turns", 1, mailers, turns=True)
        self.drains("turns50", 1, mailers, turns=True, recipients=50)
        self.drains("turns_60k", 1, {OURS: 100, BEFORE: 100}, turns=True, size=60_000)
        self.drains("turns_plain", 1, mailers, relay=plain, turns=True)
        for relay in ({}, plain):  # these are for what the sink notices
            with self.checked(OURS, 4, 2, **relay):
                self.drain(OURS, 4, 2, 3_000_000)
            with self.checked(OURS, 800, **relay):
                self.drain(OURS, 800, processes=8)

    def measure_delay(self) -> None:
        count, many, rounds, late = self.size(100, 12), self.size(800, 120), self.size(3, 2), {"delay": 0.02}
        for row, recipients, few in (("delay", 1, count // 3), ("delay50", 50, self.size(6, 1))):
            self.drains(row, rounds, {OURS: count, BEFORE: count, POSTFIX: count}, late, recipients=recipients)
            self.drains(row, 1, {ZOPE: few}, late, recipients=recipients)
        self.drains("delay8t", rounds, {OURS: many, BEFORE: many}, late, processors=8)
        self.drains("delay8p", rounds, {OURS: many, BEFORE: many, POSTFIX: many}, late, processes=8)
        self.drains("delay8p", 1, {ZOPE: many // 4}, late, processes=8)
        self.add("delay8t", POSTFIX, *self.samples["delay8p"].get(POSTFIX, []))  # it knows but one kind of worker

    def measure_apart(self) -> None:
        counts = dict.fromkeys(CONTENDERS, self.size(100, 20))
        self.drains("apart", self.size(3, 2), counts, relay={"apart": True}, apart=True)

    def measure_drain(self) -> None:
        count, rounds, mailers = self.size(5000, 1000), self.size(5, 3), (OURS, BEFORE, ZOPE, BASE)
        counts, fewer = dict.fromkeys(mailers, count), {POSTFIX: self.size(1000, 200)}

        def into_postfix(who: str, count: int) -> float:
            with self.postfix() as postfix:
                rate = self.drain(who, count, port=postfix.hold)
                if (came := postfix.files("hold")) != count:
                    raise RuntimeError(f"{came} messages came, instead of {count}")
            return rate

        self.drains("drain", rounds, {**counts, **fewer})
        self.drains("drain_plain", rounds, {**counts, **fewer}, relay={"chunking": False})
        if POSTFIX in self.contenders:
            self.in_turns("drain_postfix", rounds, mailers, into_postfix, self.size(500, 200))
        self.drains("drain8t", rounds, {OURS: count, BEFORE: count}, processors=8)
        self.drains("drain8p", rounds, {OURS: count, BEFORE: count, ZOPE: count, **fewer}, processes=8)

    def measure_enqueue(self) -> None:
        def rate(who: str, count: int, **options: int) -> float:
            queue = self.queue(0)
            with self.postfix() if who == POSTFIX else contextlib.nullcontext() as postfix:
                port = postfix.hold if postfix else 0
                return count / float(run(self.worker(enqueue, who, queue, port, count=count, **options))["seconds"])

        rounds, mailers, many = self.size(5, 3), (OURS, BEFORE, ZOPE, BASE), self.size(4000, 1000)
        self.in_turns("enqueue", rounds, (*mailers, POSTFIX), rate, self.size(500, 200))
        self.in_turns("enqueue16", rounds, mailers, functools.partial(rate, threads=16), many)
        self.in_turns("enqueue1000", rounds, mailers, functools.partial(rate, per_commit=1000), many)

    def wakes(
        self, who: str, queue: Any, port: int = 0, count: int = 10, pause: Any = (0.1, 0.4), first: int = 0, **late: Any
    ) -> list[float]:  # fmt: skip
        """Commit messages at random times while a daemon runs; return the milliseconds until each arrived."""
        with self.checked(who, count, first=first, **late) as taken:
            began = run(self.worker(enqueue, who, queue, port, count=count, pause=pause, first=first))["began"]
            wait_until(lambda: not self.sink.taken(count, 1, first)["lost"], 10)
        return [(arrival - began[i]) * 1000 for i, arrival in taken["arrivals"].items() if i in began]

    def measure_deep(self) -> None:
        """Daemons over so many deferred messages, all at the same time; then fresh mail for one after the other."""
        depths = {"wake": 0, "wake_10k": self.size(10_000, 1000), "wake_100k": self.size(100_000, 10_000),
                  "wake_1m": self.size(1_000_000, 100_000)}  # fmt: skip
        queues = {row: self.queue(depth, size=300, wait=3300) for row, depth in depths.items()}
        deep, none = self.queue(depths["wake_100k"], size=300, wait=3300, who=ZOPE), self.queue(0)
        daemons = {row: self.worker(drain, OURS, queue, daemon=True) for row, queue in queues.items()}
        zopes = [self.worker(drain, ZOPE, queue, daemon=True) for queue in (deep, none)]
        for daemon in (*daemons.values(), *zopes):
            daemon.receive()
        time.sleep(self.size(20, 5))
        idle = (("idle", OURS, daemons["wake_100k"]), ("idle", ZOPE, zopes[0]), ("idle_1m", OURS, daemons["wake_1m"]))
        before, seconds = [daemon.cpu() for _, _, daemon in idle], self.size(60, 6)
        time.sleep(seconds)
        for (row, who, daemon), start in zip(idle, before):
            self.add(row, who, (daemon.cpu() - start) * 60 / seconds)
        zopes[0].end()
        for _ in range(self.size(3, 1)):
            for row, queue in queues.items():
                self.add(row, OURS, *self.wakes(OURS, queue))
            self.add("wake", ZOPE, *self.wakes(ZOPE, none, count=self.size(5, 2), pause=(0.5, 3.5)))
            if POSTFIX in self.contenders:
                with self.postfix() as postfix:
                    self.add("wake", POSTFIX, *self.wakes(POSTFIX, none, postfix.pass_on))
        for row in list(queues)[1:]:
            self.add(row, BASE, *self.samples["wake"][OURS])
        for who, row in ((OURS, "wake_1m"), (BASE, "wake")):
            self.add("memory_1m", who, daemons[row].ask()["peak"])

    def measure_retries(self) -> None:
        def worst(who: str) -> float:
            queue = self.queue(2000, wait=-10)
            self.sink.reset(delay=0.02)
            self.worker(drain, who, queue, daemon=True).receive()
            time.sleep(0.5)
            return max(self.wakes(who, queue, first=2000, delay=0.02))

        self.in_turns("retries", self.size(3, 1), [OURS], worst)

    def command_of(self, who: str, *arguments: object) -> list[str]:
        """Return the command line of ours or of zope.sendmail."""
        code = "import sys, zope.sendmail.queue; zope.sendmail.queue.run()"
        if who != ZOPE:
            path = self.modules[who]
            code = f"import sys; sys.path[0] = {str(path.parent)!r}; import {path.stem} as m; m.main(sys.argv[1:])"
        return [sys.executable, "-c", code, *map(str, arguments)]

    def measure_batch(self) -> None:  # a fiftieth of the interval is what the clocks may differ
        def most(who: str, interval: int) -> float:
            queue = self.queue(0)
            self.sink.reset()
            self.worker(drain, who, queue, daemon=True, batch=10, interval=interval).receive()
            run(self.worker(enqueue, who, queue, count=100, pause=(interval / 25, interval / 25)))
            times = self.sink.taken()["arrivals"].values()
            return max(sum(0 <= other - one < interval * 0.98 for other in times) for one in times)

        self.in_turns("batch", 1, CONTENDERS[:2], most, self.size(5, 1))

    def measure_poison(self) -> None:
        def sent(who: str) -> float:
            self.sink.reset()
            queue = self.queue(5)
            first = min(queue.glob("new/*"))
            first.write_bytes(first.read_bytes().replace(SENDER.encode(), SPITE.encode(), 1))
            run(self.worker(drain, who, queue))
            return float(self.sink.taken()["messages"])

        self.in_turns("poison", 1, CONTENDERS[:3], sent)

    def measure_outage(self) -> None:
        def outage(who: str, refused: int) -> float:
            queue = self.queue(2000, size=300)
            result = run(self.worker(drain, who, queue, refused))
            self.add("outage_lines", who, result["lines"])
            with self.checked(who, 2000) as taken:
                run(self.worker(drain, who, queue))
            self.add("outage_back", who, taken["lost"])
            self.sink.reset(down=True)  # it says 421, and counts who comes
            run(self.worker(drain, who, self.queue(2000, size=300)))
            self.add("outage_tries", who, self.sink.taken()["connections"])
            return float(result["seconds"] * 1000)

        self.in_turns("outage", 1, CONTENDERS[:3], outage, free_port())  # nobody listens there

    def measure_memory(self) -> None:
        """By the command lines, which are asked for their peak at the end."""
        status = "; print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"

        def peak(who: str, count: int, size: int) -> float:
            command = self.command_of(who, "--hostname", HOST, "--port", self.sink.port)
            command[2] += status
            if who != ZOPE:
                command.append("--maildir")
            queue = self.queue(count, size=size)
            with self.checked(who, count):
                return int(subprocess.check_output([*command, str(queue)])) / 1000

        self.in_turns("memory", 1, CONTENDERS[:3], peak, self.size(10_000, 2000), 2000)
        self.in_turns("memory_25m", 1, CONTENDERS[:3], peak, 1, 25_000_000)

    def measure_start(self) -> None:  # the first one compiles: no matter to a median
        def start(who: str, *arguments: object) -> float:
            command = self.command_of(who, *arguments) if who != BASE else [sys.executable, "-c", ""]
            begin = time.perf_counter()
            subprocess.run(command, input=make_message(0), stdout=subprocess.DEVNULL, check=True)
            return (time.perf_counter() - begin) * 1000

        self.in_turns("start", self.size(41, 11), (OURS, BEFORE, ZOPE, BASE), start, "--help")
        inject = ("--maildir", self.queue(0), *addresses(1))
        self.in_turns("start_inject", self.size(41, 11), CONTENDERS[:2], start, *inject)


def report(bench: Bench) -> list[dict[str, Any]]:
    """Return the rows: medians, samples, and for each aim its text and whether it is met."""
    rows = []
    for name, samples in sorted(bench.samples.items(), key=lambda item: list(ROWS).index(item[0])):
        what, unit, aims = ROWS[name]
        medians = {who: statistics.median(values) for who, values in samples.items() if values}
        found = []
        for sign, bound, peer in aims:
            if medians.keys() >= {OURS, peer or OURS}:
                value = medians[OURS] / (medians[peer] if peer else 1)
                met = value >= bound if sign == "≥" else value <= bound
                found.append((f"{sign} {bound:g}" + (f" × {peer}: {value:.3g}" if peer else ""), met))
        rows.append({"row": name, "what": what, "unit": unit, "medians": medians, "samples": samples, "aims": found})
    return rows


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the medians in Markdown."""
    columns = [who for who in CONTENDERS if any(who in row["medians"] for row in rows)]
    print(f"| | {' | '.join(columns)} | aim, and what came out |\n|---|{'---|' * len(columns)}---|")
    for row in rows:
        figures = [row["medians"].get(who) for who in columns]
        cells = ["" if it is None else f"{it:,.0f}" if it >= 100 else f"{it:.3g}" for it in figures]
        aims = "; ".join(text if met else f"{text} **missed**" for text, met in row["aims"])
        print(f"| {row['what']}{', ' * bool(row['unit'])}{row['unit']} | {' | '.join(cells)} | {aims} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="judge what can be counted, in under a minute")
    parser.add_argument("--quick", action="store_true", help="smaller figures, in a few minutes")
    parser.add_argument("--json", action="store_true", help="print a document with every sample, instead of the table")
    names = [name[8:] for name in vars(Bench) if name.startswith("measure_")]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=" ".join(names))
    default = pathlib.Path(__file__).parents[1] / "sendmail.py"
    parser.add_argument("--module", type=pathlib.Path, default=default, help="what to measure: %(default)s")
    parser.add_argument("--before", type=pathlib.Path, metavar="PATH", help="another version, to compare it with")
    options = parser.parse_args()
    os.environ["PATH"] += ":/usr/sbin"
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each worker would compile all that it imports
    if not options.check and sys.prefix != str(VENV):
        if not (VENV / "bin/zope-sendmail").exists():
            say(f"installing zope.sendmail into {VENV} ...")
            subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
            subprocess.run([VENV / "bin/pip", "install", "-q", "zope.sendmail"], check=True)
        os.execv(VENV / "bin/python", [str(VENV / "bin/python"), *sys.argv])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left behind
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = str(CACHE / "pycache")  # nothing is left beside the module
    with tempfile.TemporaryDirectory(prefix="sendmail-bench-") as root, contextlib.ExitStack() as stack:
        os.chmod(root, 0o755)  # Postfix's own user must get in
        # ext4 makes files slowly where thousands were just deleted: keep the queues apart, and delete them at the end
        subprocess.run(["chattr", "+T", root], capture_output=True, check=False)
        bench = Bench(pathlib.Path(root), options, stack)
        for name in options.only or (CHECKED if options.check else names):
            begin = time.perf_counter()
            try:
                getattr(bench, f"measure_{name}")()
            except FAILURES as error:
                say(f"{name} failed: {error!r}")
                bench.failed.append((name, ""))
            bench.end_workers()
            say(f"{name}: {time.perf_counter() - begin:.0f} s")
        rows, head = report(bench), {"date": time.strftime("%Y-%m-%d %H:%M"), "cpus": os.cpu_count()}
        head |= {"quick": bench.quick, "Python": sys.version.split()[0]}
        if ZOPE in bench.contenders:
            head[ZOPE] = importlib.metadata.version(ZOPE)
        if POSTFIX in bench.contenders:
            head[POSTFIX] = subprocess.check_output(["postconf", "-d", "-h", "mail_version"], text=True).strip()
        for who, counts in bench.watched.items():
            head[f"the sink, of {who}"] = ", ".join(f"{count} {what}" for what, count in counts.items())
    if options.json:
        print(json.dumps({**head, "rows": rows}, indent=1))
    else:
        print_table(rows)
        print("", *(f"{key}: {value}" for key, value in head.items()), sep="\n")
    if not options.check:
        return 0
    wrong = [f"{row}, {who} failed" for row, who in bench.failed]
    for row in rows:
        wrong += [f"{row['what']}: {row['medians'][OURS]:g}" for _, met in row["aims"] if not met and not row["unit"]]
    wrong += [f"{bench.watched[OURS][trouble]} {trouble}" for trouble in TROUBLES if bench.watched[OURS][trouble]]
    for text in wrong:
        say(f"wrong: {text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
