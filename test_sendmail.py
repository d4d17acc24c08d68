"""The specification of sendmail.py, as tests against real servers, files, processes and kills.

    .venv/bin/python -m pytest -q                   all of it
    .venv/bin/python -m pytest -q -m "not sweep"    without the sweeps: kills, faults, power cuts, interleavings
    SENDMAIL_TEST_ALL=1 .venv/bin/python -m pytest -q -s -k "power or meet"     every state and schedule, not a sample
    SENDMAIL_TEST_REPLAY='["two processors", [[3, "run", "B"]]]' ...            one schedule, as a failure printed it

Postfix, Exim, strace, and the programs that hand mail to sendmail(8) are used where they are installed; else their
tests are skipped, and say so.  Some tests need root rights, and say so too.
"""

from __future__ import annotations

import base64
import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import datetime
import email
import email.header
import email.message
import email.policy
import enum
import errno
import fcntl
import functools
import gc
import hmac
import inspect
import io
import itertools
import json
import logging
import mailbox
import math
import multiprocessing
import os
import pathlib
import pwd
import random
import re
import resource
import select
import shlex
import shutil
import signal
import smtplib
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, NamedTuple

import pytest
import transaction
import trustme
from aiosmtpd.controller import Controller
from hypothesis import given, settings
from hypothesis import strategies as st
from transaction.interfaces import ISavepointDataManager, NoTransaction
from zope.interface.verify import verifyObject

import sendmail
from sendmail import (
    DirectMailDelivery,
    MailDeferredEvent,
    Maildir,
    MailErrorEvent,
    MailEvent,
    MailSentEvent,
    QueuedMailDelivery,
    QueueProcessorThread,
    RelayUnavailable,
    Reply,
    SMTPMailer,
    StreamMailer,
)

# ------------------------------------------------------------------------------------ fakes and fixtures: files, relays

MODULE = pathlib.Path(sendmail.__file__)
MESSAGE = b"Message-Id: <m1@example.com>\nDate: Tue, 24 Nov 2026 10:00:00 +0000\nSubject: Hello\n\nHello, Ann.\n"
SENDER, ANN, BOB = "app@example.com", "ann@example.com", "bob@example.com"
SUBDIRECTORIES = ("tmp", "new", "cur", "deferred", ".failed/new", ".failed/cur")
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # for thousands of files: a disk would need minutes
EVERYTHING = bool(os.environ.get("SENDMAIL_TEST_ALL"))  # states and schedules, not a sample of them
UNLIMITED = pytest.mark.timeout(0 if EVERYTHING else 1800)  # a minute or two, but not on a busy machine
PHASES = ["tpc_begin", "commit", "tpc_vote", "tpc_finish"]
NAME = "1700000000.M000001P1Q1.host"
DAY = 24 * 3600


def put(queue, place, *recipients, message=MESSAGE):
    """Put a message into a directory of the queue by hand; *place* is directory and name."""
    path = pathlib.Path(getattr(queue, "path", queue), place)
    path.parent.mkdir(0o700, exist_ok=True)
    path.write_bytes(b"X-Zope-From: app@x.org\nX-Zope-To: %s\n" % ", ".join(recipients or [ANN]).encode() + message)
    return path


def one_pass(queue, server, now=0.0, **options):
    """The counts of a pass of a new processor, at *now* if that is given; *server* has a mailer, or is one."""
    processor = QueueProcessorThread(queue, getattr(server, "mailer", lambda: server)(), **options)
    if now:
        processor._clock = lambda: now
    return processor.process()


def calling(act):
    """A mailer that calls *act* with the recipients, and returns what that does."""
    return types.SimpleNamespace(send=lambda _sender, recipients, _message: act(recipients))


def wait_until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait for something that another thread or process does; fail when it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def crlf(message: bytes) -> bytes:
    """The message as a relay stores it: every line end, and the last, a CRLF."""
    text = message.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")
    return text if text.endswith(b"\r\n") or not text else text + b"\r\n"


def state(queue: Maildir | os.PathLike[str] | str) -> dict[str, list[str]]:
    """The file names in each directory of a queue that has any."""
    root = pathlib.Path(getattr(queue, "path", queue))
    listed = {d: sorted(p.name for p in (root / d).iterdir()) for d in SUBDIRECTORIES if (root / d).is_dir()}
    return {directory: names for directory, names in listed.items() if names}


def content(queue: Maildir | os.PathLike[str] | str) -> list[bytes]:
    """The contents of all files in a queue, in the order of `state`."""
    root = pathlib.Path(getattr(queue, "path", queue))
    return [(root / d / name).read_bytes() for d, names in state(queue).items() for name in names]


def queued(queue: Maildir) -> tuple[str, list[str], bytes]:
    """Sender, recipients and message of the only file in the queue."""
    [file] = content(queue)
    found = re.fullmatch(rb"X-Zope-From: (.*)\nX-Zope-To: (.*)\n((?s:.*))", file)
    assert found, file
    return found[1].decode(), found[2].decode().split(", "), found[3]


def standing(root: pathlib.Path, directory: str) -> list[str]:
    """The recipients that stand in the files of a directory, each of which must be complete."""
    found = []
    for path in (root / directory).glob("[!.]*"):
        text = path.read_bytes()
        assert text.startswith(b"X-Zope-From: app@x.org\nX-Zope-To: ") and text.endswith(MESSAGE), (path, text)
        found += text.split(b"\n")[1].decode().removeprefix("X-Zope-To: ").strip().split(", ")
    return sorted(found)


def standing_recipients(queue: Maildir) -> dict[str, list[str]]:
    return {directory: standing(pathlib.Path(queue.path), directory) for directory in state(queue)}


@dataclasses.dataclass
class Received:
    sender: str
    recipients: list[str]
    content: bytes


class Relay:
    """A real SMTP server (aiosmtpd) that keeps what it takes; `refusals` maps a recipient to its reply."""

    def __init__(self, host: str = "127.0.0.1", **options: Any) -> None:
        self.received: list[Received] = []
        self.refusals: dict[str, str] = {}
        self.data_reply = ""
        self.peers: set[Any] = set()  # those who have sent something
        relay = self

        class Handler:
            async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:
                if address in relay.refusals:
                    return relay.refusals[address]
                envelope.rcpt_tos.append(address)
                return "250 2.1.5 Ok"

            async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
                if relay.data_reply:
                    return relay.data_reply
                relay.peers.add(session.peer)
                relay.received.append(Received(envelope.mail_from, envelope.rcpt_tos, envelope.original_content))
                return f"250 2.0.0 Ok: queued as {len(relay.received)}"

        class RelayController(Controller):
            def _trigger_server(self) -> None:  # port 0 is any: tell it which one it was
                self.port = self.server.sockets[0].getsockname()[1]
                super()._trigger_server()

        options.setdefault("data_size_limit", 2**26)
        self.controller = RelayController(Handler(), hostname=host, port=0, **options)
        self.controller.start()
        self.host = host
        self.port = self.controller.port

    def mailer(self, **options: Any) -> SMTPMailer:
        return SMTPMailer(self.host, self.port, **options)

    def close(self) -> None:
        if self.controller._thread is not None:  # or else it was closed already
            self.controller.stop()


@pytest.fixture
def relay() -> Iterator[Relay]:
    server = Relay()
    yield server
    server.close()


@pytest.fixture
def queue(tmp_path: pathlib.Path) -> Maildir:
    return Maildir(tmp_path / "queue")


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    """No subscriber and no transaction left over from one test to the next; SIGINT is heard in the background, too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    sendmail._handlers.clear()
    transaction.manager.explicit = False
    transaction.abort()


@pytest.fixture
def events() -> list[MailEvent]:
    happened: list[MailEvent] = []
    sendmail.subscribe(happened.append)
    return happened


class Scripted:
    """A small SMTP server for what no real one does on demand: *dialogue(connection)* runs for each connection.

    `connection.line()` reads a command ('' at the end), `connection.say(text)` writes lines, `connection.data()` reads
    up to the dot, `connection.close()` closes.
    """

    def __init__(self, dialogue: Callable[[Connection], None]) -> None:
        self.dialogue = dialogue
        self.connections: list[Connection] = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.host, self.port = self.socket.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = Connection(self.socket.accept()[0], len(self.connections) + 1)
                self.connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.dialogue(connection)
        connection.close()

    def mailer(self, **options: Any) -> SMTPMailer:
        return SMTPMailer(self.host, self.port, **{"timeout": 5, **options})

    def close(self) -> None:
        self.socket.close()
        for connection in self.connections:
            connection.close()


class Connection:
    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock, self.number = sock, number
        sock.settimeout(60)
        self.file = sock.makefile("rb")
        self.lines: list[str] = []

    def line(self) -> str:
        line = self.file.readline().decode("utf-8", "replace").rstrip("\r\n")
        self.lines.append(line)
        return line

    def say(self, text: str) -> None:
        self.sock.sendall(text.replace("\n", "\r\n").encode() + b"\r\n")

    def data(self) -> bytes:
        lines = []
        while (line := self.file.readline()) not in (b".\r\n", b""):
            lines.append(line)
        return b"".join(lines)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError, ValueError):
            self.file.close()
            self.sock.close()


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    servers: list[Scripted] = []

    def start(dialogue: Callable[[Connection], None]) -> Scripted:
        servers.append(Scripted(dialogue))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


CHUNKING = ("PIPELINING", "CHUNKING")
USUAL = {
    "greeting": "220 scripted ESMTP", "EHLO": "250 scripted", "MAIL": "250 2.1.0 Ok", "RCPT": "250 2.1.5 Ok",
    "DATA": "354 go on", "BDAT": "250 2.0.0 go on", "nobody": "503 5.5.1 no valid recipients",
    "end": "250 2.0.0 Ok: queued", "STARTTLS": "220 2.0.0 go on", "AUTH": "235 2.7.0 Ok", "QUIT": "221 2.0.0 Bye"}


def answering(*extensions: str, tls: ssl.SSLContext | None = None, **answers: Any) -> Callable[[Any], None]:
    """A dialogue of the usual answers, but for *answers* by verb, "greeting", "end" (of the data, or the last chunk),
    or "nobody" (a chunk where no recipient was accepted; as RFC 3030 says, it is read before it is refused).

    An answer is a text, a callable of line and connection, "" (silence from here on; so after a 421), or None (the
    connection is closed).  `connection.messages` is what came as data, with dots stuffed, or in chunks.
    """
    hello = ["scripted", *extensions]
    ehlo = "\n".join(["250-" + line for line in hello[:-1]] + ["250 " + hello[-1]])

    def dialogue(connection: Any) -> None:
        def answer(verb: str, line: str = "") -> str:
            text = {**USUAL, "EHLO": ehlo, **answers}.get(verb, "250 2.0.0 Ok")
            text = text(line, connection) if callable(text) else text
            if text:
                connection.say(text)
            if text == "" or text and text.startswith("421"):
                connection.file.read()
                connection.line()
            if not text or text.startswith("421"):
                raise ConnectionError
            return text

        connection.messages, chunks, sender, accepted = [], [], False, False
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        answer("greeting")
        while line := connection.line():
            verb = line.partition(" ")[0].upper()
            if verb == "BDAT":
                size = int(line.split()[1])
                chunks.append(connection.file.read(size))
                if len(chunks[-1]) < size:
                    return
                step = ("end" if line.endswith("LAST") else "BDAT") if accepted else "nobody"
                if step == "end":
                    connection.messages.append(b"".join(chunks))
                accepted = answer(step, line).startswith("2") and step == "BDAT"
                continue
            text = answer(verb, line)
            if verb == "MAIL":
                sender, accepted = text.startswith("2"), False
                chunks.clear()
            elif verb == "RCPT":
                accepted = accepted or sender and text.startswith("2")
            elif verb == "DATA" and text.startswith("354"):
                connection.messages += filter(None, [connection.data()])
                answer("end")
            elif verb == "STARTTLS" and text.startswith("220") and tls:
                secure(connection, tls)

    return dialogue


def byte_by_byte(reply: str) -> Callable[[str, Any], str]:
    """An answer that never pauses, and takes twenty seconds, if the other side has so much patience."""

    def answer(_line: str, connection: Any) -> str:
        for byte in f"{reply[:3]}-{'x' * 400}\r\n".encode():
            connection.sock.sendall(bytes([byte]))
            time.sleep(0.05)
        return reply

    return answer


def of_lines(number: int, reply: str) -> str:
    return f"{reply[:3]}-more\n" * (number - 1) + reply


def secure(connection: Any, tls: ssl.SSLContext) -> None:
    connection.sock = tls.wrap_socket(connection.sock, server_side=True)
    connection.file = connection.sock.makefile("rb")


def smtp_send(server: Any, *recipients: str, message: bytes = MESSAGE, **options: Any) -> dict[str, Reply]:
    return server.mailer(**options).send("a@x.org", recipients or ["b@x.org"], message)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


def server_tls(authority: trustme.CA, identity: str = "127.0.0.1", **validity: Any) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(identity, **validity).configure_cert(context)
    return context


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def tls_dialogue(tls: ssl.SSLContext, implicit: bool = False, **answers: Any) -> Callable[[Any], None]:
    """STARTTLS is offered, and AUTH only under TLS; or, if *implicit*, all is under TLS."""
    def dialogue(connection: Any) -> None:
        if implicit:
            secure(connection, tls)
        answering(tls=tls, **{"EHLO": ehlo, **answers})(connection)

    def ehlo(_line: str, connection: Any) -> str:
        return f"250-scripted\n250 {'AUTH PLAIN' if isinstance(connection.sock, ssl.SSLSocket) else 'STARTTLS'}"

    return dialogue


LONG_AGO = {"not_before": datetime.datetime(2001, 1, 1), "not_after": datetime.datetime(2002, 1, 1)}


def verbs(connection: Any) -> list[str]:
    return [line.partition(" ")[0].upper() for line in connection.lines if line]


class Sink:
    """A relay that keeps account of what it took for whom; while `gate` is clear, it does not say so.

    It defers recipients called `deferred…` and refuses those called `refused…`.
    """

    def __init__(self) -> None:
        self.taken: list[tuple[str, bytes]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.server = Scripted(answering(*CHUNKING, RCPT=self._recipient, end=self._end))
        self.host, self.port = self.server.host, self.server.port

    def mailer(self) -> SMTPMailer:
        return self.server.mailer(timeout=30)

    def _recipient(self, line: str, _connection: Any) -> str:
        return {"deferr": "450 4.2.1 busy", "refuse": "550 5.1.1 unknown"}.get(line[9:15], USUAL["RCPT"])

    def _end(self, _line: str, connection: Any) -> str:
        envelope = " ".join(connection.lines).rpartition("MAIL FROM")[2]
        accepted = re.findall(r"RCPT TO:<(?!deferr|refuse)(.*?)>", envelope)
        self.taken += [(address, connection.messages[-1]) for address in accepted]
        self.gate.wait(60)
        return USUAL["end"]

    def recipients(self) -> list[str]:
        return sorted(address for address, _ in self.taken)


@pytest.fixture
def sink() -> Iterator[Sink]:
    server = Sink()
    yield server
    server.gate.set()
    server.server.close()


def brief(value: Any) -> str:
    return repr(value)[:60]


COUNTS = {"sent": (1, 0, 0, 0), "deferred": (0, 1, 0, 1), "failed": (0, 0, 1, 0), "outage": (0, 0, 0, 1)}


def giving(what):
    """A mailer that returns or raises *what*."""

    def give(_recipients):
        if isinstance(what, BaseException):
            raise what
        return what

    return calling(give)


# ---------------------------------------------------------------------- fakes and fixtures: processes, under strace too


def python_command(code: str, *arguments: Any, module: Any = MODULE, options: Any = ()) -> list[Any]:
    """The command that runs *code* in a process of its own, with *module* at hand."""
    path = f"import sys; sys.path.insert(0, {str(module.parent)!r})\n"
    return [sys.executable, *options, "-c", path + code, *map(str, arguments)]


def to_relay(relay: Any) -> list[str]:
    return ["--hostname", relay.host, "--port", str(relay.port)]


def processor_command(queue: Maildir, relay: Any, *more: Any) -> list[Any]:
    return [sys.executable, MODULE, "--maildir", queue.path, *to_relay(relay), *more]


def command_line(*arguments: Any, stdin: bytes = b"", env: dict[str, str] | None = None, **options: Any) -> Any:
    """Run the command line in a process of its own, to its end."""
    return subprocess.run(
        [sys.executable, str(MODULE), *map(str, arguments)], input=stdin, capture_output=True, timeout=60,
        env={**os.environ, **(env or {})}, check=False, **options,
    )


def run_python(code: str, *arguments: Any, under: Any = (), **options: Any) -> str:
    """Run *code* in a process of its own, to a good end; return what it printed."""
    command = [*under, *python_command(code, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    return done.stdout


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call `main` here: exit status, standard output, standard error."""

    def call(*arguments: Any, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        return (sendmail.main([str(argument) for argument in arguments]), *capsys.readouterr())

    return call


@contextlib.contextmanager
def running(processor: QueueProcessorThread) -> Iterator[list[Any]]:
    """Let the thread run for the block; the counts of its passes are in the list."""
    passes: list[Any] = []
    make_pass = processor._pass
    processor._pass = lambda *how: (passes.append(make_pass(*how)), passes[-1])[1]  # type: ignore[method-assign]
    processor.start()
    try:
        yield passes
    finally:
        processor.stop()
        processor.join(20)
    assert not processor.is_alive()


def forked(work: Callable[[], Any]) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def disk_error(*_arguments: Any) -> Any:
    """In place of a system call."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture
def background() -> Iterator[Callable[..., Any]]:
    """Start processes that are ended, if need be, with the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*command: Any, **options: Any) -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen([str(part) for part in command], **options))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait(20)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                pipe.close()


FORK_SERVER = """
import ctypes, json, logging, os, signal, sys, time
import sendmail, transaction

def tell(text):
    os.writev(account, [text.replace("\\n", "<LF>").encode() + b"\\n"])

class Tell(logging.Handler):
    def emit(self, record):
        tell(f"log {record.levelname} {record.getMessage()}{' TRACEBACK' if record.exc_info else ''}")

logging.getLogger("sendmail").addHandler(Tell())
sendmail.subscribe(lambda event: tell(f"{type(event).__name__} {' '.join(event.toaddrs)}"))
for line in sys.stdin:
    job = json.loads(line)
    child = 0 if job.get("warm_up") else os.fork()
    if child:
        os.waitpid(child, os.WUNTRACED)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    account = os.open(job["account"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    if "warm_up" not in job:
        ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1))  # PR_SET_PTRACER, any: for kernels with Yama
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        exec(job["code"], {**globals(), **job["names"]})
    except BaseException as error:
        tell(f"raised {type(error).__name__}: {error}")
    if "warm_up" not in job:
        os.getppid()  # marks the end in a trace
        os._exit(0)
    print("ready", flush=True)
"""


@dataclasses.dataclass
class Run:
    """What a process under strace told, how it ended, and its calls up to the marker."""

    told: list[str]
    status: int
    calls: list[tuple[str, str]]

    def count(self) -> collections.Counter[str]:
        return collections.Counter(name for name, _ in self.calls)

    def find(self, call: str, text: str = "", start: int = 0) -> int:
        """The index of the first such call from *start* on."""
        return next(i for i, c in enumerate(self.calls) if i >= start and c[0] == call and text in c[1])


class Bench:
    """Forks processes, each under strace from its first call on, from one that has imported everything; and a sink."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        directory.mkdir()
        self.sink = Sink()
        self.server: Any = subprocess.Popen(
            python_command(FORK_SERVER), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=(directory / "stderr").open("w"))
        Maildir(directory / "warm-up").add("app@x.org", ["warm@x.org", "refused@x.org"], MESSAGE)
        self._job(PASS, directory / "warm-up", warm_up=True)
        assert self.server.stdout.readline() == "ready\n"

    def _job(self, code: str, root: pathlib.Path, **more: Any) -> None:
        names = {"path": str(root), "port": self.sink.port, "message": MESSAGE.decode(), **more.pop("names", {})}
        self.account = root.with_name(root.name + ".account")
        job = {"code": code, "account": str(self.account), "names": names, **more}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()

    def run(self, code: str, root: pathlib.Path, *options: str, **names: Any) -> Run:
        self._job(code, root, names=names)
        pid = int(self.server.stdout.readline())
        trace = root.with_name(root.name + ".trace")
        command = ["strace", "-f", "-y", "-s", "200", "-o", str(trace), *options, "-p", str(pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as strace:
            assert strace.stderr and b"attached" in strace.stderr.readline()
            os.kill(pid, signal.SIGCONT)
            try:
                strace.wait(120)
            except subprocess.TimeoutExpired:
                os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"it does not end: {options}") from None
        status = int(self.server.stdout.readline())
        lines = [line.split(None, 1)[1] for line in trace.read_text(errors="replace").splitlines()]
        found = [m for line in lines if (m := re.match(r"(<\.\.\. )?(\w+)(?:\(| resumed>)(.*)", line))]
        calls = [(m[2] + " resumed" * bool(m[1]), m[3]) for m in found]
        marker = next((i for i, call in enumerate(calls) if call[0] == "getppid"), len(calls))
        return Run(self.account.read_text().splitlines(), status, calls[:marker])

    def close(self) -> None:
        self.server.terminate()
        self.server.communicate(timeout=20)
        self.sink.server.close()


class Benches:
    """Two of them, for two cores."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.free: SimpleQueue[Bench] = SimpleQueue()
        for number in range(2):
            self.free.put(Bench(directory / f"bench{number}"))

    @contextlib.contextmanager
    def one(self) -> Iterator[Bench]:
        bench = self.free.get()
        try:
            bench.sink.taken.clear()
            yield bench
        finally:
            self.free.put(bench)

    def sweep(self, experiment: Callable[..., Any], cases: list[Any]) -> list[Any]:
        def run(number: int, case: Any) -> Any:
            with self.one() as bench:
                root = bench.directory / f"{experiment.__name__}{number}"
                result = experiment(bench, root, *case)
                shutil.rmtree(root, ignore_errors=True)
                return result

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return list(pool.map(run, itertools.count(), cases))


@pytest.fixture(scope="module")
def benches() -> Iterator[Benches]:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        benches = Benches(pathlib.Path(directory))
        yield benches
        while not benches.free.empty():
            benches.free.get().close()


@pytest.fixture
def bench(benches: Benches) -> Iterator[Bench]:
    with benches.one() as bench:
        yield bench


ENQUEUE = """
try:
    delivery = sendmail.QueuedMailDelivery(sendmail.Maildir(path))
    for number in range(count):
        delivery.send("app@x.org", [f"plain{number}@x.org"], message)
    transaction.commit()
    tell("committed")
except Exception as error:
    transaction.abort()
    tell(f"raised {type(error).__name__}: {error}")
"""
PASS = """
processor = None
for _ in range(globals().get("passes", 1)):
    try:
        processor = processor or sendmail.QueueProcessorThread(
            path, sendmail.SMTPMailer("127.0.0.1", port, timeout=30))
        processor.process()
    except Exception as error:
        tell(f"raised {type(error).__name__}: {error}")
"""
QUIET = {"brk", "mmap", "munmap", "mprotect", "mremap", "madvise", "futex", "getpid", "gettid", "uname", "getrandom",
         "rt_sigreturn", "rt_sigprocmask", "rt_sigaction", "restart_syscall", "exit", "exit_group", "clone", "clone3"}


def mixed_queue(root: pathlib.Path) -> Maildir:
    """A plain message, one that has three fates, and the claim of a processor that died."""
    queue = Maildir(root)
    queue.add("app@x.org", ["plain@x.org"], MESSAGE)
    queue.add("app@x.org", ["sent@x.org", "deferred@x.org", "refused@x.org"], MESSAGE)
    names = state(queue)["new"]
    queue.add("app@x.org", ["dead@x.org"], MESSAGE)
    (dead,) = set(state(queue)["new"]) - set(names)
    os.rename(root / "new" / dead, root / "cur" / dead)
    return queue


# ------------------------------------------------------------------------- fakes and fixtures: deliveries, transactions


@pytest.fixture(params=["queued", "direct", "fallback"])
def kind(request):
    """Which delivery: `direct` has no queue, `fallback` is a direct one that has."""
    return request.param


@pytest.fixture
def delivery(kind, queue, relay):
    return make_delivery(kind, queue, relay.mailer())


def make_delivery(kind, queue, mailer, manager=None):
    if kind == "queued":
        return QueuedMailDelivery(queue, manager)
    return DirectMailDelivery(mailer, manager, fallback=queue if kind == "fallback" else None)


def a_message(subject):
    return b"Message-Id: <%s@example.com>\nDate: Tue, 24 Nov 2026 10:00:00 +0000\nSubject: %s\n\nHello.\n" % (
        (subject.encode(),) * 2)


def subjects(messages):
    """What identifies the messages that a relay has received, or that files hold."""
    return [re.search(rb"Subject: (\w+)", getattr(message, "content", message))[1].decode() for message in messages]


def delivered(queue, relay):
    """All that comes out, at once or by a pass of a processor, which must leave nothing behind."""
    QueueProcessorThread(queue, relay.mailer()).process()
    assert state(queue) == {}
    return subjects(relay.received)


class OtherManager:
    """Another data manager, which does *act* in one phase."""

    transaction_manager = transaction.manager

    def __init__(self, phase="", act=lambda: None, key="database"):
        self.phase, self.act, self.key, self.phases = phase, act, key, []

    def __getattr__(self, name):
        if name not in (*PHASES, "abort", "tpc_abort"):
            raise AttributeError(name)
        return lambda _transaction: (self.phases.append(name), self.act() if name == self.phase else None)

    def sortKey(self):
        return self.key


def fail_here():
    raise RuntimeError("broken")


# -------------------------------------------------------------------------------------- the classifier and the schedule


@pytest.mark.parametrize(("code", "text", "status"), [
    (250, "2.1.5 Ok", "2.1.5"), (250, "Ok", "2.0.0"), (251, "", "2.0.0"),
    (450, "4.2.1 mailbox busy", "4.2.1"), (421, "closing", "4.0.0"), (450, "5.1.1 contradicts itself", "4.0.0"),
    (550, "5.1.1 <b@x.org> unknown", "5.1.1"), (554, "5.7.999", "5.7.999"), (550, "no such user", "5.0.0"),
    (550, "4.2.1 contradicts itself", "5.0.0"), (550, "5.1.1.7 is no status", "5.0.0"), (550, "5.1.1-neither", "5.0.0"),
    (354, "2.0.0 no last word", "4.0.0"), *((code, "5.7.0 log in", "4.7.0") for code in (530, 534, 535, 538)),
])
def test_the_status_of_a_reply_is_the_enhanced_one_or_else_the_general_one_of_its_code(code, text, status):
    assert Reply(code, text).status == status


@pytest.mark.parametrize(("does", "outcome", "status"), [
    (None, "sent", None),
    ({"b@x.org": Reply(250, "2.0.0 Ok")}, "sent", None),
    ({"b@x.org": Reply(450, "4.2.1 busy")}, "deferred", "4.2.1"),
    ({"b@x.org": Reply(421, "closing")}, "deferred", "4.0.0"),
    ({"b@x.org": Reply(550, "5.1.1 unknown")}, "failed", "5.1.1"),
    (smtplib.SMTPRecipientsRefused({"b@x.org": (450, b"4.2.1 busy")}), "deferred", "4.2.1"),
    (smtplib.SMTPRecipientsRefused({"b@x.org": (550, b"5.1.1 unknown")}), "failed", "5.1.1"),
    (smtplib.SMTPRecipientsRefused({"b@x.org": "550 what?"}), "deferred", None),
    (smtplib.SMTPRecipientsRefused(["b@x.org"]), "deferred", None),
    (smtplib.SMTPRecipientsRefused({"b@x.org": (530, b"5.7.0 log in")}), "deferred", "4.7.0"),
    (smtplib.SMTPRecipientsRefused({"b@x.org": (421, b"4.3.2 closing")}), "deferred", "4.3.2"),
    (smtplib.SMTPSenderRefused(451, b"4.3.0 later", "a@x.org"), "deferred", "4.3.0"),
    (smtplib.SMTPSenderRefused(553, b"5.1.8 unknown", "a@x.org"), "failed", "5.1.8"),
    (smtplib.SMTPSenderRefused(421, b"4.3.2 closing", "a@x.org"), "deferred", "4.3.2"),
    (smtplib.SMTPDataError(452, b"4.3.1 full"), "deferred", "4.3.1"),
    (smtplib.SMTPDataError(554, b"5.7.1 spam"), "failed", "5.7.1"),
    (smtplib.SMTPDataError(421, b"4.3.2 closing"), "deferred", "4.3.2"),
    *((error, "deferred", "4.7.0") for code in (530, 534, 535, 538) for error in (
        smtplib.SMTPSenderRefused(code, b"5.7.0 log in", "a@x.org"), smtplib.SMTPDataError(code, b"5.7.0 log in"))),
    (smtplib.SMTPResponseException(554, b"5.6.0 no"), "failed", "5.6.0"),
    *((error, "deferred", None) for error in (  # no success, whatever its code, for it was raised
        smtplib.SMTPDataError(250, b"2.0.0 Ok"), smtplib.SMTPSenderRefused(252, b"2.5.2 perhaps", "a@x.org"),
        smtplib.SMTPRecipientsRefused({"b@x.org": (252, b"2.5.2 perhaps")}), smtplib.SMTPResponseException(-1, b""))),
    (smtplib.SMTPConnectError(554, b"5.3.2 no service"), "outage", None),
    (smtplib.SMTPHeloError(550, b"5.7.1 who are you"), "outage", None),
    (smtplib.SMTPAuthenticationError(535, b"5.7.8 no"), "outage", None),
    (RelayUnavailable("so it says"), "outage", None),
    (ConnectionRefusedError(111, "Connection refused"), "outage", None),
    (socket.gaierror(-2, "Name or service not known"), "outage", None),
    (smtplib.SMTPServerDisconnected("gone"), "deferred", None),
    (smtplib.SMTPNotSupportedError("SMTPUTF8"), "deferred", None),
    (ConnectionResetError(104, "reset"), "deferred", None),
    (TimeoutError("timed out"), "deferred", None),
    (ssl.SSLError("bad record"), "deferred", None),
    (ValueError("a bug\nin the mailer"), "deferred", None),
], ids=brief)
def test_whatever_a_mailer_returns_or_raises_is_one_of_four_outcomes(queue, events, does, outcome, status):
    queue.add("a@x.org", ["b@x.org"], MESSAGE)
    before = state(queue)
    counts = QueueProcessorThread(queue, giving(does)).process()
    assert (counts.sent, counts.deferred, counts.failed, counts.left) == COUNTS[outcome]
    kinds = {"sent": [MailSentEvent], "deferred": [MailDeferredEvent], "failed": [MailErrorEvent], "outage": []}
    assert [type(event) for event in events] == kinds[outcome]
    assert (state(queue) == before) == (outcome == "outage")
    if status:
        assert events[0].delivery_status == status
        assert events[0].error_message.isprintable()


@pytest.mark.parametrize("answer", [
    "queued as 4F1", 1, ["ann@x.org"], object(), {"ann@x.org": "250 ok"}, {"ann@x.org": (250,)}, {"ann@x.org": None},
    {"ann@x.org": ("what", "ok")}, {"bob@x.org": object(), "ann@x.org": Reply(250, "2.0.0 Ok")}], ids=brief)
def test_a_mailer_that_returns_what_nobody_understands_has_sent_and_once(queue, events, caplog, answer):
    queue.add("app@x.org", ["ann@x.org", "bob@x.org"], MESSAGE)
    processor = QueueProcessorThread(queue, giving(answer))
    assert [processor.process().sent for _ in range(2)] == [1, 0] and state(queue) == {}
    assert [(type(event), event.toaddrs) for event in events] == [(MailSentEvent, ("ann@x.org", "bob@x.org"))]
    assert [record.levelname for record in caplog.records if record.levelno >= logging.WARNING] == ["ERROR"]


@pytest.mark.parametrize("does", [
    {"b@x.org": Reply(250, "2.0.0 Ok"), "c@x.org": Reply(450, "4.2.1 busy"), "d@x.org": Reply(550, "5.1.1 unknown")},
    {"c@x.org": (450, b"4.2.1 busy"), "d@x.org": (550, b"5.1.1 unknown")},
    {"b@x.org": "unintelligible", "c@x.org": Reply(450, "4.2.1 busy"), "d@x.org": Reply(550, "5.1.1 unknown")},
], ids=["replies", "as smtplib's sendmail", "one that is none"])
def test_guarantee_1_every_recipient_has_its_own_fate_and_stands_in_a_file_until_it_is_sent(kind, queue, events, does):
    recipients = ["b@x.org", "c@x.org", "d@x.org"]
    if kind == "queued":
        queue.add("app@x.org", recipients, MESSAGE)
        assert standing_recipients(queue) == {"new": recipients}
        counts = one_pass(queue, giving(does))
        assert (counts.sent, counts.deferred, counts.failed, counts.left) == (1, 1, 1, 1)
    else:
        make_delivery(kind, queue, giving(does)).send("app@x.org", recipients, MESSAGE)
        transaction.commit()
    later = MailErrorEvent if kind == "direct" else MailDeferredEvent
    assert {(type(event), event.toaddrs) for event in events} == {
        (MailSentEvent, ("b@x.org",)), (later, ("c@x.org",)), (MailErrorEvent, ("d@x.org",))}
    if kind != "direct":
        assert standing_recipients(queue) == {"deferred": ["c@x.org"], ".failed/new": ["d@x.org"]}


@pytest.mark.parametrize(("age", "delay"), [
    (-DAY, 60), (0, 60), (60, 60), (61, 61), (3599, 3599), (3601, 3600), (4 * DAY, 3600),
])
def test_the_next_try_is_as_far_away_as_the_message_is_old(age, delay, queue, relay, events):
    relay.data_reply = "450 4.2.1 busy"
    now = int(time.time())
    name = f"{now - age}.M000000P1Q1.host"
    put(queue, f"new/{name}")
    assert one_pass(queue, relay, now).deferred == 1
    assert state(queue) == {"deferred": [f"{now + delay}.{name}"]}
    assert events[0].retry_at == now + delay


def test_state_new_is_due_at_once_in_order_of_arrival_also_where_version_1_named_a_time(queue, relay):
    now = int(time.time())
    for second, due in ((3, ""), (1, f",due={now + 3000}"), (2, "")):
        put(queue, f"new/{now - 9 + second}.M000000P1Q1.host{due}", f"{second}@x.org")
    assert one_pass(queue, relay).sent == 3
    assert [message.recipients for message in relay.received] == [["1@x.org"], ["2@x.org"], ["3@x.org"]]


@pytest.mark.parametrize(("name", "ahead", "sent"), [
    *(("{:010d}." + NAME, ahead, sent) for ahead, sent in (
        (-DAY, 1), (-1, 1), (0, 1), (1, 0), (3599, 0), (3700, 1), (DAY, 1))),
    *((name, 600, 1) for name in ("message", "x" + NAME, "1{:010d}." + NAME, "{:010d}x" + NAME)),
])
def test_state_deferred_lasts_until_the_time_its_name_begins_with_if_that_can_be_right(name, ahead, sent, queue, relay):
    now = int(time.time())
    put(queue, "deferred/" + name.format(now + ahead))
    counts = one_pass(queue, relay, now)
    assert (counts.sent, counts.left) == (sent, 1 - sent)


def test_state_deferred_adds_a_time_to_any_name_and_a_claim_takes_it_off(queue, events, caplog):
    now, claimed = int(time.time()), []

    def refuse(recipients):
        claimed.extend(state(queue)["cur"])
        return dict.fromkeys(recipients, Reply(450, "4.2.1 busy"))

    names = [f"{now}.M000001P1Q1.host", f"{NAME},due={now + 60}",  # as version 1.0 left it
             "message", "msg.1.example.com", "12a.x", ",due=1", "9" * 40 + ".x"]  # as others name it
    for name in names:
        put(queue, f"new/{name}", message=b"Message-Id: <%s>\n" % name.encode() + MESSAGE)
    processor = QueueProcessorThread(queue, calling(refuse), max_age=10**9)
    for hours in range(3):
        processor._clock = lambda later=now + 3601 * hours: float(later)
        assert processor.process().deferred == len(names)
        due = {event.message_id: int(event.retry_at) for event in events}
        assert state(queue) == {"deferred": sorted(f"{due[name]}.{name}" for name in names)}
    assert sorted(claimed) == sorted(names * 3) and caplog.records == []


