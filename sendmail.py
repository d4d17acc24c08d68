"""Transactional e-mail with a crash-safe Maildir queue, in one file.

An application hands a message to a *delivery* and gets a message id back.  The message goes out if, and only if,
the transaction commits; a queue in the file system keeps it through crashes; a processor relays it by SMTP:

    import transaction
    from sendmail import QueuedMailDelivery, QueueProcessorThread, SMTPMailer

    QueueProcessorThread("queue", SMTPMailer("localhost", 25)).start()
    delivery = QueuedMailDelivery("queue")
    delivery.send("app@example.com", ["ann@example.com"], "Subject: Hello\\n\\nHello, Ann.\\n")
    transaction.commit()

A script without transactions calls ``Maildir("queue").add(...)``; ``python -m sendmail --help`` tells the rest.

Words
    message     the bytes that the relay gets: headers, a blank line, a body
    envelope    the sender and the recipients; what the relay goes by (RFC 5321), stored in two lines before the message
    relay       the SMTP server that takes the messages from us
    reply       what the relay says of one recipient: sent (2xx), deferred (4xx: try later) or failed (5xx: give up)
    claim       the right to send, move or unlink a message: an exclusive flock on its file
    pass        one walk of a processor through all that is due

States: the directory is the state, the name is the schedule, a rename is the transition, a lock is the life of a claim
    tmp/        being written, uncommitted; older than 36 h: litter
    new/        waiting: due at once or, where the name ends in ',due=<Unix time>', from then on
    cur/        claimed, by the process that holds the flock on it; abandoned, if nobody does
    .failed/    given up, kept for a person

    send()                  commit()                    claim()              sent()
    ──────── Maildir.write ────────▶ Maildir.publish ──▶ new/ ──────────▶ cur/ ──────▶ unlinked
             (in tmp/)              (tmp/ to new/)        ▲ ▲ ◀─────────── │ │
                                                          │ │  release(),  │ │ give_up()
                                                          │ │  defer()     │ ▼
                                                          │ └──────────────┘ .failed/
                                                          │    recover()        │
                                                          └─────────────────────┘ requeue()

Guarantees
    1. Every recipient of a committed message stands in a complete file in new/, cur/ or .failed/ until the relay has
       taken the message for that recipient.
    2. Only the holder of the flock on the inode now at that path moves, replaces or unlinks a message in new/ or cur/.
    3. A message in cur/ whose lock is free was abandoned by a process that died; the next pass of any processor takes
       it up, at once.  A living processor, however slow its relay, is never robbed.
    4. commit() returning means durable: the file fsynced before its rename, the directory after it.
    5. A changed list of recipients replaces the file atomically, before the message is let go of, and before anything
       else is written once the relay has taken the message for some of them.
    6. A process that dies causes a duplicate only between the relay's final reply and the unlink (or replacement) that
       follows it.  Nothing else, no event, no logging, no QUIT, stands between the two.
    7. A queue whose creation was cut short is completed.  A directory that is no Maildir is refused, untouched.

What can't be guaranteed
    Unlinks are not fsynced: a power cut may repeat the last few messages.  A crash between a copy in .failed/ and what
    follows may try its recipients again.  A relay that took a message and died before it said so gets it twice.  A
    DirectMailDelivery without a fallback has no queue: what fails, or is under way when the process dies, is lost.
"""

from __future__ import annotations

import atexit
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import email.message
import email.parser
import email.utils
import errno
import fcntl
import getopt
import itertools
import json
import logging
import math
import os
import pwd
import re
import select
import shutil
import signal
import smtplib
import socket
import ssl
import stat
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TextIO, TypeVar

try:
    import transaction
except ImportError:  # vendored alone: everything works but the two deliveries, which say so
    transaction = None

__all__ = [
    "MailEvent", "MailSentEvent", "MailDeferredEvent", "MailErrorEvent", "subscribe", "unsubscribe", "notify",
    "Reply", "RelayUnavailable", "Mailer", "SMTPMailer", "StreamMailer",
    "Maildir",
    "DirectMailDelivery", "QueuedMailDelivery",
    "QueueProcessorThread",
    "main",
]  # fmt: skip
__version__ = "1.0"

_log = logging.getLogger("sendmail")

_BACKOFF_MIN, _BACKOFF_MAX = 60.0, 3600.0  # seconds to the next try of a deferred message
_MAX_AGE = 5 * 24 * 3600.0  # seconds; an older message is given up instead of deferred
_LITTER_AGE = 36 * 3600.0  # seconds; the Maildir rule for what was left in tmp/
_GROUP = 100  # recipients at a time (RFC 5321, 4.5.3.1.8)
_PIECE = 32 * 1024  # bytes; dot-stuffed and with CRLF it is 64 KB at most
_FINAL_REPLY_TIMEOUT = 600.0  # seconds (RFC 5321, 4.5.3.2.6)
_OUTAGE_WAIT = 60.0  # seconds between two passes at most, while the relay is unavailable
_FSYNC_THREADS = 16

# ---------------------------------------------------------------------------------------------------- events


@dataclasses.dataclass(frozen=True)
class MailEvent:
    """What became of a message, for some of its recipients.

    `message_id` is what `send()` returned (no angle brackets); `toaddrs` are only the recipients that the event is about.
    """

    message_id: str
    fromaddr: str
    toaddrs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MailSentEvent(MailEvent):
    """The relay took it; `response` is its last reply, such as ``250 2.0.0 Ok: queued as 4F1``."""

    response: str


@dataclasses.dataclass(frozen=True)
class MailDeferredEvent(MailEvent):
    """Not yet: the next try is at `retry_at` (Unix time); `delivery_status` is an RFC 3463 code such as ``4.2.1``."""

    error_message: str
    delivery_status: str
    retry_at: float


@dataclasses.dataclass(frozen=True)
class MailErrorEvent(MailEvent):
    """Given up; `delivery_status` is an RFC 3463 code such as ``5.1.1``."""

    error_message: str
    delivery_status: str


_Handler = TypeVar("_Handler", bound=Callable[[Any], object])
_handlers: list[Callable[[Any], object]] = []


def subscribe(handler: _Handler) -> _Handler:
    """Call *handler* with every event from now on, in the order of subscription; return it (so this is a decorator).

    A handler never runs inside a commit, and always in a new transaction of its own: begun before it, committed after
    it, aborted if it raises.  One that raises is logged, and hurts nobody.
    """
    _handlers.append(handler)
    return handler


def unsubscribe(handler: Callable[[Any], object]) -> None:
    """Stop calling *handler*.  Raise `ValueError` if it was not subscribed."""
    _handlers.remove(handler)


def notify(event: MailEvent) -> None:
    """Call every handler with *event*, each in a new transaction; never raise on account of a handler."""
    for handler in tuple(_handlers):
        try:
            with _new_transaction():
                handler(event)
        except Exception:  # unknown code: whatever it raises is its own business
            _log.exception("event handler %r failed on %r", handler, event)


@contextlib.contextmanager
def _new_transaction() -> Iterator[None]:
    """Run the block in a new transaction, even where the commit of another is under way.

    An after-commit hook runs before the manager lets go of the finished transaction, so that `begin()` there would
    abort and corrupt it.  But the default manager is a thread-local around a replaceable one: lend it a fresh one.
    """
    if transaction is None:
        yield
        return
    outer = transaction.manager.manager
    fresh = transaction.manager.manager = transaction.TransactionManager()
    try:
        with fresh:
            yield
    except BaseException:
        fresh.abort()  # a commit that failed leaves its transaction behind
        raise
    finally:
        transaction.manager.manager = outer


# -------------------------------------------------------------------------------------------------- envelope

# An addr-spec (RFC 5322, 3.4.1), seen from its neighbours: what would end it early in an envelope's line or in a
# command is allowed inside a quoted local part only.
_ADDR_SPEC = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^\s,<>"@]+)@[^\s,<>"@]+')
_ADDR_SPECS = re.compile(rf"{_ADDR_SPEC.pattern}(?:, *{_ADDR_SPEC.pattern})*")
_ENHANCED_STATUS = re.compile(r"([245])\.\d{1,3}\.\d{1,3}(?!\S)")  # RFC 3463, at the head of a reply (RFC 2034)
_FIELD = re.compile(rb"[!-9;-~]+[ \t]*:")  # the head of a header line (RFC 5322, 2.2)
_BLANK_LINE = re.compile(rb"(?:\A|\r\n|\r(?!\n)|\n)(?:\r\n|\r|\n)")
_ENVELOPE = re.compile(
    rb"X-Zope-From:[ \t]*([^\n]*)\nX-Zope-To:[ \t]*([^\n]*)\n(?:X-Sendmail-Error:[ \t]*([^\n]*)\n)?", re.IGNORECASE
)
_DUE = re.compile(r",due=(\d+)\Z")
_counter = itertools.count()


def _printable(text: str) -> str:
    """Return *text* as one printable line of at most 1,000 characters, fit for a file, a log and a terminal."""
    if not text.isprintable():
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text[:1000].strip()


def _check_address(address: str) -> str:
    """Return *address*; raise `ValueError` if it is no bare addr-spec."""
    if not (address.isprintable() and _ADDR_SPEC.fullmatch(address)):
        raise ValueError(f"not an e-mail address (local@domain, without a display name): {_printable(address)!r}")
    return address


def _parse_addresses(line: str) -> tuple[str, ...]:
    """Return the bare addresses in *line*, which may hold display names (zope.sendmail's queues do)."""
    if _ADDR_SPECS.fullmatch(line):  # as it is: getaddresses() would take some of them apart
        found = _ADDR_SPEC.findall(line)
    else:
        found = [address for _name, address in email.utils.getaddresses([line])]
    return tuple(dict.fromkeys(address for address in found if address and address.isprintable()))


def _headers_of(message: bytes) -> bytes:
    """Return the header section of *message*, empty if it begins with something else."""
    if not _FIELD.match(message):
        return b""
    end = _BLANK_LINE.search(message)
    return message[: end.start()] if end else message


def _header(headers: bytes, name: bytes) -> str | None:
    """Return the unfolded value of the first header called *name*, or None."""
    pattern = rb"(?:\A|[\r\n])%s[ \t]*:((?:[^\r\n]|(?:\r\n|\r|\n)(?=[ \t]))*)" % name
    found = re.search(pattern, headers, re.IGNORECASE)
    return " ".join(found[1].decode("utf-8", "replace").split()) if found else None