@pytest.mark.parametrize(("how", "limit"), [
    ("", 5 * DAY), ("max_age", 3600), ("--max-age 1", DAY), ("--verbose", 5 * DAY)])
@pytest.mark.parametrize(("margin", "place"), [(-30, "deferred"), (30, ".failed/new")])
def test_a_reply_that_would_defer_gives_up_what_is_older_than_max_age(how, limit, margin, place, run, queue, relay):
    relay.refusals = {BOB: "450 4.2.1 busy"}
    put(queue, f"new/{int(time.time()) - limit - margin}.M000000P1Q1.host", ANN, BOB)
    if how.startswith("--"):
        assert run("--maildir", queue.path, *to_relay(relay), *how.split())[0] == 0
    else:
        counts = one_pass(queue, relay, **{how: limit} if how else {})
        assert (counts.sent, counts.deferred, counts.failed) == (1, margin < 0, margin > 0)
    assert list(state(queue)) == [place] and relay.received[0].recipients == [ANN]
    assert b"X-Zope-To: bob@example.com\nX-Sendmail-Error: 4.2.1 450 4.2.1 busy\n" in content(queue)[0]


def test_an_age_that_the_times_of_the_file_contradict_is_no_reason_to_give_up(queue, relay):
    relay.data_reply = "450 4.2.1 busy"
    put(queue, "new/100.M1P1Q1.board")  # its clock stood at 1970
    assert one_pass(queue, relay).deferred == 1


# --------------------------------------------------------------------------------------------------------------- events


@pytest.mark.parametrize("event", [
    MailSentEvent("id", SENDER, (ANN,), "250 2.0.0 Ok"),
    MailErrorEvent("id", SENDER, (ANN,), "550 5.1.1 no", "5.1.1"),
    MailDeferredEvent("id", SENDER, (ANN,), "450 4.2.1 busy", "4.2.1", 1.5),
], ids=lambda event: type(event).__name__)
def test_events_are_values_that_nobody_can_change(event):
    assert isinstance(event, MailEvent)
    assert (event.message_id, event.fromaddr, event.toaddrs) == ("id", SENDER, (ANN,))
    assert event == dataclasses.replace(event) and hash(event) == hash(dataclasses.replace(event))
    for field in dataclasses.fields(event):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(event, field.name, None)


def test_every_handler_gets_every_event_in_the_order_of_subscription_until_it_is_unsubscribed():
    got = []

    @sendmail.subscribe
    def first(event):
        got.append(("first", event))
        sendmail.unsubscribe(first)  # in the middle of a round: the others get theirs

    assert sendmail.subscribe(second := lambda event: got.append(("second", event))) is second
    sendmail.notify("one")
    sendmail.notify("two")
    assert got == [("first", "one"), ("second", "one"), ("second", "two")]
    sendmail.unsubscribe(second)
    sendmail.notify("three")
    assert len(got) == 3
    with pytest.raises(ValueError):
        sendmail.unsubscribe(second)


def test_an_interrupt_is_no_mistake_of_a_handler():
    sendmail.subscribe(lambda _event: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        sendmail.notify("one")


def test_what_a_handler_forks_may_exit(queue, relay):
    @sendmail.subscribe
    def fork(_event):
        if os.fork() == 0:
            sys.exit(0)
        os.wait()

    for _ in range(2):
        queue.add(SENDER, ANN, MESSAGE)
    forked(lambda: os._exit(one_pass(queue, relay).sent - 2))  # the child goes no further


def provoke(origin, queue, relay):
    """Send a message in such a way that one event follows."""
    if origin == "processor":
        queue.add(SENDER, ANN, a_message("cause"))
        QueueProcessorThread(queue, relay.mailer()).process()
    else:
        manager = transaction.TransactionManager(explicit=True) if origin == "explicit" else transaction.manager
        delivery = make_delivery("fallback" if origin == "fallback" else "direct", queue, relay.mailer(), manager)
        with manager:
            delivery.send(SENDER, ANN, a_message("cause"))
        if origin == "explicit":
            with pytest.raises(NoTransaction):
                manager.get()


CONDUCTS = {  # what a handler does, and what befalls the work that it had begun, at first
    "nothing more": (lambda: None, PHASES),
    "raises": (fail_here, ["abort"]),
    "exits": (sys.exit, ["abort"]),
    "aborts": (lambda: transaction.abort(), ["abort"]),
    "begins": (lambda: transaction.begin(), ["abort"]),
    "commits": (lambda: transaction.commit(), PHASES),
    "dooms": (lambda: transaction.doom(), ["abort"]),
    "joins one that fails in its vote": (
        lambda: transaction.get().join(OtherManager("tpc_vote", fail_here)), PHASES[:3]),
    "joins one that fails in its finish": (
        lambda: transaction.get().join(OtherManager("tpc_finish", fail_here)), PHASES),
    "adds a hook that fails": (
        lambda: transaction.get().addAfterCommitHook(lambda _committed: fail_here()), PHASES),
    "makes the manager explicit": (lambda: setattr(transaction.manager, "explicit", True), PHASES),
}


@pytest.mark.parametrize("origin", ["direct", "explicit", "fallback", "processor"])
@pytest.mark.parametrize("conduct", CONDUCTS)
def test_each_handler_has_a_new_transaction_and_whatever_it_does_hurts_nobody_else(conduct, origin, queue, relay):
    works, seen, (act, phases) = [OtherManager(), OtherManager()], [], CONDUCTS[conduct]

    def handle(event, work, act):
        seen.append((event, transaction.get(), transaction.get().status))
        transaction.get().join(work)
        act()

    sendmail.subscribe(lambda event: handle(event, works[0], act))
    sendmail.subscribe(lambda event: handle(event, works[1], lambda: None))
    transaction.manager.explicit = origin == "fallback"  # an explicit default manager is no obstacle
    managers = transaction.manager.manager, transaction.manager.explicit
    provoke(origin, queue, relay)
    assert [(type(event), event.toaddrs) for event, _, _ in seen] == [(MailSentEvent, (ANN,))] * 2
    assert (works[0].phases[: len(phases)], works[1].phases) == (phases, PHASES)
    assert (transaction.manager.manager, transaction.manager.explicit) == managers
    after = OtherManager()
    transaction.begin().join(after)
    assert len({id(its) for its in (transaction.get(), *(its for _, its, _ in seen))}) == 3
    assert {status for _, _, status in seen} == {transaction.get().status}
    transaction.commit()
    assert after.phases == PHASES
    assert delivered(queue, relay) == ["cause"]


@pytest.mark.parametrize("origin", ["direct", "explicit", "fallback", "processor"])
def test_a_handler_may_send_mail_itself(delivery, origin, queue, relay):
    happened = []

    @sendmail.subscribe
    def answer(event):
        happened.append(event.message_id)
        if event.message_id == "cause@example.com":
            delivery.send(SENDER, BOB, a_message("effect"))

    provoke(origin, queue, relay)
    assert delivered(queue, relay) == ["cause", "effect"]
    assert happened == ["cause@example.com", "effect@example.com"]


@pytest.mark.parametrize("origin", ["fallback", "processor"])
@pytest.mark.parametrize("reply, place", [
    ("", []), ("450 4.2.1 busy", ["deferred"]), ("550 5.1.1 no", [".failed/new"])])
def test_an_event_follows_the_rename_or_unlink_that_it_tells_of(reply, place, origin, queue, relay):
    places = []
    sendmail.subscribe(lambda event: places.append(list(state(queue))))
    relay.refusals = {ANN: reply} if reply else {}
    provoke(origin, queue, relay)
    assert places == [place]


@pytest.mark.parametrize("kind", ["direct", "fallback"])
def test_no_handler_runs_before_every_data_manager_is_finished(delivery):
    last = OtherManager(key="~~~~")
    seen = []
    sendmail.subscribe(lambda _event: seen.append((list(last.phases), transaction.get() is committing)))
    committing = transaction.begin()
    committing.join(last)
    delivery.send(SENDER, ANN, MESSAGE)
    transaction.commit()
    assert seen == [(PHASES, False)]


# -------------------------------------------------------------------------------------- the envelope, hostile addresses


def as_of_repoze(sender, recipients, message=MESSAGE):
    """A file of repoze.sendmail's: the envelope stands, encoded and folded, behind the headers of the message."""
    headers, _, body = message.partition(b"\n\n")
    envelope = [email.header.Header(text, "utf-8").encode() for text in (sender, ",".join(recipients))]
    return headers + "\nX-Actually-From: {}\nX-Actually-To: {}\n\n".format(*envelope).encode() + body


@pytest.mark.parametrize("message", [
    MESSAGE, MESSAGE.replace(b"\n", b"\r\n"), MESSAGE + b"\0\xff\r\n.\n\r", MESSAGE[:-1], MESSAGE.decode() + "Grüße\n",
    b"X-Sendmail-Error: mine\n" + MESSAGE, as_of_repoze("eve@x.org", ["eve@x.org"]),
])
def test_a_complete_message_is_queued_byte_for_byte_and_text_as_utf_8(queue, message):
    seen = []
    assert queue.add(SENDER, ANN, message) == "m1@example.com"
    one_pass(queue, types.SimpleNamespace(send=lambda *arguments: seen.append(arguments)))
    assert seen == [(SENDER, (ANN,), message if isinstance(message, bytes) else message.encode())]


def test_the_parts_of_a_message_object_are_not_changed_either(queue: Maildir) -> None:
    inner, outer = email.message.MIMEPart(), email.message.EmailMessage()
    inner.make_mixed()
    outer.make_mixed()
    outer.attach(inner)
    queue.add("app@x.org", ["ann@x.org"], outer)
    assert inner.get_boundary() is outer.get_boundary() is None
    assert queued(queue)[2].count(b"boundary=") == 2


def test_a_message_object_for_a_non_ascii_local_part_is_written_in_utf_8_without_any_bcc(queue: Maildir) -> None:
    message = email.message.EmailMessage()
    for name in ("To", "Bcc", "Resent-Bcc", "Cc"):
        message[name] = f"{name.lower()}-bär@x.org"
    queue.add("app@x.org", "bär@x.org", message)
    assert queued(queue)[2].endswith("\nTo: to-bär@x.org\nCc: cc-bär@x.org\n\n".encode())
    assert "Bcc" in message


@pytest.fixture(params=["add", "send"])
def hand_over(request, queue):
    """Queue a message, in one of the two ways."""

    def send(*arguments):
        with transaction.manager:
            return QueuedMailDelivery(queue).send(*arguments)

    return queue.add if request.param == "add" else send


@pytest.mark.parametrize("kind", [email.message.Message, email.message.EmailMessage])
def test_a_message_whose_as_bytes_takes_other_arguments_is_queued_all_the_same(hand_over, queue, kind):
    class LikeDjango(kind):
        def as_bytes(self, unixfrom=False, linesep="\n"):
            return kind.as_bytes(self, unixfrom)

    message = LikeDjango()
    for header in ("Subject: Hello", "Bcc: carl@example.com", "Message-Id: <m1@example.com>"):
        message.add_header(*header.split(": "))
    message.set_payload("Hello, Ann.\nFrom here to there.\n.\n")
    before = message.as_bytes()
    assert hand_over("Shop <app@example.com>", ANN, message) == "m1@example.com"
    assert message.as_bytes() == before
    sender, recipients, stored = queued(queue)
    assert (sender, recipients) == (SENDER, [ANN])
    assert stored.endswith(b"\nSubject: Hello\nMessage-Id: <m1@example.com>\n\nHello, Ann.\nFrom here to there.\n.\n")


ID_LINE = r"Message-Id: <[^<>@\s]+@[^<>@\s]+>\r?\n"
DATE_LINE = r"Date: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d [+-]\d{4}\r?\n"


@pytest.mark.parametrize(("given", "stored"), [
    ("Subject: x\n\nHi\n", f"{ID_LINE}{DATE_LINE}Subject: x\n\nHi\n"),
    ("Subject: x\r\n\r\nHi\n", f"{ID_LINE}{DATE_LINE}Subject: x\r\n\r\nHi\n"),
    ("Hi there\n", f"{ID_LINE}{DATE_LINE}\nHi there\n"),
    ("no header: at all\n", f"{ID_LINE}{DATE_LINE}\nno header: at all\n"),  # for the space (RFC 5322, 2.2)
    ("\nDate: in the body\n", f"{ID_LINE}{DATE_LINE}\nDate: in the body\n"),
    ("", f"{ID_LINE}{DATE_LINE}\n"),
    ("date: then\nSubject: x\n\n", f"{ID_LINE}date: then\nSubject: x\n\n"),
    ("Subject: x\nMESSAGE-ID:\n <a@b>\n\n", f"{DATE_LINE}Subject: x\nMESSAGE-ID:\n <a@b>\n\n"),
])
def test_message_id_and_date_are_added_where_they_are_missing(queue: Maildir, given: str, stored: str) -> None:
    message_id = queue.add("app@x.org", "ann@x.org", given)
    message = queued(queue)[2].decode()
    assert re.fullmatch(stored, message)
    assert f"<{message_id}>" in message


@pytest.mark.parametrize(("given", "address"), [
    *((given, ANN) for given in (
        "ann@example.com", "Ann <ann@example.com>", "<ann@example.com>", "ann@example.com (Ann, B)",
        "Änn <ann@example.com>", '"Doe, Ann <x@y>" <ann@example.com>', "=?utf-8?q?=C3=84=2C?= <ann@example.com>")),
    ("Ann <änn@bücher.example>", "änn@bücher.example"), ('Ann <"a b,<c>"@example.com>', '"a b,<c>"@example.com'),
    *((address, address) for address in (
        '"a b"@x.org', '"a,b"@x.org', r'"a\"<b>"@x.org', "bär@bücher.example", "a@[127.0.0.1]",
        enum.Enum("Address", {"ANN": "ann@x.org"}, type=str).ANN)),
])
def test_a_display_name_is_taken_and_the_address_comes_out_of_the_queue_as_it_went_in(hand_over, queue, given, address):
    seen = []
    hand_over(given, [given, BOB, address], MESSAGE)
    one_pass(queue, types.SimpleNamespace(send=lambda *arguments: seen.append(arguments)))
    assert seen == [(address, (address, BOB), MESSAGE)]


@pytest.mark.parametrize("given", [
    "ann", "@x.org", "ann@", "ann@x.org, bob@x.org", "<ann@x.org> <bob@x.org>", "ann@x.org bob@x.org", "a n@x.org",
    "ann@x@y.org", "friends: ann@x.org, bob@x.org;", "friends:;", "ann\n@x.org", "Ann\n <ann@x.org>",
    "Ann\r <ann@x.org>", "Ann <ann@x.org>\nBcc: eve@x.org", "ann@x.org\nX-Zope-To: eve@x.org", "ann\0@x.org",
    "ann\u2028@x.org", '"a\nb"@x.org', '"Ann <ann@x.org>', " ", "", "Ann", "Ann <ann>", "Ann <>",
    "Ann <ann@x.org> <bob@x.org>", "Ann <ann@x.org>, bob@x.org", "Doe, Ann <ann@x.org>", "Ann <ann@x.org",
    "Ann <ann b@x.org>", "Ann <@y.org:ann@x.org>",
])
def test_what_is_not_exactly_one_address_is_refused_at_once(hand_over, queue, given):
    for sender, recipients in (SENDER, [given]), (SENDER, [BOB, given]), (given or "no sender", [BOB]):
        with pytest.raises(ValueError, match="not one address"):
            hand_over(sender, recipients, MESSAGE)
    assert state(queue) == {}


@pytest.mark.parametrize("value", ["a@b", "<a@b", "<a b>", "<>", "<a@b> <c@d>", "<a@b\x1b[2J>", "<a<b>"])
def test_a_malformed_message_id_is_refused(queue: Maildir, value: str) -> None:
    with pytest.raises(ValueError, match="malformed Message-Id"):
        queue.add("app@x.org", "ann@x.org", f"Message-Id: {value}\n\n")
    assert state(queue) == {}


HOSTILE = ["\x1b[2J", "\r", "\x00", "\x85", "\u2028", "\u202e", "\x7f", "\x9b2J"]


@pytest.mark.parametrize("broken", [
    b"", b"\n", b"X-Zope-From: a@x.org\n", b"X-Zope-From: a@x.org\nX-Zope-To: \n\nbody", b"Subject: x\n\nbody\n",
    b"X-Zope-To: b@x.org\nX-Zope-From: a@x.org\n\nx", b"\xff\xfe\x00" * 1000,
    b"X-Zope-From: a\xff@x.org\nX-Zope-To: b@x.org\n\nx", b"X-Zope-From: a@x.org\nX-Zope-To: b@x.org, c\xe9@x.org\n\nx",
    b"X-Zope-From: a@x.org\nX-Zope-To: " + b"(" * 5000 + b"\n\nx",
    MESSAGE + as_of_repoze("eve@x.org", ["eve@x.org"]), b"X-Actually-From: eve@x.org\n" + MESSAGE,
    as_of_repoze(SENDER, [""]), as_of_repoze(SENDER, ["a b", ANN]),
    *(line.format(evil).encode() for evil in HOSTILE if not evil.isspace() for line in (
        "X-Zope-From: a{}b@x.org\nX-Zope-To: ann@x.org\n\nx", "X-Zope-From: a@x.org\nX-Zope-To: b@x, a{}b@x.org\n\nx")),
], ids=brief)
def test_a_file_without_a_readable_envelope_is_kept_in_failed(queue, relay, events, caplog, broken):
    pathlib.Path(queue.path, "new", "1.broken").write_bytes(broken)
    queue.add("app@x.org", ["ann@x.org"], MESSAGE)
    counts = one_pass(queue, relay)
    assert (counts.sent, counts.failed, counts.left) == (1, 1, 0)
    assert list(state(queue)) == [".failed/new"] and content(queue) == [broken]
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    assert [type(event) for event in events] == [MailErrorEvent, MailSentEvent]


@pytest.mark.parametrize("evil", HOSTILE, ids=ascii)
def test_what_comes_from_outside_breaks_no_line_of_the_log_envelope_or_list(queue, scripted, events, caplog, run, evil):
    forged = f"{evil}sent message-id=<forged@x.org>"
    codes = {"deferred": 450, "refused": 550}

    def reply(line, connection):  # as bytes: say() would make line ends of some of it
        code = next((code for kind, code in codes.items() if kind in line), 250)
        connection.sock.sendall(f"{code} {str(code)[0]}.1.1 {forged}\r\n".encode())
        return "-"

    def dialogue(connection):
        say, connection.say = connection.say, lambda text: text == "-" or say(text)
        answering(RCPT=reply, end=reply)(connection)

    message = f"Message-Id: <{evil}m1@x.org>\nSubject: =?utf-8?q?=1B[2J=9B?= {evil}\n\nHello.\n".encode()
    name = f"{int(time.time())}.{evil}".replace("\x00", "")
    put(queue, f"new/{name}.1", "ann@x.org", "deferred@x.org", "refused@x.org", message=message)
    pathlib.Path(queue.path, "new", f"{name}.2").write_bytes(b"no envelope")
    caplog.set_level(logging.DEBUG, "sendmail")
    one_pass(queue, scripted(dialogue))
    assert [record.getMessage() for record in caplog.records if not record.getMessage().isprintable()] == []
    assert {type(event) for event in events} == {MailSentEvent, MailDeferredEvent, MailErrorEvent}
    for event in events:
        texts = [*event.toaddrs, *vars(event).values()]
        assert all(text.isprintable() for text in texts if isinstance(text, str))
    assert sorted(state(queue)) == [".failed/new", "deferred"]
    for text in content(queue):
        if text != b"no envelope":
            head = text.decode().split("\n")
            assert [line.partition(":")[0] for line in head[:4]] == [
                "X-Zope-From", "X-Zope-To", "X-Sendmail-Error", "Message-Id"]
            assert all(line.isprintable() for line in head[:3])
            assert text.endswith(message)
    pathlib.Path(queue.path, "new", "1.x").write_bytes(f"X-Zope-From: {evil}a@x.org\nX-Zope-To: b@x.org\n\n".encode())
    for options in [], ["--json"]:
        status, output, errors = run("--maildir", queue.path, "--list", *options)
        assert (status, errors) == (0, "") and all(line.isprintable() for line in output.splitlines())


MANY = [f"recipient{number}@example.com" for number in range(50)]


@pytest.mark.parametrize(("fromaddr", "toaddrs", "sender", "recipients"), [
    (SENDER, [ANN], SENDER, [ANN]), ("", MANY, "", MANY),
    ("Shop <app@example.com>", ["Änn <ann@example.com>", '"Doe, Dora" <dora@example.com>', "fred@example.com"],
     SENDER, [ANN, "dora@example.com", "fred@example.com"]),
    ("jürgen@example.com", ["ö@example.com", ANN], "jürgen@example.com", ["ö@example.com", ANN]),
], ids=["one", "many", "fates", "utf-8"])
def test_queue_of_repoze_sendmail_is_listed_and_drained_to_each_once(run, queue, fromaddr, toaddrs, sender, recipients):
    repoze = pytest.importorskip("repoze.sendmail.delivery")
    mime = b'MIME-Version: 1.0\nContent-Type: text/plain; charset="us-ascii"\nContent-Transfer-Encoding: 7bit\n'
    message = mime + MESSAGE  # or else it would add that
    repoze.QueuedMailDelivery(queue.path).send(fromaddr, toaddrs, email.message_from_bytes(message))
    transaction.commit()
    assert content(queue) == [as_of_repoze(fromaddr, toaddrs, message)]
    relay = Relay(enable_SMTPUTF8=True)
    relay.refusals = {"dora@example.com": "450 4.2.1 try later", "fred@example.com": "550 5.1.1 no Fred here"}
    [listed] = listing(run, queue)
    assert [listed[key] for key in ("sender", "recipients", "subject", "error")] == [sender, recipients, "Hello", ""]
    assert run("--maildir", queue.path, *to_relay(relay))[0] == 0
    left = {entry["recipients"][0]: entry["state"] for entry in listing(run, queue)}
    fates = {"dora@example.com": "deferred", "fred@example.com": "failed"}
    assert left == {to: fate for to, fate in fates.items() if to in recipients}
    relay.refusals = {}
    for arguments in (["--requeue"], to_relay(relay)):
        assert run("--maildir", queue.path, *arguments) == (0, "", "")
    relay.close()
    assert {(received.sender.strip("<>"), received.content) for received in relay.received} == {(sender, crlf(message))}
    assert sorted(to for received in relay.received for to in received.recipients) == sorted(recipients)
    assert state(queue) == {}


# ------------------------------------------------------------------------------------- the mailers: replies on the wire

LOGIN = {"username": "ann", "password": "secret"}
LOGIN_WANTED = [f"{code} 5.7.0 log in first" for code in (530, 534, 535, 538)]
BROKEN = [None, "", "what?", "\xff\xfe\x00", "999 what?", "20 what?", "2" * 90000, "byte by byte", "of 1,001 lines"]
MODES = {  # what is offered, and a message for which that makes a difference
    "stepwise": ((), MESSAGE * 1000), "pipelined": (("PIPELINING",), MESSAGE * 1000),
    "one write": (CHUNKING, MESSAGE), "chunks": (CHUNKING, MESSAGE * 1000)}
each_mode = pytest.mark.parametrize("mode", MODES)


def in_mode(mode: str, **answers: Any) -> Callable[[Any], None]:
    """A dialogue of that mode; "go" stands for DATA, or for the first of several chunks."""
    names = {"go": "BDAT" if mode == "chunks" else "DATA"}
    return answering(*MODES[mode][0], **{names.get(verb, verb): answer for verb, answer in answers.items()})


def made_up(step: str, answer: Any) -> Any:
    usual = USUAL["DATA" if step == "go" else step]
    return {"byte by byte": byte_by_byte(usual), "of 1,001 lines": of_lines(1001, usual)}.get(answer, answer)


def patience(answer: Any) -> float:
    return 0.2 if answer in ("", "byte by byte") else 5


def bad_recipient(line: str, _connection: Any) -> str:
    return "550 5.1.1 unknown" if "bad@" in line else USUAL["RCPT"]


@pytest.mark.parametrize(("step", "answer"), [
    *((step, answer) for step in ("greeting", "EHLO", "STARTTLS", "AUTH") for answer in (*BROKEN, "421 4.3.2 closing")),
    ("greeting", "554 5.3.2 no service"), ("EHLO", "502 5.5.1 no"), ("EHLO", "550 5.7.1 who are you?"),
    ("EHLO", "250 Ok\n250 and again"), ("STARTTLS", "220 go on\nno TLS"),
    *(("AUTH", answer) for answer in LOGIN_WANTED), ("AUTH", "454 4.7.0 not now"), ("AUTH", "500 what?"),
    ("AUTH", "503 5.5.1 not enabled"), ("AUTH", "504 5.5.4 no such mechanism"),
], ids=brief)
def test_what_goes_wrong_before_mail_is_an_outage_after_one_try(queue, events, scripted, step, answer):
    offered = {"STARTTLS": ["STARTTLS"], "AUTH": ["AUTH LOGIN PLAIN CRAM-MD5"]}.get(step, [])
    server = scripted(answering(*offered, **{step: made_up(step, answer)}))
    queue.add("a@x.org", ["b@x.org"], MESSAGE)
    before = state(queue)
    login = {"no_tls": True, **LOGIN} if step == "AUTH" else {}
    counts = QueueProcessorThread(queue, server.mailer(timeout=patience(answer), **login)).process()
    assert (counts.sent, counts.deferred, counts.failed, counts.left) == COUNTS["outage"]
    assert (state(queue), events, type(counts.outage)) == (before, [], RelayUnavailable)
    assert [verbs(c).count("AUTH") for c in server.connections] == [int(step == "AUTH")]
    assert "MAIL" not in verbs(server.connections[0])


@pytest.mark.parametrize(("mode", "step", "answer", "status"), [(mode, *row) for mode in MODES for row in [
    ("MAIL", "550 5.7.1 not you", "5.7.1"), ("MAIL", "451 4.3.0 later", "4.3.0"),
    ("RCPT", "450 4.2.1 busy", "4.2.1"), ("RCPT", "550 no", "5.0.0"),
    ("RCPT", "550-5.1.1 no\n550-5.1.1 such\n550 5.1.1 user", "5.1.1"),
    ("go", "554 5.5.1 no", "5.5.1"), ("go", "451 4.3.0 later", "4.3.0"),
    ("end", "554 5.7.1 spam", "5.7.1"), ("end", "452 4.3.1 full", "4.3.1"),
    *((step, answer, status) for step in ("MAIL", "RCPT", "go", "end") for answers, status in (
        (["421 4.3.2 closing"], "4.3.2"), (LOGIN_WANTED, "4.7.0"), (BROKEN, "4.4.2")) for answer in answers),
] if mode != "one write" or row[0] != "go"], ids=brief)
def test_what_goes_wrong_from_mail_on_is_a_reply_to_that_message(scripted, monkeypatch, mode, step, answer, status):
    monkeypatch.setattr(sendmail, "_FINAL_REPLY_TIMEOUT", patience(answer))
    server = scripted(in_mode(mode, **{step: made_up(step, answer)}))
    replies = smtp_send(server, "b@x.org", "c@x.org", message=MODES[mode][1], timeout=patience(answer))
    assert {address: reply.status for address, reply in replies.items()} == {"b@x.org": status, "c@x.org": status}
    assert len(server.connections) == 1
    assert mode not in ("stepwise", "pipelined") or step != "end" or "RSET" not in verbs(server.connections[0])
    if step == "end" or mode in ("stepwise", "pipelined"):
        doubt = step == "end" and status == "4.4.2"
        assert all(("may have taken" in reply.text) == doubt for reply in replies.values())


def test_a_reply_may_have_a_thousand_lines(scripted, monkeypatch):
    monkeypatch.delattr(socket, "TCP_QUICKACK", raising=False)  # not every system has it
    answers = {verb: of_lines(1000, USUAL[verb]) for verb in ("greeting", "MAIL", "RCPT", "end")}
    assert smtp_send(scripted(answering(*CHUNKING, **answers)))["b@x.org"].code == 250


@pytest.mark.parametrize("mode", ["stepwise", "pipelined", "chunks"])
@pytest.mark.parametrize(("last_words", "status"), [
    ("421 4.3.2 closing", "4.3.2"), ("552 5.3.4 too big", "5.3.4"), (None, "4.4.2")])
def test_what_the_relay_said_before_a_write_failed_is_the_reason(scripted, mode, last_words, status):
    def cut_off(line, connection):
        if line == "DATA":
            connection.say("354 go on")
            connection.line()
        elif verbs(connection).count("BDAT") < 3:
            return USUAL["BDAT"]
        if last_words:
            connection.say(last_words)
        return None

    server = scripted(in_mode(mode, go=cut_off))  # and closes with most of the data unread, which resets the connection
    assert smtp_send(server, message=MESSAGE * 200_000)["b@x.org"].status == status
    assert len(server.connections) == 1


@pytest.mark.parametrize(("offered", "answers"), [
    (["PIPELINING"], {"DATA": "250 2.0.0 Ok"}), (CHUNKING, {"end": "354 go on"}), (CHUNKING, {"BDAT": "354 go on"}),
    *((CHUNKING, {verb: refusal, "nobody": answer}) for verb, refusal in (("MAIL", "550 5.7.1"), ("RCPT", "550 5.1.1"))
      for answer in ("250 2.0.0 Ok", "354 go on")),
    *((offered, {"RCPT": "550 5.1.1 unknown", "RSET": "502 5.5.1 what?"}) for offered in ((), CHUNKING)),
], ids=brief)
def test_an_answer_that_makes_no_sense_there_is_no_success_and_ends_the_connection(scripted, offered, answers):
    def at_first(verb):
        return lambda _, c: answers[verb] if c.number == 1 else USUAL.get(verb, "250 2.0.0 Ok")

    server = scripted(answering(*offered, **{verb: at_first(verb) for verb in answers}))
    with server.mailer() as mailer:
        reply = mailer.send("a@x.org", ["b@x.org"], MESSAGE * (1000 if "BDAT" in answers else 1))["b@x.org"]
        assert reply.code // 100 == (5 if answers.keys() & {"MAIL", "RCPT"} else 4)
        assert mailer.send("a@x.org", ["b@x.org"], MESSAGE)["b@x.org"].code == 250
    assert [verbs(connection).count("MAIL") for connection in server.connections] == [1, 1]


@each_mode
def test_partial_refusals_are_kept_apart_and_the_dialogue_stays_in_step(scripted, mode):
    answers = {"RCPT TO:<c@x.org>": "450-4.2.1 busy\n450 4.2.1 try later", "RCPT TO:<d@x.org>": "550 5.1.1 unknown"}
    server = scripted(in_mode(mode, RCPT=lambda line, _connection: answers.get(line, "250 2.1.5 Ok")))
    message = MODES[mode][1]
    with server.mailer() as mailer:
        for number in range(2):
            replies = mailer.send("a@x.org", ["b@x.org", "c@x.org", "d@x.org", "e@x.org"], message + b"%d" % number)
            assert [reply.code for reply in replies.values()] == [250, 450, 550, 250]
            assert replies["c@x.org"].text == "4.2.1 busy 4.2.1 try later"
    assert [c.messages for c in server.connections] == [[crlf(message + b"0"), crlf(message + b"1")]]


@pytest.mark.parametrize(("mode", "answers"), [(mode, answers) for mode in MODES for answers in [
    {"RCPT": "450 4.2.1 busy"},  # and DATA accepted for nobody
    {"RCPT": "450 4.2.1 busy", "end": "554 5.5.1 no valid recipients", "nobody": "554 5.5.1 no valid recipients"},
    {"RCPT": "450 4.2.1 busy", "DATA": "503 5.5.1 no recipients"},
    {"RCPT": "450 4.2.1 busy", "DATA": "554 5.5.1 no recipients"},
    {"MAIL": "450 4.2.1 busy"},
    {"MAIL": "450 4.2.1 busy", "RCPT": "503 5.5.1 no sender", "DATA": "503 5.5.1 no sender"},
]], ids=brief)
def test_a_message_that_nobody_may_have_is_not_sent_and_the_dialogue_stays_in_step(scripted, mode, answers):
    def at_first(verb):
        return lambda _, c: {**USUAL, **(answers if sum(x.startswith("MAIL") for x in c.lines) == 1 else {})}[verb]

    server = scripted(answering(*MODES[mode][0], **{verb: at_first(verb) for verb in answers}))
    with server.mailer() as mailer:
        refused = mailer.send("a@x.org", ["b@x.org", "c@x.org"], MODES[mode][1])
        accepted = mailer.send("a@x.org", ["b@x.org"], MESSAGE)
    assert [reply.status for reply in refused.values()] == ["4.2.1"] * 2
    assert accepted["b@x.org"].code == 250
    assert [connection.messages for connection in server.connections] == [[crlf(MESSAGE)]]
    said = verbs(server.connections[0])
    said = said[2 : said.index("MAIL", 2)]
    if mode == "one write":
        assert said == ["RCPT", "RCPT", "BDAT", "RSET"]
    assert mode != "chunks" or "BDAT" not in said


@pytest.mark.parametrize(("mode", "step", "how"), [
    (mode, step, how) for mode in MODES for step in ("MAIL", "RCPT", "go")
    for how in (None, "421 4.3.2 closing", *["452 4.5.3 too many messages"] * (step == "MAIL"))
    if step == "MAIL" or mode != "one write" and (step, mode) != ("go", "chunks")], ids=brief)
def test_a_kept_connection_that_was_dropped_meanwhile_is_reopened_once_and_silently(scripted, caplog, mode, step, how):
    drops, message = {1}, MODES[mode][1]

    def answer(_line, connection):
        usual = USUAL["DATA" if step == "go" else step]
        return how if connection.number in drops and server.connections[0].messages else usual

    server = scripted(in_mode(mode, **{step: answer}))
    with server.mailer() as mailer:
        assert mailer.send("a@x.org", ["b@x.org"], message)["b@x.org"].code == 250
        assert mailer.send("a@x.org", ["b@x.org"], message)["b@x.org"].code == 250
        assert [connection.messages for connection in server.connections] == [[crlf(message)]] * 2
        drops |= {2, 3}  # and if it happens to the new one, too, that is final
        assert mailer.send("a@x.org", ["b@x.org"], message)["b@x.org"].code // 100 == 4
    assert len(server.connections) == 3 and caplog.records == []


@pytest.mark.parametrize(("mode", "step", "how", "status"), [("one write", "RCPT", None, "4.4.2"), *(
    (mode, *row) for mode in MODES for row in [
        *((step, how, "4.4.2") for step in ("MAIL", "RCPT") for how in ("", "what?")),
        *(("end", how, "4.4.2") for how in (None, "", "what?")), ("end", "421 4.3.2 closing", "4.3.2"),
        ("MAIL", "550 5.7.1 not you", "5.7.1"), ("RCPT", "450 4.2.1 busy", "4.2.1")])], ids=brief)
def test_nothing_else_is_said_again(scripted, monkeypatch, mode, step, how, status):
    monkeypatch.setattr(sendmail, "_FINAL_REPLY_TIMEOUT", patience(how))
    server = scripted(in_mode(mode, **{step: lambda _, c: how if len(c.messages) > (step == "end") else USUAL[step]}))
    with server.mailer(timeout=patience(how)) as mailer:
        replies = [mailer.send("a@x.org", ["b@x.org"], MODES[mode][1])["b@x.org"] for _ in range(2)]
    assert ([reply.status for reply in replies], len(server.connections)) == (["2.0.0", status], 1)


def test_a_connection_that_was_dropped_and_cannot_be_had_again_is_an_outage(queue, events, scripted):
    server = scripted(answering(
        *CHUNKING, MAIL=lambda _, c: None if c.messages else USUAL["MAIL"],
        greeting=lambda _, c: USUAL["greeting"] if c.number == 1 else "421 4.7.0 too many connections"))
    for _ in range(2):
        queue.add("a@x.org", ["b@x.org"], MESSAGE)
    counts = QueueProcessorThread(queue, server.mailer()).process()
    assert (counts.sent, counts.deferred, counts.left, counts.outage is None) == (1, 0, 1, False)
    assert [type(event) for event in events] == [MailSentEvent] and state(queue).keys() == {"new"}


@pytest.mark.parametrize("reset", [False, True])
def test_a_kept_connection_that_ended_in_between_is_noticed_before_the_next_message(scripted, reset):
    def end(_line, connection):
        connection.say(USUAL["end"])
        if reset:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.file.close()
            connection.sock.close()

    server = scripted(answering(end=end))
    with server.mailer() as mailer:
        for _ in range(2):
            assert mailer.send("a@x.org", ["b@x.org"], MESSAGE)["b@x.org"].code == 250
            wait_until(lambda: server.connections[-1].sock.fileno() < 0)
    assert [verbs(connection).count("MAIL") for connection in server.connections] == [1, 1]


def test_a_dialogue_that_was_interrupted_is_not_continued(scripted):
    def end(_line, connection):
        if connection.number == len(connection.messages) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            connection.line()  # there is none, unless the dialogue goes on: with the reply to come
        return USUAL["end"]

    server = scripted(answering(end=end))
    with server.mailer() as mailer:
        with pytest.raises(KeyboardInterrupt):
            mailer.send("a@x.org", ["b@x.org"], MESSAGE)
        assert mailer.send("a@x.org", ["b@x.org"], MESSAGE)["b@x.org"].code == 250
    assert len(server.connections) == 2


@pytest.mark.parametrize("answers", [
    {"QUIT": None}, {"QUIT": ""}, {"QUIT": "500 what?"}, {"end": lambda _, c: c.say("250 2.0.0 Ok: queued")}],
    ids=["closed at QUIT", "silent at QUIT", "refused QUIT", "closed after the reply"])
def test_nothing_after_the_final_reply_can_undo_it(scripted, answers):
    server = scripted(answering(*CHUNKING, **answers))
    for kept in (contextlib.nullcontext(), mailer := server.mailer()):
        with kept:
            assert mailer.send("a@x.org", ["b@x.org"], MESSAGE) == {"b@x.org": Reply(250, "2.0.0 Ok: queued")}


@each_mode
def test_a_reply_too_many_is_not_taken_for_that_to_the_next_message(scripted, mode):
    server = scripted(in_mode(mode, RCPT=bad_recipient, end="250 2.0.0 queued\n250 2.0.0 and again"))
    with server.mailer() as mailer:
        for _ in range(3):
            replies = mailer.send("a@x.org", ["good@x.org", "bad@x.org"], MODES[mode][1])
            assert {address: reply.code for address, reply in replies.items()} == {"good@x.org": 250, "bad@x.org": 550}
    assert [len(connection.messages) for connection in server.connections] == [1, 1, 1]


@pytest.mark.parametrize(("answers", "statuses"), [
    ({"MAIL": lambda _line, connection: connection.say("550 5.7.1 not you")}, ["5.7.1", "5.7.1"]),
    ({"RCPT": bad_recipient, "end": None}, ["5.1.1", "4.4.2"])], ids=["MAIL", "RCPT"])
@each_mode
def test_what_was_refused_stays_so_if_the_relay_then_hangs_up(scripted, mode, answers, statuses):
    replies = smtp_send(scripted(in_mode(mode, **answers)), "bad@x.org", "b@x.org", message=MODES[mode][1])
    assert [reply.status for reply in replies.values()] == statuses


@pytest.mark.parametrize(("mode", "step"), [
    ("stepwise", "end"), ("one write", "end"), ("one write", "MAIL")])  # the last, as Postfix behind a virus scanner
def test_the_final_reply_and_those_that_wait_for_it_may_take_ten_minutes_whatever_the_timeout(scripted, mode, step):
    gone = []

    def late(_line, connection):
        gone.append(select.select([connection.sock], [], [], 1)[0])
        return USUAL[step]

    server = scripted(in_mode(mode, **{step: late}))
    assert smtp_send(server, message=MODES[mode][1], timeout=0.4)["b@x.org"].code == 250
    assert (gone, sendmail._FINAL_REPLY_TIMEOUT) == ([[]], 600)


def test_each_piece_of_the_data_has_the_whole_timeout(scripted):
    def slowly(_line, connection):
        connection.say("354 go on")
        tail = b""
        while not tail.endswith(b"\r\n.\r\n"):
            time.sleep(0.06)  # the slow line
            tail = tail[-5:] + connection.file.read1(2**19)
        return "250 2.0.0 Ok"

    server = scripted(answering(DATA=slowly))
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**19)
    assert smtp_send(server, message=(b"x" * 70 + b"\n") * 2**18, timeout=1)["b@x.org"].code == 250


@pytest.mark.parametrize("mode", ["pipelined", "one write"])
def test_a_group_of_a_hundred_cannot_deadlock_on_small_buffers(scripted, mode):
    server = scripted(in_mode(mode, RCPT="\n".join(["250-" + "x" * 500] * 3 + ["250 Ok"])))
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the kernel makes it its least
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    recipients = [f"{i:064}@{'x' * 180}.org" for i in range(100)]
    assert {reply.code for reply in smtp_send(server, *recipients).values()} == {250}
    assert len(server.connections) == 1


# ------------------------------------------------------------------------------- the mailers: which relay, what is said


@pytest.mark.parametrize("hostname", ["::1", "[::1]", "[::1]:{}"])
def test_the_mailer_speaks_to_an_ipv6_relay(hostname):
    with contextlib.closing(Relay("::1")) as relay:
        mailer = SMTPMailer(hostname.format(relay.port), relay.port if "{" not in hostname else 1)
        assert mailer.send("a@x.org", ["b@x.org"], MESSAGE)["b@x.org"].code == 250
        assert len(relay.received) == 1


def test_of_several_relays_the_first_that_is_ready_for_mail_is_taken(queue, scripted, relay, run, caplog):
    caplog.set_level(logging.DEBUG, "sendmail")
    busy = {"greeting": "421 4.3.2 too many connections"}
    usual = scripted(answering(greeting=lambda _line, _connection: busy.get("greeting", USUAL["greeting"])))
    mute = scripted(answering(EHLO="502 5.5.1 what?"))
    relays = [f"127.0.0.1:{usual.port}", f"127.0.0.1:{closed_port()}", f" 127.0.0.1:{mute.port}", "x" * 64, "127.0.0.1"]
    mailer = SMTPMailer(",".join(relays), str(relay.port))
    queue.add("a@x.org", ["b@x.org"], MESSAGE)
    assert QueueProcessorThread(queue, mailer).process().sent == 1 and len(relay.received) == 1
    assert f"relay=127.0.0.1:{relay.port}" in caplog.text
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and f"127.0.0.1:{relay.port}" in warnings[0]
    busy.clear()
    caplog.clear()
    queue.add("a@x.org", ["b@x.org"], MESSAGE)
    assert run("--maildir", queue.path, "--hostname", ", ".join(relays), "--port", relay.port)[::2] == (0, "")
    assert len(usual.connections[-1].messages) == 1 and len(relay.received) == 1
    with pytest.raises(RelayUnavailable, match=str(mute.port)):
        SMTPMailer(",".join(relays[1:4])).send("a@x.org", ["b@x.org"], MESSAGE)


@pytest.mark.parametrize("port", [465, 8080])
def test_a_port_that_says_nothing_is_asked_what_it_is(scripted, monkeypatch, port):
    server, connect = scripted(lambda connection: connection.line()), socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda address, *rest, **options: connect(
        (address[0], server.port if address[1] == port else address[1]), *rest, **options))
    with pytest.raises(RelayUnavailable, match="implicit.tls" if port == 465 else "SMTP"):
        SMTPMailer("127.0.0.1", port, timeout=0.2).send("a@x.org", ["b@x.org"], MESSAGE)


# ----------------------------------------------------------------------------------------------- the mailers: TLS, AUTH

REQUIRED = pytest.mark.parametrize("options", [
    {"force_tls": True}, {"implicit_tls": True}, LOGIN, {"implicit_tls": True, **LOGIN}], ids=lambda o: " ".join(o))


@REQUIRED
@pytest.mark.parametrize("fault", ["", "unknown authority", "wrong host name", "expired", "unknown to the system"])
def test_only_a_good_certificate_is_taken_where_tls_is_required(scripted, authority, options, fault):
    certificate = {"wrong host name": {"identity": "relay.example"}, "expired": LONG_AGO}.get(fault, {})
    trusted = {"unknown authority": trusting(trustme.CA()), "unknown to the system": None}
    server = scripted(tls_dialogue(server_tls(authority, **certificate), "implicit_tls" in options))
    refused = pytest.raises(RelayUnavailable, match="(?i)certificate(?s:.*)SSL_CERT_FILE")
    with refused if fault else contextlib.nullcontext():
        smtp_send(server, context=trusted.get(fault, trusting(authority)), **options)
    said = {verb for connection in server.connections for verb in verbs(connection)} & {"AUTH", "MAIL"}
    assert said == set() if fault else said == {"MAIL", *["AUTH"] * ("username" in options)}
    assert fault or isinstance(server.connections[0].sock, ssl.SSLSocket)


@pytest.mark.parametrize("certificate", [{}, {"identity": "relay.example"}, LONG_AGO], ids=["good", "host", "expired"])
def test_opportunistic_tls_takes_any_certificate(scripted, authority, certificate):
    server = scripted(tls_dialogue(server_tls(authority, **certificate)))
    assert smtp_send(server)["b@x.org"].code == 250
    assert verbs(server.connections[0])[:4] == ["EHLO", "STARTTLS", "EHLO", "MAIL"]


@pytest.mark.parametrize(("before", "after", "verb"), [
    ("", "PIPELINING CHUNKING", "BDAT"), ("PIPELINING CHUNKING", "", "DATA")])
def test_what_is_offered_under_tls_counts(scripted, authority, before, after, verb):
    def ehlo(_line: str, connection: Any) -> str:
        offered = after if isinstance(connection.sock, ssl.SSLSocket) else f"{before} STARTTLS"
        return "\n".join(f"250-{extension}" for extension in ["scripted", *offered.split()]) + "\n250 HELP"

    server = scripted(answering(tls=server_tls(authority), EHLO=ehlo))
    assert smtp_send(server)["b@x.org"].code == 250
    assert verb in verbs(server.connections[0])


@pytest.mark.parametrize(("dialogue", "otherwise"), [
    (answering("AUTH PLAIN LOGIN CRAM-MD5"), "it goes on"),
    (answering("STARTTLS", "AUTH PLAIN LOGIN CRAM-MD5", STARTTLS="454 4.7.0 not now"), "it goes on"),
    (answering("STARTTLS", "AUTH PLAIN LOGIN CRAM-MD5", STARTTLS="220 go on\nno TLS"), "an outage"),
    (answering("STARTTLS", "AUTH PLAIN LOGIN CRAM-MD5", STARTTLS="what?"), "an outage"),
], ids=["not offered", "refused", "handshake failed", "garbage"])
@pytest.mark.parametrize("options", [{"force_tls": True}, LOGIN, {"implicit_tls": True}], ids=lambda o: " ".join(o))
def test_where_tls_is_required_nothing_is_said_without_it(scripted, dialogue, otherwise, options):
    server = scripted(dialogue)
    with pytest.raises(RelayUnavailable):
        smtp_send(server, **options)
    assert not {"AUTH", "MAIL"} & set(verbs(server.connections[0]))
    assert not any("c2VjcmV0" in line or "secret" in line for line in server.connections[0].lines)
    if otherwise == "it goes on":
        assert smtp_send(server)["b@x.org"].code == 250 and len(server.connections) == 2


def test_what_comes_in_clear_after_the_reply_to_starttls_is_not_believed(scripted, authority):
    forged = "220 go on\n250-scripted\n250-PIPELINING\n250 SIZE 1"
    server = scripted(tls_dialogue(server_tls(authority), STARTTLS=forged))
    assert smtp_send(server, context=trusting(authority), force_tls=True)["b@x.org"].code == 250


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def plain(password: str) -> str:
    return f"AUTH PLAIN {b64(chr(0) + 'ann' + chr(0) + password)}"


def wanting(*passwords: str) -> Callable[[Any], None]:
    """The dialogue of a relay that takes a login with one of these passwords."""
    wanted = list(map(plain, passwords))
    return answering("AUTH PLAIN", AUTH=lambda line, _: USUAL["AUTH"] if line in wanted else "535 5.7.8 wrong")


CHALLENGE = "<1896.697170952@x.org>"
MECHANISMS = {
    "PLAIN": [plain("secret")],
    "LOGIN": [f"AUTH LOGIN {b64('ann')}", b64("secret")],
    "CRAM-MD5": ["AUTH CRAM-MD5", b64("ann " + hmac.new(b"secret", CHALLENGE.encode(), "md5").hexdigest())],
    "XOAUTH2": [f"AUTH XOAUTH2 {b64(chr(1).join(('user=ann', 'auth=Bearer secret', '', '')))}"],
}


def auth_dialogue(offered: str, verdict: str = "235 2.7.0 Ok", **answers: Any) -> Callable[[Any], None]:
    def auth(line: str, connection: Any) -> str:
        challenge = {"LOGIN": b64("Password:"), "CRAM-MD5": b64(CHALLENGE)}.get(line.split()[1])
        if challenge and verdict[0] == "2":
            connection.say(f"334 {challenge}")
            connection.line()
        return verdict

    return answering("STARTTLS", f"AUTH {offered}", AUTH=auth, **answers)


@pytest.mark.parametrize(("offered", "auth", "chosen"), [
    ("PLAIN", None, "PLAIN"), ("LOGIN", None, "LOGIN"), ("LOGIN PLAIN", None, "PLAIN"),
    ("LOGIN XOAUTH2 PLAIN CRAM-MD5 DIGEST-MD5", None, "CRAM-MD5"), ("login plain", None, "PLAIN"),
    *(("CRAM-MD5 PLAIN LOGIN XOAUTH2", name, name) for name in MECHANISMS),
    ("XOAUTH2 DIGEST-MD5", None, None), ("PLAIN LOGIN", "CRAM-MD5", None), ("PLAIN", "XOAUTH2", None), ("", None, None),
])
def test_the_best_or_the_named_mechanism_goes_on_the_wire_and_no_other(scripted, offered, auth, chosen):
    server = scripted(auth_dialogue(offered))
    with contextlib.nullcontext() if chosen else pytest.raises(RelayUnavailable):
        smtp_send(server, no_tls=True, auth=auth, **LOGIN)
    said = [line for line in server.connections[0].lines[1:] if line]
    assert said[: said.index("MAIL FROM:<a@x.org>")] == MECHANISMS[chosen] if chosen else said == []


def test_a_refused_token_has_its_explanation_fetched(scripted):
    def auth(_line, connection):
        connection.say(f"334 {b64(json.dumps({'status': '400'}))}")
        return "535 5.7.8 Username and Password not accepted" if connection.line() == "" else "501 what?"

    server = scripted(answering("AUTH XOAUTH2", AUTH=auth))
    with pytest.raises(RelayUnavailable, match="535 5.7.8"):
        smtp_send(server, no_tls=True, auth="XOAUTH2", **LOGIN)


@pytest.mark.parametrize("auth", MECHANISMS)
@pytest.mark.parametrize("password", [
    "hunter2-secret", "hunter2-s\xe9cret", lambda: b"hunter2-secret", lambda: ["hunter2-secret"],
    lambda: b"hunter2-s\xe9cret".decode()], ids=["wrong", "not ASCII", "bytes", "no text", "not UTF-8"])
def test_no_password_is_told_to_anybody(queue, scripted, events, caplog, auth, password):
    caplog.set_level(logging.DEBUG)
    server = scripted(auth_dialogue(auth, "535 5.7.8 wrong"))
    mailer = server.mailer(username="u", password=password, auth=auth, no_tls=True)
    queue.add("app@x.org", ["ann@x.org"], MESSAGE)
    counts = QueueProcessorThread(queue, mailer).process()
    assert isinstance(counts.outage, RelayUnavailable)
    told = [caplog.text, str(counts), repr(mailer), str(mailer), repr(events),
            *traceback.format_exception(counts.outage)]
    assert [text for text in told if re.search(r"hunter2|cret|xe9|\xe9", text)] == []


def test_a_mailer_of_somebody_else_is_named_in_the_log_by_its_type_alone(queue, caplog):
    mailer = giving({"a@x.org": Reply(250, "so"), "b@x.org": Reply(450, "so"), "c@x.org": Reply(550, "so")})
    mailer.password = "hunter2-secret"  # its repr tells it
    caplog.set_level(logging.DEBUG)
    queue.add("app@x.org", ["a@x.org", "b@x.org", "c@x.org"], MESSAGE)
    one_pass(queue, mailer)
    assert caplog.text.count("relay=SimpleNamespace ") == 3 and "hunter2" not in caplog.text


# ------------------------------------------------------------------------------ the mailers: addresses, sizes, contents


@pytest.mark.parametrize("address", [
    "a,b@x.org", '"a,b"@x.org', '"a b"@x.org', '"<a>"@x.org', r'"a\"b"@x.org', "o'neil@x.org", "a..b@x.org", "a.@x.org",
    "b%c@x.org", "b@[127.0.0.1]", "b@[IPv6:::1]", "-b@x.org", "B+tag@X.ORG", "b@x"])
def test_addresses_go_on_the_wire_as_they_are(scripted, address):
    server = scripted(answering(*CHUNKING))
    for sender in (address, ""):
        assert server.mailer().send(sender, [address], MESSAGE)[address].code == 250
        assert server.connections[-1].lines[1:3] == [f"MAIL FROM:<{sender}>", f"RCPT TO:<{address}>"]


@pytest.mark.parametrize("address", ["b@x.org>\r\nRSET", "b@x.org\nDATA", "b\r@x.org", "b\0@x.org", "b@x.org\u2028"])
def test_an_address_cannot_smuggle_a_command(scripted, address):
    server = scripted(answering())
    for sender, recipient in ((address, "b@x.org"), ("a@x.org", address)):
        with pytest.raises(ValueError):
            server.mailer().send(sender, [recipient], MESSAGE)
    assert server.connections == []


@pytest.mark.parametrize(("address", "plain", "smtputf8"), [
    ("b@bücher.example", "b@xn--bcher-kva.example", "b@xn--bcher-kva.example"),
    ("b@BÜCHER.example", "b@xn--bcher-kva.example", "b@xn--bcher-kva.example"),
    ("b@faß.de", None, "b@faß.de"),
    ("bär@x.org", None, "bär@x.org"),
    ("bär@bücher.example", None, "bär@bücher.example"),
])
def test_non_ascii_addresses_are_encoded_or_need_smtputf8(scripted, address, plain, smtputf8):
    for extension, wire in (("8BITMIME", plain), ("SMTPUTF8", smtputf8)):
        server = scripted(answering(extension))
        replies = smtp_send(server, "c@x.org", address)
        assert replies["c@x.org"].code == 250
        lines = server.connections[0].lines
        parameter = "" if wire is None or wire.isascii() else " SMTPUTF8"
        assert lines[1:3] == [f"MAIL FROM:<a@x.org>{parameter}", "RCPT TO:<c@x.org>"]
        if wire is None:
            assert (replies[address].code // 100, replies[address].status, lines[3]) == (5, "5.6.7", "DATA")
        else:
            assert (replies[address].code, lines[3]) == (250, f"RCPT TO:<{wire}>")
        by_it = server.mailer().send(address, ["b@x.org", "c@x.org"], MESSAGE)
        assert [reply.status for reply in by_it.values()] == ["2.0.0" if wire else "5.6.7"] * 2
        assert ("MAIL" in verbs(server.connections[1])) == bool(wire)


@pytest.mark.parametrize("message", [
    b"", b"a", b"a\n", b"a\r", b"a\r\nb\rc\nd\n\re", b"\n" * 40000, b"." * 40000, b".\n" * 7])
def test_size_is_that_of_the_message_with_all_line_ends_crlf(scripted, message):
    size = len(crlf(message))
    for limit in (size - 1, size, size + 1, 0, "what", ""):
        server = scripted(answering(f"SIZE {limit}"))
        reply = smtp_send(server, message=message)["b@x.org"]
        if limit == size - 1 > 0:  # SIZE 0 is no limit
            assert (reply.code, reply.status) == (552, "5.3.4")
            assert "MAIL" not in verbs(server.connections[0])
        else:
            assert reply.code == 250
            assert f"MAIL FROM:<a@x.org> SIZE={size}" in server.connections[0].lines


@pytest.mark.parametrize(("extension", "message", "parameter"), [
    ("8BITMIME", b"\xc3\xa4", " BODY=8BITMIME"), ("8BITMIME", b"a", ""), ("X", b"\xc3\xa4", "")])
def test_eight_bit_text_is_declared_where_it_can_be_and_goes_as_it_is(scripted, extension, message, parameter):
    server = scripted(answering(extension))
    assert smtp_send(server, message=message)["b@x.org"].code == 250
    assert server.connections[0].lines[1] == f"MAIL FROM:<a@x.org>{parameter}"
    assert server.connections[0].messages == [message + b"\r\n"]


@pytest.mark.parametrize("offered", [(), CHUNKING], ids=["DATA", "BDAT"])
@pytest.mark.parametrize("mark", [b"\r\n.\r\n", b"\n.\n", b"\r.\r", b"\r\r\n\n.."], ids=repr)
def test_line_ends_and_dots_are_right_wherever_the_data_is_cut(scripted, mark, offered):
    server = scripted(answering(*offered))
    messages = [b"x" * shift + mark * 20_000 + b"y" for shift in range(len(mark))]  # each byte of it at each cut
    with server.mailer() as mailer:
        for message in messages:
            assert mailer.send("a@x.org", ["b@x.org"], message)["b@x.org"].code == 250
    unstuffed = [data if offered else re.sub(rb"(?m)^\.", b"", data) for data in server.connections[0].messages]
    assert unstuffed == [crlf(message) for message in messages]


@pytest.mark.parametrize(("size", "last"), [(0, True), (2, True), (65536, True), (65537, False), (1_000_000, False)])
def test_up_to_64_kb_go_in_one_chunk_and_more_in_pieces_of_that_once_a_recipient_is_accepted(scripted, size, last):
    server, message = scripted(answering(*CHUNKING, RCPT=bad_recipient)), (b"x" * max(0, size - 2) + b"\r\n")[:size]
    with server.mailer() as mailer:
        assert mailer.send("a@x.org", ["b@x.org", "bad@x.org"], message)["b@x.org"].code == 250
        chunks = [line.split() for line in server.connections[0].lines if line.startswith("BDAT")]
        assert sum(int(chunk[1]) for chunk in chunks) == size and max(int(chunk[1]) for chunk in chunks) <= 65536
        assert [len(chunk) for chunk in chunks] == [2] * (len(chunks) - 1) + [3] and (len(chunks) == 1) == last
        assert mailer.send("a@x.org", ["bad@x.org"], message)["bad@x.org"].status == "5.1.1"
    assert verbs(server.connections[0]).count("BDAT") == len(chunks) + last
    assert server.connections[0].messages == [message]


parts = st.sampled_from([b"\r", b"\n", b"\r\n", b".", b"..", b"\0", b"\xff", b"From ", b"QUIT\r\n", b"Subject: x\n"])
local_parts = st.from_regex(r"[\w!#$%&'*+/=?^`{|}~-]{1,12}(\.[\w!#$%&'*+/=?^`{|}~-]{1,12})?", fullmatch=True)
addresses = st.builds("{}@{}.example".format, local_parts, st.from_regex("[a-z][a-z0-9]{0,9}", fullmatch=True))


def test_for_any_bytes_and_any_envelope_what_the_relay_stores_is_what_was_given_by_data_and_by_chunks():
    chunking = Scripted(answering(*CHUNKING, "SMTPUTF8", "8BITMIME", "SIZE"))
    with contextlib.closing(chunking), contextlib.closing(Relay(enable_SMTPUTF8=True)) as relay, (
            relay.mailer()) as by_data, chunking.mailer() as by_chunks:
        @settings(deadline=None, max_examples=150)
        @given(st.lists(parts | st.binary(max_size=30), max_size=20).map(b"".join), addresses | st.just(""),
               st.lists(addresses, min_size=1, max_size=10, unique=True))
        def check(message, sender, recipients):
            for mailer in (by_data, by_chunks):
                replies = mailer.send(sender, recipients, message)
                assert {address: reply.code for address, reply in replies.items()} == dict.fromkeys(recipients, 250)
            received, [connection] = relay.received.pop(), chunking.connections
            assert (received.content, received.sender, received.recipients) == (
                crlf(message), sender or "<>", recipients)
            assert connection.messages.pop() == crlf(message)
            assert connection.lines[-len(recipients) - 2].startswith(f"MAIL FROM:<{sender}> SIZE={len(crlf(message))}")
            assert connection.lines[-len(recipients) - 1 :] == [
                *(f"RCPT TO:<{recipient}>" for recipient in recipients), f"BDAT {len(crlf(message))} LAST"]

        check()
        assert len(relay.peers) == 1


# ------------------------------------------------------------------------------------------- the mailers: what it costs


SEND_TWICE = """
import sys, sendmail
with sendmail.SMTPMailer("127.0.0.1", int(sys.argv[1]), no_tls=True) as mailer:
    for _ in range(2):
        recipients = [f"r{i}@x.org" for i in range(int(sys.argv[2]))]
        replies = mailer.send("a@x.org", recipients, (b"x" * 70 + b"\\n") * int(sys.argv[3]))
        print({reply.code for reply in replies.values()})
"""


def traced(server: Any, recipients: int, lines: int, trace: pathlib.Path) -> str:
    """What `SEND_TWICE` does on its connection from MAIL on: a command or a size for a write, a '?' for a wait."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    strace = ["strace", "-f", "-qq", "-s", "16", "-o", trace, "-e", "trace=sendto,recvfrom,setsockopt"]
    assert run_python(SEND_TWICE, server.port, recipients, lines, under=strace) == "{250}\n" * 2
    calls = [call.groups() for call in re.finditer(
        r'(sendto|recvfrom|setsockopt)\(\d+, (?:"|SOL_TCP, )(\w*).*?(?:, .* = (\d+))', trace.read_text())]
    steps: list[str] = []
    for name, text, done in calls[[text for _, text, _ in calls].index("MAIL") :]:
        if name == "sendto":
            steps.append(text if re.fullmatch("[A-Z]{4}", text) else done)
        elif name == "recvfrom" and steps[-1] != "?":
            assert steps.pop() == "TCP_QUICKACK", "the reply's acknowledgement would be late"
            steps.append("?")
        elif text == "TCP_QUICKACK" and steps[-1] not in ("?", text):
            steps.append(text)
    return " ".join(steps)


STEPWISE = r"MAIL \? RCPT \? RCPT \? DATA \? (\d+ )+\? "


@pytest.mark.parametrize(("offered", "recipients", "lines", "message"), [
    (CHUNKING, 1, 20, r"MAIL \? "), (CHUNKING, 100, 20, r"MAIL \? "),
    (CHUNKING, 100, 2000, r"MAIL \? ((BDAT|\d+) (\? )?)+(?<=\? )"), (["PIPELINING"], 100, 2000, r"MAIL \? (\d+ )+\? "),
    (["CHUNKING"], 2, 2000, STEPWISE), ([], 2, 2000, STEPWISE),
], ids=brief)
def test_a_message_costs_one_round_trip_with_chunking_two_with_pipelining_or_one_for_each_command(
    scripted, tmp_path, offered, recipients, lines, message
):
    steps = traced(scripted(answering(*offered)), recipients, lines, tmp_path / "trace")
    assert re.fullmatch(f"({message}){{2}}QUIT( \\?)?", steps), steps
    assert all(int(size) <= 65536 + len("BDAT 65536 LAST\r\n") for size in re.findall(r"\d+", steps))


HIGH_WATER = """
import sys, sendmail
mailer = sendmail.SMTPMailer("127.0.0.1", int(sys.argv[1]), no_tls=True)
if len(sys.argv) > 2:
    assert sendmail.QueueProcessorThread(sys.argv[2], mailer).process().sent == 1
else:
    assert mailer.send("a@x.org", ["b@x.org"], (b"x" * 79 + b"\\n") * 327680)["b@x.org"].code == 250
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="/proc is not there to tell the peak of the memory")
@pytest.mark.parametrize(("offered", "through"), [(CHUNKING, False), (CHUNKING, True), (["PIPELINING"], False)])
def test_a_message_of_25_mb_takes_less_than_three_times_its_size(queue, scripted, offered, through):
    message = (b"x" * 79 + b"\n") * 327680
    server = scripted(answering(*offered, "SIZE"))
    if through:
        queue.add("a@x.org", ["b@x.org"], MESSAGE + message)
    peak = int(run_python(HIGH_WATER, server.port, *[queue.path] * through)) * 1024
    assert server.connections[0].messages[0].endswith(crlf(message))
    assert peak < 3 * len(message)


def test_each_thread_has_a_connection_of_its_own_and_outside_of_its_context_each_message(scripted):
    server = scripted(answering(MAIL=lambda line, c: f"250 2.1.0 {c.number} {line}"))
    mailer, met = server.mailer(), threading.Barrier(3)

    def work(sender):
        with mailer:
            for number in range(5):
                met.wait(10)
                with mailer:
                    assert mailer.send(sender, ["b@x.org"], b"%d" % number)["b@x.org"].code == 250

    with mailer, concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(work, ["1@x.org", "2@x.org", "3@x.org"]))
        assert mailer.send("m@x.org", ["b@x.org"], b"m")["b@x.org"].code == 250
    for _ in range(2):
        mailer.send("o@x.org", ["b@x.org"], b"o")
    senders = [{line for line in c.lines if line.startswith("MAIL")} for c in server.connections]
    assert sorted(map(len, senders)) == [1] * 6
    assert sorted(len(c.messages) for c in server.connections) == [1, 1, 1, 5, 5, 5]


def test_a_fork_has_no_part_in_its_parents_dialogue(scripted):
    server = scripted(answering())
    with server.mailer() as mailer:
        mailer.send("a@x.org", ["b@x.org"], b"1")
        forked(lambda: mailer.send("a@x.org", ["b@x.org"], b"2"))
        forked(lambda: mailer.__exit__(None, None, None))
        mailer.send("a@x.org", ["b@x.org"], b"3")
    assert [connection.messages for connection in server.connections] == [[b"1\r\n", b"3\r\n"], [b"2\r\n"]]


# ------------------------------------------------------------------------------------------- the mailers: Postfix, Exim

MAIN_CF = """
compatibility_level = 3.6
queue_directory = {root}/spool
data_directory = {root}/data
maillog_file = {root}/log
maillog_file_prefixes = {root}
myhostname = relay.example.com
mydestination =
alias_maps =
inet_interfaces = 127.0.0.1
mynetworks = 127.0.0.0/8
local_header_rewrite_clients =
notify_classes =
relayhost = [127.0.0.1]:{beyond}
disable_dns_lookups = yes
smtpd_peername_lookup = no
smtpd_error_sleep_time = 0
message_size_limit = 10000000
header_checks = regexp:{root}/etc/header_checks
smtpd_forbid_bare_newline = reject
smtpd_forbid_bare_newline_exclusions =
smtpd_relay_restrictions = permit_mynetworks, reject
smtpd_recipient_restrictions = check_recipient_access texthash:{root}/etc/access, permit_mynetworks, reject
smtpd_tls_security_level = may
smtpd_tls_chain_files = {root}/etc/server.pem
smtpd_tls_auth_only = yes
smtpd_sasl_auth_enable = yes
smtpd_sasl_local_domain = x.org
cyrus_sasl_config_path = {root}/etc/sasl
"""
MASTER_CF = """
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
smtp unix - - n - - smtp
anvil unix - - n - 1 anvil
proxymap unix - - n - - proxymap
tlsmgr unix - - n 1000? 1 tlsmgr
postlog unix-dgram n - n - 1 postlogd
127.0.0.1:{port} inet n - n - - smtpd
127.0.0.1:{encrypted} inet n - n - - smtpd -o smtpd_tls_security_level=encrypt
127.0.0.1:{implicit} inet n - n - - smtpd -o smtpd_tls_wrappermode=yes
127.0.0.1:{classic} inet n - n - - smtpd -o smtpd_discard_ehlo_keywords=chunking,silent-discard
"""


@dataclasses.dataclass
class Postfix:
    """A private Postfix; what it takes, it hands on to the relay *beyond*.  Only *classic* does not offer CHUNKING."""

    beyond: Relay
    root: pathlib.Path
    port: int
    encrypted: int
    implicit: int
    classic: int

    host = "127.0.0.1"

    def arrived(self, number: int) -> list[Received]:
        """The next *number* messages that came through."""
        wait_until(lambda: len(self.beyond.received) >= number)
        taken, self.beyond.received[:] = list(self.beyond.received), []
        assert len(taken) == number
        return taken


@pytest.fixture(scope="session")
def postfix(authority: trustme.CA) -> Iterator[Postfix]:
    if os.geteuid() != 0 or not all(map(shutil.which, ("postfix", "postconf", "saslpasswd2"))):
        pytest.skip("needs postfix and saslpasswd2, and to be root")
    with contextlib.ExitStack() as stack:
        root = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="postfix-")))
        root.chmod(0o755)  # Postfix gives up root's rights
        beyond = Relay(enable_SMTPUTF8=True)
        stack.callback(beyond.close)
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
        this = Postfix(beyond, root, *[s.getsockname()[1] for s in sockets])
        for directory in ("etc", "etc/sasl", "spool", "data"):
            (root / directory).mkdir()
        shutil.chown(root / "data", "postfix")
        (root / "etc/access").write_text("gone@ 550 5.1.1 gone\n")
        (root / "etc/header_checks").write_text("/^X-Reject:/ REJECT\n")
        (root / "etc/main.cf").write_text(MAIN_CF.format(root=root, beyond=beyond.port))
        (root / "etc/master.cf").write_text(MASTER_CF.format(**vars(this)))
        (root / "etc/sasl/smtpd.conf").write_text(
            f"pwcheck_method: auxprop\nauxprop_plugin: sasldb\nsasldb_path: {root}/etc/sasldb2\n"
            "mech_list: PLAIN LOGIN CRAM-MD5\n")
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(root / "etc/server.pem")
        subprocess.run(["saslpasswd2", "-p", "-c", "-f", root / "etc/sasldb2", "-u", "x.org", "ann"],
                       input=b"secret", check=True)
        shutil.chown(root / "etc/sasldb2", "postfix")
        subprocess.run(["postfix", "-c", root / "etc", "check"], check=True)
        daemons = subprocess.check_output(["postconf", "-c", root / "etc", "-h", "daemon_directory"], text=True).strip()
        for s in sockets:
            s.close()
        master = subprocess.Popen([f"{daemons}/master", "-c", root / "etc"], start_new_session=True)
        stack.callback(master.wait, 20)
        stack.callback(master.terminate)  # and it ends its own
        wait_until(lambda: not socket.socket().connect_ex(("127.0.0.1", this.classic)))
        yield this


@pytest.mark.parametrize("server", ["postfix", "exim"])
def test_a_message_costs_one_round_trip_to_a_real_relay(server, request, tmp_path):
    for recipients in (1, 50):
        steps = traced(request.getfixturevalue(server), recipients, 20, tmp_path / "trace")
        assert re.fullmatch(r"(MAIL \? ){2}QUIT( \?)?", steps), steps
    if server == "postfix":
        arrived = request.getfixturevalue(server).arrived(4)
        assert sorted(len(received.recipients) for received in arrived) == [1, 1, 50, 50]


@pytest.mark.parametrize("auth", [None, "PLAIN", "LOGIN", "CRAM-MD5"])
@pytest.mark.parametrize("port", ["port", "encrypted", "implicit"])
def test_postfix_takes_messages_over_tls_after_a_login(postfix, authority, port, auth):
    mailer = SMTPMailer("127.0.0.1", getattr(postfix, port), "ann@x.org", "secret", auth=auth,
                        implicit_tls=port == "implicit", context=trusting(authority))
    with mailer:
        assert [mailer.send("a@x.org", ["b@x.org"], MESSAGE)["b@x.org"].code for _ in range(2)] == [250, 250]
    assert all(b"ESMTPSA" in received.content for received in postfix.arrived(2))