def _message_id(headers: bytes) -> str:
    """Return the message id without its angle brackets, '' if there is none."""
    return _printable(_header(headers, b"Message-Id") or "").strip("<>")


def _with_header_lines(message: bytes, *lines: str) -> bytes:
    """Return *message* with *lines* before it, in its own line ends, and set apart from a body without headers."""
    eol = b"\r\n" if message[: message.find(b"\n") + 1].endswith(b"\r\n") else b"\n"
    added = b"".join(line.encode() + eol for line in lines)
    has_head = _FIELD.match(message) or message.startswith((b"\n", b"\r"))
    return added + message if has_head else added + eol + message


def _serialise(message: bytes | str | email.message.Message, addresses: Iterable[str]) -> bytes:
    """Return *message* as bytes; of a `Message`, without Bcc, which the object itself keeps."""
    if isinstance(message, bytes):
        return message
    if isinstance(message, str):
        return message.encode()
    if not isinstance(message, email.message.Message):
        raise TypeError(f"a message is bytes, str or email.message.Message, not {type(message).__name__}")
    message = copy.copy(message)  # a shallow copy has a header list of its own as soon as one is deleted
    del message["Bcc"], message["Resent-Bcc"]
    policy = message.policy
    if not all(map(str.isascii, addresses)) and hasattr(policy, "utf8"):
        policy = policy.clone(utf8=True)  # RFC 6532: a local part has no other way to be written in a header
    return message.as_bytes(policy=policy)


def _prepare(
    fromaddr: str, toaddrs: str | Iterable[str], message: bytes | str | email.message.Message
) -> tuple[str, tuple[str, ...], bytes]:
    """Check what was handed to `send()`; return the message id, the recipients and the complete message.

    Raise `ValueError` for no recipients, for an address that is no bare addr-spec and for a malformed Message-Id.
    """
    recipients = tuple(dict.fromkeys([toaddrs] if isinstance(toaddrs, str) else toaddrs))
    if not recipients:
        raise ValueError("no recipients")
    for address in recipients if fromaddr == "" else (fromaddr, *recipients):  # '' is the null sender
        _check_address(address)
    content = _serialise(message, (fromaddr, *recipients))
    headers = _headers_of(content)
    lines = []
    identifier = _header(headers, b"Message-Id")
    if identifier is None:
        identifier = email.utils.make_msgid(domain=socket.gethostname())
        lines.append(f"Message-Id: {identifier}")
    elif not (identifier.isprintable() and re.fullmatch(r"<[^<>\s]+>", identifier)):
        raise ValueError(f"malformed Message-Id: {_printable(identifier)!r} (it must read <left@right>)")
    if _header(headers, b"Date") is None:
        lines.append(f"Date: {email.utils.formatdate(localtime=True)}")
    return identifier[1:-1], recipients, _with_header_lines(content, *lines) if lines else content


def _envelope(fromaddr: str, toaddrs: Iterable[str], error: str, message: bytes) -> bytes:
    """Return the lines that stand before *message* in its file: those of zope.sendmail, and ours for the last error."""
    text = f"X-Zope-From: {fromaddr}\nX-Zope-To: {', '.join(toaddrs)}\n"
    if error or message[:17].lower() == b"x-sendmail-error:":  # or else the message's own line would pass for ours
        text += f"X-Sendmail-Error: {error}\n"
    return text.encode()


def _without_addresses(text: str) -> str:
    """Return *text* with its addresses blotted out: zope.sendmail would send it on, to every recipient."""
    return re.sub(r'(?:"[^"]*"|[^\s<>"(]*)@[^\s<>)]*', "*", text)


def _new_name() -> str:
    """Return a file name, unique for ever (the Maildir rule), whose order is the order of arrival."""
    seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
    unique = f"{next(_counter)}R{os.urandom(4).hex()}"  # R: a random part, so that containers may share host and pid
    host = socket.gethostname().replace("/", r"\057").replace(":", r"\072").replace(",", r"\054")
    return f"{seconds}.M{microseconds:06}P{os.getpid()}Q{unique}.{host}"


def _deferred_name(name: str, due: float) -> str:
    return f"{_DUE.sub('', name)},due={int(due)}"


def _due_time(name: str, now: float) -> float:
    """Return when the message called *name* is due; further ahead than the longest backoff is a wrong clock: 0, now."""
    found = _DUE.search(name)
    due = float(found[1]) if found else 0.0
    return due if due <= now + _BACKOFF_MAX else 0.0


def _backoff(age: float) -> float:
    """Return the seconds to the next try of a message *age* seconds old: as many again, within bounds, as in Postfix."""
    return min(max(age, _BACKOFF_MIN), _BACKOFF_MAX)


def _groups(recipients: Sequence[str]) -> Iterator[Sequence[str]]:
    return (recipients[i : i + _GROUP] for i in range(0, len(recipients), _GROUP))


# --------------------------------------------------------------------------------------------------- mailers

_LOGIN_WANTED = frozenset({530, 534, 535, 538})  # RFC 4954: says something about our login, nothing about a message


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the relay said of one recipient: an SMTP *code* and its *text*, kept as one printable line."""

    code: int
    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", _printable(self.text))

    def __str__(self) -> str:
        return f"{self.code} {self.text}".rstrip()

    @property
    def outcome(self) -> str:
        """'sent' (2xx), 'failed' (5xx: give up) or 'deferred' (all else: try later)."""
        return {2: "sent", 5: "failed"}.get(self.code // 100, "deferred")

    @property
    def status(self) -> str:
        """The enhanced status code (RFC 3463) in the text, or else one that says no more than the outcome."""
        kind = {"sent": "2", "failed": "5", "deferred": "4"}[self.outcome]
        found = _ENHANCED_STATUS.match(self.text)
        return found[0] if found and found[1] == kind else f"{kind}.0.0"

    def softened(self) -> Reply:
        """Return this reply as one that says 'try later'."""
        code = self.code - 100 if self.outcome == "failed" else 451
        return Reply(code, f"4{self.status[1:]} {self}")


class RelayUnavailable(Exception):
    """The relay cannot be used now, and no message is to blame: nothing is given up or deferred because of it.

    Whatever goes wrong before MAIL is answered: connection, DNS, TLS, banner, EHLO, AUTH, or a 421 or 53x to MAIL.
    """


class Mailer(Protocol):
    """What a delivery or a processor needs in order to send."""

    def send(self, fromaddr: str, toaddrs: Sequence[str], message: bytes) -> Mapping[str, Reply] | None:
        """Hand *message* to the relay for at most 100 *toaddrs*; return a `Reply` for each (None: all accepted).

        May raise `RelayUnavailable`, or in the vocabulary of `smtplib`, as a mailer of zope.sendmail does.  A mailer
        that is a context manager is used as one (re-entrant, per thread), to keep a connection between messages.
        """


def _reply(code: int, text: bytes | str) -> Reply:
    return Reply(code, text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


def _judge(reply: Reply) -> Reply:
    """Return *reply*, to MAIL, RCPT, DATA or the data, as what it means for the message.

    A 53x is about our login and says 'try later'; so does what is no SMTP reply at all, such as smtplib's -1.
    """
    known = 200 <= reply.code < 300 or 400 <= reply.code < 600
    return reply if known and reply.code not in _LOGIN_WANTED else reply.softened()


def _ask(mailer: Mailer, fromaddr: str, toaddrs: Sequence[str], message: bytes) -> dict[str, Reply]:
    """Let *mailer* send to one group; return a reply for each recipient, or raise `RelayUnavailable`.

    Whatever a mailer does is made into one of the two here, and nowhere else.
    """
    replies: Mapping[str, Reply] | None
    try:
        replies = mailer.send(fromaddr, toaddrs, message)
    except RelayUnavailable:
        raise
    except (smtplib.SMTPConnectError, smtplib.SMTPHeloError, smtplib.SMTPAuthenticationError) as error:
        raise RelayUnavailable(_reason(error)) from error
    except (ConnectionRefusedError, socket.gaierror, socket.herror) as error:
        raise RelayUnavailable(_reason(error)) from error
    except smtplib.SMTPRecipientsRefused as error:
        replies = {address: _judge(_reply(*reply)) for address, reply in error.recipients.items()}
    except smtplib.SMTPResponseException as error:
        if isinstance(error, smtplib.SMTPSenderRefused) and error.smtp_code in {421, *_LOGIN_WANTED}:
            raise RelayUnavailable(_reason(error)) from error
        replies = dict.fromkeys(toaddrs, _judge(_reply(error.smtp_code, error.smtp_error)))
    except Exception as error:  # a mailer is anybody's code; no message may stop the queue
        status = "4.4.2" if isinstance(error, OSError) else "4.3.0"
        replies = dict.fromkeys(toaddrs, Reply(451, f"{status} {_reason(error)}"))
    if replies is None:
        return dict.fromkeys(toaddrs, Reply(250, "2.0.0 Ok"))
    silence = Reply(451, "4.3.0 the mailer gave no reply for this recipient")
    return {address: replies.get(address, silence) for address in toaddrs}


def _reason(error: BaseException) -> str:
    """Return in one line what *error* says."""
    if isinstance(error, smtplib.SMTPResponseException):
        return str(_reply(error.smtp_code, error.smtp_error))
    return _printable(str(error)) or type(error).__name__


@contextlib.contextmanager
def _connected(mailer: Mailer) -> Iterator[None]:
    """Keep the connection of *mailer* for the block, if it can; raise `RelayUnavailable` if there is none to be had."""
    with contextlib.ExitStack() as stack:
        if hasattr(mailer, "__enter__"):
            try:
                stack.enter_context(mailer)
            except RelayUnavailable:
                raise
            except Exception as error:  # anybody's code again, and no message is to blame yet
                raise RelayUnavailable(_reason(error)) from error
        yield


class _Lost(Exception):
    """The connection can't be used any more; *reply* says why, as a reply that defers."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(str(reply))
        self.reply = reply


class _Kept(threading.local):
    """A thread's connection to the relay: kept while `depth` is positive, and of no use after a fork."""

    smtp: smtplib.SMTP | None = None
    pid = 0
    depth = 0


def _wire_address(address: str, smtputf8: bool) -> bytes | None:
    """Return *address* as it goes on the wire, or None if it needs the SMTPUTF8 that the relay lacks (RFC 6531).

    A domain is IDNA-encoded if that can be undone: 'faß.de' would arrive at fass.de, which is somebody else's.
    """
    local, at, domain = address.rpartition("@")
    if local.isascii() and not domain.isascii():
        with contextlib.suppress(UnicodeError):
            ascii_domain = domain.encode("idna")
            if ascii_domain.decode("idna") == domain.lower():
                return f"{local}{at}".encode() + ascii_domain
    return address.encode() if smtputf8 or address.isascii() else None