EXIM_CONF = """
exim_user = mail
queue_only
primary_hostname = exim.example.org
log_file_path = {root}/%slog
spool_directory = {root}/spool
tls_certificate = {root}/server.pem
acl_smtp_rcpt = ${{if eq{{$local_part}}{{gone}} {{deny hosts = *}}{{accept hosts = *}}}}
acl_smtp_data = ${{if def:h_X-Reject: {{deny hosts = *}}{{accept hosts = *}}}}
"""
EXIM_OF_DEBIAN = "timeout 60 apt-get download exim4-daemon-light && dpkg -x exim4-daemon-light_*.deb ."


def exim_program() -> str:
    """Exim: named, installed, or out of Debian's package, which can't be installed beside Postfix."""
    cached = pathlib.Path.home() / ".cache/sendmail-tests/exim4"
    installed = shutil.which("exim4", path=f"{os.environ['PATH']}:/usr/sbin")
    found = os.environ.get("SENDMAIL_TEST_EXIM") or installed
    if not found and not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as here:
            if subprocess.run(EXIM_OF_DEBIAN, shell=True, cwd=here, capture_output=True, check=False).returncode:
                pytest.skip(f"no exim4 here, and none to be had by: {EXIM_OF_DEBIAN}")
            program = pathlib.Path(here, "usr/sbin/exim4")  # it asks for a user that only an installation makes
            program.write_bytes(program.read_bytes().replace(b"\0Debian-exim\0", b"\0" + b"mail".ljust(12, b"\0")))
            program.rename(cached)
    return str(found or cached)


@dataclasses.dataclass
class Exim:
    """A private Exim, which keeps what it takes."""

    port: int
    spool: pathlib.Path

    def arrived(self, _number: int) -> list[Received]:
        found = []
        for head in self.spool.glob("*-H"):  # envelope and header; beside it a file with the body
            if parts := re.search(r"\nXX\n\d+\n(.*?)\n\n.*Subject: (\d+)\n", head.read_text(), re.DOTALL):
                body = head.with_name(head.name[:-1] + "D").read_bytes().partition(b"\n")[2]
                found.append(Received("", parts[1].split(), b"Subject: %s\n\n" % parts[2].encode() + crlf(body)))
            head.unlink()
        return found


@pytest.fixture(scope="session")
def exim(authority: trustme.CA) -> Iterator[Exim]:
    if os.geteuid() != 0:
        pytest.skip("Exim needs to be started by root")
    program, port = exim_program(), closed_port()
    with tempfile.TemporaryDirectory(prefix="exim-") as name:
        root = pathlib.Path(name)
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(root / "server.pem")
        (root / "exim.conf").write_text(EXIM_CONF.format(root=root))
        for path in (root, root / "server.pem"):
            shutil.chown(path, "mail")  # Exim gives up root's rights
        command = [program, "-C", root / "exim.conf", "-bdf", "-oX", f"127.0.0.1.{port}"]
        daemon = subprocess.Popen(command, stderr=subprocess.PIPE)
        try:
            wait_until(lambda: daemon.poll() is not None or not socket.socket().connect_ex(("127.0.0.1", port)))
            if daemon.poll() is not None:  # a library is missing, say
                pytest.skip(f"exim4 does not start: {daemon.stderr.read().decode().strip()}")
            yield Exim(port, root / "spool/input")
        finally:
            daemon.terminate()
            daemon.communicate(timeout=20)


SMUGGLERS = [
    before + dot + after + b"MAIL FROM:<evil@x.org>\r\nRCPT TO:<victim@x.org>\r\nDATA\r\nSubject: smuggled\r\n\r\n.\r\n"
    for before in (b"", b"\n", b"\r", b"\r\n", b"\r\r\n") for dot in (b".", b"..", b".\0")
    for after in (b"\n", b"\r", b"\r\n", b"\n\r")]


@pytest.mark.parametrize(("name", "port", "tls"), [
    ("postfix", "port", True), ("postfix", "classic", True), ("exim", "port", True), ("exim", "port", False)])
def test_a_real_relay_takes_mixed_messages_over_one_connection(name, port, tls, request, authority, monkeypatch):
    server, connect, opened = request.getfixturevalue(name), socket.create_connection, []
    short, long = ".\n..\r\n.\r\n\r.\rQUIT\nf\xfcr\n.".encode(), b".\nno end of it\r\n\n" * 200_000
    cases = [  # recipients, a header line, body, codes
        (["b@x.org"], "", short, [250]), (["b@x.org", "gone@x.org", "c@x.org"], "", short, [250, 550, 250]),
        (["gone@x.org", "gone@y.org"], "", short, [550, 550]), (["b@x.org"], "X-Reject: 1\n", short, [550]),
        (["b@x.org"], "", b"", [250]), (["b@x.org", "gone@x.org"], "", long, [250, 550])] * 3
    cases += [(["b@x.org"], "", smuggler, [250]) for smuggler in SMUGGLERS]
    expected = []
    monkeypatch.setattr(socket, "create_connection", lambda *at, **how: opened.append(at) or connect(*at, **how))
    context = trusting(authority) if tls else None
    with SMTPMailer("127.0.0.1", getattr(server, port), no_tls=not tls, force_tls=tls, context=context) as mailer:
        for number, (recipients, header, body, codes) in enumerate(cases, 100):
            replies = mailer.send("a@x.org", recipients, f"Subject: {number}\n{header}\n".encode() + body)
            assert [replies[to].code for to in recipients] == codes
            if accepted := [to for to in recipients if replies[to].code == 250]:
                expected.append((b"%d" % number, accepted, crlf(body)))
    assert len(opened) == 1
    arrived = [(re.search(rb"Subject: (\d+)", each.content)[1], each.recipients, re.split(
        rb"\r?\n\r?\n", each.content, maxsplit=1)[1]) for each in server.arrived(len(expected))]
    assert sorted(arrived) == expected


# ---------------------------------------------------------------------------------------- the Maildir: creation, rights


@pytest.mark.parametrize("missing", ["tmp", "new", "cur", "tmp new", "new cur", "tmp new cur"])
def test_guarantee_7_a_queue_whose_creation_was_cut_short_is_completed(tmp_path: pathlib.Path, missing: str) -> None:
    Maildir(tmp_path / "q")
    for directory in missing.split():
        (tmp_path / "q" / directory).rmdir()
    Maildir(tmp_path / "q").add("app@x.org", ["ann@x.org"], MESSAGE)
    assert len(state(tmp_path / "q")["new"]) == 1


@pytest.mark.parametrize("names", [["notes.txt"], ["new/", "old/"], ["tmp/", "cur/", "mail"]])
def test_guarantee_7_a_directory_that_is_no_queue_is_refused_untouched(tmp_path: pathlib.Path, names: Any) -> None:
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="not a Maildir"):
        Maildir(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_add_raises_where_the_message_cannot_be_shown_and_leaves_litter(queue: Maildir, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "rename", disk_error)
    with pytest.raises(OSError):
        queue.add("app@x.org", "ann@x.org", MESSAGE)
    assert state(queue).keys() == {"tmp"}


def test_the_path_of_a_queue_goes_where_it_goes_for_everybody_else_and_stays(tmp_path, relay, monkeypatch):
    for name in ("releases/42", "gone", "real"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "current").symlink_to("releases/42")
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    queues = [Maildir("relative"), Maildir("current/../queue"), Maildir("link")]
    before = set(tmp_path.rglob("*"))
    with pytest.raises(FileNotFoundError):
        Maildir("")
    assert set(tmp_path.rglob("*")) == before
    monkeypatch.chdir("gone")
    (tmp_path / "gone").rmdir()
    relay.data_reply = "550 5.7.1 no"
    for queue in (*queues, Maildir(tmp_path / "absolute")):
        queue.add(SENDER, ANN, MESSAGE)
        assert one_pass(queue, relay).failed == 1
    for path in ("relative", "releases/queue", "real", "absolute"):
        assert state(tmp_path / path).keys() == {".failed/new"}


DIRECTORIES = ["tmp", "new", "cur", "deferred", ".failed", ".failed/tmp", ".failed/new", ".failed/cur"]


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_a_directory_of_the_queue_that_is_a_link_is_refused_at_every_pass(directory, queue, sink, run, tmp_path):
    everybody = ["sent@x.org", "deferred@x.org", "refused@x.org"]
    queue.add("app@x.org", everybody, MESSAGE)
    processor = QueueProcessorThread(queue, sink.mailer())
    processor.process()
    for name in ("new", "cur", "deferred", "tmp"):
        put(queue, f"{name}/{NAME}", "sent@x.org")
    theirs = tmp_path / "theirs"
    for name in (".", "tmp", "new", "cur"):
        (theirs / name).mkdir()
        for file in (theirs / name / NAME, theirs / name / f"{int(time.time()):010d}.x"):
            file.write_bytes(b"private")
            os.utime(file, (0, 0))
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in (theirs, *theirs.rglob("*")))
    os.rename(f"{queue.path}/{directory}", tmp_path / "away")
    os.symlink(theirs, f"{queue.path}/{directory}")
    for hours in (0, 40):
        processor._clock = lambda hours=hours: time.time() + hours * 3600
        with pytest.raises((OSError, ValueError)):
            processor.process()
    with contextlib.suppress(OSError, ValueError):
        queue.add("app@x.org", everybody, MESSAGE)
    for call in (["-f", "app@x.org", *everybody], ["--requeue"], ["--list"], to_relay(sink)):
        status, _output, errors = run("--maildir", queue.path, *call)
        assert status in (0, 73, 74) and (status == 0 or re.fullmatch(r"sendmail: .*\n", errors))
    assert status != 0, "a pass is refused"
    assert sorted((str(path), path.lstat().st_mtime_ns) for path in (theirs, *theirs.rglob("*"))) == before
    assert sink.recipients() == ["sent@x.org"]


@pytest.mark.parametrize(("umask", "given", "directories", "files"), [
    (0, {}, 0o700, 0o600), (0o077, {"": 0o700}, 0o700, 0o600), (0o077, {"": 0o2770}, 0o2770, 0o660),
    (0, {"": 0o750}, 0o750, 0o640), (0o077, {"": 0o755, "new": 0o2770, "tmp": 0o2770, "cur": 0o2770}, 0o2770, 0o660),
])
def test_rights_follow_new_or_else_the_queue_directory_whatever_the_umask(
    tmp_path, sink, background, umask, given, directories, files
):
    root = tmp_path / "queue"
    for name, mode in given.items():
        (root / name).mkdir()
        (root / name).chmod(mode)
    command_line("--maildir", root, "-f", "app@x.org", "deferred@x.org", "refused@x.org", stdin=MESSAGE, umask=umask)
    process = background(*processor_command(Maildir(root), sink, "--interval", 0.05), umask=umask,
                         stderr=subprocess.DEVNULL)
    wait_until(lambda: set(state(root)) == {"deferred", ".failed/new"})
    process.terminate()
    assert process.wait(20) == 0
    modes = {str(path): oct(stat.S_IMODE(path.lstat().st_mode)) for path in root.rglob("*")}
    assert modes == {path: oct(directories if os.path.isdir(path) else files) for path in modes}
    assert stat.S_IMODE(root.stat().st_mode) == given.get("", 0o700) and (root / "trigger").is_fifo()


@pytest.mark.parametrize("made", ["trigger", "tmp", "cur", "deferred", ".failed", ".failed/new"])
def test_a_link_in_the_place_of_what_was_just_made_gets_no_rights(made, tmp_path, sink, monkeypatch, caplog):
    root, victim, away = (tmp_path / name for name in ("queue", "victim", "away"))
    root.mkdir()
    root.chmod(0o770)
    victim.touch(0o600) if made == "trigger" else victim.mkdir(0o700)
    mode = victim.stat().st_mode

    def swapping(make):
        def make_and_swap(path, *rest, **more):
            make(path, *rest, **more)
            if path == f"{root}/{made}" and not away.exists():
                os.rename(path, away)
                os.symlink(victim, path)

        return make_and_swap

    for call in ("mkdir", "mkfifo"):
        monkeypatch.setattr(os, call, swapping(getattr(os, call)))
    with contextlib.suppress(OSError, ValueError):  # refused
        Maildir(root).add("app@x.org", ["deferred@x.org", "refused@x.org"], MESSAGE)
        with running(QueueProcessorThread(root, sink.mailer(), 3600)) as passes:
            wait_until(lambda: passes or caplog.records)
    assert away.exists() and victim.stat().st_mode == mode
    assert made == "trigger" or list(victim.iterdir()) == []


@pytest.mark.parametrize("mode", [0o311, 0o111])
def test_a_queue_in_a_directory_that_may_not_be_read_can_be_made_and_opened(tmp_path, mode):
    parent = tmp_path / "parent"
    parent.mkdir()
    if mode == 0o111:
        Maildir(parent / "queue")
    parent.chmod(mode)
    done = command_line("--maildir", parent / "queue", ANN, stdin=MESSAGE, preexec_fn=without_root_rights)
    parent.chmod(0o700)
    assert (done.returncode, list(state(parent / "queue"))) == (0, ["new"]) and b"ermission" not in done.stderr


# -------------------------------------------------------------------------------------------------- the Maildir: states


def test_state_tmp_is_litter_after_36_hours_for_a_processor_that_lives_long_too(queue, relay, caplog):
    litter = put(queue, f"tmp/{NAME}")
    processor = QueueProcessorThread(queue, relay.mailer())
    for hours, locked, kept in ((0, False, 1), (35.9, False, 1), (37, True, 1), (39, False, 0)):
        processor._clock = lambda hours=hours: time.time() + hours * 3600
        with litter.open("rb") as file:
            if locked:  # it is somebody's
                fcntl.flock(file, fcntl.LOCK_EX)
            assert processor.process().left == 0
        assert list(state(queue)) == ["tmp"] * kept
    assert relay.received == [] and NAME in caplog.text and ANN in caplog.text


def test_state_cur_is_where_a_message_stands_claimed_and_is_never_robbed_while_an_attempt_is_under_way(queue, relay):
    looks = []

    def look(_recipients):
        before = list(state(queue))
        other_process = command_line("--maildir", queue.path, *to_relay(relay)).returncode
        looks.append((before, one_pass(queue, relay, time.time() + 30 * DAY).sent, other_process, list(state(queue))))

    with transaction.manager:
        DirectMailDelivery(calling(look), fallback=queue).send(SENDER, ANN, MESSAGE)
    queue.add(SENDER, ANN, MESSAGE)
    one_pass(queue, calling(look))
    assert looks == [(["cur"], 0, 0, ["cur"])] * 2
    assert state(queue) == {} and relay.received == []


def test_state_failed_is_a_maildir_of_its_own_in_which_nothing_is_overwritten(queue, relay, run):
    relay.refusals = {"ann@x.org": "550 5.1.1 unknown", "eve@x.org": "450 4.2.1 busy"}
    queue.add("app@x.org", ["ann@x.org", "eve@x.org"], MESSAGE)
    one_pass(queue, relay)
    assert {path.name for path in pathlib.Path(queue.path, ".failed").iterdir()} == {"tmp", "new", "cur"}
    assert standing_recipients(queue) == {"deferred": ["eve@x.org"], ".failed/new": ["ann@x.org"]}
    relay.refusals["eve@x.org"] = "550 5.1.1 unknown"
    one_pass(queue, relay, time.time() + 3600)
    failed = state(queue)[".failed/new"]
    assert run("--maildir", queue.path, "--requeue")[0] == 0
    assert standing_recipients(queue) == {"new": ["ann@x.org", "eve@x.org"]}
    one_pass(queue, relay)
    assert standing_recipients(queue) == {".failed/new": ["ann@x.org", "eve@x.org"]}
    assert not set(failed) & set(state(queue)[".failed/new"])


@pytest.mark.parametrize("named", [False, True])
def test_requeue_gives_what_was_deferred_or_given_up_a_fresh_name_in_new(named, run, queue, relay):
    old = [f"{int(time.time()) + 600:010d}.{NAME}", f"1.{NAME}", f"2.{NAME}:2,S"]  # the last marked by a mail client
    for directory, name in zip(("deferred", ".failed/new", ".failed/cur"), old):
        pathlib.Path(queue.path, directory).mkdir(parents=True)
        put(queue, f"{directory}/{name}", message=b"X-Sendmail-Error: 4.2.1 450 4.2.1 busy\n" + MESSAGE)
    pathlib.Path(queue.path, ".failed/new/0").mkdir()  # neither this nor a link is a message
    pathlib.Path(queue.path, ".failed/new/1").symlink_to("nowhere")
    assert run("--maildir", queue.path, "--requeue", *["--", *old] * named) == (0, "", "")
    names = state(queue)["new"]
    assert len(names) == 3 and state(queue) == {"new": names, ".failed/new": ["0", "1"]}
    assert all(re.fullmatch(r"\d{10}\.M\d{6}P\d+Q\w+\.[^:,]+", name) for name in names)
    assert not any(NAME in name for name in names)
    assert one_pass(queue, relay).sent == 3
    assert {received.content for received in relay.received} == {crlf(MESSAGE)}


# -------------------------------------------------------------------------------------------------- the Maildir: claims


def test_guarantee_2_what_cannot_be_locked_is_not_sent(bench: Bench) -> None:
    root = bench.directory / "no locks"
    mixed_queue(root)
    before = state(root)
    run = bench.run(PASS, root, "-e", "inject=flock:error=ENOLCK:when=1+")
    assert bench.sink.taken == [] and state(root) == before
    assert len(run.told) == 3 and all(line.startswith("log ERROR") for line in run.told)


@pytest.mark.parametrize("place", ["new", "cur", "deferred"])
def test_guarantee_2_what_somebody_else_has_locked_is_left_to_them(place, run, queue, relay):
    path = put(queue, f"{place}/{NAME}")
    processor = QueueProcessorThread(queue, relay.mailer())
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run("--maildir", queue.path, "--requeue", NAME)[0] == 65
        assert [processor.process().sent for _ in range(2)] == [0, 0] and state(queue) == {place: [NAME]}
    processor._clock = lambda: time.time() + 61
    assert processor.process().sent == 1


def fork_a_sleeper(writer: int) -> None:
    """Fork a child that writes its number, when it is up, and does nothing else."""
    if not os.fork():
        os.write(writer, b"%d" % os.getpid())
        time.sleep(60)
        os._exit(0)


@pytest.mark.parametrize("place", ["new", "cur"])
@pytest.mark.parametrize("count", [1, 101])  # it dies when it sends to one: at once, or after the file has changed
def test_guarantee_3_a_child_forked_at_the_wrong_moment_does_not_keep_a_claim(count, place, tmp_path, relay):
    everybody, opening = [f"{number}@x.org" for number in range(count)], os.open

    def pass_and_die(queue, number, writer):
        """Make a pass, fork while the file is opened that has this number, and die in the end."""
        opened, forking = [], threading.Thread(target=fork_a_sleeper, args=[writer])

        def open_and_fork(target, *rest, **more):
            fd = opening(target, *rest, **more)
            opened.append(target)
            if len(opened) == number:
                forking.start()
                forking.join(0.3)  # it ends at once, or waits for what we do now
            return fd

        def send(recipients):
            if len(recipients) == 1:
                if len(opened) >= number:
                    forking.join(20)
                os._exit(0)

        os.open = open_and_fork
        one_pass(queue, calling(send))

    for number in itertools.count(1):
        queue = Maildir(tmp_path / str(number))
        put(queue, f"{place}/{NAME}", *everybody)
        reader, writer = os.pipe()
        forked(functools.partial(pass_and_die, queue, number, writer))
        os.close(writer)
        child = os.read(reader, 20)
        os.close(reader)
        try:
            assert one_pass(queue, relay).sent == 1, f"fork at open {number}"
            assert relay.received[-1].recipients == everybody[-1:]
        finally:
            if child:
                os.kill(int(child), signal.SIGKILL)
        if not child:  # there are no more
            break
    assert number > 1


def test_guarantee_3_a_lost_descriptor_keeps_no_other_open_in_a_child(queue, relay):
    reader, writer = os.pipe()

    def claim_all_and_die(_recipients):
        if os.listdir(f"{queue.path}/new"):
            one_pass(queue, calling(claim_all_and_die))
        held = [fd for fd in os.listdir("/proc/self/fd") if "/cur/" in os.path.realpath(f"/proc/self/fd/{fd}")]
        for fd in held[:4]:
            os.close(int(fd))  # as a daemon does that closes what it does not know
        fork_a_sleeper(writer)
        os._exit(0)

    for number in range(8):
        queue.add("app@x.org", [f"{number}@x.org"], MESSAGE)
    forked(lambda: one_pass(queue, calling(claim_all_and_die)))
    child = int(os.read(reader, 20))
    try:
        assert QueueProcessorThread(queue, relay.mailer()).process().sent == 8
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(("place", "target", "more"), [
    ("new/", "cur", 2), ("cur/", "new", 2), ("deferred/1700000000.", "cur", 61)])  # which is looked at once a minute
def test_what_cannot_be_claimed_stops_nothing_is_said_once_and_looked_at_again_after_a_minute(
    place, target, more, queue, relay, caplog
):
    put(queue, place + NAME, "ann@x.org")
    in_the_way = pathlib.Path(queue.path, target, NAME)
    in_the_way.mkdir()
    now = time.time() + 30
    put(queue, f"deferred/{now + 50:010.0f}.{NAME}.later", "carl@x.org")
    queue.add("app@x.org", ["bob@x.org"], MESSAGE)
    processor = QueueProcessorThread(queue, relay.mailer())
    processor._clock = lambda: now
    for seconds in (0, 59, more):
        now += seconds
        assert processor.process().sent == 1 and len(caplog.records) == 1
        if seconds == 0:
            in_the_way.rmdir()
    assert [message.recipients for message in relay.received] == [["bob@x.org"], ["carl@x.org"], ["ann@x.org"]]
    assert state(queue) == {}


# ----------------------------------------------------------------------------------------------- the Maildir: odd files


def test_odd_files_are_left_alone_and_stop_nothing(queue, relay, caplog, tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"X-Zope-From: a@x.org\nX-Zope-To: victim@x.org\n" + MESSAGE)
    for directory in ("new", "cur", "deferred"):
        root = pathlib.Path(queue.path, directory)
        root.mkdir(exist_ok=True)
        (root / "1.link").symlink_to(outside)
        (root / "1.dangling").symlink_to(tmp_path / "nowhere")
        (root / "1.directory").mkdir()
        os.mkfifo(root / "1.fifo")
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(str(root / "1.socket"))
        (root / ".hidden").write_bytes(outside.read_bytes())
    pathlib.Path(queue.path, "tmp", "1.link").symlink_to(outside)
    os.utime(outside, (0, 0))
    os.utime(pathlib.Path(queue.path, "tmp", "1.link"), (0, 0), follow_symlinks=False)
    before = state(queue)
    queue.add("app@x.org", ["ann@x.org"], MESSAGE)
    processor = QueueProcessorThread(queue, relay.mailer())
    for _ in range(3):
        processor.process()
    assert [message.recipients for message in relay.received] == [["ann@x.org"]]
    assert state(queue) == before and outside.exists()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_no_file_is_opened_in_a_way_that_follows_a_link_nor_locked_while_it_may_be_written(bench: Bench) -> None:
    root = bench.directory / "links"
    mixed_queue(root)
    put(root, "tmp/1.litter", "old@x.org")
    os.utime(root / "tmp" / "1.litter", (0, 0))
    put(root, "tmp/2.young")
    run = bench.run(PASS, root)
    assert any("removed" in line and "old@x.org" in line for line in run.told)
    opened = [text for call, text in run.calls if call == "openat" and f"{root}/" in text.partition(",")[2]]
    assert len(opened) > 10
    assert [text for text in opened if not re.search("O_NOFOLLOW|O_EXCL|O_DIRECTORY", text)] == []
    assert [text for call, text in run.calls if call == "flock" and "2.young" in text] == []


@pytest.fixture
def trigger(queue):
    """Reads a byte for each wake-up since the last time."""
    os.mkfifo(f"{queue.path}/trigger")
    fd = os.open(f"{queue.path}/trigger", os.O_RDWR | os.O_NONBLOCK)

    def read():
        with contextlib.suppress(BlockingIOError):
            return os.read(fd, 100)
        return b""

    yield read
    os.close(fd)


def test_a_processor_that_stops_leaves_a_wake_up_to_the_others(queue, relay, trigger):
    processor = QueueProcessorThread(queue, relay.mailer(), 3600)
    processor.stop()
    processor.run()
    assert trigger() == b"\0"


@pytest.mark.parametrize("make", ["mkfifo", "mkdir", "touch"])
def test_a_trigger_that_is_no_fifo_or_a_link_to_one_is_ignored(make, queue, relay, tmp_path):
    trigger, theirs = pathlib.Path(queue.path, "trigger"), tmp_path / "theirs"
    if make == "mkfifo":
        os.mkfifo(theirs)
        trigger.symlink_to(theirs)
        fd = os.open(theirs, os.O_RDWR | os.O_NONBLOCK)
        os.write(fd, b"theirs")
    else:
        getattr(trigger, make)()
    with running(QueueProcessorThread(queue, relay.mailer(), 3600)) as passes:
        wait_until(lambda: passes)
        queue.add("app@x.org", ["ann@x.org"], MESSAGE)
    assert len(passes) == 1  # it neither woke nor span
    assert one_pass(queue, relay).sent == 1
    if make == "mkfifo":
        assert os.read(fd, 10) == b"theirs"
        os.close(fd)
    assert make != "touch" or trigger.read_bytes() == b""


# ------------------------------------------------------------------------------------------- crashes and faults: faults

FAULTS = {
    "ENOSPC": "openat write fsync rename mkdir",
    "EIO": "openat write fsync rename unlink flock close pread64 newfstatat getdents64 mkdir ftruncate",
    "EACCES": "openat rename unlink mkdir newfstatat",
    "EMFILE": "openat socket pipe2",
    "EINTR": "openat write fsync rename unlink flock close pread64 getdents64",
    "ENOENT": "openat rename newfstatat",
    "ENOLCK": "flock",
}


def fault_points(run: Run) -> list[tuple[str, str, int, str]]:
    """Each fault at each call, once, and from then on; EINTR only once, for Python repeats what is interrupted."""
    return [(fault, call, n + 1, lasting) for fault, calls in FAULTS.items() for call in calls.split()
            for n in range(run.count()[call]) for lasting in ("", "+") if not (lasting and fault == "EINTR")]


def fault_at(fault: str, call: str, n: int, lasting: str) -> tuple[str, ...]:
    return "-e", f"trace={call},getppid", "-e", f"inject={call}:error={fault}:when={n}{lasting}"


@pytest.mark.sweep
def test_no_fault_in_a_pass_loses_or_stops_anything(benches: Benches) -> None:
    with benches.one() as bench:
        mixed_queue(bench.directory / "traced faults")
        traced = bench.run(PASS, bench.directory / "traced faults", passes=2)
        usual = traced.count()

    def fault_in_pass(bench: Bench, root: pathlib.Path, fault: str, call: str, n: int, lasting: str) -> str:
        mixed_queue(root)
        run = bench.run(PASS, root, *fault_at(fault, call, n, lasting), passes=2)
        try:
            assert run.status == 0
            assert run.count()[call] < 3 * usual[call] + 20, "it spins"
            assert not any("<LF>" in line or "TRACEBACK" in line for line in run.told)
            sent = {to for line in run.told if line.startswith("MailSentEvent") for to in line.split()[1:]}
            assert lasting or len(sent) >= 2, "it does not go on with the next message"
            assert lasting or sent == set(bench.sink.recipients()), "what was taken is not told"
            given_up = standing(root, ".failed/new") if (root / ".failed/new").is_dir() else []
            assert ("MailErrorEvent refused@x.org" in run.told) == bool(given_up), "what was given up is not told"
            trouble = [line for line in run.told if line.startswith(("log WARN", "log ERR", "log CRIT", "raised"))]
            assert fault == "ENOENT" or len(sent) == 3 or any("failed message-id" not in line for line in trouble)
            for directory in ("new", "cur", "deferred", ".failed/new"):
                standing(root, directory)  # which fails where one is not complete
            assert one_pass(root, bench.sink, time.time() + 3700).outage is None
            assert set(bench.sink.recipients()) == {"plain@x.org", "dead@x.org", "sent@x.org"}
            assert {text for _, text in bench.sink.taken} == {crlf(MESSAGE)}
            assert (standing(root, "new"), standing(root, "cur")) == ([], [])
            assert standing(root, "deferred") == ["deferred@x.org"]
            assert set(standing(root, ".failed/new")) == {"refused@x.org"}
            held = [line for line in run.told if line.startswith("log CRITICAL")]
            assert len(held) <= 1 or lasting
            repeated = len(bench.sink.taken) > 3
            assert held or not repeated
        except Exception as error:
            return f"{fault} at {call} {n}{lasting}: {type(error).__name__} {str(error).splitlines()[0]} {run.told}"
        return "repeated" if repeated else ""

    results = benches.sweep(fault_in_pass, fault_points(traced))
    failures = [result for result in results if result not in ("", "repeated")]
    print(f"a pass: {len(results)} faults, {results.count('repeated')} duplicates after one that could record nothing")
    assert not failures, "\n".join([f"{len(failures)} of {len(results)}", *failures])


@pytest.mark.sweep
def test_no_fault_in_a_commit_leaves_a_message_half_sent(benches: Benches) -> None:
    with benches.one() as bench:
        traced = bench.run(ENQUEUE, bench.directory / "traced enqueue faults", count=3)

    def fault_in_commit(bench: Bench, root: pathlib.Path, fault: str, call: str, n: int, lasting: str) -> str:
        where = f"{fault} at {call} {n}{lasting}"
        run = bench.run(ENQUEUE, root, *fault_at(fault, call, n, lasting), count=3)
        try:
            assert run.status == 0
            assert not any("<LF>" in line or "TRACEBACK" in line for line in run.told)
            (raised,) = [line for line in run.told if line.startswith(("committed", "raised"))]
            stuck = [line.split()[1] for line in run.told if line.startswith("MailErrorEvent")]
            visible = standing(root, "new") if (root / "new").is_dir() else []
            if raised == "committed":
                assert sorted(visible + stuck) == ["plain0@x.org", "plain1@x.org", "plain2@x.org"]
                assert set(stuck) <= set(standing(root, "tmp"))
                assert len(stuck) == sum(line.startswith("log CRITICAL") for line in run.told)
            else:
                assert visible == []
                assert os.strerror(getattr(__import__("errno"), fault)) in raised
        except Exception as error:
            return f"{where}: {type(error).__name__} {str(error).splitlines()[0]} {run.told} {state(root)}"
        return "committed" if raised == "committed" else "raised"

    results = benches.sweep(fault_in_commit, fault_points(traced))
    failures = [result for result in results if result not in ("committed", "raised")]
    print(f"an enqueue: {len(results)} faults, {results.count('committed')} overcome, the others raised")
    assert not failures, "\n".join([f"{len(failures)} of {len(results)}", *failures])


# ------------------------------------------------------------------------------- crashes and faults: order of the calls


@pytest.mark.parametrize("count", [1, 3, 40])
def test_guarantee_4_file_then_name_then_directory_are_durable_before_commit_returns(bench: Bench, count: int) -> None:
    root = bench.directory / f"durable{count}"
    if count == 3:
        Maildir(root)  # by a process that may have died before it was durable
    run = bench.run(ENQUEUE, root, count=count)
    first_file = run.find("openat", f"{root}/tmp/")
    assert run.find("fsync", f"<{root}>") < first_file
    assert run.find("fsync", f"<{root.parent}>") < first_file
    renames = [i for i, (name, text) in enumerate(run.calls) if name == "rename" and f'"{root}/new/' in text]
    files = [run.calls[i][1].split('"')[1] for i in renames]
    syncs = [text.partition("<")[2].partition(">")[0] for name, text in run.calls[first_file:] if name == "fsync"]
    assert sorted(syncs) == sorted([*files, f"{root}/new"]) and len(files) == count
    assert all(run.find("fsync", f"<{file}>") < renames[0] for file in files)
    before = run.calls[: renames[0]]  # what a thread had begun by then had also ended
    unfinished = [text for name, text in before if name == "fsync" and "<unfinished" in text]
    assert len(unfinished) == [name for name, _ in before].count("fsync resumed")
    assert renames[-1] < run.find("fsync", f"<{root}/new>") < run.find("writev", "committed")


@pytest.mark.parametrize("made", [False, True])  # by another process, which may have died before it was durable
@pytest.mark.parametrize(("recipient", "place", "reply", "event"), [
    ("deferred@x.org", "deferred", "450 4.2.1 busy", "MailDeferredEvent"),
    ("refused@x.org", ".failed/new", "550 5.1.1 unknown", "MailErrorEvent")])
def test_guarantee_5_what_is_deferred_or_given_up_is_durable_there(bench, recipient, place, reply, event, made):
    root = bench.directory / f"{recipient} {made}"
    Maildir(root).add("app@x.org", [recipient], MESSAGE)
    for name in DIRECTORIES[3:] * made:
        (root / name).mkdir(0o700)
    run = bench.run(PASS, root)
    replied, rename = run.find("recvfrom", reply), run.find("rename", f'"{root}/{place}/')
    written = run.find("write", f"X-Sendmail-Error: {reply[4:9]} {reply}\\n")
    temporary = run.calls[written][1].partition("<")[2].partition(">")[0]
    assert written < run.find("fsync", f"<{temporary}>") < rename
    assert run.find("fsync", f"<{root}>", replied) < rename < run.find("writev", event)
    if place == ".failed/new":
        assert run.find("fsync", f"<{root}/.failed>", replied) < rename
        assert rename < run.find("fsync", f"<{root}/{place}>", rename) < run.find("writev", event)


def test_guarantee_5_a_list_that_is_shortened_in_place_is_durable_before_the_rest(bench: Bench) -> None:
    root = bench.directory / "shortened"
    Maildir(root).add("app@x.org", ["sent@x.org", "deferred@x.org"], MESSAGE)
    (name,) = state(root)["new"]
    run = bench.run(PASS, root, "-e", "inject=write:error=ENOSPC:when=1+")
    shortened = run.find("pwrite64", "deferred@x.org")
    assert run.find("recvfrom", "Ok: queued") < shortened
    assert shortened < run.find("fsync", f"<{root}/cur/{name}>") < run.find("writev", "MailSentEvent")


def test_guarantee_4_a_requeue_is_durable(bench: Bench) -> None:
    root = bench.directory / "requeued"
    Maildir(root).add("app@x.org", ["refused@x.org"], MESSAGE)
    bench.run(PASS, root)
    run = bench.run("tell(f'status {sendmail.main(arguments)}')", root, arguments=["--maildir", str(root), "--requeue"])
    rename = run.find("rename", f'"{root}/.failed/new/')
    assert rename < run.find("fsync", f"<{root}/new>") < run.find("writev", "status 0")


def test_guarantee_6_nothing_stands_between_the_final_reply_and_what_records_it(bench: Bench) -> None:
    root = bench.directory / "window"
    mixed_queue(root)
    run = bench.run(PASS, root)
    windows = []
    for i, (call, text) in enumerate(run.calls):
        if call == "recvfrom" and "Ok: queued" in text:
            end = next(j for j in range(i, len(run.calls)) if run.calls[j][0] in ("unlink", "rename"))
            windows.append([c for c in run.calls[i + 1 : end + 1] if c[0] not in QUIET])
    unlinks = [window for window in windows if window[-1][0] == "unlink"]
    assert [[call for call, _ in window] for window in unlinks] == [["unlink"], ["unlink"]]
    (replacement,) = [window for window in windows if window not in unlinks]
    writing = {"openat", "newfstatat", "ioctl", "lseek", "fchmod", "write", "fsync", "flock", "close", "rename"}
    assert {call for call, _ in replacement} <= writing
    assert all(f"{root}/tmp/" in text or f"{root}/cur/" in text for _, text in replacement)


# ---------------------------------------------------------------------------- crashes and faults: disks full and broken


@pytest.mark.parametrize("kind", ["queued", "fallback"])
@pytest.mark.parametrize("fault", ["a bad disk", "a bad disk and no thread", "a lost file", "a lost file of many"])
def test_what_cannot_be_made_durable_vetoes_before_a_database_votes(fault, delivery, queue, relay, monkeypatch):
    database, fsync, failed = OtherManager(), os.fsync, []

    def fail_once(fd):  # the second time Linux says that all is well
        if failed:
            return fsync(fd)
        failed.append(fd)
        return disk_error()

    with pytest.raises(OSError), transaction.manager:
        transaction.get().join(database)
        for number in range(2 if fault == "a lost file" else 20):
            delivery.send(SENDER, ANN, a_message(f"n{number}"))
        if fault.startswith("a lost file"):
            os.unlink(f"{queue.path}/tmp/{state(queue)['tmp'][1]}")
        else:
            monkeypatch.setattr(os, "fsync", fail_once)
        if fault.endswith("no thread"):
            monkeypatch.setattr(threading.Thread, "start", lambda _thread: fail_here())
    transaction.abort()
    assert not {"tpc_vote", "tpc_finish"} & set(database.phases)
    assert state(queue) == {} and relay.received == []


@pytest.fixture
def small_disk(tmp_path, request):
    mounted = tmp_path / "small"
    mounted.mkdir()
    size = getattr(request, "param", "64k")
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", mounted]
    ran = subprocess.run(command, capture_output=True, check=False)
    if ran.returncode:
        pytest.skip(f"no right to mount a tmpfs: {ran.stderr.decode().strip()}")
    yield mounted
    subprocess.run(["umount", "-l", mounted], check=True)  # lazily: a claim may be kept


def fill(disk, room=0):
    """Fill a small disk but for *room* bytes."""
    with open(disk / "filler", "ab", buffering=0) as filler:
        with contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
        filler.truncate(filler.seek(0, os.SEEK_END) - room)


@pytest.mark.parametrize("small_disk", ["4m"], indirect=True)
def test_guarantee_5_on_a_full_disk_a_list_of_any_length_is_shortened_in_place_and_nobody_gets_it_twice(small_disk):
    everybody = [f"{number:060}@{'x' * 180}.org" for number in range(5000)]  # over a megabyte
    queue = Maildir(small_disk / "queue")
    queue.add("app@x.org", everybody, MESSAGE)
    fill(small_disk)
    asked = []

    def send(recipients):
        asked.extend(recipients)
        return dict.fromkeys(recipients, Reply(450 if 100 < len(asked) <= 9900 else 250, "so"))

    for hours in range(2):
        one_pass(queue, calling(send), time.time() + 3601 * hours)
        assert standing_recipients(queue) == {"deferred": everybody[100:]}
    assert one_pass(queue, calling(send), time.time() + 3601 * 2).left == 0
    assert asked == everybody + everybody[100:] * 2


def test_guarantee_5_on_a_full_disk_what_is_given_up_is_given_up_once(small_disk, relay, events, run):
    queue = Maildir(small_disk / "queue")
    queue.add("app@x.org", [ANN, BOB], b"X-Filler: 1\n" * 400 + MESSAGE)
    relay.refusals = {ANN: "450 4.2.1 busy", BOB: "550 5.1.1 unknown"}
    fill(small_disk)
    for hours in range(4):
        fill(small_disk, 8192)  # for the copy, but not for the shorter file
        one_pass(queue, relay, time.time() + 3601 * hours)
        assert standing_recipients(queue) == {"deferred": [ANN], ".failed/new": [BOB]}
    os.unlink(small_disk / "filler")
    told = [(type(event), event.toaddrs) for event in events]
    assert told == [(MailErrorEvent, (BOB,)), *[(MailDeferredEvent, (ANN,))] * 4]
    relay.refusals = {}
    assert run("--maildir", queue.path, "--requeue")[0] == 0
    assert one_pass(queue, relay).sent == 2
    assert sorted(received.recipients for received in relay.received) == [[ANN], [BOB]]


@pytest.mark.parametrize("partly", [False, True])
def test_guarantee_6_what_cannot_be_recorded_is_said_once_and_not_sent_again_by_this_process(
    partly, queue, relay, events, monkeypatch, caplog
):
    relay.refusals = {BOB: "450 4.2.1 busy"} if partly else {}
    taken = (ANN,) if partly else (ANN, BOB)

    def live_and_die():
        queue.add(SENDER, [ANN, BOB], MESSAGE)
        processors = [QueueProcessorThread(queue, relay.mailer()) for _ in range(2)]
        with monkeypatch.context() as patch:
            for call in ("unlink", "fsync"):  # without fsync no other file and no shorter list is to be trusted
                patch.setattr(os, call, disk_error)
            for processor in processors * 2:
                processor.process()
        for processor in processors:
            processor._clock = lambda: time.time() + DAY
            assert processor.process().left == 1
        with transaction.manager:
            DirectMailDelivery(relay.mailer(), fallback=queue).send(SENDER, "more@x.org", MESSAGE)
        assert command_line("--maildir", queue.path, *to_relay(relay)).returncode == 0
        assert [event.toaddrs for event in events] == [taken, ("more@x.org",)]
        critical = [record.getMessage() for record in caplog.records if record.levelno == logging.CRITICAL]
        assert len(critical) == 1 and f"{queue.path}/cur/" in critical[0]

    forked(live_and_die)
    assert len(state(queue)["cur"]) == 1
    one_pass(queue, relay)  # the next process knows of a shorter list alone, if the disk has it after all
    assert [tuple(each.recipients) for each in relay.received] == [taken, ("more@x.org",), *[taken] * (not partly)]


# ----------------------------------------------------------------------- crashes and faults: forks, interrupts and bugs


def test_a_fork_cannot_note_anything_in_a_message_that_its_parent_has_claimed(queue):
    claim = queue._claim("new", put(queue, "new/1.x", ANN, BOB).name)
    claim.read()
    before = content(queue)

    def note():
        os.dup2(os.open(claim.path, os.O_RDWR), claim.fd)  # as if it had a claim by the same number
        with pytest.raises(OSError, match="claimed by another process"):
            claim.note([BOB], "")

    forked(note)
    assert content(queue) == before


def test_what_a_fork_aborts_is_still_there_for_the_parent_to_commit(queue):
    QueuedMailDelivery(queue).send(SENDER, ANN, MESSAGE)
    forked(transaction.abort)
    transaction.commit()
    assert state(queue).keys() == {"new"}


def test_a_fork_that_exits_during_a_commit_lets_go_of_nothing_that_its_parent_holds(queue, relay):
    mailer = relay.mailer()

    def send(*arguments):
        if not (child := os.fork()):
            sys.exit()
        os.waitpid(child, 0)
        return mailer.send(*arguments)

    def commit():
        with transaction.manager:
            delivery = DirectMailDelivery(types.SimpleNamespace(send=send), fallback=queue)
            for number in range(3):
                delivery.send(SENDER, f"ann{number}@example.com", MESSAGE)

    forked(commit)
    assert (len(relay.received), state(queue)) == (3, {})


def test_every_fork_hears_its_own_stop(queue):
    processor, gates = QueueProcessorThread(queue, OK, 3600), [os.pipe() for _ in range(8)]

    def run_and_stop(gate):
        thread = threading.Thread(target=processor.run)  # 3.13.0 starts no Thread that was made before the fork
        thread.start()
        select.select([gate], [], [], 20)
        processor.stop()
        thread.join(5)
        assert not thread.is_alive()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        ends = [pool.submit(forked, functools.partial(run_and_stop, reader)) for reader, _ in gates]
        time.sleep(0.3)  # all of them wait by then
        for (_, writer), end in zip(gates, ends):
            os.write(writer, b"x")
            end.result()


@pytest.mark.parametrize(("kind", "told"), [
    ("queued", [MailErrorEvent]), ("fallback", [MailErrorEvent, MailSentEvent]),
    ("fallback, down", [MailErrorEvent, MailDeferredEvent])])