def _wire_size(message: bytes) -> int:
    """Return the size of *message* with CRLF for every line end, as SIZE counts it (RFC 1870, 5)."""
    size = len(message) + message.count(b"\n") + message.count(b"\r") - 2 * message.count(b"\r\n")
    return size if message.endswith((b"\n", b"\r")) or not message else size + 2


def _wire_pieces(message: bytes) -> Iterator[bytes]:
    """Yield *message* as DATA wants it: CRLF for CR, LF and CRLF, dots stuffed, the end marked (RFC 5321, 4.5.2)."""
    start, line_start = 0, True
    while start < len(message):
        end = start + _PIECE
        if message[end - 1 : end + 1] == b"\r\n":
            end += 1  # one line end, not two
        piece = message[start:end].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        stuffed = piece.replace(b"\n", b"\r\n").replace(b"\n.", b"\n..")
        if line_start and piece.startswith(b"."):
            stuffed = b"." + stuffed
        start, line_start = end, piece.endswith(b"\n")
        if start < len(message):
            yield stuffed
        else:
            yield stuffed + (b".\r\n" if line_start else b"\r\n.\r\n")
    if not message:
        yield b".\r\n"


class _Transfer:
    """One mail transaction (RFC 5321, 3.3): from MAIL to the reply to the data, and how far it got."""

    def __init__(self, smtp: smtplib.SMTP, fromaddr: str, toaddrs: Sequence[str], message: bytes) -> None:
        self.smtp = smtp
        self.message = message
        self.replies: dict[str, Reply] = {}
        self.mail_answered = False
        self.decided = False  # the data has begun, or all replies are known: not to be tried again
        features = smtp.esmtp_features
        size, limit, utf8 = _wire_size(message), features.get("size", ""), "smtputf8" in features
        sender = _wire_address(fromaddr, utf8)
        self._recipients: dict[str, bytes] = {}
        for address in toaddrs:
            recipient = _wire_address(address, utf8)
            if limit.isdigit() and 0 < int(limit) < size:
                self.replies[address] = Reply(552, f"5.3.4 {size} bytes are more than the relay takes ({limit})")
            elif sender is None or recipient is None:
                self.replies[address] = Reply(553, "5.6.7 an address needs SMTPUTF8, which the relay does not offer")
            else:
                self._recipients[address] = recipient
        mail = b"MAIL FROM:<%s>" % (sender or b"")
        if "size" in features:
            mail += b" SIZE=%d" % size
        if "8bitmime" in features and not message.isascii():
            mail += b" BODY=8BITMIME"
        if not all(map(bytes.isascii, (mail, *self._recipients.values()))):
            mail += b" SMTPUTF8"
        self._mail = mail + b"\r\n"

    def run(self) -> None:
        """Do it, filling `replies`.  Raise `_Lost`, or `RelayUnavailable` where the reply to MAIL says so."""
        if not self._recipients:
            return
        self.smtp.sock.settimeout(self.smtp.timeout)
        rcpts = [b"RCPT TO:<%s>\r\n" % address for address in self._recipients.values()]
        self._pipelined = "pipelining" in self.smtp.esmtp_features and len(rcpts) <= _GROUP
        if self._pipelined:  # all in one write (RFC 2920, 3.1); a group is too small to fill the buffers on the way
            self._write(b"".join((self._mail, *rcpts, b"DATA\r\n")))
        sender = self._command(self._mail)
        if sender.code in _LOGIN_WANTED:
            raise RelayUnavailable(str(sender))
        self.mail_answered = True
        refused = None if sender.outcome == "sent" else _judge(sender)
        for address, rcpt in zip(self._recipients, rcpts):
            self.replies[address] = refused or _judge(self._command(rcpt))
            if refused and self._pipelined:
                self._answer()
        accepted = [address for address in self._recipients if self.replies[address].outcome == "sent"]
        if accepted or self._pipelined:
            data = self._command(b"DATA\r\n")
            if data.code == 354:
                final = self._transmit(self.message if accepted else b"")  # RFC 2920, 3.1: DATA may be accepted for nobody
            elif data.outcome == "sent":
                raise _Lost(Reply(451, f"4.5.0 unexpected reply to DATA: {data}"))
            else:
                final = data
            for address in accepted:
                self.replies[address] = _judge(final)
        if not self.decided and not refused:
            self.decided = True
            self._write(b"RSET\r\n")
            self._answer()

    def _transmit(self, message: bytes) -> Reply:
        """Write the data, and wait for the relay's last word on it, which nothing that raises may follow."""
        self.decided = True
        for piece in _wire_pieces(message):
            self._write(piece)
        self.smtp.sock.settimeout(_FINAL_REPLY_TIMEOUT)
        return self._answer("; the relay may have taken the message")

    def _command(self, command: bytes) -> Reply:
        """Return the reply to *command*, which a pipelined dialogue has written already."""
        if not self._pipelined:
            self._write(command)
        return self._answer()

    def _write(self, data: bytes) -> None:
        try:
            self.smtp.sock.sendall(data)
        except OSError as error:
            raise _Lost(Reply(451, f"4.4.2 connection lost: {_reason(error)}")) from error

    def _answer(self, doubt: str = "") -> Reply:
        try:
            code, text = self.smtp.getreply()
        except (smtplib.SMTPException, OSError) as error:  # SMTPException: a line too long, for one
            raise _Lost(Reply(451, f"4.4.2 connection lost: {_reason(error)}{doubt}")) from error
        reply = _reply(code, text)
        if not 200 <= code < 600:  # smtplib says -1 where there is no code
            raise _Lost(Reply(451, f"4.4.2 unintelligible reply: {reply}{doubt}"))
        if code == 421:  # RFC 5321, 3.8: the relay closes the connection
            raise _Lost(reply)
        return reply


def _xoauth2(smtp: Any) -> None:
    token = f"user={smtp.user}\1auth=Bearer {smtp.password}\1\1"
    smtp.auth("XOAUTH2", lambda challenge=None: token if challenge is None else "")  # "" asks for the refusal's code


_MECHANISMS: dict[str, Callable[[Any], object]] = {
    "CRAM-MD5": lambda smtp: smtp.auth("CRAM-MD5", smtp.auth_cram_md5),
    "PLAIN": lambda smtp: smtp.auth("PLAIN", smtp.auth_plain),
    "LOGIN": lambda smtp: smtp.auth("LOGIN", smtp.auth_login),
    "XOAUTH2": _xoauth2,
}
_BEST_MECHANISMS = ("CRAM-MD5", "PLAIN", "LOGIN")


class SMTPMailer:
    """Send by SMTP to one relay.

    As a context manager it keeps one connection per thread; outside, it makes one per message.  TLS is used where the
    relay offers it, unless *no_tls*; *force_tls* requires STARTTLS, *implicit_tls* speaks TLS from the start (port
    465).  Certificate and host name are verified wherever TLS is required or a password is sent, by *context* or else
    by the system's authorities.  A password never crosses any other connection, unless *no_tls* says so.

    *password* is a string, or a callable that is asked at every login.  *auth* names the one mechanism to use:
    CRAM-MD5, PLAIN, LOGIN or XOAUTH2; by default it is the relay's best of the first three.  *timeout*, in seconds, is
    for each step of the dialogue; the reply to the data has ten minutes.

    Raise `ValueError` for settings that contradict each other.
    """

    def __init__(
        self, hostname: str = "localhost", port: int = 25, username: str | None = None,
        password: str | Callable[[], str] | None = None, no_tls: bool = False, force_tls: bool = False,
        implicit_tls: bool = False, *, auth: str | None = None, timeout: float = 60,
        context: ssl.SSLContext | None = None,
    ) -> None:  # fmt: skip
        self._verified = force_tls or implicit_tls or (username is not None and not no_tls)
        if not hostname or not 0 < port < 65536 or not timeout > 0:
            raise ValueError(f"no such relay: host {hostname!r}, port {port}, timeout {timeout}")
        if no_tls and (force_tls or implicit_tls):
            raise ValueError("no_tls contradicts force_tls and implicit_tls")
        if (username is None) != (password is None):
            raise ValueError("a username needs a password, and a password a username")
        if auth is not None and auth.upper() not in _MECHANISMS:
            raise ValueError(f"unknown mechanism {auth!r}: it is one of {', '.join(_MECHANISMS)}")
        if context and username and not no_tls and not (context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname):
            raise ValueError("a password needs a context that verifies certificate and host name")
        self.hostname, self.port, self.timeout = hostname, port, timeout
        self.no_tls, self.force_tls, self.implicit_tls = no_tls, force_tls, implicit_tls
        self._username, self._password, self._auth = username, password, auth
        self._context = context
        self._ehlo_name: str | None = None  # found once, for the look-up may be slow
        self._kept = _Kept()

    def __str__(self) -> str:
        return f"{self.hostname}:{self.port}"

    def __enter__(self) -> SMTPMailer:
        """Connect, unless this thread has a connection.  May raise `RelayUnavailable`."""
        self._connection()
        self._kept.depth += 1
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self._kept.depth -= 1
        if self._kept.depth == 0:
            self._disconnect(politely=True)

    def send(self, fromaddr: str, toaddrs: Sequence[str], message: bytes) -> dict[str, Reply]:
        """Send *message*; return a `Reply` for each of *toaddrs*.  May raise `RelayUnavailable`.

        Line ends become CRLF, and dots are stuffed (RFC 5321, 4.5.2).  After the relay's last word nothing can raise.
        """
        if not "".join((fromaddr, *toaddrs)).isprintable():
            raise ValueError("an address with control characters")
        used = self._kept.smtp is not None and self._kept.pid == os.getpid()
        with self:
            try:
                return self._transact(fromaddr, toaddrs, message, used)
            except BaseException:  # whatever it was: the dialogue was cut off somewhere
                self._disconnect()
                raise

    # -- the connection

    def _connection(self) -> smtplib.SMTP:
        kept = self._kept
        if kept.smtp is not None and kept.pid != os.getpid():  # a fork has no part in its parent's dialogue
            self._disconnect()
        if kept.smtp is None:
            kept.smtp, kept.pid = self._connect(), os.getpid()
        return kept.smtp

    def _disconnect(self, politely: bool = False) -> None:
        """Close the connection; the reply to a QUIT is not waited for: it could change nothing."""
        smtp, self._kept.smtp = self._kept.smtp, None
        if smtp is not None:
            with contextlib.suppress(Exception):  # the messages are where they are
                if politely:
                    smtp.send(b"QUIT\r\n")
            with contextlib.suppress(Exception):
                smtp.close()

    def _connect(self) -> smtplib.SMTP:
        """Return a connection that is ready for MAIL; whatever goes wrong is `RelayUnavailable`."""
        smtp = None
        try:
            if self.implicit_tls:
                smtp = smtplib.SMTP_SSL(
                    self.hostname, self.port, self._ehlo_name, timeout=self.timeout, context=self._tls()
                )
            else:
                smtp = smtplib.SMTP(self.hostname, self.port, self._ehlo_name, timeout=self.timeout)
            self._ehlo_name = smtp.local_hostname
            smtp.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # the last piece must not wait for an ACK
            self._ehlo(smtp)
            if not (self.no_tls or self.implicit_tls):
                self._starttls(smtp)
            if self._username is not None:
                self._login(smtp)
            return smtp
        except BaseException as error:
            if smtp is not None:
                smtp.close()
            if isinstance(error, Exception):
                raise RelayUnavailable(f"{self}: {_reason(error)}") from error
            raise

    def _ehlo(self, smtp: smtplib.SMTP) -> None:
        code, text = smtp.ehlo()
        if code != 250:
            raise smtplib.SMTPHeloError(code, text)

    def _starttls(self, smtp: smtplib.SMTP) -> None:
        """Turn TLS on where it is offered (RFC 7435: better than nothing), or raise where it is required."""
        if smtp.has_extn("starttls"):
            with contextlib.suppress(() if self._verified else smtplib.SMTPResponseException):  # offered, but refused
                smtp.starttls(context=self._tls())
                self._ehlo(smtp)
        elif self._verified:
            raise RelayUnavailable("TLS is required, but STARTTLS is not offered")

    def _tls(self) -> ssl.SSLContext:
        if self._context is None:
            if self._verified:
                self._context = ssl.create_default_context()
            else:
                self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                self._context.check_hostname, self._context.verify_mode = False, ssl.CERT_NONE
        return self._context

    def _login(self, smtp: smtplib.SMTP) -> None:
        """Log in with one mechanism, once: a second try on a 535 gets accounts locked."""
        offered = smtp.esmtp_features.get("auth", "").upper().split()
        mechanism = self._auth.upper() if self._auth else next((m for m in _BEST_MECHANISMS if m in offered), None)
        if mechanism not in offered:
            raise RelayUnavailable(f"AUTH {mechanism or 'PLAIN'} is not offered, but {' '.join(offered) or 'none'}")
        password = self._password() if callable(self._password) else self._password
        smtp.user, smtp.password = self._username, password  # type: ignore[attr-defined]
        try:
            _MECHANISMS[mechanism](smtp)
        except UnicodeEncodeError:  # its text would show a part of the password
            raise RelayUnavailable("username and password must be ASCII") from None

    # -- a mail transaction (RFC 5321, 3.3)

    def _transact(self, fromaddr: str, toaddrs: Sequence[str], message: bytes, used: bool) -> dict[str, Reply]:
        """Send over the kept connection, or over a new one if the relay has dropped it since it was last *used*."""
        smtp = self._connection()
        transfer = _Transfer(smtp, fromaddr, toaddrs, message)
        try:
            transfer.run()
        except _Lost as lost:
            self._disconnect()
            if used and not transfer.decided:
                return self._transact(fromaddr, toaddrs, message, used=False)
            if not transfer.mail_answered:
                raise RelayUnavailable(f"{self}: {lost}") from lost
            for address in toaddrs:
                if address not in transfer.replies or transfer.replies[address].outcome == "sent":
                    transfer.replies[address] = lost.reply
        return transfer.replies


class StreamMailer:
    """Print instead of sending, to *stream* (None: standard output): for a first try, and for development."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._lock = threading.Lock()  # keeps the messages of several workers apart

    def __str__(self) -> str:
        return "stream"

    def send(self, fromaddr: str, toaddrs: Sequence[str], message: bytes) -> None:
        """Print envelope and message.  Raise `RelayUnavailable` if the stream does not take them."""
        stream = self._stream or sys.stdout
        text = message.decode("utf-8", "replace").replace("\r\n", "\n")
        try:
            with self._lock:
                stream.write(f"MAIL FROM:<{fromaddr}> RCPT TO:<{'>,<'.join(toaddrs)}>\n{text.rstrip()}\n\n")
                stream.flush()
        except (OSError, ValueError, AttributeError) as error:  # closed in one of three ways
            raise RelayUnavailable(f"cannot print: {_reason(error)}") from error


# --------------------------------------------------------------------------------------------------- Maildir

_claims: set[_Claim] = set()  # all that this process has open
_unsettled: list[_Claim] = []  # those that wait, locked, for a disk that takes what is to be recorded


class _Claim:
    """A message that nobody else may send, move or unlink while `fd` holds the flock on it."""

    def __init__(self, queue: Maildir, directory: str, name: str) -> None:
        self.queue, self.directory, self.name = queue, directory, name
        # O_RDWR: NFS wants it for an exclusive lock; O_NONBLOCK: a FIFO must not stop us
        self.fd = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        _claims.add(self)
        self.fromaddr, self.error, self.message_id = "", "", ""
        self.toaddrs: tuple[str, ...] = ()
        self.owed: tuple[str, ...] | None = None  # set while the relay took it for others, and the file can't say so

    @property
    def path(self) -> str:
        return self.queue._path(self.directory, self.name)

    @property
    def arrival(self) -> float:
        """The Unix time in its name; of a foreign name, when it was last changed."""
        seconds = self.name.partition(".")[0]
        return float(seconds) if seconds.isdecimal() else os.fstat(self.fd).st_mtime

    def read(self) -> bytes:
        """Return the message; learn its envelope.  Raise `ValueError` if there is none."""
        size = os.fstat(self.fd).st_size
        head = os.pread(self.fd, _PIECE, 0)
        if head.count(b"\n") < 3:
            head = os.pread(self.fd, size, 0)
        found = _ENVELOPE.match(head)
        self.toaddrs = _parse_addresses(found[2].decode("utf-8", "replace").strip()) if found else ()
        if not found or not self.toaddrs:
            raise ValueError("no readable envelope")
        self.fromaddr = next(iter(_parse_addresses(found[1].decode("utf-8", "replace").strip())), "")
        self.error = (found[3] or b"").decode("utf-8", "replace")
        start = found.end()  # what is left is read by itself, so that a large message is in memory once
        message = head[start:] if len(head) == size else os.pread(self.fd, size - start, start)
        self.message_id = _message_id(_headers_of(message))
        return message

    def move(self, directory: str, name: str) -> None:
        os.rename(self.path, self.queue._path(directory, name))
        self.directory, self.name = directory, name

    def keep(self, toaddrs: tuple[str, ...], error: str, message: bytes) -> None:
        """Replace the file by one for *toaddrs* alone.  It is locked before it is seen: else it looked abandoned."""
        name = self.queue._write(self.fromaddr, toaddrs, message, error, sync=True)
        try:
            replacement = self.queue._lock("tmp", name)
            if replacement is None:
                raise OSError(errno.ENOLCK, "cannot lock", name)
            try:
                os.rename(replacement.path, self.path)
                self.fd, replacement.fd = replacement.fd, self.fd
            finally:
                replacement.close()
        except OSError:
            self.queue._discard(name)
            raise
        self.toaddrs, self.error = toaddrs, error
        self.queue._fsync("cur")

    def record(self, waiting: tuple[str, ...], error: str, message: bytes) -> None:
        """Write down that the relay has taken the message for all but *waiting*: the end of the duplicate's window."""
        self.owed = waiting
        if waiting:
            self.keep(waiting, error, message)
        else:
            _insist(os.unlink, self.path)
            self.close()
        self.owed = None

    def defer(self, due: float) -> None:
        self.move("new", _deferred_name(self.name, due))
        self.close()

    def release(self) -> None:
        self.move("new", self.name)
        self.close()

    def give_up(self) -> None:
        self.move(self.queue._failed(), _new_name())
        self.queue._fsync(self.directory)
        self.close()

    def give_up_for(self, toaddrs: tuple[str, ...], error: str, message: bytes) -> None:
        """Put a copy for *toaddrs* in .failed/: the others have another fate."""
        name = self.queue._write(self.fromaddr, toaddrs, message, error, sync=True)
        directory = self.queue._failed()
        os.rename(self.queue._path("tmp", name), self.queue._path(directory, name))
        self.queue._fsync(directory)

    def requeue(self) -> None:
        self.move("new", _new_name())
        self.close()

    def close(self) -> None:
        """Unlock, which a copy of the descriptor in a forked child would put off, and close."""
        if self in _claims:
            _claims.discard(self)
            with contextlib.suppress(OSError):
                fcntl.flock(self.fd, fcntl.LOCK_UN)
            os.close(self.fd)


def _close_claims_in_child() -> None:
    """Close the copies that a fork made, without unlocking: the locks are the parent's, and must end with it."""
    for claim in _claims:
        os.close(claim.fd)
    _claims.clear()


os.register_at_fork(after_in_child=_close_claims_in_child)


def _fsync(*paths: str) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _insist(call: Callable[..., None], *args: str) -> None:
    """Call, and call again a few times while it raises `OSError`: for what must not fail."""
    for _ in range(2):
        with contextlib.suppress(OSError):
            return call(*args)
    return call(*args)