def test_committed_mail_that_cannot_be_renamed_is_kept_for_a_year_and_told_of(kind, told, queue, relay, events, caplog):
    kind, _, down = kind.partition(", ")
    delivery = make_delivery(kind, queue, SMTPMailer("127.0.0.1", closed_port()) if down else relay.mailer())
    ids = [delivery.send(SENDER, ANN, a_message(subject)) for subject in ("stuck", "free")]
    stuck = pathlib.Path(queue.path, "tmp", state(queue)["tmp"][0])
    complete = stuck.read_bytes()
    os.mkdir(f"{queue.path}/new/{stuck.name}")  # a file is never renamed onto a directory
    sendmail.subscribe(lambda _event: os.listdir(f"{queue.path}/tmp") == [stuck.name] or events.clear())
    transaction.commit()
    transaction.abort()
    assert stuck.read_bytes() == complete and stuck.stat().st_mtime > time.time() + 364 * DAY
    assert [type(event) for event in events] == told
    error = events[0]
    assert (error.message_id, error.toaddrs, error.delivery_status[0]) == (ids[0], (ANN,), "5")
    [line] = [record.getMessage() for record in caplog.records if record.levelno == logging.CRITICAL]
    assert str(stuck) in line
    one_pass(queue, relay, time.time() + 360 * DAY)
    assert stuck.exists() and subjects(relay.received) == ["free"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_or_exit_in_a_mailer_is_no_reply_and_the_next_pass_takes_the_message(kind, queue, sink, events):
    queue.add("app@x.org", ["ann@x.org"], MESSAGE)
    with pytest.raises(kind):
        one_pass(queue, giving(kind()))
    assert (list(state(queue)), events) == (["cur"], [])
    assert one_pass(queue, sink).sent == 1


def test_an_exit_of_a_mailer_in_a_thread_is_a_deferral(queue):
    queue.add("app@x.org", ["ann@x.org"], MESSAGE)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert pool.submit(one_pass, queue, giving(SystemExit("bug"))).result().deferred == 1


def test_an_fsync_of_a_new_directory_that_failed_is_logged_and_not_tried_again(queue, sink, monkeypatch, caplog):
    fsync, failed = os.fsync, []

    def failing(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/deferred"):
            failed.append(descriptor)
            raise OSError(errno.EIO, "broken")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    queue.add("app@x.org", ["deferred@x.org"], MESSAGE)
    assert one_pass(queue, sink).deferred == 1
    assert (len(failed), "cannot make" in caplog.text, list(state(queue))) == (1, True, ["deferred"])


@pytest.mark.parametrize(("kind", "where"), [
    ("queued", "rename"), ("fallback", "rename"), ("fallback", "send"), ("direct", "send")])
def test_an_interrupt_within_finish_loses_no_mail_or_tells_of_it(kind, where, queue, relay, events, monkeypatch):
    rename, calls = os.rename, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt  # by its signal handler, which can run between any two lines
        if where == "rename":
            rename(*arguments)

    delivery = make_delivery(kind, queue, relay.mailer() if where == "rename" else calling(interrupted))
    ids = [delivery.send(SENDER, ANN, a_message(f"n{number}")) for number in range(5)]
    if where == "rename":
        monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt) if where == "send" else contextlib.suppress(KeyboardInterrupt):
        transaction.commit()
    transaction.abort()
    assert "tmp" not in state(queue)
    later = MailErrorEvent if kind == "direct" else MailDeferredEvent
    told = [(event.message_id, type(event)) for event in events]
    assert where != "send" or told == list(zip(ids, [MailSentEvent] * 2 + [later] * 3))
    first = {"rename": 0, "send": 2}[where]  # the third is an ordinary dead claim
    assert sorted(delivered(queue, relay)) == [f"n{number}" for number in range(first, 5 * (kind != "direct"))]


@pytest.mark.parametrize("kind", ["queued", "direct"])
def test_a_bug_in_finish_reaches_no_commit_and_shows_no_message_in_the_log(delivery, kind, queue, monkeypatch, caplog):
    delivery.send(SENDER, ANN, MESSAGE + b"token=secret\n")
    monkeypatch.setattr(Maildir, "_wake", lambda _queue: fail_here())
    monkeypatch.setattr(sendmail, "_groups", lambda _recipients: fail_here())
    transaction.commit()
    assert list(state(queue)) == ["new"] * (kind == "queued")
    assert caplog.records[-1].levelno == logging.CRITICAL
    assert ANN in caplog.text and "secret" not in caplog.text


# -------------------------------------------------------------------------------------- crashes and faults: power cuts

STATES = 4000  # of each workload, by default; hardly any has more, unless the module is wrong


class TellingMailer:
    """A relay that defers and refuses recipients by their names, and tells for whom it takes a message."""

    def __init__(self, tell):
        self.tell = tell

    def send(self, _fromaddr, toaddrs, _message):
        codes = {address: {"deferr": 450, "refuse": 550}.get(address[:6], 250) for address in toaddrs}
        self.tell(" ".join(["sent", *(address for address in toaddrs if codes[address] == 250)]))
        return {address: sendmail.Reply(code, "said so") for address, code in codes.items()}


RECORDED = inspect.getsource(TellingMailer) + """
def send(delivery, *addresses):
    for address in addresses:
        delivery.send("app@x.org", address.split(), message)

def commit(delivery, *addresses, dropped=()):
    send(delivery, *addresses)
    point = transaction.savepoint()
    send(delivery, *dropped)
    point.rollback()
    tell(" ".join(["may", *addresses]))
    transaction.commit()
    tell(" ".join(["must", *addresses]))

def make_pass(now):
    processor = sendmail.QueueProcessorThread(path, TellingMailer(tell))
    processor._clock = lambda: now
    processor.process()
"""
QUEUED = "sendmail.QueuedMailDelivery(path)"
MIXED = ["new plain", "new sent deferred refused", "cur dead", "new refused2", "new deferred2 deferred3"]
WORKLOADS = {  # what stands in the queue, and what is done then
    "creation": ([], "sendmail.Maildir(path)"),
    "add": ([], "tell('may a@x.org'); sendmail.Maildir(path).add('app@x.org', 'a@x.org', message); "
                "tell('must a@x.org')"),
    "a commit of 1": ([], f"commit({QUEUED}, 'a@x.org')"),
    "a commit of 3": ([], f"commit({QUEUED}, 'a@x.org', 'b@x.org c@x.org', 'd@x.org')"),
    "a commit of 20": ([], f"commit({QUEUED}, *[f'{{n}}@x.org' for n in range(20)])"),
    "an abort": ([], f"send({QUEUED}, 'never@x.org'); transaction.abort(); commit({QUEUED}, 'a@x.org')"),
    "a savepoint": ([], f"commit({QUEUED}, 'a@x.org', dropped=['never@x.org'])"),
    "a pass": (MIXED, "make_pass(time.time())"),
    "a later pass": ([*MIXED, "pass"], "make_pass(time.time() + 7200)"),
    "a requeue": ([*MIXED, "pass"], "sendmail.main(['--maildir', path, '--requeue'])"),
    "a direct delivery": ([], "commit(sendmail.DirectMailDelivery(TellingMailer(tell), fallback=path), "
                              "'a@x.org', 'b@x.org deferred@x.org refused@x.org')"),
}


def snapshot(top: pathlib.Path) -> dict[str, bytes | None]:
    """What stands at each path of the queue; None is a directory."""
    paths = [path for path in (top / "q", *top.glob("q/**/*")) if path.is_dir() or path.is_file()]
    return {str(path.relative_to(top)): None if path.is_dir() else path.read_bytes() for path in paths}


def lay_out(top: pathlib.Path, disk: dict[str, bytes | None]) -> pathlib.Path:
    """Make the directory hold just this, and return the path of the queue."""
    shutil.rmtree(top, ignore_errors=True)
    top.mkdir()
    for path, content in sorted(disk.items()):
        if content is None:
            os.mkdir(top / path, 0o700)
        else:
            (top / path).write_bytes(content)
    return top / "q"


def stage(top: pathlib.Path, instructions: list[str]) -> dict[str, bytes | None]:
    """Make a queue of messages that are new, that a dead process had claimed in cur/, or that a pass has seen."""
    for where, *recipients in map(str.split, instructions):
        if where == "pass":
            QueueProcessorThread(top / "q", TellingMailer(str)).process()
            continue
        Maildir(top / "q").add("app@x.org", [f"{name}@x.org" for name in recipients], MESSAGE)
        if where == "cur":
            path = max((top / "q/new").iterdir())
            path.rename(top / "q/cur" / path.name)
    return snapshot(top)


def named_in(content: bytes | None) -> list[str]:
    """The recipients of a file."""
    return (content or b"").partition(b"X-Zope-To: ")[2].partition(b"\n")[0].decode().replace(",", "").split()


def drained(queue: pathlib.Path) -> tuple[collections.Counter[str], list[str]]:
    """Send all that a queue holds, hours later: the copies that each recipient gets, and those who were given up."""
    taken: list[tuple[str, bytes]] = []
    mailer = types.SimpleNamespace(send=lambda _, toaddrs, message: taken.extend((a, message) for a in toaddrs))
    processor = QueueProcessorThread(queue, mailer)
    processor._clock = lambda: time.time() + 4 * 3600
    assert processor.process().left == 0, "something is left"
    assert {message for _, message in taken} <= {MESSAGE}, "a part was sent"
    return collections.Counter(address for address, _ in taken), standing(queue, ".failed/new")


CALL = r"(open|mkdir|rename|unlink|write|fsync|getppid)\w*\((?:\d+<([^>]*)>)?(.*)\) += \d+(?:<.*>)?"  # strace's line


class Step(NamedTuple):
    """A call of a recorded run: what it did to names, to the content of a file, to the disk, or what it told."""

    began: int  # the number of steps before the call; another thread's may stand between it and its end
    names: dict[str, int | None] = {}  # to inodes: 0 is a directory, None that it is gone
    inode: int | None = None
    content: bytes = b""
    synced: int | str | None = None  # the inode of a file, or the path of a directory
    told: str = ""
    removed: list[str] = []  # the recipients who lose a name outside tmp/


def recorded(trace: list[str], top: pathlib.Path, before: dict[str, bytes | None]) -> list[Step]:
    """Return the steps of a run under strace, after those that made what stood there before."""
    steps: list[Step] = []
    names: dict[str, int | None] = {}
    contents = {0: b""}
    unfinished: dict[str, tuple[int, str]] = {}

    def name(began: int, changes: dict[str, int | None]) -> None:
        left = [names.get(path) or 0 for path in changes if not path.startswith("q/tmp/")]
        removed = [recipient for inode in left for recipient in named_in(contents[inode])]
        steps.append(Step(began, names=changes, removed=removed))
        names.update(changes)

    def create(began: int, path: str, content: bytes = b"") -> None:
        contents[len(contents)] = content
        name(began, {path: len(contents) - 1})
        steps.append(Step(began, inode=names[path], content=content))

    for path, content in sorted(before.items()):
        if content is None:
            name(-1, {path: 0})
        else:
            create(-1, path, content)
    for line in trace:
        pid, text = line.split(None, 1)
        began = len(steps)
        if text.endswith("<unfinished ...>"):
            unfinished[pid] = began, text.removesuffix("<unfinished ...>")
        elif text.startswith("<... "):
            began, call = unfinished[pid]
            text = call + text.partition(" resumed>")[2]
        found = re.fullmatch(CALL, text)
        call, *strings = [found[1], found[2] or "", *re.findall(r'"((?:[^"\\]|\\.)*)"', found[3])] if found else [""]
        paths = [os.path.normpath(string).replace(str(top), ".").removeprefix("./") for string in strings]
        if call == "getppid":
            break
        elif call == "write" and paths[0] == "q.account":
            steps.append(Step(began, told=strings[1].removesuffix(r"\n")))
        elif call == "write" and names.get(paths[0]):
            inode = names[paths[0]]
            contents[inode] += "".join(strings[1:]).encode().decode("unicode_escape").encode("latin-1")
            steps.append(Step(began, inode=inode, content=contents[inode]))
        elif call == "fsync":
            steps.append(Step(began, synced=names.get(paths[0]) or paths[0]))
        elif call == "open" and "O_CREAT" in found[3] and paths[1].startswith("q/") and names.get(paths[1]) is None:
            create(began, paths[1])
        elif call == "mkdir":
            name(began, {paths[1]: 0})
        elif call == "rename":
            name(began, {paths[1]: None, paths[2]: names[paths[1]]})
        elif call == "unlink":
            name(began, {paths[1]: None})
    there = {path: contents[inode] if inode else None for path, inode in names.items() if inode is not None}
    assert there == snapshot(top), "the recording does not tell all that was done"
    return steps


def choices(alternatives: list[int]) -> Iterator[tuple[int, ...]]:
    """Yield all combinations where they are few; else none, all, each alone present and each alone missing."""
    if math.prod(alternatives) <= 256:
        yield from itertools.product(*map(range, alternatives))
        return
    for common in ([0] * len(alternatives), [n - 1 for n in alternatives]):
        yield tuple(common)
        for i, n in enumerate(alternatives):
            yield from ((*common[:i], other, *common[i + 1 :]) for other in range(n) if other != common[i])


def names_kept(steps: list[Step], start: int, weak: bool) -> Iterator[set[int]]:
    """Yield the sets of steps whose names a disk may hold after the last of them.

    An ordered disk, as of ext4, keeps names in order, and with any fsync all that were there when it was called.
    A weak one, as POSIX allows it, keeps what it likes, and with the fsync of a directory the names in that.
    """
    syncs = [step for step in steps if step.synced is not None]
    if not weak:
        last = max([start, *(sync.began for sync in syncs)])
        yield from (set(range(end)) for end in range(last, len(steps) + 1))
        return
    kept, later, uncertain = set(range(start)), set(), []
    for i in range(len(steps) - 1, start - 1, -1):
        directories = {os.path.dirname(path) or "." for path in steps[i].names}
        if any(sync.began > i and sync.synced in directories for sync in syncs):
            later |= steps[i].names.keys()
        if steps[i].names.keys() <= later:
            kept.add(i)  # it is on the disk, or what followed it is
        else:
            uncertain.append(i)
    for chosen in choices([2] * len(uncertain)):
        yield kept | {i for i, there in zip(uncertain, chosen) if there}


def contents_kept(steps: list[Step], start: int) -> dict[int, list[bytes | None]]:
    """Return what a disk may hold of each inode: what had an fsync, all that was written, or a part of that."""
    kept: dict[int, list[bytes | None]] = {0: [None]}
    for inode in {inode for step in steps for inode in step.names.values() if inode}:
        durable = max([start, *(step.began for step in steps if step.synced == inode)])
        least = max((step.content for step in steps[:durable] if step.inode == inode), key=len, default=b"")
        most = max((step.content for step in steps if step.inode == inode), key=len, default=b"")
        kept[inode] = [most] if least == most else [least, most[: (len(least) + 2 * len(most)) // 3], most]
    return kept


def states(steps: list[Step], weak: bool) -> Iterator[tuple[int, list[str], dict[str, bytes | None]]]:
    """Yield each moment of a run, whose removal may not have reached the disk by then, and all that it may hold."""
    start = sum(step.began < 0 for step in steps)
    seen = set()
    for moment in range(start, len(steps) + 1):
        told = sum(bool(step.told) for step in steps[:moment])
        contents = contents_kept(steps[:moment], start)
        for kept in names_kept(steps[:moment], start, weak):
            removable = [r for i, step in enumerate(steps) if i not in kept for r in step.removed]
            names = {path: inode for i in sorted(kept) for path, inode in steps[i].names.items()}
            tree: dict[str, int] = {}
            for path, inode in sorted(names.items()):
                if inode is not None and (path == "q" or tree.get(os.path.dirname(path)) == 0):
                    tree[path] = inode
            for chosen in choices([len(contents[inode]) for inode in tree.values()]):
                disk = {path: contents[inode][n] for (path, inode), n in zip(tree.items(), chosen)}
                if (key := (told, frozenset(disk.items()))) not in seen:
                    seen.add(key)
                    yield moment, removable, disk


def check_power_cut(queue: pathlib.Path, steps: list[Step], removable: list[str]) -> None:
    """Whoever was promised a message gets it, whole, and nobody else; again only if the disk had not removed it yet."""
    told = collections.defaultdict(list)
    for step in steps:
        word, *recipients = step.told.split() or [""]
        told[word] += recipients
        told["must"] += named_in(step.content) if step.began < 0 else []
    copies, failed = drained(queue)
    assert copies.keys() <= {*told["may"], *told["must"]}, "sent, but never committed"
    copies.update(told["sent"])
    lost = set(told["must"]) - {*copies, *failed}
    assert not lost, f"lost: {lost}"
    repeated = {r for r in copies if copies[r] > 1 + removable.count(r)}
    assert not repeated, f"sent again, though the disk had removed it: {repeated}"


def cut_power(case: tuple[str, list[Step], bool]) -> tuple[str, list[str]]:
    """Check what a disk may hold after each moment of a run; return what was done, and what is wrong."""
    name, steps, weak = case
    logging.disable()
    possible = list(states(steps, weak))
    chosen = possible if EVERYTHING else random.Random(name).sample(possible, min(len(possible), STATES))
    wrong = []
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        for moment, removable, disk in chosen:
            try:
                check_power_cut(lay_out(pathlib.Path(directory, "top"), disk), steps[:moment], removable)
            except Exception as error:
                told = [step.told for step in steps[:moment] if step.told]
                lines = [f"{name}: {error!r:.300}", *told, "the disk:", *map(str, sorted(disk.items()))]
                wrong.append("\n".join(lines))
    moments = sum(step.began >= 0 for step in steps)
    return f"{name}: {moments} moments, {len(chosen)} of {len(possible)} states, {len(wrong)} wrong", wrong


def side_by_side(work: Callable[[Any], tuple[str, list[str]]], cases: list[Any]) -> None:
    """Do the work for each case, two at a time, in forked processes; say what was done, and fail if it is wrong."""
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        results = list(pool.map(work, cases))
    print(*(summary for summary, _ in results), sep="\n")
    wrong = [complaint for _, complaints in results for complaint in complaints]
    assert not wrong, wrong[0]


@pytest.mark.sweep
@UNLIMITED
def test_guarantee_4_no_power_cut_loses_or_repeats_what_was_committed_or_sends_a_part_of_it(benches: Benches) -> None:
    """After ALICE (OSDI 2014): what a disk may hold after every call of real runs, drained by a processor.

    Not modelled: torn renames (the old name gone, the new one not there), disks that lie about fsync, and NFS.
    """
    cases = []
    with benches.one() as bench:
        for number, (name, (instructions, code)) in enumerate(WORKLOADS.items()):
            top = bench.directory / f"power{number}"
            top.mkdir()
            before = stage(top, instructions)
            calls = "trace=/^(open|mkdir|rename|unlink|write|fsync|getppid)"
            run = bench.run(RECORDED + code, top / "q", "-s", "65536", "-e", calls)
            assert run.status == 0 and not [line for line in run.told if "raised" in line], run.told
            steps = recorded((top / "q.trace").read_text().splitlines(), top, before)
            cases += [(f"{name}, {'weak' if weak else 'ordered'}", steps, weak) for weak in (False, True)]
    side_by_side(cut_power, cases)


@pytest.mark.sweep
def test_guarantees_1_and_4_no_kill_loses_what_was_committed_or_sends_a_part_of_it(benches: Benches) -> None:
    """Killed at every system call of every workload, a process repeats at most the message in hand."""

    def run(bench: Bench, top: pathlib.Path, name: str, *point: Any) -> Run:
        instructions, code = WORKLOADS[name]
        top.mkdir()
        before = stage(top, instructions)
        inject = ["-e", "inject={}:signal=SIGKILL:when={}".format(*point)] if point else []
        done = bench.run(RECORDED + code, top / "q", *inject)
        Maildir(top / "q")  # which completes it, if need be
        stood = [Step(-1, content=content or b"") for content in before.values()]
        word, *in_hand = done.told[-1].split() if done.told else [""]
        check_power_cut(top / "q", stood + [Step(0, told=line) for line in done.told], in_hand * (word == "sent"))
        return done

    names = [name for name in WORKLOADS if name != "a commit of 20"]  # whose threads make their calls in any order
    points = [(name, call, n + 1) for name, done in zip(names, benches.sweep(run, [(name,) for name in names]))
              for call, count in done.count().items() if call not in QUIET for n in range(count)]
    statuses = [done.status for done in benches.sweep(run, points)]
    print(f"{len(points)} kill points, {statuses.count(-signal.SIGKILL)} kills")
    assert statuses.count(-signal.SIGKILL) >= 0.9 * len(points)


# ------------------------------------------------------------------------------------ crashes and faults: interleavings

SCHEDULES = 250  # of each number of decisions, in each encounter, by default
LATER = time.time() + 2 * 3600  # the hour of every pass, or the same schedule would not always be the same
GATED = {os: "open close dup2 rename replace link unlink mkdir rmdir lstat stat scandir listdir", fcntl: "flock"}
LASTING = ("rename", "replace", "link", "unlink", "mkdir", "rmdir", "flock", "close", "dup2", "sent")


def processing(queue, mailer):
    processor = QueueProcessorThread(queue, mailer)
    processor._clock = lambda: LATER
    return processor.process


def committing(delivery, *recipients):
    delivery.send("app@x.org", recipients, MESSAGE)
    transaction.commit()
    return recipients


def queueing(queue, _mailer):
    return functools.partial(committing, QueuedMailDelivery(queue), "queued@x.org")


def delivering(queue, mailer):
    return functools.partial(committing, DirectMailDelivery(mailer, fallback=queue), "a@x.org", "deferred-a@x.org")


def adding(queue, _mailer):
    recipient = f"{os.getpid()}@x.org"
    return lambda: Maildir(queue).add("app@x.org", recipient, MESSAGE) and (recipient,)


def calling_main(option):
    def call(queue):
        assert sendmail.main(["--maildir", queue, option]) == 0

    return lambda queue, _mailer: functools.partial(call, queue)


ENCOUNTERS = {  # what stands in the queue, and who meets there
    "two processors": (["new plain"], processing, processing),
    "two processors and a deferral": (["new sent deferred refused"], processing, processing),
    "two processors and a retry": (["new deferred", "pass"], processing, processing),
    "two processors and an abandoned claim": (["cur sent deferred", "new plain"], processing, processing),
    "a processor and a sender": (["new plain"], processing, queueing),
    "a processor and --requeue": (["new refused", "new deferred", "pass"], processing, calling_main("--requeue")),
    "a processor and --list": (["new sent deferred", "new plain"], processing, calling_main("--list")),
    "a processor and a direct delivery": (["new plain"], processing, delivering),
    "--requeue and a direct delivery": (["new refused", "pass"], calling_main("--requeue"), delivering),
    "two that create": ([], adding, adding),
    "two that requeue": (["new refused", "new deferred", "pass"], calling_main("--requeue"), calling_main("--requeue")),
    "two processors and --requeue": (["new deferred", "pass"], processing, processing, calling_main("--requeue")),
    "two processors and a sender": (["cur sent deferred"], processing, processing, queueing),
}


def subject(call, arguments, locked):
    """What a call is about, if another actor could notice it: a lock, a list, a message, but not one's own in tmp/."""
    if call in ("close", "dup2") and arguments[0] not in locked:
        return ""
    paths = [os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
             for path in arguments[: 2 if call in ("rename", "replace", "link") else 1]]
    named = call in ("open", "lstat", "stat", "flock", "dup2", "unlink")
    if not re.fullmatch(r".*/top/q(/(new|cur|deferred|\.failed/\w+)/.*)?" if named else r".*/top/q(/.*)?", paths[0]):
        return ""
    unlocking = call == "flock" and arguments[1] == fcntl.LOCK_UN
    return " ".join([path.partition("/top/")[2] for path in paths] + ["LOCK_UN"] * unlocking)


def act(role, queue, report, token):
    """The life of an actor: prepare for its role, play it, with a token for each call, and then once more."""
    locked, playing = set(), False

    def say(line):
        os.write(report, line.replace("\n", " ").encode() + b"\n")

    def wait():
        if not os.read(token, 1):
            os._exit(0)

    def gated(name, call):
        def wait_and_call(*arguments, **keywords):
            if playing and (about := subject(name, arguments, locked)):
                say(f"{name} {about}")
                wait()
            result = call(*arguments, **keywords)
            if name == "flock" and arguments[1] != fcntl.LOCK_UN:
                locked.add(arguments[0])
            elif name in ("flock", "close"):
                locked.discard(arguments[0])
            return result

        return wait_and_call

    for module, names in GATED.items():
        for name in names.split():
            setattr(module, name, gated(name, getattr(module, name)))
    log = logging.getLogger("sendmail")
    log.propagate = False
    log.handlers = [logging.Handler(logging.WARNING)]
    log.handlers[0].emit = lambda record: "reply=" in record.getMessage() or say(f"! {record.getMessage()}")
    while True:
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
        locked.clear()
        try:
            work = role(str(queue), TellingMailer(lambda line: (say(line), wait())))
            playing = True
            promised = work()
        except BaseException as error:
            say(f"! raised {error!r}")
        playing = False
        if sys.stderr.getvalue():
            say(f"! {sys.stderr.getvalue()}")
        say(" ".join(["done", *(promised if isinstance(promised, tuple) else ())]))
        wait()


class Actor:
    """A process that waits for a token before each of its calls."""

    def __init__(self, role, queue):
        self.lines, report = os.pipe()
        token, self.token = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.token)
            try:
                act(role, queue, report, token)
            finally:
                os._exit(1)
        os.close(report)
        os.close(token)
        self.begin()

    def begin(self):
        self.last, self.sent, self.unsettled, self.promised = "", [], [], []
        self.listen()

    def listen(self):
        """Learn what call it waits to make; none at its end."""
        text = ""
        while not text.endswith("\n"):
            assert select.select([self.lines], [], [], 30)[0], "it hangs"
            chunk = os.read(self.lines, 1 << 16)
            assert chunk, "it died"
            text += chunk.decode()
            assert not text.startswith("!"), text
        self.next = text.strip()
        if self.next.startswith("done"):
            self.promised = self.next.split()[1:]
            self.next = ""

    def step(self):
        self.last, *words = self.next.split()
        if self.last == "sent":
            self.sent += words
            self.unsettled = words
        elif self.last in ("rename", "replace", "unlink"):
            self.unsettled = []
        os.write(self.token, b".")
        self.listen()

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.lines)
        os.close(self.token)
        self.next = ""


def holders(path):
    """The processes that hold a lock on the file that stands at a path now."""
    locks = re.findall(r"FLOCK +ADVISORY +WRITE (\d+) \S+:(\d+) ", pathlib.Path("/proc/locks").read_text())
    return {int(pid) for pid, inode in locks if path.exists() and path.stat().st_ino == int(inode)}


class Play:
    """A schedule played: a list of decisions, each of them a number of steps, and whom to 'run' or to 'kill' then."""

    def __init__(self, roles, disk, schedule, top, company):
        self.schedule, self.disk, self.company = schedule, disk, company
        self.queue = lay_out(top, disk)
        self.turns, self.lines, self.switches, self.dead, self.repeatable = [], [], 0, None, []
        self.names = {}  # of the messages, as they are printed: m1, m2, in the order of their appearance
        self.shortened(str(sorted(disk)))
        self.complaint = ""
        try:
            for name, role in zip("ABC", roles):
                if name in company:
                    os.write(company[name].token, b".")
                    company[name].begin()
                else:
                    company[name] = Actor(role, self.queue)
            self.actors = dict(sorted(company.items()))
            self.perform()
            self.judge()
        except Exception as error:
            self.complaint = (str(error) or repr(error)).partition("\n")[0]
            while company:
                company.popitem()[1].kill()

    def shortened(self, line):
        def short(found):
            return self.names.setdefault(found[0], f"m{len(self.names) + 1}")

        return re.sub(r"\d{10}\.M[^ /']+", short, line)

    def perform(self):
        decisions, turn = list(self.schedule), ""
        while running := [name for name, actor in self.actors.items() if actor.next]:
            forced = turn not in running
            turn = running[0] if forced else turn
            while decisions and decisions[0][0] == len(self.turns):
                _, deed, name = decisions.pop(0)
                if deed == "run":
                    self.switches += not forced
                    turn = name
                else:
                    self.lines.append(self.shortened(f"    {name} is killed before: {self.actors[name].next}"))
                    self.dead, self.repeatable = self.actors[name].pid, self.actors[name].unsettled
                    self.company.pop(name).kill()
            actor = self.actors[turn]
            if actor.next:
                known = set(self.names)
                self.lines.append(self.shortened(f"{len(self.turns):3} {turn} {actor.next}"))
                self.turns.append((turn, forced, {name: self.actors[name].last for name in running}, actor.next))
                self.check(actor, known)
                actor.step()
        assert not decisions, "the schedule does not fit"

    def check(self, actor, known):
        """Guarantee 2: only who has the lock on what stands there moves, replaces or unlinks it.  Names are fresh."""
        call, *paths = actor.next.split()
        if call not in ("rename", "replace", "unlink"):
            return
        source, *targets = [self.queue.parent / path for path in paths]
        written = source.parent.name == "tmp"
        assert written or holders(source) == {actor.pid}, "it has not the lock"
        for target in targets:
            if written and target.parent.name == "cur":
                assert holders(source) == holders(target) == {actor.pid}, "it has not both locks"
            else:
                assert not target.exists(), "something is in the way"
            released = source.parent.name == "cur" and target.parent == self.queue / "new"
            assert target.parent.name != "new" or released or target.name not in known, "the name is not fresh"

    def judge(self):
        """Every recipient has the message once, but after a death in the window; and only the dead leave something."""
        litter = [name for name in os.listdir(self.queue / "tmp") if f"P{self.dead}Q" not in name]
        assert not litter, "something is left in tmp/"
        copies, failed = drained(self.queue)
        copies.update(r for actor in self.actors.values() for r in actor.sent)
        expected = [r for content in self.disk.values() for r in named_in(content)]
        lost = {*expected, *(r for actor in self.actors.values() for r in actor.promised)} - {*copies, *failed}
        assert not lost, f"lost: {lost}"
        repeated = {r for r in copies if copies[r] + (r in failed and not self.dead) > 1 + (r in self.repeatable)}
        assert not repeated, f"sent again: {repeated}"

    def followers(self):
        """Yield the schedules with one decision more: at most two changes without need, and one death."""
        start = self.schedule[-1][0] + 1 if self.schedule else 0
        for step in range(start, len(self.turns)):
            turn, forced, last, call = self.turns[step]
            for name in last:
                if name != turn and (forced or self.switches < 2):
                    yield [*self.schedule, (step, "run", name)]
                # others can only notice what was done before a death, and that a lock is free
                if not self.dead and (last[name] in ("", *LASTING) if name == turn else call.startswith("flock")):
                    yield [*self.schedule, (step, "kill", name)]


def play_all(name, only=None):
    """Play the schedules of an encounter, those with fewer decisions first; return what was done, and what is wrong."""
    instructions, *roles = ENCOUNTERS[name]
    chance = random.Random(name)
    company, wrong, played, left_out = {}, [], 0, 0
    schedules = [only or []]
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        disk = stage(pathlib.Path(directory), instructions)
        while schedules:
            followers = []
            for schedule in schedules:
                play = Play(roles, disk, schedule, pathlib.Path(directory, "top"), company)
                played += 1
                if play.complaint or only is not None:
                    replay = f"SENDMAIL_TEST_REPLAY='{json.dumps([name, schedule])}'"
                    wrong.append("\n".join([*play.lines, play.complaint or "nothing is wrong", replay]))
                followers += play.followers()
            if only is not None:
                followers = []
            few = followers if EVERYTHING else chance.sample(followers, min(len(followers), SCHEDULES))
            left_out += len(followers) - len(few)
            schedules = few
    for actor in company.values():
        actor.kill()
    return f"{name}: {played} schedules, at least {left_out} left out, {len(wrong)} wrong", wrong


@pytest.mark.sweep
@UNLIMITED
def test_guarantees_2_and_3_hold_in_whatever_order_processes_meet() -> None:
    """After CHESS (OSDI 2008): real processes and locks, one call at a time, in all orders with at most two changes
    of the actor that were not needed, and the death of one of them anywhere.
    """
    if replay := os.environ.get("SENDMAIL_TEST_REPLAY"):
        pytest.fail(play_all(*json.loads(replay))[1][0])
    side_by_side(play_all, list(ENCOUNTERS))


# --------------------------------------------------------------------------------------- transactions: the data manager


def test_one_data_manager_per_delivery_and_transaction_keeps_the_interface(kind, queue, relay):
    delivery, other = (make_delivery(kind, queue, relay.mailer()) for _ in range(2))
    database = OtherManager(key="~sqlalchemy:139872398472398")
    transaction.get().join(database)
    for _ in range(3):
        delivery.send(SENDER, ANN, MESSAGE)
    other.send(SENDER, ANN, MESSAGE)
    _, first, second = transaction.get()._resources
    for manager in (first, second):
        assert verifyObject(ISavepointDataManager, manager, tentative=True)
        assert manager.transaction_manager is transaction.manager
        assert manager.sortKey() > database.sortKey()
    assert first.sortKey() != second.sortKey()


@pytest.mark.parametrize("calls", [
    "abort", "tpc_abort", "abort tpc_abort", "abort abort tpc_abort tpc_abort", "tpc_begin tpc_abort abort",
    "tpc_begin abort tpc_abort", "tpc_begin commit abort tpc_abort", "tpc_begin commit commit tpc_abort tpc_abort",
    "tpc_begin commit tpc_vote tpc_abort", "tpc_begin commit tpc_vote tpc_vote abort tpc_abort abort tpc_finish",
])
def test_an_aborted_data_manager_leaves_nothing_in_whatever_order_it_is_called(calls, delivery, queue, relay, events):
    delivery.send(SENDER, ANN, MESSAGE)
    current = transaction.get()
    [manager] = current._resources
    for call in calls.split():
        getattr(manager, call)(current)
    assert state(queue) == {} and relay.received == []
    manager.savepoint().rollback()
    transaction.abort()
    assert state(queue) == {} and relay.received == [] and events == []


@pytest.mark.parametrize("calls", [
    "abort", "tpc_abort", "abort tpc_abort", "tpc_abort abort", "tpc_finish", "tpc_finish tpc_abort",
    "tpc_begin commit tpc_vote tpc_finish", "tpc_begin commit tpc_vote tpc_abort", "savepoint abort",
])
def test_a_finished_data_manager_touches_nothing_in_whatever_order_it_is_called(calls, delivery, kind, queue, relay):
    delivery.send(SENDER, ANN, MESSAGE)
    current = transaction.get()
    [manager] = current._resources
    before = manager.savepoint()
    transaction.commit()
    after, files = content(queue), state(queue)
    assert list(files) == (["new"] if kind == "queued" else [])
    for call in calls.split():
        manager.savepoint().rollback() if call == "savepoint" else getattr(manager, call)(current)
    before.rollback()
    assert (content(queue), state(queue)) == (after, files)
    assert delivered(queue, relay) == ["Hello"]


# upper and lower case: two deliveries; a digit: a savepoint; <digit: a rollback to it
@pytest.mark.parametrize("script, expected", [
    ("a 1 b <1", "a"),
    ("1 a <1", ""),
    ("1 a <1 b", "b"),
    ("1 a <1 b <1 c", "c"),
    ("a 1 <1 <1 b", "ab"),
    ("a 1 b 2 c <1 d", "ad"),
    ("a 1 b 2 c <2 d", "abd"),
    ("1 a 2 b <2 c <1 d", "d"),
    ("1 a 2 b <1 <1", ""),
    ("1 a <1 2 b 3 c <3 d <2 e", "e"),
    ("a 1 A b <1 B", "aB"),
    ("a 1 A 2 b B <2 c C", "aAcC"),
    ("1 a A <1 B", "B"),
])
def test_a_rollback_drops_exactly_what_was_sent_after_the_savepoint(script, expected, kind, queue, relay):
    lower, upper = (make_delivery(kind, queue, relay.mailer()) for _ in range(2))
    savepoints = {}
    for step in script.split():
        if step[0] == "<":
            savepoints[step[1]].rollback()
        elif step.isdigit():
            savepoints[step] = transaction.savepoint()
        else:
            (lower if step.islower() else upper).send(SENDER, ANN, a_message(step))
    assert sorted(subjects(content(queue))) == (sorted(expected) if kind != "direct" else [])
    transaction.commit()
    assert sorted(delivered(queue, relay)) == sorted(expected)


def test_deliveries_at_the_same_address_are_never_mixed_up(kind, tmp_path):
    queues = [Maildir(tmp_path / str(number)) for number in range(20)]
    seen = [[] for _ in queues]
    for number, queue in enumerate(queues):
        mailer = types.SimpleNamespace(send=lambda _from, _to, message, into=seen[number]: into.append(message))
        make_delivery(kind, queue, mailer).send(SENDER, ANN, a_message(f"n{number}"))
        gc.collect()
    transaction.commit()
    for number, queue in enumerate(queues):
        assert subjects(content(queue) + seen[number]) == [f"n{number}"]


# --------------------------------------------------------------------------- transactions that come to nothing, or late


@pytest.mark.parametrize("key", ["database", "~~~~"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_data_manager_that_fails_stops_the_mail_unless_it_is_let_go(phase, key, delivery, kind, queue, relay, events):
    delivery.send(SENDER, ANN, a_message("one"))
    transaction.get().join(OtherManager(phase, fail_here, key))
    with pytest.raises(RuntimeError, match="broken"):
        transaction.commit()
    let_go = phase == "tpc_finish" and key == "~~~~"
    assert bool(state(queue)) == (let_go and kind == "queued")
    assert len(events) == (let_go and kind != "queued")  # whatever the status of the commit
    transaction.abort()
    with transaction.manager:
        delivery.send(SENDER, ANN, a_message("two"))
    assert delivered(queue, relay) == (["one", "two"] if let_go else ["two"])


@pytest.mark.parametrize(("phase", "key"), [("tpc_vote", "~~~~"), ("tpc_finish", "~sqlalchemy:1")])
def test_nothing_shows_before_all_have_voted_and_the_databases_are_finished(phase, key, delivery, kind, queue, relay):
    seen = []

    def look():
        seen.append((one_pass(queue, relay).left, list(state(queue)), relay.received[:]))

    other = OtherManager(phase, look, key)
    transaction.get().join(other)
    delivery.send(SENDER, ANN, a_message("one"))
    transaction.commit()
    assert kind != "queued" or other.phases == PHASES  # after a hook, for what there is to tell, an abort would follow
    assert seen == [(0, ["tmp"] * (kind != "direct"), [])]
    assert delivered(queue, relay) == ["one"]


@pytest.mark.parametrize("key", ["database", "~~~~"])
@pytest.mark.parametrize("when", ["before the commit", *PHASES, "after the commit"])
@pytest.mark.parametrize("joined", [True, False])
def test_what_is_sent_during_a_commit_goes_out_or_is_refused(joined, when, key, delivery, queue, relay):
    accepted, refused = [], []

    def send(*_committed):
        try:
            accepted.append(delivery.send(SENDER, ANN, a_message("late")))
        except ValueError as error:
            refused.append(error)

    if joined:
        delivery.send(SENDER, ANN, a_message("one"))
    current = transaction.get()
    current.addBeforeCommitHook(send) if when == "before the commit" else None
    current.addAfterCommitHook(send) if when == "after the commit" else None
    current.join(OtherManager(when, send, key))
    transaction.commit()
    transaction.commit()  # before version 3 of `transaction`, hooks after the commit are in the next one
    assert len(accepted) + len(refused) == 1
    assert accepted or when != "before the commit"
    assert delivered(queue, relay) == ["one"] * joined + ["late"] * len(accepted)


# ----------------------------------------------------------------------------------------- transactions: their managers


def test_an_explicit_manager_rules_its_deliveries_and_no_other(kind, queue, relay):
    manager = transaction.TransactionManager(explicit=True)
    delivery = make_delivery(kind, queue, relay.mailer(), manager)
    with pytest.raises(NoTransaction):
        delivery.send(SENDER, ANN, a_message("never"))
    assert state(queue) == {}
    manager.begin()
    delivery.send(SENDER, ANN, a_message("one"))
    transaction.abort()
    transaction.commit()
    assert "new" not in state(queue) and relay.received == []
    manager.commit()
    with pytest.raises(NoTransaction):
        delivery.send(SENDER, ANN, a_message("never"))
    manager.begin()
    delivery.send(SENDER, ANN, a_message("never"))
    manager.abort()
    with manager:
        delivery.send(SENDER, ANN, a_message("two"))
    assert delivered(queue, relay) == ["one", "two"]


def test_sixteen_threads_commit_fifty_times_each_through_one_delivery(queue):
    delivery = QueuedMailDelivery(queue)

    def work(thread):
        for number in range(50):
            if number % 5 == 0:
                delivery.send(SENDER, ANN, a_message("aborted"))
                transaction.abort()
            delivery.send(SENDER, ANN, a_message(f"t{thread}n{number}"))
            transaction.commit()

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    assert sorted(subjects(content(queue))) == sorted(f"t{t}n{number}" for t in range(16) for number in range(50))
    assert list(state(queue)) == ["new"]


def test_after_a_conflict_error_one_mail_goes_out_that_of_the_second_attempt(delivery, tmp_path, queue, relay):
    zodb = pytest.importorskip("ZODB", reason="ZODB is not installed")
    storage = pytest.importorskip("ZODB.FileStorage").FileStorage(str(tmp_path / "data.fs"))
    database, rival, tries = zodb.DB(storage), transaction.TransactionManager(), []
    connection = database.open()
    with transaction.manager:
        connection.root()["visits"] = 0
    for attempt in transaction.manager.attempts():
        with attempt:
            connection.root()["visits"] += 1
            tries.append(connection.root()["visits"])
            if len(tries) == 1:
                with rival:
                    database.open(rival).root()["visits"] += 10
            delivery.send(SENDER, ANN, a_message(f"visit{tries[-1]}"))
    database.close()
    assert tries == [1, 11]
    assert delivered(queue, relay) == ["visit11"]


# ----------------------------------------------------------------------------------------------------------- deliveries


def test_a_commit_or_a_requeue_wakes_the_processors_once_and_an_abort_never(queue, trigger, run):
    delivery = QueuedMailDelivery(queue)
    for outcome, woken in ((transaction.abort, b""), (transaction.commit, b"\0")):
        for _ in range(3):
            delivery.send(SENDER, ANN, MESSAGE)
        assert trigger() == b""
        outcome()
        assert trigger() == woken
    assert run("--maildir", queue.path, "--requeue")[0] == 0 and trigger() == b"\0"


def test_a_direct_delivery_with_a_fallback_shows_all_then_claims_one_after_the_other_and_wakes_last(queue, trigger):
    seen = []

    def look(_recipients):
        seen.append({directory: len(names) for directory, names in state(queue).items()})
        assert trigger() == b""

    delivery = DirectMailDelivery(calling(look), fallback=queue)
    for _ in range(3):
        delivery.send(SENDER, ANN, MESSAGE)
    transaction.commit()
    assert seen == [{"new": 2, "cur": 1}, {"new": 1, "cur": 1}, {"cur": 1}] and state(queue) == {}
    assert trigger() == b"\0"


@pytest.mark.parametrize("count", [1, 20])
def test_a_commit_at_interpreter_exit_succeeds(count, queue):
    code = """
import atexit, transaction
from sendmail import *
@atexit.register
def commit():
    delivery = QueuedMailDelivery(sys.argv[1])
    for _ in range(int(sys.argv[2])):
        delivery.send("app@example.com", "ann@example.com", "Subject: Bye\\n\\n")
    transaction.commit()
"""
    run_python(code, queue.path, count)
    assert len(state(queue).get("new", [])) == count


@pytest.mark.parametrize("kind", ["direct", "fallback"])
def test_a_direct_delivery_sends_all_over_one_connection(delivery, queue, relay, events):
    identifiers = [delivery.send(SENDER, [ANN, BOB], a_message(f"n{number}")) for number in range(5)]
    assert relay.received == []
    transaction.commit()
    assert subjects(relay.received) == [f"n{number}" for number in range(5)]
    assert len(relay.peers) == 1 and state(queue) == {}
    assert [(event.message_id, event.toaddrs) for event in events] == [(each, (ANN, BOB)) for each in identifiers]
    assert all(event.response.startswith("250 ") for event in events)


@pytest.mark.parametrize("kind", ["direct", "fallback"])
def test_a_direct_delivery_asks_for_a_hundred_recipients_at_a_time(kind, queue):
    asked = []
    with transaction.manager:
        delivery = make_delivery(kind, queue, calling(lambda recipients: asked.append(len(recipients))))
        delivery.send(SENDER, [f"r{number}@x.org" for number in range(250)], MESSAGE)
    assert asked == [100, 100, 50]


OK = StreamMailer(io.StringIO())
ANY_HOST = ssl.create_default_context()
ANY_HOST.check_hostname = False
WRONG = [  # an argument, who takes it, and what it can't be
    ("interval", lambda queue, value: QueueProcessorThread(queue, OK, value), ["3", 0, -1, float("nan"), None]),
    ("batch", lambda queue, value: QueueProcessorThread(queue, OK, batch=value), [0, -1, "10", 1.5]),
    ("max_age", lambda queue, value: QueueProcessorThread(queue, OK, max_age=value), ["5", None]),
    ("mailer", lambda queue, value: QueueProcessorThread(queue, value), [None, StreamMailer, "localhost", print]),
    ("mailer", lambda queue, value: DirectMailDelivery(value), [None, SMTPMailer, "localhost"]),
    ("queue", lambda queue, value: QueueProcessorThread(value, OK), [None, 3, Maildir]),
    ("queue", lambda queue, value: QueuedMailDelivery(value), [None, 3]),
    ("fallback", lambda queue, value: DirectMailDelivery(OK, fallback=value), [3, OK]),
    ("hostname|port", lambda queue, value: SMTPMailer(value), [
        "", ",", "a,,b", "a:", ":25", "a:b", "a:0", "a:65536", "a:²", None]),
    ("port", lambda queue, value: SMTPMailer("a", value), [None, "", "smtp", "-1", "2 5", 0, 65536, 25.5, "²"]),
    ("timeout", lambda queue, value: SMTPMailer(timeout=value), [None, "60", 0, -1, float("nan")]),
    ("no_tls|password|context", lambda queue, value: SMTPMailer(**value), [  # what contradicts itself
        {"no_tls": True, "force_tls": True}, {"no_tls": True, "implicit_tls": True}, {"username": "ann"},
        *({"context": ANY_HOST, **more} for more in ({"force_tls": True}, {"implicit_tls": True}, LOGIN))]),
    ("no_tls|force_tls|implicit_tls", lambda queue, value: SMTPMailer(**value), [  # "false" would be true
        {"no_tls": "false"}, {"force_tls": "no"}, {"implicit_tls": ""}]),
    ("auth", lambda queue, value: SMTPMailer(username="app", password="x", auth=value), ["NOSUCH", 3]),
    ("password", lambda queue, value: SMTPMailer(username="app", password=value), [None, 3]),
    ("address", lambda queue, value: queue.add(value, ANN, MESSAGE), [None, 3]),
    ("toaddrs|address", lambda queue, value: queue.add(SENDER, value, MESSAGE), [None, 3, [None]]),
    ("recipients", lambda queue, value: queue.add(SENDER, value, MESSAGE), [[], (), iter(())]),
    ("message", lambda queue, value: queue.add(SENDER, ANN, value), [None, 3]),
]


@pytest.mark.parametrize(("name", "make", "value"), [
    pytest.param(name, make, value, id=f"{name}={brief(value)}") for name, make, values in WRONG for value in values])
def test_a_wrong_argument_is_named_at_once(queue, name, make, value):
    with pytest.raises((TypeError, ValueError), match=rf"\b({name})\b"):
        make(queue, value)
    assert state(queue) == {}


@pytest.mark.parametrize("kind", ["direct", "fallback"])
@pytest.mark.parametrize(("error", "place"), [
    (RelayUnavailable("down"), "new"), (ConnectionRefusedError("no"), "new"), (RuntimeError("bug"), "deferred"),
    (ConnectionResetError("gone"), "deferred"), (smtplib.SMTPServerDisconnected("gone"), "deferred"),
    (smtplib.SMTPDataError(451, b"4.3.0 later"), "deferred"),
], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("where", ["send", "second send", "enter", "exit"])
def test_whatever_a_mailer_raises_no_commit_fails_and_every_message_has_its_event(
    where, error, place, kind, queue, events, caplog
):
    sent = []

    class Raising:
        def __enter__(self): self.check("enter")
        def __exit__(self, *_): self.check("exit")

        def check(self, place):
            if place == where:
                raise error

        def send(self, fromaddr, toaddrs, message):
            self.check("send" if not sent else "second send")
            sent.append(message)

    delivery = make_delivery(kind, queue, Raising())
    identifiers = [delivery.send(SENDER, ANN, a_message(subject)) for subject in ("one", "two")]
    transaction.commit()
    trouble = MailErrorEvent if kind == "direct" else MailDeferredEvent
    went = {"send": 0, "second send": 1, "enter": 0, "exit": 2}[where]
    assert [event.message_id for event in events] == identifiers
    assert [type(event) for event in events] == [MailSentEvent] * went + [trouble] * (2 - went)
    assert subjects(sent) == ["one", "two"][:went]
    assert subjects(content(queue)) == ["one", "two"][went:] * (kind == "fallback")
    assert list(state(queue)) in ([], ["new" if where == "enter" else place])
    assert not [record for record in caplog.records if record.levelno == logging.CRITICAL]


# --------------------------------------------------------------------------------------- the processor: outages, poison


def test_an_outage_is_one_line_a_pass_and_charged_to_no_message(queue, sink, events, caplog):
    for number in range(2):
        queue.add("app@x.org", [f"{number}@x.org"], MESSAGE)
    put(queue, f"deferred/{int(time.time()):010d}.{NAME}", "2@x.org")
    before = state(queue), content(queue)
    processor = QueueProcessorThread(queue, SMTPMailer("127.0.0.1", closed_port()), max_age=60)
    for days in (0, 1, 30):
        processor._clock = lambda days=days: time.time() + days * DAY
        caplog.clear()
        counts = processor.process()
        assert (counts.sent, counts.deferred, counts.failed, counts.left) == (0, 0, 0, 3)
        (line,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert line.getMessage().startswith("relay unavailable") and "\n" not in line.getMessage()
        assert (state(queue), content(queue)) == before and events == []
    assert one_pass(queue, sink).sent == 3
    assert sink.recipients() == ["0@x.org", "1@x.org", "2@x.org"]


def run_at_once(processor, monkeypatch, now, wait):
    """Let the processor run: time passes on the clock *now* (a list), as *wait* says, and nobody waits for it."""
    def poll(milliseconds):
        now[0] += wait(milliseconds / 1000)
        return []

    processor._clock = lambda: now[0]
    monkeypatch.setattr(select, "poll", lambda: types.SimpleNamespace(register=lambda *_arguments: None, poll=poll))
    processor.run()


def test_the_wait_between_two_passes_doubles_while_an_outage_lasts_up_to_a_minute(queue, monkeypatch, caplog):
    now, waits = [time.time()], []
    end = now[0] + 200

    def send(_recipients):
        if now[0] < end:
            raise RelayUnavailable("down")

    def wait(seconds):
        waits.append(round(seconds))
        if state(queue) == {}:
            processor.stop()
        return seconds

    queue.add("app@x.org", "ann@x.org", MESSAGE)
    processor = QueueProcessorThread(queue, calling(send), 3)
    run_at_once(processor, monkeypatch, now, wait)
    assert waits == [3, 3, 6, 12, 24, 48, 60, 60, 3]
    assert len(caplog.messages) == 9 and "back" in caplog.messages[-1]


def test_during_an_outage_nothing_wakes_a_processor(queue: Maildir) -> None:
    queue.add("app@x.org", ["ann@x.org"], MESSAGE)
    with running(QueueProcessorThread(queue, giving(RelayUnavailable("down")), 3600)) as passes:
        wait_until(lambda: passes)
        for _ in range(20):
            queue.add("app@x.org", ["ann@x.org"], MESSAGE)
    assert [counts.left for counts in passes] == [1]


VERDICTS = {
    "lost": None, "silent": "", "421": "421 4.3.2 closing", "450": "450 4.2.1 busy", "530": "530 5.7.0 log in",
    "535": "535 5.7.8 log in", "550": "550 5.1.1 no", "sent": "250 2.0.0 Ok"}


def by_sender(_line, connection):
    """The answer that the sender of the message asks for."""
    mail = next(line for line in reversed(connection.lines) if line.startswith("MAIL"))
    return VERDICTS[re.search(r"<(\w+)@", mail)[1]]


@pytest.mark.parametrize(("verb", "messages", "attempted"), [
    *((verb, messages, attempted) for verb in ("MAIL", "RCPT", "end") for messages, attempted in (
        ("lost sent sent sent sent", 5),
        ("lost sent 421 sent 530 sent 535 sent", 8),
        ("lost 421 sent 530 lost 450 lost lost 550 421 535 sent", 12),
        ("lost 421 530 sent sent", 3),
        ("sent lost lost lost lost sent", 4),
    )),
    ("MAIL", "silent sent silent silent sent", 5),
    ("RCPT", "silent lost silent sent", 3),
])
def test_three_messages_in_a_row_that_break_the_relay_are_an_outage_and_fewer_stop_no_other(
    verb, messages, attempted, queue, scripted, run
):
    server = scripted(answering(**{verb: by_sender}))
    senders = messages.split()
    for sender in senders:
        queue.add(f"{sender}@x.org", "ann@x.org", MESSAGE)
    names = state(queue)["new"]
    status, _output, errors = run("--maildir", queue.path, *to_relay(server), "--timeout", 0.5)
    done, left = senders[:attempted], state(queue).get("new", [])
    assert left == names[attempted:], "these keep their place"
    assert len(state(queue).get(".failed/new", [])) == done.count("550")
    assert len(state(queue).get("deferred", [])) == len(done) - done.count("sent") - done.count("550")
    assert (status, errors.count("unavailable")) == ((75, 1) if left else (0, 0))


def test_a_message_whose_file_is_gone_when_the_relay_has_taken_it_is_sent(queue, events, caplog):
    def send(_recipients):
        [name] = os.listdir(f"{queue.path}/cur")
        os.unlink(f"{queue.path}/cur/{name}")

    queue.add("app@x.org", "ann@x.org", MESSAGE)
    processor = QueueProcessorThread(queue, calling(send))
    assert [processor.process().sent for _ in range(2)] == [1, 0]
    assert [type(event) for event in events] == [MailSentEvent] and caplog.records == []


def test_what_is_read_short_is_not_sent_cut_off(queue: Maildir, relay: Relay, monkeypatch: Any) -> None:
    queue.add("app@x.org", "ann@x.org", MESSAGE + b"x" * 100_000)
    read = os.pread
    with monkeypatch.context() as patch:  # as read(2) does over 2 GB
        patch.setattr(os, "pread", lambda fd, size, start: read(fd, min(size, 50_000), start))
        assert one_pass(queue, relay).deferred == 1
    assert relay.received == [] and content(queue)[0].endswith(b"x" * 100_000)


def test_a_relay_that_goes_in_the_middle_of_a_message_to_many_stops_no_other_message(queue):
    def act(recipients):
        if "poison1@x.org" in recipients:
            return dict.fromkeys(recipients, Reply(421, "4.3.2 closing"))
        if "poison101@x.org" in recipients:
            raise RelayUnavailable("refused")

    queue.add("app@x.org", [f"poison{number}@x.org" for number in range(102)], MESSAGE)
    queue.add("app@x.org", ["ann@x.org"], MESSAGE)
    counts = one_pass(queue, calling(act), time.time() + 6 * DAY)  # too old, but for an outage
    assert (counts.sent, counts.deferred, counts.failed, counts.outage) == (1, 1, 1, None)
    assert len(standing(pathlib.Path(queue.path), "deferred")) == 2


def test_what_others_have_locked_wakes_no_processor_again_and_is_left(queue, sink, monkeypatch):
    wake, woken = queue._wake, []
    monkeypatch.setattr(Maildir, "_wake", lambda _queue: woken.append(1))
    with contextlib.ExitStack() as locks, running(QueueProcessorThread(queue, sink.mailer(), 3600)) as passes:
        wait_until(lambda: passes)
        for number in range(2):
            held = locks.enter_context(put(queue, f"new/{number}.x").open())
            fcntl.flock(held, fcntl.LOCK_EX)
        wake()
        wait_until(lambda: len(passes) > 1)
    assert (len(woken), passes[1].left) == (1, 2), "woken once, at its end"


def test_what_an_outage_interrupts_counts_as_sent_and_left(queue: Maildir) -> None:
    def send(recipients):
        if "100@x.org" in recipients:
            raise RelayUnavailable("gone")

    queue.add("app@x.org", [f"{number}@x.org" for number in range(150)], MESSAGE)
    counts = one_pass(queue, calling(send))
    assert (counts.sent, counts.left) == (1, 1)
    assert standing_recipients(queue) == {"new": sorted(f"{number}@x.org" for number in range(100, 150))}


# -------------------------------------------------------------------------------------------------- the processor: stop

RUNNING = """
import sys, sendmail
mailer = sendmail.SMTPMailer("127.0.0.1", int(sys.argv[2]))
processor = sendmail.QueueProcessorThread(sys.argv[1], mailer, 0.05)
stop = processor.stop
processor.stop = lambda: (stop(), print("stopping", flush=True))
processor.start()
input()
"""


@pytest.fixture
def five(queue, sink):
    """Five messages, and a relay that does not reply; to be called when it may: then a process ends that sent one."""
    sink.gate.clear()
    for number in range(5):
        queue.add("app@x.org", [f"{number}@x.org"], MESSAGE)

    def check(process):
        assert process.poll() is None
        sink.gate.set()
        assert process.wait(20) == 0
        assert sink.recipients() == ["0@x.org"]
        assert [(directory, len(names)) for directory, names in state(queue).items()] == [("new", 4)]

    return check


@pytest.mark.parametrize("how", ["exit", "stop()"])
def test_stopping_finishes_the_message_in_hand_and_starts_no_other(how, five, queue, sink, background):
    code = RUNNING + "processor.stop(); processor.join()" * (how == "stop()")
    process = background(*python_command(code, queue.path, sink.port), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    wait_until(lambda: sink.taken)
    process.stdin.write(b"\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"stopping\n"
    five(process)


def pending(pid: int, signum: int) -> bool:
    """Whether a signal still waits to be taken by a process."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return any(int(mask, 16) >> signum - 1 & 1 for mask in re.findall(r"(?m)^S(?:ig|hd)Pnd:\s*(\w+)", status))


SIGNALS = pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
ONCE_AND_ON = pytest.mark.parametrize("arguments", [[], ["--interval", "0.05"]], ids=["once", "and on"])


@SIGNALS
@ONCE_AND_ON
def test_a_signal_finishes_the_message_in_hand_and_starts_no_other(arguments, signum, five, queue, sink, background):
    process = background(*processor_command(queue, sink, *arguments), stderr=subprocess.PIPE)
    wait_until(lambda: sink.taken)
    process.send_signal(signum)
    wait_until(lambda: not pending(process.pid, signum))
    five(process)
    assert process.stderr.read() == b""


@SIGNALS
@ONCE_AND_ON
def test_a_second_signal_ends_at_once_and_the_next_pass_recovers(queue, sink, relay, background, arguments, signum):
    queue.add("app@x.org", ["ann@x.org"], MESSAGE)
    sink.gate.clear()
    process = background(*processor_command(queue, sink, *arguments), stderr=subprocess.DEVNULL)
    wait_until(lambda: sink.taken)
    # two that come at the same time are one: send it until it is understood
    wait_until(lambda: process.send_signal(signum) or process.poll() is not None)
    assert process.returncode == -signum
    assert list(state(queue)) == ["cur"]
    assert command_line("--maildir", queue.path, *to_relay(relay)).returncode == 0
    assert (len(relay.received), state(queue)) == (1, {})


def test_a_second_interrupt_ends_an_exit_that_waits_for_the_relay(queue, sink, relay, background):
    queue.add("app@x.org", ["ann@x.org"], MESSAGE)
    sink.gate.clear()
    process = background(*python_command(RUNNING, queue.path, sink.port), stdin=subprocess.PIPE,
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_until(lambda: sink.taken)
    process.send_signal(signal.SIGINT)
    assert any(line.startswith(b"KeyboardInterrupt") for line in iter(process.stderr.readline, b""))
    assert process.poll() is None and list(state(queue)) == ["cur"]
    wait_until(lambda: process.send_signal(signal.SIGINT) or process.poll() is not None)
    assert QueueProcessorThread(queue, relay.mailer()).process().sent == 1
    assert "ten minutes" in " ".join(QueueProcessorThread.start.__doc__.split())


@pytest.mark.parametrize(("ending", "passes"), [("sys.exit()", 2), ("processor.stop(), os._exit(0)", 3)])
def test_whatever_a_forked_child_does_to_its_copy_the_processor_neither_stops_nor_spins(queue, ending, passes):
    code = f"""
import os, time, sendmail
processor = sendmail.QueueProcessorThread(sys.argv[1], sendmail.StreamMailer(), 3600)
passes, make_pass = [], processor._pass
processor._pass = lambda *how: (passes.append(1), make_pass(*how))[1]
processor.start()
while not passes: time.sleep(0.01)
if not os.fork():
    {ending}
os.wait()
while len(passes) < {passes} - 1: time.sleep(0.01)
sendmail.Maildir(sys.argv[1]).add("app@x.org", "ann@x.org", "")
while len(passes) < {passes}: time.sleep(0.01)
processor.stop()
processor.join()
print(len(passes), file=sys.stderr)
"""
    command = python_command(code, queue.path, options=["-W", "ignore"])
    ran = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert ran.stderr == f"{passes}\n".encode()


# --------------------------------------------------------------------- the processor: depth, and what is looked at when


def test_fresh_mail_never_waits_for_retries(queue: Maildir) -> None:
    now, order = int(time.time()), []

    def send(recipients):
        order.extend(recipients)
        if order[-1] in ("fresh2@x.org", "retry1@x.org"):
            queue.add("app@x.org", f"after-{order[-1]}", MESSAGE)

    for number in (1, 2, 3):  # in the order of their times, not of their arrival
        put(queue, f"deferred/{now - 100 + number:010d}.{now - 500 - number}.M1P1Q1.host", f"retry{number}@x.org")
    for number in (1, 2):
        queue.add("app@x.org", f"fresh{number}@x.org", MESSAGE)
    with running(QueueProcessorThread(queue, calling(send), 3600)):
        wait_until(lambda: len(order) == 7)
    assert order.index("after-fresh2@x.org") <= 3
    order.remove("after-fresh2@x.org")
    assert order == [f"{name}@x.org" for name in ("fresh1", "fresh2", "retry1", "after-retry1", "retry2", "retry3")]


@pytest.mark.parametrize(("duration", "wakes", "longest"), [
    (0.5, [0.0, 0.1, 1.0, 4.0, 4.5, 0.5, 3.0, 7.0, 9.0, 9.5, 99.0, 2.0], 16),
    (0.01, [99.0], 10.1), (3, [99.0], 13.1), (6, [99.0], 18.1)])
def test_batch_bounds_every_interval_whatever_the_wake_ups_and_is_reached(queue, monkeypatch, duration, wakes, longest):
    now, sent, wakes = [1_800_000_000.0], [], itertools.cycle(wakes)

    def send(_recipients):
        now[0] += duration
        sent.append(now[0])
        if len(sent) > 60:
            processor.stop()

    def wait(seconds):  # which mail may end before its time
        for _ in range(4):
            queue.add("app@x.org", "ann@x.org", MESSAGE)
        return min(next(wakes), seconds)

    processor = QueueProcessorThread(queue, calling(send), 10.0, batch=3)
    run_at_once(processor, monkeypatch, now, wait)
    intervals = [later - earlier for earlier, later in zip(sent, sent[3:])]
    assert min(intervals) >= 10
    assert max(intervals) < longest, "nor are there less"


def test_a_queue_that_cannot_be_read_for_a_while_is_looked_at_once_in_an_interval(queue, monkeypatch, caplog):
    now, waits, away = [1_800_000_000.0], [], f"{queue.path}.away"

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 1:  # batch cut a pass short, and more is due
            os.rename(queue.path, away)
        if len(waits) == 4:
            os.rename(away, queue.path)
        if len(waits) == 5:
            processor.stop()
        return seconds

    for _ in range(2):
        queue.add("app@x.org", "ann@x.org", MESSAGE)
    processor = QueueProcessorThread(queue, calling(lambda _recipients: None), 10.0, batch=1)
    run_at_once(processor, monkeypatch, now, wait)
    assert waits == [10] * 5 and state(queue) == {}
    assert [message.startswith("cannot process") for message in caplog.messages] == [True] * 3


@pytest.mark.parametrize(("batch", "tries"), [(None, range(3, 7)), (2, [2])])
def test_a_pass_however_long_it_takes_keeps_to_batch_and_looks_at_what_is_deferred_once(queue, batch, tries):
    now, tried = [time.time()], []

    def busy(recipients):
        tried.append(recipients)
        now[0] += 4000  # by now all others are due again
        return {recipients[0]: Reply(450, "4.2.1 busy")}

    for _ in range(3):
        queue.add("app@x.org", ["ann@x.org"], MESSAGE)
    processor = QueueProcessorThread(queue, calling(busy), batch=batch)
    processor._clock = lambda: now[0]
    processor.process()
    assert len(tried) in tries


@pytest.mark.parametrize("count", [1, 2])
def test_a_woken_processor_that_finds_more_than_one_message_wakes_the_next(count, queue, trigger):
    woken = []
    processor = QueueProcessorThread(queue, calling(lambda _recipients: woken.append(trigger())), 3600)
    with running(processor) as passes:
        wait_until(lambda: passes)
        delivery = QueuedMailDelivery(queue)
        for _ in range(count):
            delivery.send(SENDER, ANN, MESSAGE)
        transaction.commit()  # one wake-up, however many there are
        wait_until(lambda: sum(counts.sent for counts in passes) == count)
    assert woken == [[b""], [b"\0", b""]][count - 1]


def test_what_is_deferred_is_found_when_due_and_another_processs_within_a_minute_of_a_right_clock(queue, relay):
    relay.refusals = {ANN: "450 4.2.1 busy"}
    now = [time.time()]
    processor = QueueProcessorThread(queue, relay.mailer())
    processor._clock = lambda: now[0]
    queue.add(SENDER, ANN, MESSAGE)
    assert processor.process().deferred == 1
    relay.refusals = {}
    due = int(state(queue)["deferred"][0][:10])
    put(queue, f"deferred/{due + 30:010}.{NAME}", BOB)
    for now[0], sent in ((due - 1, 0), (due, 1), (due + 29, 0), (due + 91, 1), (due + 30 * DAY, 0)):
        assert processor.process().sent == sent
    put(queue, f"deferred/{due + 92:010}.{NAME}", BOB)
    now[0] = due + 92  # it was ahead
    assert processor.process().sent == 1


IDLE = """
processor = sendmail.QueueProcessorThread(path, sendmail.SMTPMailer("127.0.0.1", port))
processor.process()
os.path.exists("/marker-1")
for _ in range(3):
    processor.process()
os.path.exists("/marker-2")
sendmail.Maildir(path).add("app@x.org", ["fresh@x.org"], message)
counts = processor.process()
tell(f"{counts.sent} sent, {counts.left} left")
"""


def test_neither_an_idle_pass_nor_fresh_mail_lists_what_is_deferred(bench: Bench) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        root = pathlib.Path(directory) / "deep"
        Maildir(root)
        (root / "deferred").mkdir()
        now = int(time.time())
        for number in range(20_000):
            name = f"{now + 1000 + number % 500:010d}.{now}.M{number:06}P1Q1.host"
            os.mknod(root / "deferred" / name, 0o600 | stat.S_IFREG)
        run = bench.run(IDLE, root)
    first, last = run.find("newfstatat", "/marker-1"), run.find("newfstatat", "/marker-2")
    idle = [call for call, _ in run.calls[first + 1 : last] if call not in QUIET]
    listings = [i for i, (call, text) in enumerate(run.calls) if call == "getdents64" and "/deferred>" in text]
    assert listings and max(listings) < first
    assert "connect" not in idle and len(idle) <= 3 * 32
    print(f"20,000 deferred: {len(idle) / 3:.0f} calls in an idle pass, then {run.told[-1]}")
    assert run.told[-1] == "1 sent, 20000 left" and bench.sink.recipients() == ["fresh@x.org"]


def test_a_message_with_many_replies_costs_no_square_of_their_number(queue, events, monkeypatch):
    comparisons, equal = [], Reply.__eq__
    monkeypatch.setattr(Reply, "__eq__", lambda one, other: comparisons.append(1) or equal(one, other))
    monkeypatch.setattr(Reply, "__hash__", lambda reply: hash((reply.code, reply.text)))
    everybody = [f"{number}@x.org" for number in range(1000)]
    queue.add("app@x.org", everybody, MESSAGE)
    mailer = calling(lambda to: {address: Reply(450, f"4.2.1 {address}") for address in to})
    assert QueueProcessorThread(queue, mailer).process().deferred == 1
    assert [event.toaddrs for event in events] == [(address,) for address in everybody]
    assert len(comparisons) < 10 * len(everybody)


def test_a_message_in_many_groups_is_not_written_again_for_each(queue):
    size = 3_000_000
    queue.add("app@x.org", [f"{number}@x.org" for number in range(1000)], MESSAGE + b"x" * size)

    def written():
        return int(re.search(r"wchar: (\d+)", pathlib.Path("/proc/self/io").read_text())[1])

    before = written()
    mailer = calling(lambda to: {address: Reply(450 if "7" in address else 250, "so") for address in to})
    counts = QueueProcessorThread(queue, mailer).process()
    assert (counts.sent, counts.deferred) == (1, 1) and written() - before < 3 * size
    assert f'To: {", ".join(f"{n}@x.org" for n in range(1000) if "7" in str(n))}\n'.encode() in content(queue)[0]


# -------------------------------------------------------------------------------------------- the command line: options

USER = pwd.getpwuid(os.getuid()).pw_name
ME = f"{USER}@example.org"


@pytest.mark.parametrize(("arguments", "sender", "recipients"), [
    ("'Doe, Ann <ann@example.com>'", ME, ["Doe@example.org", ANN]),
    ("'\"Doe, Ann\" <ann@example.com>, bob@example.com'", ME, [ANN, BOB]),
    ("'\"a b,c\"@example.com' o\\'b+x=y%z!w@example.com", ME, ['"a b,c"@example.com', "o'b+x=y%z!w@example.com"]),
    ("root jürgen@example.com root", ME, ["root@example.org", "jürgen@example.com"]),
    ("ann@example.com -i bob@example.com -f app@example.com", SENDER, [ANN, BOB]),
    ("ann@example.com -oi --domain example.net bob", f"{USER}@example.net", [ANN, "bob@example.net"]),
    ("-- -f@example.com -i@example.com", ME, ["-f@example.com", "-i@example.com"]),
    ("ann@example.com -- -q", ME, [ANN, "-q@example.org"]),
    *((f"{ignored} ann@example.com", ME, [ANN]) for ignored in (
        "", "-i --", "-q", "-q15m", "-qf -qI1A2B -qRx.org -q1h30m", "-h 3", "-h3", "-oi -oem -odb -oee -om -o7 -oQ/tmp",
        "-o i -O DeliveryMode=b -OTimeout.queuereturn=1d", "-viUGoem", "-F 'A B' -N never -Nfailure",
        "-R hdrs -Rfull -V x -B 7BIT -B8BITMIME -L tag -Ltag -X /dev/null", "-U -G -v -bm", "-bm -odi")),
    *((f"{sender} ann@example.com -q", SENDER, [ANN]) for sender in (
        "-f app@example.com", "-fapp@example.com", "-r app@example.com", "-rapp@example.com", "-ifapp@example.com",
        "-f 'The App <app@example.com>'")),
    ("-f app ann@example.com", "app@example.org", [ANN]),
    ("-f '<>' ann@example.com", "", [ANN]), ("-f '' ann@example.com", "", [ANN]),
    ("-i -FCronDaemon -B8BITMIME -oem root", ME, ["root@example.org"]),
    ("-t", ME, ["tom@example.com"]), ("-ti -oem -odi", ME, ["tom@example.com"]),
    ("-itf app@example.com", SENDER, ["tom@example.com"]),
    ("-t ann@example.com tom@example.com", ME, [ANN, "tom@example.com"]),
    ("ann@example.com -t", ME, [ANN, "tom@example.com"]),
])  # fmt: skip
def test_options_of_sendmail_mean_what_they_mean_there(run, queue, arguments, sender, recipients):
    message = b"From: app@example.com\nTo: Tom <tom@example.com>\n" + MESSAGE
    call = ["--maildir", queue.path, "--domain", "example.org", *shlex.split(arguments)]
    assert run(*call, stdin=message) == (0, "", "")
    assert queued(queue) == (sender, recipients, message)


@pytest.mark.parametrize(("say", "arguments"), [
    *(("recipients", injection) for injection in (
        "-i", "-oi", "-q", "-q5m", "-bm", "-v", "-f a@example.com", "-h 3", "--", "-F App -i")),
    *((option, f"{option} {ANN}") for option in ("-Z", "-bs", "-bd", "-bv", "--nonsense")),
    *((option.partition("=")[0], option) for option in ("-f", "--port", "--json", "--verbose=1", "--force-tls=yes")),
    *((option, option + value) for option, value in (  # no option may be abbreviated
        ("--verb", ""), ("--max", " 5"), ("--host", "=x"), ("--li", ""), ("--req", ""), ("--password-f", " secret"))),
    *(("--password-file", option) for option in (
        "--password secret", "--password=secret", "--username app --password secret", f"{ANN} --password secret")),
    *((option.split()[0], option + " " + injection) for option in (  # of the relay or the processor, and an injection
        "--hostname x", "--port 25", "--username x", "--password-file x", "--auth PLAIN", "--no-tls", "--force-tls",
        "--implicit-tls", "--timeout 5", "--workers 2", "--batch 1", "--max-age 1", "--soft-bounce", "--print",
        "--interval 60") for injection in (ANN, "-t")),
    ("--soft-bounce", "--soft-bounce yes"), ("--list", f"--list {ANN}"), ("--list", "--list -i"),
    ("--requeue", "--list --requeue"), ("--requeue", "--requeue -t"), ("tls", "--no-tls --force-tls"),
    ("NOSUCH", "--auth NOSUCH"), ("password", "--username app"), ("--maildir", "--maildir ''"),
    *((option, f"{option} {value}") for option, value in (
        *(("--hostname", text) for text in ("''", "a,,b", "a:b")),
        *(("--port", text) for text in ("smtp", "0", "70000", "25.5", "２５²")),
        *((name, text) for name in ("--interval", "--timeout", "--max-age") for text in ("0", "-1", "nan", "inf", "d")),
        *((name, text) for name in ("--workers", "--batch") for text in ("0", "-1", "all", "1.5")))),
])  # fmt: skip
def test_wrong_usage_is_neither_a_pass_nor_an_injection_and_what_is_wrong_is_named(run, queue, say, arguments):
    queue.add(SENDER, ANN, MESSAGE)
    before = state(queue)
    status, output, errors = run("--maildir", queue.path, *shlex.split(arguments), stdin=MESSAGE)
    assert (status, output, state(queue)) == (64, "", before)
    assert re.fullmatch(r"sendmail: .+\n", errors)
    assert say.strip("-") in errors and "secret" not in errors


@pytest.mark.parametrize(("headers", "recipients"), [
    ("To: ann@example.com\nCc: bob@example.com\nBcc: carl@example.com\n", "ann bob carl"),
    ("TO: ann@example.com\nTo: bob@example.com\nbcc:carl@example.com\n", "ann bob carl"),
    ("To: \"Doe, Ann\" <ann@example.com>,\n\tBob (a, b) <bob@example.com>\n", "ann bob"),
    ("To: =?utf-8?q?J=C3=BCrgen=2C?= <ann@example.com>, Bj\u00f6rn <bob@example.com>\n", "ann bob"),
    ("To: undisclosed-recipients:;\nBcc: ann@example.com,\n bob@example.com\nCc: c@example.com\n", "ann bob c"),
    ("To: friends:ann@example.com, bob@example.com;\nBcc: c@example.com;\n", "ann bob c"),
    ("To: ann@example.com\nTo: ann@example.com\nCc: Ann <ann@example.com>\n", "ann"),
    ("To: old@x.org\nBcc: old@x.com\nResent-To: ann@example.com\nResent-Bcc: bob@example.com\n", "ann bob"),
    ("To: old@example.com\nResent-Cc: ann@example.com\n", "ann"),
    ("To: ann@example.com,\nCc: ann@[127.0.0.1], b@[IPv6:::1]\n", "ann ann@[127.0.0.1] b@[IPv6:::1]"),
    ("To: ann@example.com(Ann)\nCc: (Bob)bob@example.com\n", "ann bob"),
    ('To: "a:b"@example.com, "c;d"@example.com\n', '"a:b" "c;d"'),
    ("To: ann@example.com\nSubject : x\nCc : bob@example.com\nBcc : carl@example.com\n", "ann bob carl"),
    ("To: ann, bob\nCc: (c) carl, dan@x.org\n", "ann bob carl dan@x.org"),
    ("To: 👩\u200d💻 Ann <ann@example.com>\n", "ann"),
])  # fmt: skip
@pytest.mark.parametrize("eol", ["\n", "\r\n"])
@pytest.mark.parametrize("order", ["{headers}{others}", "{others}{headers}"])
def test_recipients_are_taken_from_the_headers_and_bcc_is_dropped(run, queue, headers, recipients, eol, order):
    others = "From: app@example.com\nDate: Tue, 24 Nov 2026 10:00:00 +0000\nMessage-Id: <1@x>\n"
    kept = order.format(headers=re.sub(r"(?im)^(Resent-)?Bcc *:.*\n(\s.*\n)*", "", headers), others=others)
    kept += "\nBcc: body@example.com\n"
    message = (order.format(headers=headers, others=others) + "\nBcc: body@example.com\n").replace("\n", eol).encode()
    assert run("--maildir", queue.path, "--domain", "example.com", "-t", stdin=message) == (0, "", "")
    assert set(queued(queue)[1]) == {name if "@" in name else f"{name}@example.com" for name in recipients.split()}
    assert queued(queue)[2] == kept.replace("\n", eol).encode()


@pytest.mark.parametrize(("headers", "recipients", "kept"), [
    (b"X: a form\rBcc: secret@x.org\nTo: b@x.org\n", ["b@x.org", "secret@x.org"], b"X: a form\rTo: b@x.org\n"),
    (b"To: b@x.org\rBcc: secret@x.org\rSubject: hi\n", ["b@x.org", "secret@x.org"], b"To: b@x.org\rSubject: hi\n"),
    (b"Bcc: secret@x.org,\r\n\tc@x.org\r\nX-Bcc: no\r\n", ["secret@x.org", "c@x.org"], b"X-Bcc: no\r\n"),
    (b"To: b@x.org\nno header\nBcc: secret@x.org\n", ["b@x.org", "secret@x.org"], b"To: b@x.org\nno header\n"),
])
@pytest.mark.parametrize("before", [b"", b">From ann Tue Nov 24\n", b"From ann Tue Nov 24\r\n>From bob\n>>From c\n"])
def test_bcc_is_dropped_whatever_ends_its_line_or_stands_before(run, queue, headers, recipients, kept, before):
    others = b"From: app@x.org\nDate: x\nMessage-Id: <1@x.org>\n"
    assert run("--maildir", queue.path, "-t", stdin=before + others + headers + b"\n>From here\n") == (0, "", "")
    assert (sorted(queued(queue)[1]), queued(queue)[2]) == (sorted(recipients), others + kept + b"\n>From here\n")


@pytest.mark.parametrize(("options", "body", "kept"), [
    ("", b"one\n.\ntwo\n", b"one\n"), ("", b"one\r\n.\r\ntwo\r\n", b"one\r\n"), ("", b"one\n.", b"one\n"),
    ("", b"one\n..\n. \n.x\n\r.\ntwo", b"one\n..\n. \n.x\n\r.\ntwo"),
    *((options, body, body) for options, body in (
        ("-i", b"one\n.\ntwo\n..\n.\n"), ("-oi", b".\n"), ("-oem -ti", b"one\n."), ("-o i", b"one\n.\r\ntwo"),
        ("-i", b"\0\xff" + bytes(range(1, 256)) * 300))),
])
def test_dot_alone_ends_the_message_only_without_i_and_every_other_byte_is_kept(run, queue, relay, options, body, kept):
    head = b"From: a@example.com\n" + MESSAGE.partition(b"\n\n")[0] + b"\n\n"
    assert run("--maildir", queue.path, ANN, *options.split(), stdin=head + body) == (0, "", "")
    assert queued(queue)[2] == head + kept
    QueueProcessorThread(queue, relay.mailer()).process()
    assert relay.received[0].content == crlf(head + kept)


@pytest.mark.parametrize(("arguments", "author"), [
    ("-f jörg@example.com", "jörg@example.com"), ("-f '' --domain bücher.example", "MAILER-DAEMON@bücher.example"),
    ("-f jörg@example.com -F 'Jörg <>'", "=?utf-8?b?SsO2cmcgPD4=?= <jörg@example.com>"),
    ("-f eve@example.com -F 'Eve, the App'", '"Eve, the App" <eve@example.com>'),
    ("-f eve@example.com -F Eve", "Eve <eve@example.com>"), ("-f eve@example.com", "eve@example.com"),
    ("-f eve@example.com -F 'Eve\nReply-To: eve@evil.org'", None), ("", f"{USER}@{socket.gethostname()}"),
])
def test_a_missing_from_is_added_whoever_it_is(run, queue, arguments, author):
    assert run("--maildir", queue.path, *shlex.split(arguments), "root", stdin=b"no header\n") == (0, "", "")
    assert author is None or f"From: {author}\n".encode() in queued(queue)[2]
    assert sorted(email.message_from_bytes(queued(queue)[2]).keys()) == ["Date", "From", "Message-Id"]
    assert queued(queue)[1] == [f"root@{'bücher.example' if '--domain' in arguments else socket.gethostname()}"]


def test_a_user_without_a_name_sends_by_number(run, queue, monkeypatch):
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # which knows nobody
    assert run("--maildir", queue.path, "--domain", "here.org", ANN, stdin=b"Subject: x\n\n") == (0, "", "")
    assert queued(queue)[0] == f"uid{os.getuid()}@here.org"


def limited(resource_: int, limit: int) -> Callable[[], None]:
    """What sets a limit between fork and exec."""
    return lambda: resource.setrlimit(resource_, (limit, limit))


@pytest.mark.parametrize("text", [
    "<", ",", '"', "(", "[", "\\", "a,", "a <", "(a) ", "a@x.org,\n ", '"\\', "=?utf-8?q?a?= ", "=?q?b?"])
def test_a_hostile_header_or_envelope_costs_a_bounded_time_and_is_refused_in_one_line_or_taken(queue, text):
    def bounded(*arguments, stdin=b""):
        done = command_line("--maildir", queue.path, *arguments, stdin=stdin,
                            preexec_fn=limited(resource.RLIMIT_CPU, 10))
        assert (done.returncode, len(done.stderr) < 3000) in [(0, True), (65, True)]
        return done

    long = f"group:{text * (1_000_000 // len(text))};\n\n".encode()
    done = bounded("--domain", "x.org", "-t", stdin=b"To: " + long)
    assert (done.returncode, len(done.stderr.splitlines())) == ((0, 0) if state(queue) else (65, 1))
    for number, lines in enumerate((
        b"X-Zope-From: a@x.org\nX-Zope-To: ", b"X-Actually-From: a@x.org\nX-Actually-To: ",
        b"X-Zope-From: a@x.org\nX-Zope-To: b@x.org\nSubject: ",
    )):
        pathlib.Path(queue.path, "new", f"{number}.x").write_bytes(lines + long)
    bounded("--list", "--json")
    bounded("--print")


def test_a_header_costs_no_multiple_of_its_size(queue):
    code = """
import sendmail
assert sendmail.main(["--maildir", sys.argv[1], "-t"]) == 0
print(open("/proc/self/status").read())
"""
    told = run_python(code, queue.path, input=f"To: {ANN}\nX-Long: {'x ' * 2_500_000}\nBcc: bob@example.com\n\n")
    assert int(re.search(r"VmHWM:\s+(\d+) kB", told)[1]) < 150_000, "of which Python takes 30 MB"
    assert queued(queue)[1] == [ANN, BOB] and b"\nBcc" not in queued(queue)[2]


@pytest.mark.parametrize(("option", "size", "limit", "where"), [
    ("-i", 1 << 34, (resource.RLIMIT_AS, 1 << 28), ""), ("-t", 1 << 34, (resource.RLIMIT_AS, 1 << 28), ""),
    ("-i", 3_000_000, (resource.RLIMIT_FSIZE, 2_000_000), "/queue")])
def test_a_message_too_large_for_memory_or_disk_is_one_line_and_no_litter(queue, tmp_path, option, size, limit, where):
    with open(tmp_path / "large", "w+b") as large:
        large.write(b"Subject: x\n\n")
        large.truncate(size)
        large.seek(0)
        command = [sys.executable, MODULE, "--maildir", queue.path, option, ANN]
        done = subprocess.run(command, stdin=large, capture_output=True, timeout=60,
                              preexec_fn=limited(*limit))
    assert done.returncode in ((74,) if where else (65, 74))
    assert re.fullmatch(rb"sendmail: \S.*\n", done.stderr) and where.encode() in done.stderr
    assert (state(queue), done.stdout) == ({}, b"")


# --------------------------------------------------------------------------------- the command line: what operators see


def listing(run: Any, queue: Maildir) -> list[dict[str, Any]]:
    """The objects of `--list --json`, which must succeed."""
    status, output, errors = run("--maildir", queue.path, "--list", "--json")
    assert (status, errors) == (0, "")
    return [json.loads(line) for line in output.splitlines()]


@pytest.fixture
def spool(queue, relay):
    """A queue with a message in each state, of different age and size, and the file name of each."""
    now = int(time.time())
    relay.refusals = {"dora@example.com": "450 4.2.1 try later", "fred@example.com": "550 5.1.1 no Fred here"}
    queue.add(SENDER, "dora@example.com", MESSAGE)
    queue.add("", ["fred@example.com"], MESSAGE)
    QueueProcessorThread(queue, relay.mailer()).process()
    relay.refusals = {}
    root = pathlib.Path(queue.path)
    names = {"failed": state(queue)[".failed/new"][0], "deferred": state(queue)["deferred"][0]}
    for what, age, size in ("due", 3 * 3600 + 60, 2_000_000), ("sending", 100 * 86400, 10):
        queue.add(SENDER, [f"{what}@example.com", "joe@example.com"], MESSAGE + b"x\n" * (size // 2))
        [new] = set(state(queue)["new"]) - set(names.values())
        names[what] = f"{now - age}.{new.partition('.')[2]}"
        (root / "new" / new).rename(root / ("cur" if what == "sending" else "new") / names[what])
    with open(root / "cur" / names["sending"], "r+b") as claimed:
        fcntl.flock(claimed, fcntl.LOCK_EX)
        yield names


def test_list_as_json_is_an_object_for_each_message(run, queue, spool):
    before = state(queue), content(queue)
    listed = {entry["state"]: entry for entry in listing(run, queue)}
    assert {what: entry["name"] for what, entry in listed.items()} == spool
    assert {what: entry["recipients"] for what, entry in listed.items()} == {
        "due": ["due@example.com", "joe@example.com"], "sending": ["sending@example.com", "joe@example.com"],
        "deferred": ["dora@example.com"], "failed": ["fred@example.com"],
    }  # fmt: skip
    for entry in listed.values():
        assert set(entry) == {
            "name", "state", "age", "size", "due", "message_id", "subject", "sender", "recipients", "error"}
        assert (entry["message_id"], entry["subject"]) == ("m1@example.com", "Hello")
    assert [listed[what]["sender"] for what in ("due", "failed")] == [SENDER, ""]
    assert "450 4.2.1 try later" in listed["deferred"]["error"]
    assert "550 5.1.1 no Fred here" in listed["failed"]["error"]
    assert not listed["due"]["error"]
    assert abs(listed["due"]["age"] - 3 * 3600 - 60) < 60
    assert listed["due"]["age"] % 1, "the name has microseconds"
    assert listed["due"]["size"] == (pathlib.Path(queue.path) / "new" / spool["due"]).stat().st_size
    assert listed["deferred"]["due"] == int(spool["deferred"][:10])
    assert (state(queue), content(queue)) == before


@pytest.mark.parametrize("columns", [0, 40, 80, 200])
def test_list_fits_the_terminal_and_is_whole_where_there_is_none(run, queue, spool, monkeypatch, columns):
    queue.add(SENDER, [f"recipient{number}@example.com" for number in range(50)], MESSAGE)
    whole = run("--maildir", queue.path, "-bp")[1]
    assert all(text in whole for text in ("dora@", "joe@", "recipient49@", SENDER, *spool.values()))
    last = whole.splitlines()[-1]
    assert all(count in last for count in ("2 due", "1 sending", "1 deferred", "1 failed"))
    assert re.search(r"\b100 ?d", last), "the age of the oldest"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((columns, 24)))
    status, output, _errors = run("--maildir", queue.path, "--list")
    assert status == 0
    if columns:
        assert max(map(len, output.splitlines())) <= columns
    for text in ("deferred", "failed", "sending", r"\b3 ?h", r"\b2 ?MB", "450 4.2.1 try", "550 5.1.1 no Fred"):
        assert columns == 40 or re.search(text, output), "what an operator needs is not what is cut off"
    assert bool(columns) or "recipient49@" in output, "this terminal tells no width"


def test_list_reads_the_head_of_a_message_alone(run, queue):
    for place, head in ("new/1", b""), ("cur/2", b"X-Zope-From: app@x.org\nX-Zope-To: ann@example.com\n" + MESSAGE):
        with open(f"{queue.path}/{place}.M1P1Q1.host", "wb") as file:
            file.write(head)
            file.truncate(1 << 42)  # which fits in no memory
    listed = listing(run, queue)
    assert [(entry["state"], entry["recipients"], entry["subject"], entry["size"]) for entry in listed] == [
        ("due", [ANN], "Hello", 1 << 42), ("due", [], "", 1 << 42)]  # the first was abandoned


@pytest.mark.parametrize("closed", ["new/1.M1P1Q1.host", ".failed/new", ".failed", "deferred"])
def test_list_shows_what_may_be_read_and_says_what_may_not(queue, closed):
    root = pathlib.Path(queue.path)
    for number, directory in enumerate(["new", "new", ".failed/new", "deferred"], 1):
        (root / directory).mkdir(parents=True, exist_ok=True)
        (root / directory / f"{number}.M1P1Q1.host").write_bytes(b"X-Zope-From: a@x.org\nX-Zope-To: b@x\n" + MESSAGE)
    (root / closed).chmod(0)
    table, objects = [command_line("--maildir", root, "--list", *options, preexec_fn=without_root_rights)
                      for options in ([], ["--json"])]  # fmt: skip
    (root / closed).chmod(0o700)
    listed = {entry["name"]: entry for entry in map(json.loads, objects.stdout.splitlines())}
    for done in (table, objects):
        assert done.returncode == (0 if closed.startswith("new") else 74)
        assert b"Permission denied" in done.stdout + done.stderr
    assert listed["2.M1P1Q1.host"]["recipients"] == ["b@x"] and b"2.M1P1Q1.host" in table.stdout
    if closed.startswith("new"):
        entry = listed["1.M1P1Q1.host"]
        assert (entry["state"], entry["recipients"]) == ("due", []) and "Permission denied" in entry["error"]
        assert entry["age"] >= 0 and entry["size"] > len(MESSAGE)


def test_output_in_a_narrow_encoding_shows_the_rest_escaped(queue):
    queue.add(SENDER, "łódź@example.com", "Subject: łódź\n\n")
    for arguments, expected in ("--list", b"\\u0142"), ("--print", b"\\u0142"), ("--list", b"none"):
        done = command_line("--maildir", queue.path, arguments, env={"PYTHONIOENCODING": "latin-1"})
        assert (done.returncode, done.stderr) == (0, b"") and expected in done.stdout


@pytest.mark.parametrize("unknown", ["nonsense", "../new/x", "sending"])
def test_requeue_says_what_it_could_not_and_does_the_rest(run, queue, spool, unknown):
    name = spool.get(unknown, unknown)
    status, output, errors = run("--maildir", queue.path, "--requeue", spool["failed"], name)
    assert (status, output) == (65, "")
    assert re.fullmatch(rf"sendmail: .*{re.escape(name)}.*\n", errors)
    assert ".failed/new" not in state(queue)
    assert state(queue)["cur"] == [spool["sending"]]


def test_verbose_logs_each_message_as_keys_and_values(run, queue, relay):
    relay.refusals = {"dora@example.com": "450 4.2.1 try later"}
    for recipients in ([ANN, BOB], ["dora@example.com"]):
        queue.add(SENDER, recipients, MESSAGE)
    status, output, errors = run("--maildir", queue.path, *to_relay(relay), "--verbose")
    assert (status, output) == (0, "")
    sent, deferred = (line for line in errors.splitlines() if "message-id=" in line)
    for line, *words in (sent, "ann@", "bob@", "250 2.0.0 Ok: queued as 1"), (deferred, "dora@", "450 4.2.1 try later"):
        pairs = dict(word.split("=", 1) for word in shlex.split(line) if "=" in word)
        assert pairs["message-id"].strip("<>") == "m1@example.com"
        assert float(pairs["delay"].rstrip("s")) >= 0
        assert f"{relay.host}:{relay.port}" in pairs["relay"]
        assert words[-1] in pairs["reply"]
        assert all(word in line for word in [SENDER, *words])


OWNER = """
import os, sendmail
@sendmail.subscribe
def tell(event):
    print(os.geteuid(), os.getegid(), 0 in os.getgroups(), flush=True)
sys.exit(sendmail.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("owner", ["nobody", 54321], ids=["a name", "a number alone"])
def test_root_becomes_the_owner_of_the_queue_before_it_touches_it(relay, owner):
    if os.geteuid() != 0:
        pytest.skip("this needs root rights")
    user, group = (owner, owner) if isinstance(owner, int) else pwd.getpwnam(owner)[2:4]
    relay.refusals = {"dora@example.com": "450 4.2.1 try later", "fred@example.com": "550 5.1.1 no Fred here"}
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o711)
        queue = Maildir(directory + "/queue")
        for path in (pathlib.Path(queue.path), *pathlib.Path(queue.path).iterdir()):
            os.chown(path, user, group)
        told = ""
        use_relay = ["--hostname", f"localhost:{relay.port}", "--workers", "2"]  # all that is imported late, too
        for arguments in ([ANN, "dora@example.com", "fred@example.com"], use_relay, ["--list"], ["--requeue"]):
            printed = run_python(OWNER, "--maildir", queue.path, *arguments, input=MESSAGE.decode())
            told += printed * ("--hostname" in arguments)
            owners = {(path.stat().st_uid, path.stat().st_gid) for path in pathlib.Path(directory).rglob("*")}
            assert owners == {(user, group)}
        assert told == f"{user} {group} False\n" * 3
        assert {where: len(names) for where, names in state(queue).items()} == {"new": 2}


# -------------------------------------------------------------------- the command line: exit statuses, and what is said


def test_pass_is_silent_but_for_a_message_that_is_given_up(run, queue, relay):
    call = ["--maildir", queue.path, *to_relay(relay)]
    assert run(*call) == (0, "", "")
    queue.add(SENDER, ANN, MESSAGE)
    assert run(*call) == (0, "", "")
    relay.refusals = {"dora@example.com": "450 4.2.1 try later", "fred@example.com": "550 5.1.1 no Fred here"}
    queue.add(SENDER, [ANN, "dora@example.com"], MESSAGE)
    assert run(*call) == (0, "", ""), "a deferral is no trouble"
    queue.add(SENDER, ["fred@example.com", ANN], MESSAGE)
    status, output, errors = run(*call)
    assert (status, output) == (0, "")
    assert re.fullmatch(r"sendmail: .*\n", errors)
    assert all(text in errors for text in ("m1@example.com", "fred@example.com", "550 5.1.1 no Fred here"))
    assert len(relay.received) == 3


def test_options_reach_the_processor(run, queue, relay):
    relay.refusals = {"fred@example.com": "550 5.1.1 no Fred here"}
    for name in ("fred", "ann", "bob"):
        queue.add(SENDER, f"{name}@example.com", MESSAGE)
    call = ["--maildir", queue.path, *to_relay(relay)]
    assert run(*call, "--batch", 1, "--soft-bounce") == (0, "", "")
    assert (relay.received, [*map(len, state(queue).values())]) == ([], [2, 1]), "Fred is deferred"
    assert run(*call, "--batch", 1) == (0, "", "")
    assert [received.recipients for received in relay.received] == [[ANN]]


@pytest.mark.parametrize(("arguments", "chosen"), [
    ("--hostname h,[::1]:27 --port 26 --timeout 7 --implicit-tls --auth PLAIN",
     {"hostname": "h,[::1]:27", "port": "26", "timeout": "7.0", "implicit_tls": "True", "auth": "PLAIN"}),
    ("--force-tls", {"force_tls": "True"}), ("--no-tls", {"no_tls": "True"}), ("--workers 2", {}), ("", {})])
def test_options_reach_the_mailer(run, queue, monkeypatch, arguments, chosen):
    made = []
    monkeypatch.setattr(sendmail, "SMTPMailer", lambda **settings: made.append(settings) or StreamMailer())
    assert run("--maildir", queue.path, *arguments.split()) == (0, "", "")
    assert [{name: str(value) for name, value in settings.items() if value} for settings in made] == [chosen]


def test_environment_names_the_queue_options_prevail_and_a_queue_that_is_made_is_said(monkeypatch, run, tmp_path):
    Maildir(tmp_path / "one")
    monkeypatch.setenv("SENDMAIL_MAILDIR", str(tmp_path / "one"))
    status, output, errors = run("--maildir", tmp_path / "two", "--print")
    assert (status, output) == (0, "")
    assert re.fullmatch(rf"sendmail: .*{tmp_path}/two\b.*\n", errors), "it may be a typing error"
    assert run(ANN, stdin=MESSAGE) == run(ANN, "--maildir", tmp_path / "two", stdin=MESSAGE) == (0, "", "")
    assert [list(state(tmp_path / name)) for name in ("one", "two")] == [["new"], ["new"]]
    assert run("--print")[1].count("Hello, Ann.") == 1
    assert [list(state(tmp_path / name)) for name in ("one", "two")] == [[], ["new"]]
    monkeypatch.delenv("SENDMAIL_MAILDIR")
    status, output, errors = run("--print")
    assert (status, output) == (64, "") and "--maildir" in errors


def test_main_leaves_the_process_as_it_found_it(run, queue, relay, monkeypatch):
    def process():
        log = logging.getLogger("sendmail")
        signals = [signal.getsignal(number) for number in range(1, signal.NSIG)]
        logs = log.level, [(handler, handler.formatter) for handler in log.handlers], log.propagate
        return signals, logs, dict(os.environ), os.getcwd(), [*sendmail._handlers], os.getresuid(), os.getgroups()

    monkeypatch.setenv("POSIXLY_CORRECT", "1")
    monkeypatch.setattr(logging.getLogger("sendmail"), "level", 37)
    monkeypatch.setattr(logging.getLogger("sendmail"), "handlers", [logging.NullHandler()])
    sendmail.subscribe(lambda event: os.kill(os.getpid(), signal.SIGTERM) if event.toaddrs == (BOB,) else None)
    before = process()
    for arguments, status in (
        ([ANN, "-f", BOB], 0), (["--verbose", *to_relay(relay)], 0), (["--list"], 0), (["--requeue"], 0), (["--x"], 64),
        ([BOB, "-f", ANN], 0), (["--hostname", f"127.0.0.1:{closed_port()}"], 75), (["--help"], 0),
        (["--interval", "60", *to_relay(relay)], 0), (["--print", "--workers", "2"], 0),
    ):  # fmt: skip
        assert run("--maildir", queue.path, *arguments, stdin=b"Subject: x\n\n")[0] == status
        assert process() == before
    assert [(received.sender, received.recipients) for received in relay.received] == [(BOB, [ANN]), (ANN, [BOB])]


def test_password_comes_from_the_environment(monkeypatch, scripted, run, queue):
    server = scripted(wanting("secret"))
    call = ["--maildir", queue.path, *to_relay(server), "--username", "ann", "--no-tls"]
    queue.add(SENDER, ANN, MESSAGE)
    monkeypatch.setenv("SENDMAIL_PASSWORD", "wrong-password")
    status, _, errors = run(*call)
    assert (status, len(errors.splitlines()), list(state(queue))) == (75, 1, ["new"])
    assert "wrong-password" not in errors and plain("wrong-password") in server.connections[0].lines
    monkeypatch.setenv("SENDMAIL_PASSWORD", "secret")
    assert run(*call) == (0, "", "") and state(queue) == {}


AT = r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d\S* "  # how a daemon's lines begin


def test_password_file_is_read_at_every_login(background, scripted, queue, tmp_path):
    server = scripted(wanting("one", "two"))
    password = tmp_path / "password"
    password.touch()
    options = ["--username", "ann", "--password-file", password, "--no-tls", "--interval", "0.05"]
    daemon = background(*processor_command(queue, server, *options), stderr=subprocess.PIPE)
    for secret in ("one", "wrong", "two"):
        password.write_text(f"{secret}\r\nignored\n", newline="")
        queue.add(SENDER, ANN, MESSAGE)
        wait_until(lambda secret=secret: plain(secret) in str([connection.lines for connection in server.connections]))
        wait_until(lambda wrong=secret == "wrong": wrong or state(queue) == {})
    daemon.terminate()
    assert (daemon.wait(20), sum(len(connection.messages) for connection in server.connections)) == (0, 3)
    assert all(re.match(AT + "sendmail: ", line.decode()) for line in daemon.stderr)


# ------------------------------------------------------------------------------------------ the command line: bad input


def without_root_rights() -> None:
    """Between fork and exec: let the modes of files count for root, too."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


BAD_INPUT = {
    # name: arguments ({q} is a good queue, {d} a directory, {p} the port of a relay), standard input, exit status
    **{f"injection: {arguments}": (f"--maildir {{q}} {arguments}", MESSAGE, 65) for arguments in (
        "-t", "ann@", "'ann bob carl'", "'ann@example.com\nBcc: eve@x.org'", "ann\udcff@example.com", "''",
        "-f app@ ann@example.com", "--domain 'a b' root")},
    **{f"message: {message}": ("--maildir {q} -t", message.encode(), 65) for message in (
        "To: <ann@example.com@>, bob@\n", "To: ann@x.org\u200b\n\n", "To: ann@x.org\nMessage-Id: nonsense\n\n",
        "To: a(b\n\n")},
    **{f"queue: {path} {arguments}": (f"--maildir {{d}}/{path} {arguments}", MESSAGE, 73) for path, arguments in (
        *((path, ANN) for path in ("file", "file/queue", "no/where", "", "locked/queue", "x" * 300)), ("", ""),
        ("locked", "--list"), ("missing", "--list"), ("missing", "--requeue"))},
    "requeue-unknown": ("--maildir {q} --requeue nonsense", b"", 65),
    "tmp-not-writable": ("--maildir {d}/readonly ann@example.com", MESSAGE, 74),
    "new-not-readable": ("--maildir {d}/hidden --port {p}", b"", 74),
    "message-not-to-be-locked": ("--maildir {d}/foreign --requeue", b"", 74),
    **{f"relay: {host}": (f"--maildir {{q}} --hostname {host}", b"", 75) for host in (
        "127.0.0.1:1", "a..b", "127.0.0.1.1.1.")},
    **{f"password file: {file} {more}": (
        f"--maildir {{q}} --port {{p}} --username app --no-tls --password-file {{d}}/{file} {more}", b"", status)
       for file, more, status in (
           ("missing", "", 64), ("missing", "--interval 9", 64), ("secret", "", 64),
           (".", "", 75), ("binary", "", 75), ("umlaut", "", 75))},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_with_its_exit_status_and_nothing_is_lost(name, queue, tmp_path, scripted):
    arguments, stdin, status = BAD_INPUT[name]
    server = scripted(wanting("secret"))
    directory = tmp_path / "d"
    for path in (directory, directory / "locked"):
        path.mkdir()
    (directory / "file").write_text("precious")
    for file, text in ("secret", b"x\n"), ("binary", b"\xffhunter2\n"), ("umlaut", "hunter2-ä\n".encode()):
        (directory / file).write_bytes(text)
    Maildir(directory / "readonly")
    Maildir(directory / "hidden").add(SENDER, ANN, MESSAGE)
    Maildir(directory / "foreign")
    (directory / "foreign/deferred").mkdir(exist_ok=True)
    (directory / "foreign/deferred/1795655567.1.M1P1Q1.host").write_bytes(MESSAGE)
    queue.add(SENDER, ANN, MESSAGE)
    modes = {"locked": 0, "secret": 0, "readonly/tmp": 0o500, "hidden/new": 0o300,
             "foreign/deferred/1795655567.1.M1P1Q1.host": 0}  # fmt: skip
    for path, mode in modes.items():
        (directory / path).chmod(mode)
    call = shlex.split(arguments.format(q=queue.path, d=directory, p=server.port))
    done = command_line(*call, stdin=stdin, env={"SENDMAIL_MAILDIR": ""}, preexec_fn=without_root_rights)
    for path in modes:
        (directory / path).chmod(0o700)
    errors = done.stderr.decode(errors="replace")
    assert (done.returncode, done.stdout) == (status, b"")
    assert re.fullmatch(r"(?!.*Traceback)(.*)sendmail: \S.*\n", errors)
    assert "hunter2" not in errors
    assert status != 64 or str(directory) in errors, "the file is named"
    assert [len(content(q)) for q in (queue, directory / "hidden", directory / "foreign")] == [1, 1, 1]
    assert [file.endswith(MESSAGE) for file in content(queue)] == [True]
    assert (directory / "file").read_text() == "precious"
    assert (state(directory / "readonly"), [c.messages for c in server.connections if c.messages]) == ({}, [])
    assert sorted(p.name for p in directory.iterdir()) == [
        "binary", "file", "foreign", "hidden", "locked", "readonly", "secret", "umlaut"]  # fmt: skip


@pytest.mark.parametrize("closed", [True, False])
def test_unreadable_standard_input_queues_nothing(queue, closed):
    close = (lambda: os.close(0)) if closed else None
    with open("/proc/self/mem", "rb") as source:  # which has nothing at its beginning that could be read
        done = subprocess.run([sys.executable, MODULE, "--maildir", queue.path, ANN], stdin=source,
                              capture_output=True, preexec_fn=close, timeout=60, check=False)
    assert done.returncode == 74
    assert re.fullmatch(rb"sendmail: \S.*\n", done.stderr)
    assert state(queue) == {}


@pytest.mark.parametrize(
    "arguments", ["--list", "--list --json", "--help", "--version", "--print", "--print --interval 9"]
)
@pytest.mark.parametrize("output", ["full", "closed", "broken-pipe"])
def test_output_that_goes_nowhere_is_at_most_one_line_and_nothing_is_lost(background, queue, arguments, output):
    queue.add(SENDER, ANN, MESSAGE)
    before = state(queue)
    if output == "full":
        target: Any = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, target = os.pipe()
        os.close(reader)
    close = (lambda: os.close(1)) if output == "closed" else None
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = background(sys.executable, MODULE, "--maildir", queue.path, *arguments.split(), stdout=target,
                         stderr=subprocess.PIPE, preexec_fn=close, env=buffered)  # fmt: skip
    os.close(target)
    errors = process.stderr.readline()
    process.terminate() if "--interval" in arguments else None  # it stays, as it does when a relay is unavailable
    errors += process.stderr.read()
    silent = output == "broken-pipe" and "--print" not in arguments  # as in `--list | head -1`
    assert process.wait(20) == {"--print": 75, "--print --interval 9": 0}.get(arguments, 0 if silent else 74)
    assert re.fullmatch(rb"" if silent else rb".*sendmail: \S.*\n", errors)
    assert state(queue) == before


def test_closed_standard_error_stops_nothing(queue, relay):
    relay.refusals = {"fred@example.com": "550 5.1.1 no Fred here"}
    for name in ("fred", "ann"):
        queue.add(SENDER, f"{name}@example.com", MESSAGE)
    done = command_line("--maildir", queue.path, *to_relay(relay), preexec_fn=lambda: os.close(2))
    assert (done.returncode, len(relay.received), list(state(queue))) == (0, 1, [".failed/new"])


# ----------------------------------------------------------------------------------- the command line: signals, daemons


def test_interrupted_injection_queues_nothing_and_shows_no_traceback(background, queue):
    call = [sys.executable, MODULE, "--maildir", queue.path, ANN]
    process = background(*call, stdin=subprocess.PIPE, stderr=subprocess.PIPE,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    process.stdin.write(b"Subject: x\n\n" + b"x\n" * 500_000)  # more than a pipe holds: it is reading
    process.send_signal(signal.SIGINT)
    assert (process.wait(20), process.stderr.read(), state(queue)) == (130, b"", {})
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


@pytest.mark.parametrize("journal", ["", "8:1"])
def test_daemon_outlives_an_outage_and_says_when_it_began_and_ended(background, scripted, tmp_path, journal):
    server = scripted(answering(greeting=lambda _, connection: USUAL["greeting"] if connection.number > 2 else None))
    queue = types.SimpleNamespace(path=str(tmp_path / "queue"))
    with open(tmp_path / "stderr", "w+b") as stderr:
        environment = {**os.environ, "JOURNAL_STREAM": journal}
        daemon = background(*processor_command(queue, server, "--interval", "0.05"), stderr=stderr, env=environment)
        wait_until(lambda: (tmp_path / "stderr").read_bytes().endswith(b"\n"))
        Maildir(queue.path).add(SENDER, ANN, MESSAGE)
        wait_until(lambda: state(queue) == {})
        daemon.terminate()
        assert daemon.wait(20) == 0
    made, *outage, back = (tmp_path / "stderr").read_text().splitlines()
    pattern = ("" if journal else AT) + "sendmail: "
    assert all(re.match(pattern, line) for line in (made, *outage, back))
    assert queue.path in made
    assert ["unavailable" in line for line in outage] == [True, True]
    assert re.search(r"relay\b.*\bback\b", back)
    assert server.connections[2].messages == [crlf(MESSAGE)]


def test_main_makes_a_pass_in_any_thread(queue, relay):
    queue.add(SENDER, ANN, MESSAGE)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert pool.submit(sendmail.main, ["--maildir", queue.path, *to_relay(relay)]).result(20) == 0
    assert (len(relay.received), state(queue)) == (1, {})


# ----------------------------------------------------------------- the command line: the file alone, and no transaction


def test_the_file_alone_queues_and_prints_with_nothing_but_the_standard_library(queue, tmp_path):
    command = [sys.executable, "-I", "-S", shutil.copy(MODULE, tmp_path / "vendored.py"), "--maildir", queue.path]
    for option, stdin, shown in ("-t", b"To: ann@example.com\n" + MESSAGE, b""), ("--print", b"", b"Hello, Ann."):
        done = subprocess.run([*command, option], input=stdin, capture_output=True, timeout=60, cwd="/", env={})
        assert (done.returncode, done.stderr) == (0, b"") and shown in done.stdout
    assert state(queue) == {}


def test_without_transaction_only_the_deliveries_are_missing(queue, relay):
    code = """
sys.modules["transaction"] = None  # not to be had
import logging, sendmail
logging.basicConfig(stream=sys.stdout)
@sendmail.subscribe
def broken(event): raise RuntimeError("broken handler")
@sendmail.subscribe
def working(event): print(type(event).__name__, *event.toaddrs)
queue = sendmail.Maildir(sys.argv[1])
queue.add("app@example.com", "ann@example.com", "Subject: Hello\\n\\nHello.\\n")
mailer = sendmail.SMTPMailer("127.0.0.1", int(sys.argv[2]))
sendmail.QueueProcessorThread(queue, mailer).process()
for make in (lambda: sendmail.QueuedMailDelivery(queue), lambda: sendmail.DirectMailDelivery(mailer)):
    try:
        make()
    except ImportError as error:
        print(error)
"""
    *log, event, queued, direct = run_python(code, queue.path, relay.port).splitlines()
    assert log[-1] == "RuntimeError: broken handler"
    assert event == f"MailSentEvent {ANN}" and len(relay.received) == 1
    assert "pip install transaction" in queued and "pip install transaction" in direct


# -------------------------------------------------------------------------------------- the command line: real programs

CRON = (  # what Debian's cron says, and how it calls
    b"From: root (Cron Daemon)\nTo: root\nSubject: Cron <root@host> /usr/local/bin/report\nMIME-Version: 1.0\n"
    b"Content-Type: text/plain; charset=UTF-8\nContent-Transfer-Encoding: 8bit\nX-Cron-Env: <SHELL=/bin/sh>\n\n"
    b"Gr\xc3\xbc\xc3\x9fe\n.\nthe end\n"
)
BODY = b"Dear Ann,\n.\nFrom here to there.\n"


PATCH = b"""From 0123456789012345678901234567890123456789 Mon Sep 17 00:00:00 2001
From: =?UTF-8?q?Ann=20=C3=84?= <ann@example.com>
Date: Tue, 24 Nov 2026 10:00:00 +0000
Subject: [PATCH] Add f

---
 f | 1 +
--
2.39.5
"""
GIT = "git -c user.name=App -c user.email=app@example.com send-email --quiet --confirm=never --suppress-cc=all"
PHP = 'mail("ann@example.com", "Hi", "A,\n.\nBye", "From: app@example.com\r\nBcc: dan@example.com", "-fapp@b.org");'
OTHERS = "-c carl@example.com -b dan@example.com ann@example.com"
PROGRAMS = {
    "git": (GIT + " --sendmail-cmd={mta} --envelope-sender=auto --to='\"Doe, Ann\" <ann@example.com>' "
            "--to=carl@example.com --bcc=dan@example.com {dir}/0001.patch", b"", SENDER, "ann carl dan"),
    "s-nail": ("s-nail -: / -S v15-compat -S mta={mta} -s Grüße -r app@example.com " + OTHERS,
               BODY, SENDER, "ann carl dan"),
    "bsd-mailx": ("env MAILRC={dir}/mailrc bsd-mailx -s Hello " + OTHERS, BODY, f"{USER}@example.com", "ann carl dan"),
    "mutt": ("mutt -n -F /dev/null -e 'set sendmail=\"{mta} -oem -oi\" from=app@example.com use_envelope_from copy=no' "
             "-s Grü " + OTHERS, BODY, SENDER, "ann carl dan"),
    "cron": ("{mta} -FCronDaemon -i -B8BITMIME -oem root", CRON, f"{USER}@example.com", "root"),
    "php": (f"php -n -d sendmail_path='{{mta}} -t -i' -r '{PHP}'", b"", "app@b.org", "ann dan"),
}  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_mail_of_a_real_program_reaches_the_relay_to_the_byte(program, tmp_path, queue, relay):
    command, stdin, sender, recipients = PROGRAMS[program]
    if program != "cron" and not shutil.which(program):
        pytest.skip(f"{program} is not installed")
    if program == "git" and subprocess.run(["perl", "-MMail::Address", "-e1"], capture_output=True).returncode:
        pytest.skip("git send-email needs Mail::Address, which is not installed")
    mta = tmp_path / "mta"  # keeps a copy of what it is fed
    mta.write_text(f"#!/bin/sh\ntee {tmp_path}/fed | {sys.executable} {MODULE} --maildir {queue.path} "
                   '--domain example.com "$@"\n')
    mta.chmod(0o755)
    (tmp_path / "0001.patch").write_bytes(PATCH)
    (tmp_path / "mailrc").write_text(f"set sendmail={mta}\n")
    environment = {**os.environ, "HOME": str(tmp_path), "GIT_CONFIG_GLOBAL": "/dev/null", "LC_ALL": "C.UTF-8"}
    arguments = shlex.split(command.format(mta=mta, dir=tmp_path))
    done = subprocess.run(arguments, input=stdin, capture_output=True, env=environment, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    wait_until(lambda: state(queue).get("new"))  # bsd-mailx does not wait for it
    assert command_line("--maildir", queue.path, *to_relay(relay)).returncode == 0
    [received] = relay.received
    fed = b"".join(x for x in (tmp_path / "fed").read_bytes().splitlines(True) if not x.startswith(b"Bcc:"))
    assert received.sender == sender
    assert received.recipients == [f"{name}@example.com" for name in recipients.split()]
    assert received.content.endswith(crlf(fed))
    added = received.content[: -len(crlf(fed))].decode()
    assert re.fullmatch(r"((From|Date|Message-Id): .+\r\n)*", added)
    headers = email.message_from_bytes(received.content)
    assert all(len(headers.get_all(name, [])) == 1 for name in ("From", "Date", "Message-Id"))
    assert state(queue) == {}


def test_queue_of_zope_sendmail_is_drained(queue):
    pytest.importorskip("zope.sendmail")
    from zope.sendmail.delivery import QueuedMailDelivery as ZopeDelivery
    relay = Relay(enable_SMTPUTF8=True)
    cases = [
        ('"App, the" <app@example.com>', ['"Doe, Ann" <ann@example.com>', BOB], ["ann", "bob"]),
        (SENDER, ["Jürgen Groß <ann@example.com>", "Bob (a, b) <bob@example.com>"], ["ann", "bob"]),
        (SENDER, ["jürgen@example.com"], ["jürgen"]),
        (SENDER, ['"a,b"@example.com', "=?utf-8?q?D=2C_E?= <d@example.com>"], ['"a,b"', "d"]),
    ]
    messages = [b"Message-Id: <%d@x>\nSubject: \xc3\xbc\xdf\n\n\xff\xfe \xe4\n.\n\tend" % n for n in range(len(cases))]
    for (sender, recipients, _), message in zip(cases, messages):
        ZopeDelivery(queue.path).send(sender, recipients, message)
        transaction.commit()
    (pathlib.Path(queue.path) / "new" / ".rejected-1.2.host.3").write_bytes(b"X-Zope-From: a@x\nX-Zope-To: b@x\n\n")
    done = command_line("--maildir", queue.path, *to_relay(relay))
    relay.close()
    assert (done.returncode, done.stderr) == (0, b"")
    assert [r.sender for r in relay.received] == [SENDER] * len(cases)
    received = {r.content: r.recipients for r in relay.received}  # in the order of a random part of their names
    assert received == {
        crlf(message): [f"{local}@example.com" for local in locals_]
        for (_, _, locals_), message in zip(cases, messages)
    }
    assert state(queue) == {"new": [".rejected-1.2.host.3"]}


def test_queue_of_ours_is_drained_by_zope_sendmail(queue, relay):
    pytest.importorskip("zope.sendmail")
    message = crlf(MESSAGE.replace(b"Hello", b"\xc3\xbc\xff\n.\n..\n"))  # it would send a bare LF as it is
    recipients = [ANN, '"Doe, J"@example.com', "o'b+x=y@example.com"]
    queue.add(SENDER, ["dora@example.com"], message)
    relay.refusals = {"dora@example.com": "450 4.2.1 <dora@example.com> is busy"}
    QueueProcessorThread(queue, relay.mailer()).process()
    relay.refusals = {}
    queue.add(SENDER, recipients, message)
    assert command_line("--maildir", queue.path, "--requeue").returncode == 0
    zope = [sys.executable, "-m", "zope.sendmail.queue", *to_relay(relay), queue.path]
    subprocess.run(zope, check=True, timeout=60)
    deferred, other = sorted(relay.received, key=lambda received: len(received.recipients))
    assert (other.recipients, other.content) == (recipients, message)
    note, _, rest = crlf(deferred.content).partition(b"\r\n")
    assert (deferred.recipients, rest) == (["dora@example.com"], message)
    assert note.startswith(b"X-Sendmail-Error: 4.2.1 450 4.2.1 ")
    assert b"@" not in note
    assert state(queue) == {}


def test_mailer_of_zope_sendmail_works_here(queue, relay, events):
    mailer = pytest.importorskip("zope.sendmail.mailer").SMTPMailer(relay.host, relay.port)
    relay.refusals = {"dora@example.com": "450 4.2.1 try later", "fred@example.com": "550 5.1.1 no Fred here"}
    for name in ("ann", "dora", "fred"):
        queue.add(SENDER, f"{name}@example.com", MESSAGE)
    counts = QueueProcessorThread(queue, mailer).process()
    assert (counts.sent, counts.deferred, counts.failed, counts.left) == (1, 1, 1, 1)
    assert [(type(event), *event.toaddrs) for event in events] == [
        (MailSentEvent, ANN), (MailDeferredEvent, "dora@example.com"), (MailErrorEvent, "fred@example.com")]
    relay.close()
    queue.add(SENDER, ANN, MESSAGE)
    assert QueueProcessorThread(queue, mailer).process().left == 2
    assert len(events) == 3, "an outage is nobody's fault"


# ------------------------------------------------------------------------------------------------------------ documents

README = MODULE.with_name("README.md").read_text()
SHOP, SUBJECT = "shop@example.com", "Your order"

# The words before each example, and the language of the example.  None is without its test below.
EXAMPLES = {
    "this queues a message": "sh",
    "## From an application": "python",
    "**Django.**": "python",
    "**Flask, SQLAlchemy.**": "python",
    "**Pyramid.**": "python",
    "**Testing an application.**": "python",
    "**Events**": "python",
    "## The command line": "sh",
    "**cron.**": "text",
    "**systemd.**": "ini",
    "**A spool for two users**": "sh",
    "## Development": "sh",  # .ci/run takes this command from the README
}


def example(words: str) -> str:
    """The first example after these words."""
    found = re.search(rf"{re.escape(words)}.*?^```{EXAMPLES[words]}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert found, words
    return found[1]


def ran(directory: pathlib.Path, code: str, *arguments: Any) -> str:
    """What a script of the README prints, run in a directory."""
    return run_python(code.replace("/srv/app", str(directory)), *arguments, cwd=directory)


def shell(directory: pathlib.Path, commands: str) -> str:
    """What commands of the README print, run where its reader has the module."""
    (directory / MODULE.name).write_bytes(MODULE.read_bytes())
    commands = commands.replace("/tmp/queue", str(directory / "queue")).replace("/srv/app", str(directory))
    commands = commands.replace("python3 ", shlex.quote(sys.executable) + " ")
    command = ["bash", "-euc", commands]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, re.sub("sendmail: made a new queue: .*\n", "", done.stderr)) == (0, "")
    return done.stdout


def test_every_example_of_the_readme_is_tested():
    blocks = re.findall(r"^```\w+\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert blocks == [example(words) for words in EXAMPLES]
    assert README.index("```sh") < README.index("\n## ") and README[: README.index("```sh")].count("\n") < 15


def test_first_command_of_the_readme_shows_the_mail(tmp_path):
    assert "Hello, Ann." in shell(tmp_path, example("this queues a message"))
    assert state(tmp_path / "queue") == {}


def test_first_program_of_the_readme_shows_the_mail(tmp_path):
    printed = ran(tmp_path, example("## From an application"))
    assert SHOP in printed and SUBJECT in printed and "Thank you, Ann." in printed
    assert state(tmp_path / "queue") == {}


def test_django_queues_when_the_transaction_commits(tmp_path):
    pytest.importorskip("django")
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "mail.py").write_text(example("**Django.**"))
    new, old = re.findall(r'`(MAILERS = .*?|EMAIL_BACKEND = .*?)`', README, re.DOTALL)
    ran(tmp_path, """
import django, os, sys
from django.conf import settings

sys.path.insert(0, "")
chosen = {}
exec(sys.argv[1] if django.VERSION >= (6, 1) else sys.argv[2], chosen)
chosen.pop("__builtins__")
settings.configure(
    MAIL_QUEUE="queue", DEFAULT_FROM_EMAIL='"Shöp, Inc." <shop@example.com>',
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "shop.db"}}, **chosen,
)
django.setup()
from django.core.mail import EmailMultiAlternatives, send_mail
from django.db.transaction import atomic

with atomic():
    assert send_mail("Your order", "Thank you, Ann.", None, ["Ann <ann@example.com>"]) == 1
    assert not os.listdir("queue/new")
try:
    with atomic():
        send_mail("Never", "Never.", None, ["ann@example.com"])
        raise LookupError
except LookupError:
    pass
message = EmailMultiAlternatives("Größe", "From here: größer.", None, ["ann@example.com"], bcc=["bob@example.com"])
message.attach_alternative("<p>Größer.</p>", "text/html")
message.send()
""", new, old)
    first, second = sorted(mailbox.Maildir(tmp_path / "queue", create=False), key=lambda m: m["X-Zope-To"])
    assert [first["X-Zope-From"], first["X-Zope-To"], first["Subject"]] == [SHOP, ANN, SUBJECT]
    assert [second["X-Zope-From"], second["X-Zope-To"], second["Bcc"]] == [SHOP, f"{ANN}, bob@example.com", None]
    assert "From here: größer." in second.get_payload(0).get_payload(decode=True).decode()


def test_flask_and_sqlalchemy_commit_order_and_mail_or_neither(tmp_path):
    pytest.importorskip("flask_sqlalchemy")
    ran(tmp_path, f"""
import os
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.exc import OperationalError

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:////srv/app/shop.db"
db = SQLAlchemy(app)

class Order(db.Model):
    id = db.Column(db.Integer, primary_key=True)

{example("**Flask, SQLAlchemy.**")}
with app.app_context():
    db.create_all()
    assert app.test_client().post("/order").text == "ordered"
    assert db.session.query(Order).count() == 1
    transaction.abort()
    db.drop_all()
    app.testing = True
    try:
        app.test_client().post("/order")
    except OperationalError:
        assert not os.listdir("queue/tmp")
    else:
        raise AssertionError
""")
    [message] = mailbox.Maildir(tmp_path / "queue", create=False)
    assert [message["X-Zope-To"], message["Subject"]] == [ANN, SUBJECT]


def test_pyramid_commits_what_a_view_sends_and_messages_of_pyramid_mailer_are_taken(tmp_path):
    pytest.importorskip("pyramid_tm")
    pytest.importorskip("pyramid_mailer.message")
    send, add = re.findall(r"`((?:request\.delivery\.send|queue\.add)\(m\..*?)`", README)
    ran(tmp_path, f"""
import os
from pyramid.config import Configurator
from pyramid.request import Request
from pyramid.response import Response
from pyramid_mailer.message import Message

settings = {{"mail.queue_path": "queue"}}
config = Configurator(settings=settings)
{example("**Pyramid.**")}
m = Message("Your order", ["Ann <ann@example.com>"], "Thank you.", sender="Shop <shop@example.com>", bcc=["bob@x.org"])

def order(request):
    {send}
    assert not os.listdir("queue/new")
    if request.GET:
        raise LookupError
    return Response("ordered")

config.add_route("order", "/order")
config.add_view(order, route_name="order")
application = config.make_wsgi_app()
try:
    Request.blank("/order?broken=1").get_response(application)
except LookupError:
    assert os.listdir("queue/new") == os.listdir("queue/tmp") == []
else:
    raise AssertionError
assert Request.blank("/order").get_response(application).text == "ordered"
assert len(os.listdir("queue/new")) == 1
{add}
""")
    found = list(mailbox.Maildir(tmp_path / "queue", create=False))
    assert [[m["X-Zope-From"], m["X-Zope-To"]] for m in found] == [[SHOP, f"{ANN}, bob@x.org"]] * 2
    assert [[m["From"], m["Bcc"], m["Subject"]] for m in found] == [["Shop <shop@example.com>", None, SUBJECT]] * 2


def test_an_application_is_tested_as_the_readme_says(tmp_path):
    ran(tmp_path, f"""{example("**Testing an application.**")}
import transaction
delivery.send("shop@example.com", "ann@example.com", "Subject: Your order\\n\\nThank you.\\n")
assert outbox == []
transaction.commit()
assert list(outbox[0][1]) == ["ann@example.com"] and "Subject: Your order" in outbox[0][2], outbox
""")
    Maildir(tmp_path / "queue").add(SHOP, ANN, MESSAGE)
    [message] = mailbox.Maildir(tmp_path / "queue")
    assert [message["X-Zope-From"], message["X-Zope-To"], message["Subject"]] == [SHOP, ANN, "Hello"]


def test_events_are_heard_in_a_script_beside_the_application(tmp_path, queue, relay):
    relay.refusals[ANN] = "550 5.1.1 no such user"
    message_id = queue.add(SHOP, [ANN, "bob@example.com"], MESSAGE)
    printed = ran(tmp_path, example("**Events**"), "--maildir", queue.path, "--hostname", f"{relay.host}:{relay.port}")
    assert printed == f"given up: {message_id} {ANN} 550 5.1.1 no such user\n"


def test_operators_commands_of_the_readme_work(tmp_path, relay):
    cd, *lines = example("## The command line").splitlines()
    list_all, requeue, show, remove, clear = [f"{cd}\n{line}" for line in lines]
    relay.refusals[ANN] = "550 5.1.1 no such user"
    queue = Maildir(tmp_path / "queue")
    queue.add(SHOP, ANN, MESSAGE)
    processor = QueueProcessorThread(queue, relay.mailer())
    processor.process()
    [name] = state(queue)[".failed/new"]
    assert re.search(f"(?s){name}.*failed.*{ANN}.*550 5.1.1 no such user", shell(tmp_path, list_all))
    assert "Hello, Ann." in shell(tmp_path, show.replace("NAME", name))
    shell(tmp_path, f"{clear}\n{requeue}")
    assert list(state(queue)) == ["new"]
    processor.process()
    [name] = state(queue)[".failed/new"]
    os.utime(tmp_path / "queue" / ".failed" / "new" / name, (1, 1))
    shell(tmp_path, clear)
    assert state(queue) == {}
    queue.add(SHOP, ANN, MESSAGE)
    shell(tmp_path, remove.replace("NAME", state(queue)["new"][0]))
    assert state(queue) == {}


def service_of(name: str) -> str:
    """The command of a service of the README."""
    if name == "**cron.**":
        return example(name).split("  app  ")[1]
    if name == "**systemd.**":
        return re.search(r"^ExecStart=/usr/bin/((?:.*\\\n)*.*)", example(name), re.MULTILINE)[1].replace("\\\n", "")
    return shlex.join(json.loads(re.search(r"`(\[.*\])`", README[README.index(name) :])[1]))


@pytest.mark.parametrize("name", ["**cron.**", "**systemd.**", "**Containers.**"])
def test_services_of_the_readme_send(name, background, scripted, tmp_path):
    server = scripted(wanting("secret"))
    (tmp_path / "relay-password").write_text("secret\n")
    Maildir(tmp_path / "queue").add(SHOP, ANN, MESSAGE)
    command = service_of(name).replace("%d", str(tmp_path)).replace("python3 ", "")
    command = re.sub(r"\S*/sendmail.py", str(MODULE), command)
    command = re.sub(r"--maildir \S+", f"--maildir {tmp_path}/queue", command)
    command = command.replace("--username app", "--username ann")
    command = re.sub(r"--hostname \S+", f"--hostname {server.host}:{server.port} --no-tls", command)
    process = background(sys.executable, *shlex.split(command), stderr=subprocess.PIPE)
    wait_until(lambda: server.connections and state(tmp_path / "queue") == {})
    if "--interval" in command:
        process.terminate()
    assert process.wait(20) == 0
    log = process.stderr.read().decode()
    assert (ANN in log) == ("--verbose" in command)


@pytest.mark.skipif(os.getuid() != 0, reason="two users are needed, and only root can be them")
@pytest.mark.parametrize("closed", [True, False])
def test_spool_of_the_readme_is_filled_by_one_user_and_emptied_by_another(closed, relay):
    """Whatever their umask; and, if it is *closed*, neither can put another directory in the place of one of its."""
    commands = example("**A spool for two users**") if closed else "install -d -m 2770 -g mail /srv/spool"
    relay.refusals = {"refused@example.com": "550 5.1.1 no", "busy@example.com": "450 4.2.1 busy"}

    def become(uid: int) -> None:
        os.umask(0o077)
        os.setgroups([group])
        os.setgid(uid)
        os.setuid(uid)

    def web() -> None:
        become(4001)
        Maildir(root).add("app@x.org", [ANN, "refused@example.com", "busy@example.com"], MESSAGE)
        for made in (root / "other", root / ".failed" / "other") * closed:
            with contextlib.suppress(PermissionError):
                made.mkdir()
                os._exit(2)

    def cron() -> None:
        become(4002)
        options = ["--maildir", str(root), "--hostname", f"{relay.host}:{relay.port}"]
        assert sendmail.main(options) == 0
        assert sendmail.main(["--maildir", str(root), "--list"]) == 0
        QueueProcessorThread(root, relay.mailer()).process()

    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        root = pathlib.Path(directory, "spool")
        subprocess.run(["sh", "-euc", commands.replace("/srv/spool", str(root))], check=True)
        group = root.stat().st_gid
        made = set(root.rglob("*"))
        for _ in range(2):
            forked(web)
            forked(cron)
        assert [received.recipients for received in relay.received] == [[ANN], [ANN]]
        assert standing_recipients(Maildir(root)) == {
            "deferred": ["busy@example.com"] * 2, ".failed/new": ["refused@example.com"] * 2}
        assert {path.stat().st_gid for path in root.rglob("*")} == {group}
        assert not closed or {path for path in root.rglob("*") if not path.is_file()} == made


def test_every_option_that_the_readme_names_is_in_the_help_which_fits_80_columns():
    helped = command_line("--help")
    assert (helped.returncode, helped.stderr) == (0, b"")
    assert max(map(len, helped.stdout.decode().splitlines())) <= 80
    option = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
    others = {"--grep", "--daemon", "--config", "--password"}  # of journalctl and zope.sendmail
    named = set(option.findall(README[: README.index("## Development")])) - others
    assert named - set(option.findall(helped.stdout.decode())) == set()


def test_the_example_of_the_module_runs(tmp_path):
    example = re.search(r"\n\n((?:    .*\n|\n)+)", sendmail.__doc__)[1]
    code = "\n".join(line[4:] for line in example.splitlines()).replace('SMTPMailer("localhost", 25)', "StreamMailer()")
    printed = ran(tmp_path, "from sendmail import *\n" + code)
    assert ("Hello, Ann." in printed) != (list(state(tmp_path / "queue")) == ["new"])


def test_every_guarantee_and_every_state_has_a_quick_test_that_is_called_after_it():
    states = re.findall(r"^    \.?(\w+)/  ", sendmail.__doc__, re.MULTILINE)
    numbers = re.findall(r"^    (\d)\. ", sendmail.__doc__, re.MULTILINE)
    assert (states, numbers) == (["tmp", "new", "cur", "deferred", "failed"], list("1234567"))
    marks = {name: [mark.name for mark in getattr(test, "pytestmark", ())] for name, test in globals().items()}
    quick = " ".join(name for name in marks if "sweep" not in marks[name])
    wanted = [f"test_state_{state}_" for state in states] + [f"test_guarantee_{number}_" for number in numbers]
    assert [prefix for prefix in wanted if prefix not in quick] == []


def test_pydoc_is_short_and_shows_the_public_names_alone():
    command = [sys.executable, "-m", "pydoc", "sendmail"]
    shown = subprocess.run(command, cwd=MODULE.parent, capture_output=True, text=True, check=True, timeout=60).stdout
    contents = shown.partition("\nCLASSES\n")[2]
    names = re.findall(r"^    (?:class (\w+)|(\w+)(?:\(.*\) ->| = )).*", contents, re.MULTILINE)
    assert {name for name in map("".join, names) if not name.startswith("__")} == set(sendmail.__all__)
    assert len(shown.splitlines()) < 1200  # most of it inherited from the standard library


def test_every_public_name_is_documented_and_nothing_else_is_public():
    for name in sendmail.__all__:
        assert getattr(sendmail, name).__doc__, name
    defined = {name for name, value in vars(sendmail).items() if getattr(value, "__module__", "") == "sendmail"}
    assert {name for name in defined if not name.startswith("_")} == set(sendmail.__all__)