class Maildir:
    """A queue: a standard Maildir at *path*, made if it is missing, unless *create* is false.

    Directories are made 0700 and files 0600, or follow the wider rights that somebody gave the queue's directory.

    Raise `FileNotFoundError` where there is none and *create* is false, `ValueError` for a directory that holds other
    things, and any other `OSError`.
    """

    def __init__(self, path: str | os.PathLike[str], create: bool = True) -> None:
        self.path = os.fspath(path)
        wanted = {"tmp", "new", "cur"}
        try:
            present = set(os.listdir(self.path))
        except FileNotFoundError:
            if not create:
                raise
            _make_directory(self.path, 0o700)
            present = set()
        if wanted - present and (present - wanted or not create):
            raise ValueError(f"{self.path} is not a Maildir: it is left as it is")
        self._mode = stat.S_IMODE(os.stat(self.path).st_mode)
        if wanted - present:
            for directory in wanted:
                _make_directory(self._path(directory), self._mode)
            _fsync(self.path, os.path.dirname(os.path.abspath(self.path)))

    def add(self, fromaddr: str, toaddrs: str | Iterable[str], message: bytes | str | email.message.Message) -> str:
        """Queue a message now, without a transaction; return its id.  When this returns, it is durable.

        Arguments and errors are those of `QueuedMailDelivery.send`; an `OSError` says that it is not in the queue.
        """
        message_id, recipients, content = _prepare(fromaddr, toaddrs, message)
        name = self._write(fromaddr, recipients, content, sync=True)
        for error in self._publish([name]).values():
            self._discard(name)
            raise error
        return message_id

    def _path(self, *parts: str) -> str:
        return "/".join((self.path, *parts))

    def _names(self, directory: str) -> list[str]:
        return [name for name in os.listdir(self._path(directory)) if name[0] != "."]

    def _write(
        self, fromaddr: str, toaddrs: Iterable[str], message: bytes, error: str = "", sync: bool = False
    ) -> str:
        """Write a complete file in tmp/; return its name."""
        name = _new_name()
        fd = os.open(self._path("tmp", name), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                if self._mode & 0o666 != 0o600:
                    os.fchmod(fd, self._mode & 0o666)
                file.write(_envelope(fromaddr, toaddrs, error, message))
                file.write(message)
                file.flush()
                if sync:
                    os.fsync(fd)
        except BaseException:
            self._discard(name)
            raise
        return name

    def _discard(self, name: str) -> None:
        """Unlink a file in tmp/; one that stays is litter."""
        with contextlib.suppress(OSError):
            os.unlink(self._path("tmp", name))

    def _sync(self, names: Sequence[str]) -> None:
        """Make files in tmp/ durable, side by side where there are many: a disk takes them together."""
        paths = [self._path("tmp", name) for name in names]
        if len(paths) < 4:
            return _fsync(*paths)
        with concurrent.futures.ThreadPoolExecutor(_FSYNC_THREADS) as pool:
            for _ in pool.map(lambda share: _fsync(*share), [paths[i::_FSYNC_THREADS] for i in range(_FSYNC_THREADS)]):
                pass
        return None

    def _publish(self, names: Iterable[str], directory: str = "new") -> dict[str, OSError]:
        """Show complete files (tmp/ to new/), durably, and wake the processors; return what could not be moved."""
        failures = {}
        for name in names:
            try:
                _insist(os.rename, self._path("tmp", name), self._path(directory, name))
            except OSError as error:
                failures[name] = error
        try:
            _insist(self._fsync, directory)
        except OSError as error:  # they are there, and will be sent, unless the power fails first
            _log.error("cannot make %s durable: %s", self._path(directory), _reason(error))
        self._wake()
        return failures

    def _fsync(self, directory: str) -> None:
        _fsync(self._path(directory))

    def _lock(self, directory: str, name: str) -> _Claim | None:
        """Lock a message where it is.  None: it is gone, or claimed by the living; `OSError`: no message, or trouble."""
        try:
            claim = _Claim(self, directory, name)
        except FileNotFoundError:
            return None
        locked = False
        try:
            status = os.fstat(claim.fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", claim.path)
            fcntl.flock(claim.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = os.path.samestat(status, os.lstat(claim.path))  # or it was moved before we had the lock
        except (BlockingIOError, FileNotFoundError):
            pass
        finally:
            if not locked:
                claim.close()
        return claim if locked else None

    def _claim(self, name: str, directory: str = "new") -> _Claim | None:
        """Claim a message (to cur/).  None and `OSError`: as in `_lock`."""
        claim = self._lock(directory, name)
        if claim is not None:
            try:
                claim.move("cur", name)
            except BaseException:
                claim.close()
                raise
        return claim

    def _recover(self, name: str) -> bool:
        """Take up an abandoned claim: back to new/.  False: a living process holds it."""
        claim = self._lock("cur", name)
        if claim is None:
            return False
        try:
            claim.release()
        finally:
            claim.close()
        return True

    def _failed(self) -> str:
        """Return the directory for what is given up, made if need be: a Maildir++ folder."""
        if not os.path.isdir(self._path(".failed/new")):
            for directory in (".failed", ".failed/tmp", ".failed/cur", ".failed/new"):
                _make_directory(self._path(directory), self._mode)
            os.close(os.open(self._path(".failed/maildirfolder"), os.O_CREAT | os.O_CLOEXEC, 0o600))
            _fsync(self._path(".failed"), self.path)
        return ".failed/new"

    def _clean(self, now: float) -> None:
        """Remove litter from tmp/, naming the envelope of each in the log."""
        for name in self._names("tmp"):
            path = self._path("tmp", name)
            with contextlib.suppress(OSError):
                status = os.lstat(path)
                if stat.S_ISREG(status.st_mode) and now - status.st_mtime > _LITTER_AGE:
                    with open(path, "rb") as file:
                        envelope = (file.readline(1000) + file.readline(1000)).decode("utf-8", "replace")
                    os.unlink(path)
                    _log.warning("removed what was left uncommitted in tmp/%s: %s", name, _printable(envelope))

    def _wake(self) -> None:
        """Wake the processors that wait on the queue's FIFO, if any."""
        with contextlib.suppress(OSError):
            fd = os.open(self._path("trigger"), os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if stat.S_ISFIFO(os.fstat(fd).st_mode):
                    os.write(fd, b"\0")
            finally:
                os.close(fd)

    def _open_trigger(self) -> list[int]:
        """Return both ends of the FIFO (with no writer, `poll` would report its end for ever), or [] for none."""
        path, ends = self._path("trigger"), []
        try:
            with contextlib.suppress(FileExistsError):
                os.mkfifo(path, 0o600)
                os.chmod(path, self._mode & 0o666)
            for flag in (os.O_RDONLY, os.O_WRONLY):
                ends.append(os.open(path, flag | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC))
            if stat.S_ISFIFO(os.fstat(ends[0]).st_mode):
                return ends
        except OSError as error:
            _log.info("no trigger, so the interval alone counts: %s", _reason(error))
        for fd in ends:
            os.close(fd)
        return []


def _make_directory(path: str, mode: int) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
        if mode != 0o700:
            os.chmod(path, mode)


def _event(
    outcome: str, message_id: str, fromaddr: str, toaddrs: Iterable[str], reply: Reply, retry_at: float = 0.0
) -> MailEvent:
    """Return the event that tells of *outcome* and *reply*."""
    about = (message_id, fromaddr, tuple(toaddrs))
    if outcome == "sent":
        return MailSentEvent(*about, str(reply))
    if outcome == "deferred":
        return MailDeferredEvent(*about, str(reply), reply.status, retry_at)
    return MailErrorEvent(*about, str(reply), reply.status)


def _log_event(event: MailEvent, relay: object, delay: float) -> None:
    failed = isinstance(event, MailErrorEvent)
    outcome = "failed" if failed else "deferred" if isinstance(event, MailDeferredEvent) else "sent"
    _log.log(
        logging.ERROR if failed else logging.INFO,
        "%s message-id=<%s> from=<%s> to=<%s> relay=%s delay=%.1f reply=%s",
        outcome, event.message_id, event.fromaddr, ">,<".join(event.toaddrs), relay, delay,
        json.dumps(getattr(event, "response", None) or getattr(event, "error_message", ""), ensure_ascii=False),
    )  # fmt: skip


def _by_reply(replies: Mapping[str, Reply]) -> dict[Reply, list[str]]:
    grouped: dict[Reply, list[str]] = {}
    for address, reply in replies.items():
        grouped.setdefault(reply, []).append(address)
    return grouped


@dataclasses.dataclass(frozen=True)
class _Courier:
    """Sends claimed messages and settles them, recipient by recipient; `tell` is called with every event."""

    mailer: Mailer
    tell: Callable[[MailEvent], object]
    clock: Callable[[], float] = time.time
    max_age: float = _MAX_AGE
    soft_bounce: bool = False

    def deliver(self, claim: _Claim) -> set[str]:
        """Return the outcomes: 'sent', 'deferred', 'failed'.  On `RelayUnavailable`, release the claim, and raise it.

        Whatever else goes wrong is logged, and the message deferred: no message can stop the queue.
        """
        try:
            return self._attempt(claim)
        except RelayUnavailable:
            claim.release()
            raise
        except Exception as error:
            _log.error("%s: %s", claim.name, _reason(error))
            if claim.owed is not None:  # nobody may send it again, so nobody else may have it
                _unsettled.append(claim)
            else:
                now = self.clock()
                with contextlib.suppress(OSError):
                    claim.defer(now + _backoff(now - claim.arrival))
            return {"deferred"}
        finally:
            if claim.owed is None:
                claim.close()

    def _attempt(self, claim: _Claim) -> set[str]:
        try:
            message = claim.read()
        except ValueError as error:
            claim.give_up()
            _log.error("given up, see %s: %s", claim.path, error)
            return {"failed"}
        waiting = dict.fromkeys(claim.toaddrs)
        outcomes: dict[str, dict[str, Reply]] = {}
        for group in _groups(claim.toaddrs):
            replies = _ask(self.mailer, claim.fromaddr, group, message)
            accepted = {address: reply for address, reply in replies.items() if reply.outcome == "sent"}
            if accepted:
                waiting = {address: None for address in waiting if address not in accepted}
                claim.record(tuple(waiting), self._error_line(replies) or claim.error, message)
                self._report("sent", claim, accepted)
                outcomes["sent"] = accepted
            for address in [address for address in group if address in waiting]:
                outcome, reply = self._verdict(replies[address], claim)
                outcomes.setdefault(outcome, {})[address] = reply
        self._settle(claim, message, outcomes.get("deferred", {}), outcomes.get("failed", {}))
        return set(outcomes)

    def _verdict(self, reply: Reply, claim: _Claim) -> tuple[str, Reply]:
        """Return what becomes of a recipient that the relay did not take: 'deferred' or 'failed'."""
        if self.soft_bounce and reply.outcome == "failed":
            reply = reply.softened()
        too_old = self.clock() - claim.arrival > self.max_age
        return ("failed" if too_old else reply.outcome), reply

    def _settle(
        self, claim: _Claim, message: bytes, deferred: dict[str, Reply], failed: dict[str, Reply]
    ) -> None:
        """Leave the message where it belongs, for those recipients that the relay did not take."""
        if failed:
            error = self._error_line(failed)
            if deferred:
                claim.give_up_for(tuple(failed), error, message)
            else:
                self._annotate(claim, tuple(failed), error, message)
                claim.give_up()
            self._report("failed", claim, failed)
        if deferred:
            self._annotate(claim, tuple(deferred), self._error_line(deferred), message)
            now = self.clock()
            due = float(int(now + _backoff(now - claim.arrival)))
            claim.defer(due)
            self._report("deferred", claim, deferred, due)

    @staticmethod
    def _annotate(claim: _Claim, toaddrs: tuple[str, ...], error: str, message: bytes) -> None:
        """Write down who is left, and why.  A full disk must not keep the message from moving on without that."""
        if (toaddrs, error) != (claim.toaddrs, claim.error):
            try:
                claim.keep(toaddrs, error, message)
            except OSError as trouble:
                _log.error("%s: %s", claim.name, _reason(trouble))

    @staticmethod
    def _error_line(replies: Mapping[str, Reply]) -> str:
        """Return what the file says of the last of *replies* that is no success; no address is named there."""
        bad = [reply for reply in replies.values() if reply.outcome != "sent"]
        return _without_addresses(f"{bad[-1].status} {bad[-1]}") if bad else ""

    def _report(self, outcome: str, claim: _Claim, replies: Mapping[str, Reply], retry_at: float = 0.0) -> None:
        for reply, toaddrs in _by_reply(replies).items():
            event = _event(outcome, claim.message_id, claim.fromaddr, toaddrs, reply, retry_at)
            _log_event(event, self.mailer, self.clock() - float(claim.name.partition(".")[0]))
            self.tell(event)


# ------------------------------------------------------------------------------------------------ deliveries


@dataclasses.dataclass(frozen=True)
class _Message:
    """What a transaction has sent: its content, or the name of the file in tmp/ that holds it."""

    message_id: str
    fromaddr: str
    toaddrs: tuple[str, ...]
    content: bytes = b""
    name: str = ""

    def event(self, outcome: str, reply: Reply, retry_at: float = 0.0) -> MailEvent:
        return _event(outcome, self.message_id, self.fromaddr, self.toaddrs, reply, retry_at)


class _DataManager:
    """What one delivery has to do with one transaction (`transaction.interfaces.ISavepointDataManager`).

    `transaction` calls `abort` and `tpc_abort` in any number, also after a commit: they only know of messages that
    are not finished, and finish takes them away first.
    """

    def __init__(self, delivery: _Delivery, manager: Any) -> None:
        self.delivery = delivery  # Transaction.set_data goes by id(): while this lives, no other delivery has that id
        self.transaction_manager = manager
        self.messages: list[_Message] = []
        self.joined = self.committing = False

    def savepoint(self) -> _Savepoint:
        return _Savepoint(self, len(self.messages))

    def drop(self, start: int) -> None:
        dropped, self.messages[start:] = self.messages[start:], []
        self.delivery._forget(dropped)

    def abort(self, _transaction: Any) -> None:
        self.joined = self.committing = False
        self.drop(0)

    tpc_abort = abort

    def tpc_begin(self, _transaction: Any) -> None:
        self.committing = True

    def commit(self, _transaction: Any) -> None:
        """All that can fail: it comes before any vote, and zope.sqlalchemy commits in its vote."""
        self.delivery._make_durable(self.messages)

    def tpc_vote(self, _transaction: Any) -> None:
        pass

    def tpc_finish(self, transaction: Any) -> None:
        """Let the messages go; never raise, for the databases have committed.  What to tell is told afterwards."""
        messages, self.messages = self.messages, []
        events: list[MailEvent] = []
        try:
            if messages:
                self.delivery._finish(messages, events.append)
        except Exception:
            _log.critical("mail of a committed transaction is in doubt: %s", messages, exc_info=True)
        if events:  # a hook makes `transaction` abort every data manager once more
            transaction.addAfterCommitHook(lambda _committed: [notify(event) for event in events])

    def sortKey(self) -> str:
        return f"~~sendmail:{id(self)}"  # after every database's, so that mail is visible after the data is


class _Savepoint:
    def __init__(self, manager: _DataManager, length: int) -> None:
        self.manager, self.length = manager, length

    def rollback(self) -> None:
        self.manager.drop(self.length)


class _Delivery:
    """What the two deliveries share: `send`, and the part of the transaction in which all that can fail is done."""

    def __init__(self, queue: Maildir | str | os.PathLike[str] | None, transaction_manager: Any) -> None:
        if transaction is None:
            raise ImportError(f"{type(self).__name__} needs the package 'transaction': pip install transaction")
        self._manager = transaction.manager if transaction_manager is None else transaction_manager
        self._queue = None if queue is None else _maildir(queue)

    def send(self, fromaddr: str, toaddrs: str | Iterable[str], message: bytes | str | email.message.Message) -> str:
        """Send *message* when, and only when, the transaction commits; return its id (without angle brackets).

        *fromaddr* is an address, or '' (the null sender); *toaddrs* an address or several, where duplicates count once.
        *message* is bytes, text or a `Message`, without its Bcc; it gets a Message-Id and a Date if it has none.

        Raise `ValueError` for no recipients, for an address that is no bare addr-spec (RFC 5322, 3.4.1) and for a
        malformed Message-Id; `OSError` if the message can't be written; and what the transaction manager raises.
        """
        message_id, recipients, content = _prepare(fromaddr, toaddrs, message)
        current = self._manager.get()
        try:
            manager: _DataManager = current.data(self)
        except KeyError:
            manager = _DataManager(self, self._manager)
            current.set_data(self, manager)
        if manager.committing:
            raise ValueError("the transaction is being committed: too late to send")
        if not manager.joined:  # new, or sent away by the rollback of a savepoint older than itself
            current.join(manager)
            manager.joined = True
        if self._queue is None:
            manager.messages.append(_Message(message_id, fromaddr, recipients, content))
        else:
            name = self._queue._write(fromaddr, recipients, content)
            manager.messages.append(_Message(message_id, fromaddr, recipients, name=name))
        return message_id

    def _forget(self, messages: Iterable[_Message]) -> None:
        if self._queue is not None:
            for message in messages:
                self._queue._discard(message.name)

    def _make_durable(self, messages: Iterable[_Message]) -> None:
        if self._queue is not None:
            self._queue._sync([message.name for message in messages])

    def _finish(self, messages: Iterable[_Message], tell: Callable[[MailEvent], object]) -> None:
        raise NotImplementedError


class QueuedMailDelivery(_Delivery):
    """Queue messages at commit, in *queue* (a `Maildir`, or its path), for a processor to send.

    *transaction_manager* is `transaction.manager` (thread-local) unless another is given.  Raise `ImportError` where
    `transaction` is not installed, and what `Maildir` raises.
    """

    def __init__(self, queue: Maildir | str | os.PathLike[str], transaction_manager: Any = None) -> None:
        super().__init__(queue, transaction_manager)

    def _finish(self, messages: Iterable[_Message], tell: Callable[[MailEvent], object]) -> None:
        assert self._queue is not None
        _publish_committed(self._queue, messages, tell)


def _publish_committed(queue: Maildir, messages: Iterable[_Message], tell: Callable[[MailEvent], object]) -> None:
    """Show the messages of a committed transaction; one that can't be shown stays complete in tmp/, and is told of."""
    by_name = {message.name: message for message in messages}
    for name, error in queue._publish(by_name).items():
        path = queue._path("tmp", name)
        with contextlib.suppress(OSError):
            os.utime(path, (time.time() + 366 * 86400,) * 2)  # no litter for a year
        _log.critical("committed mail is stuck: move %s to new/ by hand (%s)", path, _reason(error))
        tell(by_name[name].event("failed", Reply(554, f"5.3.0 stuck in {path}: {_reason(error)}")))


class DirectMailDelivery(_Delivery):
    """Send messages by *mailer* while the transaction commits; what fails becomes a `MailErrorEvent` after it.

    A process that dies in the middle loses what it had not sent, unless *fallback* names a queue (a `Maildir`, or its
    path): then this is a queued delivery that makes the first attempt itself, and what can't be sent now stays there
    (`MailDeferredEvent`).  All else is as for `QueuedMailDelivery`.
    """

    def __init__(
        self, mailer: Mailer, transaction_manager: Any = None, *,
        fallback: Maildir | str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(fallback, transaction_manager)
        self._mailer = mailer

    def _finish(self, messages: Iterable[_Message], tell: Callable[[MailEvent], object]) -> None:
        with contextlib.ExitStack() as connection:
            outage = None
            try:
                connection.enter_context(_connected(self._mailer))
            except RelayUnavailable as error:
                outage = error
            if self._queue is None:
                self._send(messages, tell, outage)
            else:
                self._send_or_queue(self._queue, messages, tell, outage)

    def _send(
        self, messages: Iterable[_Message], tell: Callable[[MailEvent], object], outage: RelayUnavailable | None
    ) -> None:
        for message, group in ((message, group) for message in messages for group in _groups(message.toaddrs)):
            replies: dict[str, Reply] = {}
            if outage is None:
                try:
                    replies = _ask(self._mailer, message.fromaddr, group, message.content)
                except RelayUnavailable as error:
                    outage = error
            if outage is not None:
                replies = dict.fromkeys(group, _no_relay(outage))
            for reply, toaddrs in _by_reply(replies).items():
                outcome = "sent" if reply.outcome == "sent" else "failed"  # there is no later here
                event = dataclasses.replace(message, toaddrs=tuple(toaddrs)).event(outcome, reply)
                _log_event(event, self._mailer, 0.0)
                tell(event)

    def _send_or_queue(
        self, queue: Maildir, messages: Iterable[_Message], tell: Callable[[MailEvent], object],
        outage: RelayUnavailable | None,
    ) -> None:  # fmt: skip
        claims: list[tuple[_Message, _Claim]] = []
        try:
            for message in messages:
                try:
                    claim = queue._claim(message.name, "tmp")
                except OSError:
                    claim = None
                if claim is None:
                    _publish_committed(queue, [message], tell)
                else:
                    claims.append((message, claim))
            with contextlib.suppress(OSError):
                queue._fsync("cur")
            courier = _Courier(self._mailer, tell)
            for message, claim in claims:
                if outage is None:
                    try:
                        courier.deliver(claim)
                    except RelayUnavailable as error:
                        outage = error
                else:
                    claim.release()
                if outage is not None:
                    tell(message.event("deferred", _no_relay(outage), time.time()))
        finally:
            for _message, claim in claims:
                if claim.owed is None:
                    claim.close()
            queue._publish([])


def _no_relay(outage: RelayUnavailable) -> Reply:
    return Reply(451, f"4.4.1 {outage}")


def _maildir(queue: Maildir | str | os.PathLike[str]) -> Maildir:
    return queue if isinstance(queue, Maildir) else Maildir(queue)


# ------------------------------------------------------------------------------------------------- processor


@dataclasses.dataclass
class _Counts:
    """What a pass did, in messages; `outage` is why it ended early."""

    sent: int = 0
    deferred: int = 0
    failed: int = 0
    left: int = 0
    outage: RelayUnavailable | None = None


@dataclasses.dataclass
class _Listing:
    """What a pass remembers of a directory, so that an idle one costs a `stat`, however deep the queue."""

    mtime: int = -1
    listed: float = 0.0
    count: int = 0
    next_due: float = 0.0  # until then the listing holds, if nothing changes


class QueueProcessorThread(threading.Thread):
    """Send what is due in *queue* (a `Maildir`, or its path) by *mailer*, every *interval* seconds and when woken.

    `start()` makes it a daemon thread that interpreter exit stops and joins; `run()` does the work in this thread;
    `process()` makes one pass.  At most *batch* messages a pass, over *workers* connections.  A message older than
    *max_age* seconds is given up instead of deferred; *soft_bounce* defers what the relay refuses for good.
    As many processors as you like may share a queue.
    """

    def __init__(
        self, queue: Maildir | str | os.PathLike[str], mailer: Mailer, interval: float = 3.0, *,
        batch: int | None = None, workers: int = 1, max_age: float = _MAX_AGE, soft_bounce: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(name="sendmail", daemon=True)
        self._queue, self._mailer, self._interval = _maildir(queue), mailer, interval
        self._batch, self._workers, self._max_age, self._soft_bounce = batch, workers, max_age, soft_bounce
        self._clock: Callable[[], float] = time.time
        self._lock = threading.Lock()  # of the counts
        self._stopping = False
        self._bell = os.pipe()  # rung by stop(), which a signal handler may call: an Event could dead-lock there
        os.set_blocking(self._bell[1], False)
        weakref.finalize(self, lambda ends: [os.close(fd) for fd in ends], self._bell)
        self._listings = {"new": _Listing(), "cur": _Listing()}
        self._not_before: dict[str, float] = {}  # what stands in new/ or cur/ and can't be claimed: when to look again
        self._suspects: set[str] = set()  # at these the relay became unavailable: others go first
        self._next_cleaning = 0.0

    def start(self) -> None:
        atexit.register(self._stop_and_join)
        super().start()

    def stop(self) -> None:
        """Finish the message in hand, and start no other.  Returns at once; safe in a signal handler."""
        self._stopping = True
        with contextlib.suppress(OSError):
            os.write(self._bell[1], b"\0")

    def _stop_and_join(self) -> None:
        self.stop()
        self.join()

    def run(self) -> None:
        """Make passes until `stop()`."""
        trigger = self._queue._open_trigger()
        outage_began = None
        try:
            while not self._stopping:
                _drain(trigger[:1])  # before the pass lists, never after: what comes now, it sees
                try:
                    outage = self.process().outage
                except Exception as error:  # the queue itself can't be read; it may come back
                    _log.error("cannot process %s: %s", self._queue.path, _reason(error))
                    outage = None
                if outage is None:
                    outage_began = None
                    self._wait(self._interval, trigger)
                else:
                    outage_began = outage_began or self._clock()
                    lasted = self._clock() - outage_began
                    self._wait(max(self._interval, min(lasted, _OUTAGE_WAIT)), [])
        finally:
            for fd in trigger:
                os.close(fd)
            atexit.unregister(self._stop_and_join)

    def _wait(self, seconds: float, trigger: Sequence[int]) -> None:
        poll = select.poll()
        for fd in (self._bell[0], *trigger[:1]):
            poll.register(fd, select.POLLIN)
        poll.poll(seconds * 1000)

    def process(self) -> _Counts:
        """Make one pass; return the number of messages `sent`, `deferred`, `failed` and `left` in the queue.

        A message counts under each that befell one of its recipients.  If the relay is unavailable, the pass ends, and
        `outage` says why.  Raise `OSError` if the queue can't be read.
        """
        counts = _Counts()
        now = self._clock()
        self._tidy(now)
        for name in self._look("cur", now):
            try:
                self._queue._recover(name)
            except OSError as error:
                self._leave("cur", name, error)
        due = collections.deque(self._look("new", now)[: self._batch])
        counts.left = sum(listing.count for listing in self._listings.values())
        if due and not self._stopping:
            try:
                with _connected(self._mailer):  # before any claim, and before a second connection
                    helpers = [
                        threading.Thread(target=self._help, args=(due, counts), daemon=True)
                        for _ in range(min(self._workers, len(due)) - 1)
                    ]
                    with contextlib.suppress(RuntimeError):  # no more threads, as at interpreter exit
                        for helper in helpers:
                            helper.start()
                    self._work(due, counts)
                    for helper in helpers:
                        if helper.ident:
                            helper.join()
            except RelayUnavailable as error:
                counts.outage = error
        if counts.outage is not None:
            _log.warning("relay unavailable, %d left in the queue: %s", counts.left, _printable(str(counts.outage)))
        return counts

    def _tidy(self, now: float) -> None:
        """Write down what a full disk kept from being written; remove litter, once an hour."""
        for claim in _unsettled[:]:
            with contextlib.suppress(OSError, ValueError):
                claim.record(claim.owed or (), claim.error, claim.read())
                _unsettled.remove(claim)
                if claim.toaddrs and claim in _claims:
                    claim.release()
        if now >= self._next_cleaning:
            self._next_cleaning = now + 3600
            self._queue._clean(now)

    def _look(self, directory: str, now: float) -> list[str]:
        """Return what is due in *directory*, in order of arrival; [], without listing it, if nothing can have changed.

        A directory can change without a change of its mtime, but only within the clock tick of the file system: one
        that was younger than 2 s when it was listed is listed again.
        """
        listing = self._listings[directory]
        mtime = os.stat(self._queue._path(directory)).st_mtime_ns
        if mtime == listing.mtime and listing.listed <= now < listing.next_due:
            return []
        names = self._queue._names(directory)
        due = []
        next_due = math.inf
        for name in names:
            when = max(_due_time(name, now), self._not_before.get(name, 0.0))
            if when <= now:
                due.append(name)
            else:
                next_due = min(next_due, when)
        quiet = not due and now - mtime / 1e9 > 2
        self._listings[directory] = _Listing(mtime, now, len(names), next_due if quiet else 0.0)
        return sorted(due, key=lambda name: (name in self._suspects, name))

    def _help(self, due: collections.deque[str], counts: _Counts) -> None:
        """Work over one more connection; if there is none to be had, the first one goes on."""
        try:
            with _connected(self._mailer):
                self._work(due, counts)
        except RelayUnavailable as error:
            _log.info("no further connection: %s", error)

    def _work(self, due: collections.deque[str], counts: _Counts) -> None:
        """Claim and deliver one message after the other, until there is no more or the relay is unavailable."""
        courier = _Courier(self._mailer, notify, self._clock, self._max_age, self._soft_bounce)
        while not self._stopping and counts.outage is None:
            try:
                name = due.popleft()
            except IndexError:
                return
            try:
                claim = self._queue._claim(name)
                outcomes = courier.deliver(claim) if claim is not None else set()
            except RelayUnavailable as error:
                counts.outage = error
                self._suspects.add(name)
            except Exception as error:
                self._leave("new", name, error)
            else:
                self._suspects.discard(name)
                with self._lock:
                    counts.sent += "sent" in outcomes
                    counts.deferred += "deferred" in outcomes
                    counts.failed += "failed" in outcomes
                    counts.left -= bool(outcomes) and "deferred" not in outcomes

    def _leave(self, directory: str, name: str, error: Exception) -> None:
        """Leave alone for a while what can't be claimed: in silence, if it is no regular file."""
        self._not_before[name] = self._clock() + _BACKOFF_MIN
        with contextlib.suppress(OSError):
            if not stat.S_ISREG(os.lstat(self._queue._path(directory, name)).st_mode):
                return
        _log.error("cannot claim %s/%s: %s", directory, name, _reason(error))


def _drain(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(BlockingIOError):
            while os.read(fd, 65536):
                pass


# ---------------------------------------------------------------------------------------------- command line

_HELP = """\
usage: python -m sendmail --maildir DIR [options]                  send what is due, once; for cron
       python -m sendmail --maildir DIR --interval SECONDS         keep doing so
       python -m sendmail --maildir DIR -t < message               queue a message, as sendmail(8) does
       python -m sendmail --maildir DIR [-f SENDER] RECIPIENT ...  the same, for these recipients
       python -m sendmail --maildir DIR --list [--json]            show the queue
       python -m sendmail --maildir DIR --requeue [NAME ...]       make failed and deferred messages due again

queue
  --maildir DIR         the queue; made if it is missing (default: $SENDMAIL_MAILDIR)
  --interval SECONDS    stay, look for mail that often, and when something is queued
  --batch N             send at most N messages a pass (default: all that are due)
  --workers N           connections to the relay (default: 1)
  --max-age DAYS        give up what could not be sent for so long (default: 5)
  --soft-bounce         defer what the relay refuses for good
  --print               print instead of sending

relay
  --hostname HOST       (default: localhost)
  --port PORT           (default: 25)
  --username NAME       log in as NAME, with the password in $SENDMAIL_PASSWORD or
  --password-file FILE  in the first line of FILE, which is read at every login
  --auth MECHANISM      CRAM-MD5, PLAIN, LOGIN or XOAUTH2 (default: the best of the first three)
  --no-tls              never use TLS
  --force-tls           require STARTTLS, and verify the certificate
  --implicit-tls        TLS from the start (port 465)
  --timeout SECONDS     for each step of the dialogue (default: 60)

queueing: the options of sendmail(8), of which these count
  -t                    recipients are those in To, Cc and Bcc, besides those given
  -i, -oi               a line with only a dot does not end the message
  -f, -r SENDER         envelope sender (default: you); <> for none
  -F NAME               full name for a From that is missing
  --domain DOMAIN       completes addresses without one (default: this host's name)

  --verbose             a line for every message
  --help, --version

exit status: 0 done (though messages may have been deferred or given up), 64 wrong usage, 65 bad message,
73 no queue, 74 input or output error, 75 relay unavailable
"""
_LONG_OPTIONS = [
    "maildir=", "interval=", "batch=", "workers=", "max-age=", "soft-bounce", "print", "hostname=", "port=", "username=",
    "password-file=", "auth=", "no-tls", "force-tls", "implicit-tls", "timeout=", "domain=", "verbose", "list", "json",
    "requeue", "help", "version",
]  # fmt: skip
_SENDMAIL_OPTIONS = "A:B:C:F:GIL:N:O:R:UV:X:b:ce:f:h:imno:p:r:tv"  # as in Postfix; -q by itself, see _parse
_USAGE, _DATAERR, _CANTCREAT, _IOERR, _TEMPFAIL = 64, 65, 73, 74, 75  # sysexits(3)


class _Exit(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def _parse(argv: Sequence[str]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Return our options, those of sendmail(8), and the operands."""
    end = argv.index("--") if "--" in argv else len(argv)
    queue_runs = [arg for arg in argv[:end] if re.match("-q", arg)]  # takes an attached value only, as getopt can't say
    try:
        pairs, operands = getopt.gnu_getopt(
            [arg for arg in argv[:end] if arg not in queue_runs] + list(argv[end:]), _SENDMAIL_OPTIONS, _LONG_OPTIONS
        )
    except getopt.GetoptError as error:
        raise _Exit(_USAGE, f"{error}; see --help") from None
    ours = {option[2:]: value for option, value in pairs if option.startswith("--")}
    theirs = {option + (value if option in ("-o", "-b") else ""): value for option, value in pairs if option[1] != "-"}
    if queue_runs:
        theirs["-q"] = ""
    if theirs.pop("-bp", None) is not None:
        ours["list"] = ""
    return ours, theirs, operands


def _number(options: Mapping[str, str], name: str, default: float, whole: bool = False) -> float:
    try:
        value = float(options.get(name, default))
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf or (whole and value != int(value)):
        raise _Exit(_USAGE, f"--{name} takes a positive {'whole ' if whole else ''}number, not {options[name]!r}")
    return value


def _mailer_from(options: Mapping[str, str]) -> Mailer:
    if "print" in options:
        return StreamMailer()
    password: str | Callable[[], str] | None = os.environ.get("SENDMAIL_PASSWORD")
    path = options.get("password-file")
    if path:
        def password() -> str:
            with open(path, encoding="utf-8") as file:
                return file.readline().rstrip("\r\n")
    username = options.get("username")
    try:
        return SMTPMailer(
            options.get("hostname", "localhost"), int(_number(options, "port", 25, whole=True)), username,
            password if username is not None else None, "no-tls" in options, "force-tls" in options,
            "implicit-tls" in options, auth=options.get("auth"), timeout=_number(options, "timeout", 60),
        )  # fmt: skip
    except ValueError as error:
        raise _Exit(_USAGE, str(error)) from None


def _inject(queue: Maildir, options: Mapping[str, str], flags: Mapping[str, str], operands: Iterable[str]) -> None:
    """Queue the message on standard input, as sendmail(8) does."""
    domain = options.get("domain") or socket.gethostname()

    def addresses(text: str) -> list[str]:
        return [a if "@" in a else f"{a}@{domain}" for a in _parse_addresses(text)]

    recipients = []
    for operand in operands:
        recipients += addresses(operand) or [operand]
    if not recipients and "-t" not in flags:
        raise _Exit(_USAGE, "no recipients: name them, or use -t; see --help")
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # as in many a container
        user = f"uid{os.getuid()}"
    given = flags.get("-f", flags.get("-r", user))
    sender = "" if given in ("", "<>") else (addresses(given) or [given])[0]
    try:
        lines = iter(sys.stdin.buffer.readline, b"")
        if not flags.keys() & {"-i", "-oi"}:
            lines = itertools.takewhile(lambda line: line.rstrip(b"\r\n") != b".", lines)
        message = b"".join(lines)
    except (OSError, ValueError, AttributeError) as error:  # closed, in one of three ways
        raise _Exit(_DATAERR, f"cannot read the message from standard input: {_reason(error)}") from None
    if message.startswith(b"From "):  # an mbox's separator, which some programs leave there
        message = message.partition(b"\n")[2]
    headers = _headers_of(message)
    fields = email.parser.HeaderParser().parsestr(headers.decode("utf-8", "replace"))
    if "-t" in flags:
        names = ("To", "Cc", "Bcc")
        resent = [f"Resent-{name}" for name in names if f"Resent-{name}" in fields]
        for value in [value for name in resent or names for value in fields.get_all(name, [])]:
            recipients += addresses(value)
        if not recipients:
            raise _Exit(_DATAERR, "no recipients in To, Cc or Bcc")
    without_bcc = re.sub(rb"(?im)^(?:Resent-)?Bcc[ \t]*:.*\n?(?:[ \t].*\n?)*", b"", headers)
    message = without_bcc + message[len(headers) :]
    if "From" not in fields:
        author = sender or f"MAILER-DAEMON@{domain}"
        message = _with_header_lines(message, f"From: {email.utils.formataddr((flags.get('-F', ''), author))}")
    try:
        queue.add(sender, recipients, message)
    except ValueError as error:
        raise _Exit(_DATAERR, str(error)) from None


def _entries(queue: Maildir) -> Iterator[dict[str, Any]]:
    """Yield what `--list` shows of each message."""
    now = time.time()
    for directory in ("cur", "new", ".failed/new", ".failed/cur"):
        names = []
        with contextlib.suppress(FileNotFoundError):
            names = sorted(queue._names(directory))
        for name in names:
            due = _due_time(name, now)
            state = "failed" if directory not in ("cur", "new") else "deferred" if due > now else "due"
            try:
                claim = queue._lock(directory, name)
            except OSError:
                continue
            if claim is None:
                if directory != "cur": continue
                state = "sending"
                claim = _Claim(queue, directory, name)
            error = ""
            try:
                claim.read()
            except (OSError, ValueError) as trouble:
                claim.error = str(trouble)
            yield {
                "name": name, "state": state, "age": int(now - claim.arrival), "size": os.fstat(claim.fd).st_size,
                "sender": claim.fromaddr, "recipients": list(claim.toaddrs), "due": int(due) or None, "error": claim.error,
            }
            claim.close()


def _human(number: float, units: Sequence[tuple[int, str]]) -> str:
    for size, unit in units:
        if number >= size:
            return f"{number / size:.0f} {unit}"
    return f"{number:.0f} {units[-1][1]}"


_AGES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
_SIZES = ((1_000_000, "MB"), (1000, "kB"), (1, "B"))


def _list(queue: Maildir, as_json: bool) -> None:
    entries = list(_entries(queue))
    if as_json:
        for entry in entries:
            print(json.dumps(entry))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**6
    states: dict[str, int] = {}
    for e in entries:
        states[e["state"]] = states.get(e["state"], 0) + 1
        state = f"deferred for {_human(e['due'] - time.time(), _AGES)}" if e["state"] == "deferred" else e["state"]
        for line in (
            f"{e['name']}  {_human(e['age'], _AGES):>6}  {_human(e['size'], _SIZES):>6}  {state}",
            f"    <{e['sender']}> to {', '.join(e['recipients'])}", f"    {e['error']}" * bool(e["error"])
        ):
            if line:
                print(line if len(line) < width else line[: width - 2] + "…")
    oldest = _human(max((e["age"] for e in entries), default=0), _AGES)
    count = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
    print(f"-- {len(entries)} messages{': ' + count + '; the oldest is ' + oldest + ' old' if entries else ''}")


def _requeue(queue: Maildir, names: Sequence[str]) -> None:
    missing = set(names)
    for directory in ("new", ".failed/new", ".failed/cur"):
        with contextlib.suppress(FileNotFoundError):
            for name in queue._names(directory):
                if name in missing or (not names and (directory != "new" or _DUE.search(name))):
                    claim = queue._lock(directory, name)
                    if claim:
                        claim.requeue()
                        missing.discard(name)
    queue._publish([])
    if missing:
        raise _Exit(_DATAERR, f"no such message, or it is being sent: {', '.join(sorted(missing))}")


def _pass(queue: Maildir, options: Mapping[str, str]) -> int:
    """Run a processor, once or until a signal."""
    processor = QueueProcessorThread(
        queue, _mailer_from(options), _number(options, "interval", 3),
        batch=int(_number(options, "batch", 10**9, whole=True)), workers=int(_number(options, "workers", 1, whole=True)),
        max_age=_number(options, "max-age", 5) * 86400, soft_bounce="soft-bounce" in options,
    )

    def stop(signum: int, _frame: object) -> None:
        signal.signal(signum, signal.SIG_DFL)  # a second one ends at once
        processor.stop()

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        if "interval" in options:
            processor.run()
            return 0
        return _TEMPFAIL if processor.process().outage else 0
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with *argv* (default: that of the process); return its exit status (sysexits)."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("sendmail: %(message)s"))
    _log.addHandler(handler)
    try:
        options, flags, operands = _parse(sys.argv[1:] if argv is None else argv)
        _log.setLevel(logging.INFO if "verbose" in options else logging.WARNING)
        return _dispatch(options, flags, operands)
    except _Exit as error:
        print(f"sendmail: {error}", file=sys.stderr)
        return error.status
    except OSError as error:
        print(f"sendmail: {_reason(error)}", file=sys.stderr)
        return _IOERR
    finally:
        _log.removeHandler(handler)


def _dispatch(options: Mapping[str, str], flags: Mapping[str, str], operands: Sequence[str]) -> int:
    if "help" in options:
        print(_HELP, end="")
        return 0
    if "version" in options:
        print(f"sendmail.py {__version__}")
        return 0
    path = options.get("maildir") or os.environ.get("SENDMAIL_MAILDIR")
    if not path:
        raise _Exit(_USAGE, "which queue? name it with --maildir or $SENDMAIL_MAILDIR; see --help")
    inject = bool(flags) or (bool(operands) and "requeue" not in options)
    try:
        queue = Maildir(path, create="list" not in options and "requeue" not in options)
    except (OSError, ValueError) as error:
        raise _Exit(_CANTCREAT, _reason(error)) from None
    if "list" in options:
        _list(queue, "json" in options)
    elif "requeue" in options:
        _requeue(queue, operands)
    elif inject:
        _inject(queue, options, flags, operands)
    else:
        return _pass(queue, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
