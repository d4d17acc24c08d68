"""Transactional e-mail with a crash-safe Maildir queue, in one file.

A *delivery* takes a message, and gives its id.  The message goes out if, and only if, the transaction commits; a queue
in the file system keeps it through crashes; a *processor* relays it by SMTP; *events* tell how it went:

    import transaction
    from sendmail import QueuedMailDelivery, QueueProcessorThread, SMTPMailer

    QueueProcessorThread("queue", SMTPMailer("localhost", 25)).start()
    delivery = QueuedMailDelivery("queue")
    delivery.send("app@example.com", ["ann@example.com"], "Subject: Hello\\n\\nHello, Ann.\\n")
    transaction.commit()

Without transactions, `Maildir("queue").add(...)` does it in one step; `python -m sendmail --help` tells the rest.

Words
    envelope    the sender and the recipients, which the relay goes by; stored in two lines before the message
    relay       the SMTP server that takes our messages
    reply       what the relay says of one recipient: sent (2xx), deferred (4xx: try later) or failed (5xx: give up)
    claim       the right to send, move or unlink a message: an exclusive flock on its file
    pass        one walk of a processor through what is due

States: the directory is the state, the name is the schedule, a rename is the transition, a lock is the life of a claim
    tmp/        being written: not committed, or not yet in the place of another; older than 36 h: litter
    new/        waiting: due at once or, where the name ends in ',due=<Unix time>', from then on (but at once, if that
                is over an hour ahead: a clock was wrong)
    cur/        claimed, by the process that holds the lock on it; abandoned, if nobody does
    .failed/    given up, kept for a person (a Maildir++ folder)

    send ─write─▶ tmp/ ─publish─▶ new/ ─claim─▶ cur/ ─record─▶ (unlinked)
                                   ▲ ◀─defer, release─┤
                                   │                  └─give_up, give_up_for─▶ .failed/
                                   └───────────────── requeue ────────────────────┘

Guarantees
    1. Every recipient of a committed message stands in a complete file in new/, cur/ or .failed/ until the relay has
       taken the message for that recipient.
    2. Only the holder of the lock on the inode now at that path moves, replaces or unlinks a message in new/ or cur/.
    3. A message in cur/ whose lock is free was abandoned, as by a process that died: the next pass of any processor
       takes it up.  A living processor, however slow its relay, is never robbed.
    4. commit() returning means durable: the file fsynced before its rename, the directory after it (if that last fsync
       fails, the log says so).
    5. A changed list of recipients replaces the file atomically, before the message is let go of; once the relay has
       taken it for some, the file without those is the first thing written (in place, where no other file can be).
    6. A process that dies causes a duplicate only between the relay's final reply and the unlink (or replacement) that
       follows it; nothing else, no event, no logging, no QUIT, stands between the two.
    7. A queue whose creation was cut short is completed, if nothing else stands in it; a directory that is no Maildir
       is refused, untouched.

What can't be guaranteed
    Unlinks are not fsynced: a power cut may repeat the last few messages.  Where an unlink (or replacement) fails, the
    process holds the message back as long as it lives; the next one sends it again.  A crash after the copy in .failed/
    may try its recipients again.  A relay that took a message and died before saying so gets it twice.  A process that
    dies after a database has committed, but before its turn came, leaves the mail in tmp/; so does a rename that fails
    after the commit, and a critical line in the log names the file.  A DirectMailDelivery without a fallback has no
    queue: what fails, or is under way when the process dies, is lost.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import copy
import dataclasses
import email.message
import email.utils
import fcntl
import getopt
import itertools
import json
import logging
import os
import pwd
import re
import select
import signal
import smtplib
import socket
import ssl
import stat
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TextIO, TypeAlias, TypeVar

try:
    import transaction
except ImportError:  # vendored alone: everything works but the two deliveries, which say so
    transaction = None

__all__ = [
    "MailEvent", "MailSentEvent", "MailDeferredEvent", "MailErrorEvent", "subscribe", "unsubscribe", "notify",
    "Reply", "RelayUnavailable", "Mailer", "SMTPMailer", "StreamMailer",
    "Maildir", "DirectMailDelivery", "QueuedMailDelivery", "QueueProcessorThread", "main",
]  # fmt: skip
__version__ = "1.0"

_BACKOFF_MIN, _BACKOFF_MAX = 60.0, 3600.0  # seconds to the next try of a deferred message, or (first) a failed claim
_MAX_AGE = 5 * 86400.0  # seconds; an older message is given up instead of deferred
_LITTER_AGE = 36 * 3600.0  # seconds (Maildir's rule for tmp/)
_OUTAGE_WAIT_MAX = 60.0  # seconds between two passes, while the relay is unavailable
_FINAL_REPLY_TIMEOUT = 600.0  # seconds (RFC 5321, 4.5.3.2.6)
_GROUP = 100  # recipients at a time (RFC 5321, 4.5.3.1.8)
_PIECE = 32_000  # bytes of a message; under 64 KB with dots stuffed and line ends made CRLF
_AT_ONCE = 16  # fsyncs, or claims, of a delivery; each takes a file descriptor
_Queue: TypeAlias = "Maildir | str | os.PathLike[str]"
_Content: TypeAlias = "bytes | str | email.message.Message"
_log = logging.getLogger("sendmail")

# --------------------------------------------------------------------------------------------------- events


@dataclasses.dataclass(frozen=True)
class MailEvent:
    """What became of the message that `send()` called `message_id`, for `toaddrs`: those that the event is about."""
    message_id: str
    fromaddr: str
    toaddrs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MailSentEvent(MailEvent):
    """The relay took it; `response` is its last reply, such as `250 2.0.0 Ok: queued as 4F1`."""
    response: str


@dataclasses.dataclass(frozen=True)
class MailDeferredEvent(MailEvent):
    """Not yet: the next try is at `retry_at` (Unix time); `delivery_status` is that of RFC 3463, such as `4.2.1`."""
    error_message: str
    delivery_status: str
    retry_at: float


@dataclasses.dataclass(frozen=True)
class MailErrorEvent(MailEvent):
    """Given up; `delivery_status`: see RFC 3463, such as `5.1.1`.  A file without envelope has no id, no recipients."""
    error_message: str
    delivery_status: str


_Handler = TypeVar("_Handler", bound=Callable[[Any], object])
_handlers: list[Callable[[Any], object]] = []


def subscribe(handler: _Handler) -> _Handler:
    """Call *handler* with every event of this process, in the order of subscription; return it (a decorator, then).

    A handler runs after any commit that it tells of, and always in a new transaction (of `transaction.manager`): begun
    before it, committed after it, aborted if it raises.  One that raises is logged, and hurts nobody.
    """
    _handlers.append(handler)
    return handler


def unsubscribe(handler: Callable[[Any], object]) -> None:
    """Stop calling *handler*.  Raise `ValueError` if it is not subscribed."""
    _handlers.remove(handler)


def notify(event: MailEvent) -> None:
    """Call every handler with *event*, each in a new transaction."""
    for handler in tuple(_handlers):
        try:
            with _new_transaction() if transaction else contextlib.nullcontext():
                handler(event)
        except (Exception, SystemExit):  # it is anybody's code
            _log.exception("event handler %r failed on %r", handler, event)


@contextlib.contextmanager
def _new_transaction() -> Iterator[None]:
    """Run the block in a new transaction, also where the commit of another is under way.

    An after-commit hook runs before the manager lets go of the finished transaction: `begin()` would abort and corrupt
    it there.  But the default manager is a thread-local with a replaceable one inside: lend it a fresh one.
    """
    outer, fresh = transaction.manager.manager, transaction.TransactionManager()
    transaction.manager.manager = fresh
    try:
        with fresh:
            yield
    finally:
        transaction.manager.manager = outer
        fresh.abort()  # what a failed commit has left behind


# ------------------------------------------------------------------------------------------------- envelope

# A bare addr-spec (RFC 5322, 3.4.1).  What would end it early in our files or in a command must be in quotes.
_ADDR_SPEC = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^\s,<>"@]+)@[^\s,<>"@]+')
_ADDR_SPECS = re.compile(rf"{_ADDR_SPEC.pattern}(?:, *{_ADDR_SPEC.pattern})*")
_ENHANCED_STATUS = re.compile(r"([245])\.\d{1,3}\.\d{1,3}(?!\S)")  # RFC 2034, RFC 3463
_FIELD_NAME = re.compile(rb"[!-9;-~]+[ \t]*:")  # RFC 5322, 2.2
_BLANK_LINE = re.compile(rb"(\A|\r\n|\r(?!\n)|\n)(?:\r\n|\r|\n)")
_FIELD_REST = rb"[ \t]*:([^\r\n]*(?:(?:\r\n|\r|\n)[ \t][^\r\n]*)*)"  # with the lines that are folded into it
_BCC = re.compile(rb"(?i)(?<![^\r\n])(?:Resent-)?Bcc" + _FIELD_REST + rb"(?:\r\n|\r|\n|\Z)")
_ENVELOPE = re.compile(rb"(?i)X-Zope-From:([^\n]*)\nX-Zope-To:([^\n]*)\n(?:X-Sendmail-Error:([^\n]*)\n)?")
_LENIENT = {"strict": False} if hasattr(email.utils, "supports_strict_parsing") else {}  # one comma is no harm


def _printable(text: bytes | str) -> str:
    """Return *text* as one printable line of at most 1,000 characters, fit for a file, a log and a terminal."""
    line = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    if not line.isprintable():
        line = " ".join("".join(c if c.isprintable() else " " for c in line).split())
    return line[:1000].strip()


def _encodable(text: str, stream: Any) -> str:
    """Return *text* with what *stream* can't take made `\\u...`."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _parse_addresses(line: bytes | str, bare: bool = True) -> tuple[str, ...]:
    """Return the bare addresses in *line*, which may hold display names: zope.sendmail's queues do.

    Not *bare* is for the value of a header: there groups and comments may touch an address.
    """
    text = (line.decode("utf-8", "replace") if isinstance(line, bytes) else line).strip()
    if (bare or not re.search("[():;]", text)) and _ADDR_SPECS.fullmatch(text):  # getaddresses splits some
        return tuple(dict.fromkeys(_ADDR_SPEC.findall(text)))
    with contextlib.suppress(RecursionError):  # a thousand parentheses
        return tuple(dict.fromkeys(address for _, address in email.utils.getaddresses([text], **_LENIENT) if address))
    return ()


def _headers_of(message: bytes) -> bytes:
    """Return the header section of *message*, up to the blank line; b'' if it begins with something else."""
    end = _BLANK_LINE.search(message)
    return (message[: end.end(1)] if end else message) if _FIELD_NAME.match(message) else b""


def _fields(headers: bytes, name: bytes) -> Iterator[str]:
    """Yield the unfolded values of the headers called *name*, a regular expression."""
    for found in re.finditer(rb"(?i)(?<![^\r\n])" + name + _FIELD_REST, headers):
        yield " ".join(found[1].decode("utf-8", "replace").split())


def _with_header_lines(message: bytes, *lines: str) -> bytes:
    """Return *message* with *lines* before it, in its own line ends, and set apart if it begins with no header."""
    eol = b"\r\n" if message[: message.find(b"\n") + 1].endswith(b"\r\n") else b"\n"
    added = b"".join(line.encode() + eol for line in lines)
    return added + (message if _FIELD_NAME.match(message) or message[:1] in (b"\n", b"\r") else eol + message)


def _serialise(message: _Content, addresses: Iterable[str]) -> bytes:
    """Return *message* as bytes; of a `Message`, a copy without Bcc."""
    if isinstance(message, (bytes, str)):
        return message.encode() if isinstance(message, str) else message
    message = copy.deepcopy(message)  # for writing it sets boundaries, in its parts too
    del message["Bcc"], message["Resent-Bcc"]
    policy: Any = message.policy
    utf8 = hasattr(policy, "utf8") and not all(map(str.isascii, addresses))  # RFC 6532: can't be written otherwise
    return message.as_bytes(policy=policy.clone(utf8=True) if utf8 else policy)


def _prepare(fromaddr: str, toaddrs: str | Iterable[str], message: _Content) -> tuple[str, tuple[str, ...], bytes]:
    """Check the arguments of `send()`; return message id, recipients and the complete message.  Raise `ValueError`."""
    recipients = tuple(dict.fromkeys([toaddrs] if isinstance(toaddrs, str) else toaddrs))
    if not recipients:
        raise ValueError("no recipients")
    for address in recipients if fromaddr == "" else (fromaddr, *recipients):  # '' is the null sender
        if not (address.isprintable() and _ADDR_SPEC.fullmatch(address)):
            raise ValueError(f"not an address (local@domain, without a display name): {_printable(address)!r}")
    content = _serialise(message, (fromaddr, *recipients))
    headers = _headers_of(content)
    found, date = (next(_fields(headers, name), None) for name in (b"Message-Id", b"Date"))
    message_id = email.utils.make_msgid(domain=socket.gethostname()) if found is None else found
    if not (message_id.isprintable() and re.fullmatch(r"<[^<>\s]+>", message_id)):
        raise ValueError(f"malformed Message-Id, not <left@right>: {_printable(message_id)!r}")
    added = [] if found else [f"Message-Id: {message_id}"]
    added += [] if date is not None else [f"Date: {email.utils.formatdate(localtime=True)}"]
    return message_id[1:-1], recipients, _with_header_lines(content, *added)


# -------------------------------------------------------------------------------------------------- mailers

_LOGIN_WANTED = {530, 534, 535, 538}  # RFC 4954, 6: this is about our login, not about a message
_NO_RELAY = (smtplib.SMTPConnectError, smtplib.SMTPHeloError, smtplib.SMTPAuthenticationError,
             ConnectionRefusedError, socket.gaierror, socket.herror)  # fmt: skip
_MECHANISMS = ("CRAM-MD5", "PLAIN", "LOGIN", "XOAUTH2")  # the best first; the last, which takes a token, only by name


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the relay says of a recipient: an SMTP *code*, and its *text* as one printable line."""
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
        """The enhanced status code (RFC 3463) in the text; if that has none of its class, what the code says."""
        digit, found = {"sent": "2", "failed": "5"}.get(self.outcome, "4"), _ENHANCED_STATUS.match(self.text)
        return found[0] if found and found[1] == digit else f"{digit}.0.0"

    def softened(self) -> Reply:
        """Return this reply as one that says 'try later'."""
        return Reply(self.code - 100 if self.outcome == "failed" else 451, f"4{self.status[1:]} {self}")

    def judged(self) -> Reply:
        """Return what this means after MAIL, for the message: a 530 or its like, or what is no reply: 'try later'."""
        known = 200 <= self.code < 300 or 400 <= self.code < 600
        return self if known and self.code not in _LOGIN_WANTED else self.softened()


_OK, _NO_REPLY = Reply(250, "2.0.0 Ok"), Reply(451, "4.3.0 the mailer told nothing of this recipient")


class RelayUnavailable(Exception):
    """The relay can't be used now, and no message is to blame: what is in a queue keeps its place there.

    That is whatever goes wrong before MAIL is answered: connection, DNS, TLS, banner, EHLO and AUTH, and a 421, 530,
    534, 535 or 538 to MAIL.
    """


class Mailer(Protocol):
    """What deliveries and processors need.  The workers of a processor share it, each in a thread of its own.

    One that is a context manager is entered, by each of these, around several messages.
    """

    def send(self, fromaddr: str, toaddrs: Sequence[str], message: bytes) -> Mapping[str, Reply] | None:
        """Hand *message* to the relay, for at most 100 *toaddrs*; return a `Reply` for each (None: all accepted).

        May raise `RelayUnavailable`, or in the vocabulary of `smtplib`, as the mailers of zope.sendmail do.
        """


def _reason(error: Any) -> str:
    """Return in one line what the exception *error* says."""
    if isinstance(error, smtplib.SMTPResponseException):
        return str(Reply(error.smtp_code, error.smtp_error))  # type: ignore[arg-type]
    return _printable(str(error)) or type(error).__name__


def _ask(mailer: Mailer, fromaddr: str, toaddrs: Sequence[str], message: bytes) -> dict[str, Reply]:
    """Let *mailer* send to one group: whatever it does becomes a reply for each recipient, or `RelayUnavailable`."""
    raised = True
    try:
        replies: Any = mailer.send(fromaddr, toaddrs, message)
        raised = False
        replies = replies if isinstance(replies, Mapping) else {}
        default = _NO_REPLY if any(isinstance(r, Reply) for r in replies.values()) else _OK  # smtplib's: the refused
    except RelayUnavailable:
        raise
    except smtplib.SMTPRecipientsRefused as error:
        replies, default = error.recipients, _NO_REPLY
    except Exception as error:  # a mailer is anybody's code
        code = getattr(error, "smtp_code", 0)
        before_mail = isinstance(error, smtplib.SMTPSenderRefused) and code in {421, *_LOGIN_WANTED}
        if before_mail or isinstance(error, _NO_RELAY):
            raise RelayUnavailable(_reason(error)) from error
        text = f"{'4.4.2' if isinstance(error, OSError) else '4.3.0'} {_reason(error)}"
        replies, default = {}, Reply(code, getattr(error, "smtp_error", "")).judged() if code else Reply(451, text)
    told = {address: replies.get(address, default) for address in toaddrs}
    told = {address: reply if isinstance(reply, Reply) else Reply(*reply).judged() for address, reply in told.items()}
    # smtplib raises on a 2xx, too, where it wanted another answer: nothing was taken
    return {address: r.softened() if raised and r.outcome == "sent" else r for address, r in told.items()}


def _ask_in_groups(
    mailer: Mailer, fromaddr: str, toaddrs: Sequence[str], message: bytes
) -> Iterator[tuple[dict[str, Reply], dict[str, Reply]]]:
    """Yield, group by group, the replies that say 'sent', and the others; what is to be noted can be, in between."""
    for start in range(0, len(toaddrs), _GROUP):
        replies = _ask(mailer, fromaddr, toaddrs[start : start + _GROUP], message)
        sent = {address: reply for address, reply in replies.items() if reply.outcome == "sent"}
        yield sent, {address: reply for address, reply in replies.items() if address not in sent}


@contextlib.contextmanager
def _connected(mailer: Any) -> Iterator[None]:
    """Enter *mailer* for the block, if it is a context manager.  Raise `RelayUnavailable` if it refuses."""
    connection = mailer if hasattr(mailer, "__enter__") else contextlib.nullcontext()
    try:
        connection.__enter__()
    except RelayUnavailable:
        raise
    except Exception as error:
        raise RelayUnavailable(_reason(error)) from error
    try:
        yield
    finally:
        with contextlib.suppress(Exception):  # the messages are settled by now
            connection.__exit__(None, None, None)


def _wire_address(address: str, smtputf8: bool) -> bytes | None:
    """Return *address* as it goes on the wire; None if that takes the SMTPUTF8 (RFC 6531) that the relay lacks.

    A domain is IDNA-encoded if that can be undone: 'faß.de' would become fass.de, which is somebody else's.
    """
    local, at, domain = address.rpartition("@")
    if local.isascii() and not domain.isascii():
        with contextlib.suppress(UnicodeError):
            encoded = domain.encode("idna")
            if encoded.decode("idna") == domain.lower():
                return f"{local}{at}".encode() + encoded
    return address.encode() if smtputf8 or address.isascii() else None


def _mail_command(
    offered: Mapping[str, str], fromaddr: str, toaddrs: Sequence[str], message: bytes, replies: dict[str, Reply]
) -> tuple[bytes, dict[str, bytes]]:
    """Return MAIL, and the recipients as they go on the wire; fill *replies* for those that the relay can't serve."""
    ends = message.count(b"\n") + message.count(b"\r") - 2 * message.count(b"\r\n")
    size = len(message) + ends + (2 if message and message[-1:] not in b"\r\n" else 0)  # with CRLF (RFC 1870, 5)
    limit = offered.get("size", "")
    sender, recipients = _wire_address(fromaddr, "smtputf8" in offered), {}
    for address in toaddrs:
        recipient = _wire_address(address, "smtputf8" in offered)
        if limit.isdecimal() and 0 < int(limit) < size:
            replies[address] = Reply(552, f"5.3.4 {size} bytes are more than the relay takes ({limit})")
        elif sender is None or recipient is None:
            replies[address] = Reply(553, "5.6.7 an address needs SMTPUTF8, which the relay does not offer")
        else:
            recipients[address] = recipient
    command = b"MAIL FROM:<%s>" % (sender or b"")
    ascii_only = all(map(bytes.isascii, (command, *recipients.values())))
    command += b" SIZE=%d" % size if "size" in offered else b""
    command += b" BODY=8BITMIME" if "8bitmime" in offered and not message.isascii() else b""
    return command + (b"\r\n" if ascii_only else b" SMTPUTF8\r\n"), recipients


def _wire_pieces(message: bytes) -> Iterator[bytes]:
    """Yield *message* as DATA takes it: CR, LF and CRLF made CRLF, dots stuffed, the end marked (RFC 5321, 4.5.2)."""
    start, at_line_start = 0, True
    while start < len(message):
        end = start + _PIECE
        if message[end - 1 : end + 1] == b"\r\n":  # one line end, not two
            end += 1
        piece = message[start:end].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        dot = b"." if at_line_start and piece.startswith(b".") else b""
        start, at_line_start = end, piece.endswith(b"\n")
        last = (b".\r\n" if at_line_start else b"\r\n.\r\n") if start >= len(message) else b""
        yield dot + piece.replace(b"\n.", b"\n..").replace(b"\n", b"\r\n") + last
    if not message:
        yield b".\r\n"


class _Lost(Exception):
    """The connection can't be used any more; the argument is the `Reply` that this is to a message on its way."""


def _answer(smtp: Any, pieces: Iterable[bytes] = (), final: bool = False, go_ahead: int = 0) -> Reply:
    """Write *pieces*, each under the timeout, and return the reply; the *final* one has ten minutes."""
    doubt = ""
    try:
        for piece in pieces:
            smtp.sock.sendall(piece)
        if final:
            smtp.sock.settimeout(_FINAL_REPLY_TIMEOUT)
            doubt = "; the relay may have taken the message"
        reply = Reply(*smtp.getreply())
    except OSError as error:  # SMTPException is one: the end, or a line too long
        raise _Lost(Reply(451, f"4.4.2 connection lost: {_reason(error)}{doubt}")) from error
    if not (200 <= reply.code < 300 or 400 <= reply.code < 600 or reply.code == go_ahead):  # smtplib's -1 is none
        raise _Lost(Reply(451, f"4.4.2 unintelligible reply{doubt}: {reply.text}"))
    if reply.code == 421:  # the relay closes the connection (RFC 5321, 3.8)
        raise _Lost(reply)
    return reply


class _Kept(threading.local):
    """What a thread keeps of a mailer: the connection, the process that made it, how often the mailer was entered."""
    smtp: Any = None
    pid = depth = 0
    stage = ""  # of the dialogue: 'MAIL' until that is answered, then 'RCPT', then 'end': not to be tried again


class SMTPMailer:
    """Send by SMTP to one relay; as a context manager, keep one connection per thread for all that is sent inside.

    TLS is used where the relay offers it, unless *no_tls*; *force_tls* requires STARTTLS, and *implicit_tls* is TLS
    from the start (port 465).  Certificate and host name are verified, by *context* or the system's authorities,
    wherever TLS is required or a password is sent, and no password crosses another connection, unless *no_tls*.
    *password* is a string, or a callable that is asked at every login; *auth* is the one mechanism to use (CRAM-MD5,
    PLAIN, LOGIN, XOAUTH2), by default the relay's best of the first three.  *timeout* is in seconds, for each step;
    the reply to the data has ten minutes.  Raise `ValueError` for what is wrong or contradicts itself.
    """

    def __init__(
        self, hostname: str = "localhost", port: int = 25, username: str | None = None,
        password: str | Callable[[], str] | None = None, no_tls: bool = False, force_tls: bool = False,
        implicit_tls: bool = False, *, auth: str | None = None, timeout: float = 60,
        context: ssl.SSLContext | None = None,
    ) -> None:  # fmt: skip
        if not hostname or not 0 < port < 65536 or not timeout > 0 or (auth or "PLAIN").upper() not in _MECHANISMS:
            raise ValueError(f"bad host name, port, timeout or auth: {hostname!r}, {port}, {timeout}, {auth}")
        if no_tls and (force_tls or implicit_tls):
            raise ValueError("no_tls contradicts force_tls and implicit_tls")
        if (username is None) != (password is None):
            raise ValueError("username and password go together: one is missing")
        self._verified = force_tls or implicit_tls or (username is not None and not no_tls)
        if context and self._verified and not context.check_hostname:
            raise ValueError("a context must verify certificate and host name where TLS is required or a password sent")
        if context is None and self._verified:
            context = ssl.create_default_context()
        elif context is None:  # RFC 7435: better than nothing
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self._relay, self._implicit_tls, self._starttls = (hostname, port), implicit_tls, not (no_tls or implicit_tls)
        self._username, self._password, self._auth = username, password, auth and auth.upper()
        self._timeout, self._context, self._kept = timeout, context, _Kept()
        self._ehlo_name: str | None = None  # looked up once, for that may be slow

    def __str__(self) -> str:
        return "%s:%d" % self._relay

    def __enter__(self) -> SMTPMailer:
        """Connect, unless this thread is connected.  May raise `RelayUnavailable`."""
        kept = self._kept
        if kept.pid != os.getpid():  # a fork has no part in its parent's dialogue
            self._disconnect()
        if kept.smtp is None:
            kept.smtp, kept.pid = self._connect(), os.getpid()
        kept.depth += 1
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self._kept.depth -= 1
        if self._kept.depth == 0:
            self._disconnect(b"QUIT\r\n")

    def send(self, fromaddr: str, toaddrs: Sequence[str], message: bytes) -> dict[str, Reply]:
        """Send *message*; return a `Reply` for each of *toaddrs*.  May raise `RelayUnavailable`, `ValueError`."""
        if not "".join((fromaddr, *toaddrs)).isprintable():
            raise ValueError("an address holds control characters")
        kept, replies = self._kept, dict[str, Reply]()
        reused = kept.smtp is not None and kept.pid == os.getpid()  # the relay may have dropped it meanwhile
        with self:
            try:
                self._transact(fromaddr, toaddrs, message, replies)
                return replies
            except BaseException as error:
                self._disconnect()
                if not isinstance(error, _Lost):
                    raise
                lost: Reply = error.args[0]
            if reused and kept.stage != "end":
                return self.send(fromaddr, toaddrs, message)  # once: the connection is a new one
            if kept.stage == "MAIL":
                raise RelayUnavailable(f"{self}: {lost}")
            return {a: replies[a] if a in replies and replies[a].outcome != "sent" else lost for a in toaddrs}

    def _transact(self, fromaddr: str, toaddrs: Sequence[str], message: bytes, replies: dict[str, Reply]) -> None:
        """Do one mail transaction (RFC 5321, 3.3), filling *replies*.  May raise `_Lost` and `RelayUnavailable`."""
        smtp, self._kept.stage = self._kept.smtp, "MAIL"
        mail, recipients = _mail_command(smtp.esmtp_features, fromaddr, toaddrs, message, replies)
        if not recipients:
            return
        smtp.sock.settimeout(0)
        with contextlib.suppress(OSError):  # nothing, over TLS; or the end, which shows soon enough
            if unasked := smtp.file.peek():  # it would be taken for the reply to what we say next
                raise _Lost(Reply(451, f"4.5.0 out of step: {_printable(unasked)}"))
        smtp.sock.settimeout(self._timeout)
        commands = [mail, *(b"RCPT TO:<%s>\r\n" % recipient for recipient in recipients.values()), b"DATA\r\n"]
        pipelined = smtp.has_extn("pipelining") and len(recipients) <= _GROUP  # more could fill the buffers both ways
        # what to write before each reply; RFC 2920: all at once, then nothing
        writes = [[b"".join(commands)]] + [[]] * len(commands) if pipelined else [[command] for command in commands]
        sender = _answer(smtp, writes[0])
        if sender.code in _LOGIN_WANTED:
            raise RelayUnavailable(f"{self}: {sender}")
        self._kept.stage, refused = "RCPT", sender.outcome != "sent"
        if refused:
            replies.update(dict.fromkeys(recipients, sender.judged()))
        for address, write in zip(recipients, writes[1:]) if pipelined or not refused else ():
            reply = _answer(smtp, write)
            if not refused:
                replies[address] = reply.judged()
        accepted = [address for address in recipients if replies[address].outcome == "sent"]
        if accepted or pipelined:
            reply = _answer(smtp, writes[-1], go_ahead=354)
            if reply.code == 354:  # a relay may say so though it has no recipient (RFC 2920, 3.1)
                self._kept.stage = "end"
                reply = _answer(smtp, _wire_pieces(message if accepted else b""), final=True)  # nothing raises after it
            elif reply.outcome == "sent":
                raise _Lost(Reply(451, f"4.5.0 unexpected reply to DATA: {reply}"))
            replies.update(dict.fromkeys(accepted, reply.judged()))
        if self._kept.stage == "RCPT" and not refused:
            self._kept.stage = "end"
            if _answer(smtp, [b"RSET\r\n"]).outcome != "sent":  # the next message would be nested in this one
                raise _Lost(_NO_REPLY)

    def _disconnect(self, last_word: bytes = b"") -> None:
        """Close the connection; the reply to a QUIT is nobody's business, and a QUIT none of a fork's."""
        smtp, self._kept.smtp = self._kept.smtp, None
        if smtp is not None:
            with contextlib.suppress(Exception), contextlib.closing(smtp):
                smtp.sock.sendall(last_word if self._kept.pid == os.getpid() else b"")

    def _connect(self) -> Any:
        """Return a connection that is ready for MAIL.  Raise `RelayUnavailable` for whatever goes wrong."""
        smtp: Any = None
        try:
            if self._implicit_tls:
                smtp = smtplib.SMTP_SSL(*self._relay, self._ehlo_name, timeout=self._timeout, context=self._context)
            else:
                smtp = smtplib.SMTP(*self._relay, self._ehlo_name, timeout=self._timeout)
            self._ehlo_name = smtp.local_hostname
            smtp.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or the last piece waits for an ACK
            reply = smtp.ehlo()
            if self._starttls and smtp.has_extn("starttls"):
                try:
                    smtp.starttls(context=self._context)
                    reply = smtp.ehlo()
                except smtplib.SMTPResponseException as error:
                    if self._verified or smtp.sock is None or error.smtp_code in (-1, 421):  # more than a refusal
                        raise
            if reply[0] != 250:
                raise smtplib.SMTPHeloError(*reply)
            if self._verified and not isinstance(smtp.sock, ssl.SSLSocket):
                raise RelayUnavailable("TLS is required, but STARTTLS is not offered")
            if self._username is not None:
                self._login(smtp)
            return smtp
        except BaseException as error:
            if smtp is not None:
                smtp.close()
            if isinstance(error, Exception):
                raise RelayUnavailable(f"{self}: {_reason(error)}") from error
            raise

    def _login(self, smtp: Any) -> None:
        """Log in by one mechanism, once: after a second try on a 535, accounts get locked."""
        offered = smtp.esmtp_features.get("auth", "").upper().split()
        mechanism = self._auth or next((m for m in _MECHANISMS[:3] if m in offered), "PLAIN")
        password = self._password() if callable(self._password) else self._password
        if mechanism not in offered:
            raise RelayUnavailable(f"AUTH {mechanism} is not offered")
        if not f"{self._username}{password}".isascii():  # smtplib's error would show a part of it
            raise RelayUnavailable("username and password must be ASCII")
        smtp.user, smtp.password = self._username, password
        method = f"auth_{mechanism.lower().replace('-', '_')}"  # smtplib has none for XOAUTH2
        token = f"user={self._username}\1auth=Bearer {password}\1\1"  # and '' acknowledges its refusal
        reply = smtp.auth(mechanism, getattr(smtp, method, lambda challenge=None: token if challenge is None else ""))
        if reply[0] != 235:  # smtplib takes a 503, too, which would say that we had logged in before
            raise smtplib.SMTPAuthenticationError(*reply)


@dataclasses.dataclass
class StreamMailer:
    """Print, which counts as sent, on *stream* (None: standard output): for a first try, and for development."""
    stream: TextIO | None = None

    def send(self, fromaddr: str, toaddrs: Sequence[str], message: bytes) -> None:
        """Print envelope and message.  Raise `RelayUnavailable` if the stream does not take them."""
        body = message.decode("utf-8", "replace").replace("\r\n", "\n").rstrip()
        stream: Any = self.stream or sys.stdout  # which is None where it is closed
        try:
            text = f"MAIL FROM:<{fromaddr}> RCPT TO:<{'>,<'.join(toaddrs)}>\n{body}\n\n"
            stream.write(_encodable(text, stream))
            stream.flush()
        except (OSError, ValueError, AttributeError) as error:  # closed, in one of three ways
            raise RelayUnavailable(f"cannot print: {_reason(error)}") from error


# -------------------------------------------------------------------------------------------------- Maildir

_DUE = re.compile(r",due=\d+\Z")
_counter = itertools.count()


def _new_name() -> str:
    """Return a file name, unique for ever (Maildir's rule); sorted, names are in order of arrival."""
    seconds, micros = divmod(time.time_ns() // 1000, 1_000_000)
    unique = f"{next(_counter)}R{os.urandom(4).hex()}"  # R: containers may share host name and pid
    host = socket.gethostname().replace("/", r"\057").replace(":", r"\072").replace(",", r"\054")
    return f"{seconds}.M{micros:06}P{os.getpid()}Q{unique}.{host}"


def _age(name: str, file: str | int, now: float) -> float:
    """Return the seconds since a message arrived, by its name; a foreign name tells nothing, but its *file* does."""
    seconds = name.partition(".")[0]
    return now - (float(seconds) if seconds.isdecimal() else os.stat(file).st_mtime)


def _schedule(names: Iterable[str], now: float) -> tuple[list[str], int, float]:
    """Return which of *names* are due at *now*, how many are not, and when to look again.

    One that says more than the longest backoff comes from a wrong clock: it is due.
    """
    this_second, latest = f"{int(now):010}", f"{int(now + _BACKOFF_MAX):010}"
    due, waiting, next_due = list[str](), 0, latest
    for name in names:
        when = name[-10:]  # compared as text, which is quick: there may be 100,000
        if this_second < when <= latest and name[-15:-10] == ",due=" and when.isdecimal():
            waiting, next_due = waiting + 1, when if when < next_due else next_due
        else:
            due.append(name)
    return due, waiting, float(next_due)


def _backoff(age: float) -> float:
    """Return the seconds to the next try of a message: as many as it is old, within bounds, as in Postfix."""
    return min(max(age, _BACKOFF_MIN), _BACKOFF_MAX)


def _fsync(*paths: str) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _insist(call: Callable[..., None], *args: str) -> None:
    """Call, and again a few times while it raises `OSError`: for what must not fail."""
    for _ in range(2):
        with contextlib.suppress(OSError):
            return call(*args)
    return call(*args)


class Maildir:
    """A queue: the Maildir at *path*, made where it is missing, unless *create* is false.

    Directories are made 0700 and files 0600; where the queue's own directory has wider rights, they follow it.
    Raise `ValueError` for a directory that is something else, `FileNotFoundError` and other `OSError`s.
    """

    def __init__(self, path: str | os.PathLike[str], create: bool = True) -> None:
        self.path, self._mode = os.fspath(path), 0o700
        if self.path and not os.path.isabs(self.path):  # the process may change its directory
            # not abspath(), for '..' may follow a link
            self.path = os.path.join(os.getcwd(), self.path)
        if create and not os.path.lexists(self.path):
            self._make_directories("")  # the queue's own
        present, wanted = set(os.listdir(self.path)), {"tmp", "new", "cur"}
        if wanted - present and (present - wanted or not create):
            raise ValueError(f"{self.path} is not a Maildir; left as it is")
        self._mode = stat.S_IMODE(os.stat(self.path).st_mode)
        if wanted - present:
            self._make_directories(*wanted)
            _fsync(self._path("."), self._path(".."))  # these, for the path may be a link

    def add(self, fromaddr: str, toaddrs: str | Iterable[str], message: _Content) -> str:
        """Queue a message durably, without a transaction; return its id.  Arguments and errors: see `send()`."""
        message_id, recipients, content = _prepare(fromaddr, toaddrs, message)
        self._store("new", fromaddr, recipients, content)
        self._wake()
        return message_id

    def _path(self, *parts: str) -> str:
        return "/".join((self.path, *parts))

    def _names(self, directory: str) -> Iterator[str]:
        """Yield the names of the messages in *directory*: dot-files, links, FIFOs and the like are none."""
        with os.scandir(self._path(directory)) as entries:
            yield from (e.name for e in entries if e.name[0] != "." and e.is_file(follow_symlinks=False))

    def _make_directories(self, *directories: str) -> None:
        for directory in directories:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._path(directory), 0o700)
                os.chmod(self._path(directory), self._mode | 0o700)

    def _write(self, fromaddr: str, toaddrs: Iterable[str], message: bytes, error: str = "", sync: bool = False) -> str:
        """Write a complete file in tmp/, envelope first; return its name."""
        name = _new_name()
        text = "".join(("X-Zope-From: ", fromaddr, "\nX-Zope-To: ", ", ".join(toaddrs), "\n"))  # of an Enum, the value
        if error or message[:17].lower() == b"x-sendmail-error:":  # the message's own would pass for ours
            text += f"X-Sendmail-Error: {error}\n"
        try:
            with open(self._path("tmp", name), "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                os.fchmod(file.fileno(), self._mode & 0o666 | 0o600)
                file.writelines((text.encode(), message))
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        except BaseException:
            self._discard(name)
            raise
        return name

    def _discard(self, name: str) -> None:
        """Unlink a file in tmp/; one that stays is litter."""
        with contextlib.suppress(OSError):
            os.unlink(self._path("tmp", name))

    def _sync(self, names: Sequence[str]) -> None:
        """Make files in tmp/ durable, side by side where there are many: a disk takes many fsyncs together."""
        paths = [self._path("tmp", name) for name in names]
        if len(paths) > 3:
            with contextlib.suppress(RuntimeError), concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(lambda share: _fsync(*share), [paths[i::_AT_ONCE] for i in range(_AT_ONCE)]))
                return  # or else there are no more threads, as at interpreter exit
        _fsync(*paths)

    def _publish(self, names: Iterable[str], directory: str = "new") -> dict[str, OSError]:
        """Move complete files out of tmp/, durably; return what could not be moved."""
        failures = {}
        for name in names:
            try:
                _insist(os.rename, self._path("tmp", name), self._path(directory, name))
            except OSError as error:  # NFS may say so of what it has done
                if not os.path.isfile(self._path(directory, name)):
                    failures[name] = error
        try:
            _fsync(self._path(directory))  # once: a second fsync would hide what the first has lost
        except OSError as error:  # they are there, and go out, if the power stays on
            _log.error("cannot make %s durable: %s", self._path(directory), _reason(error))
        return failures

    def _store(self, directory: str, fromaddr: str, toaddrs: Iterable[str], message: bytes, error: str = "") -> None:
        """Put a complete file in *directory*, durably; if that fails, what was written is litter."""
        name = self._write(fromaddr, toaddrs, message, error, sync=True)
        if failure := self._publish([name], directory).get(name):
            raise failure

    def _wake(self) -> None:
        """Wake the processors that wait on the trigger."""
        with contextlib.suppress(OSError):  # ENXIO: nobody waits
            fd = os.open(self._path("trigger"), os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            with open(fd, "wb", buffering=0) as trigger:
                if stat.S_ISFIFO(os.fstat(fd).st_mode):
                    trigger.write(b"\0")

    def _open_trigger(self) -> list[int]:
        """Return the FIFO that `_wake` writes to, both ends open (or it would read as ended); [] if there is none."""
        path = self._path("trigger")
        with contextlib.suppress(OSError):
            if not os.path.lexists(path):
                os.mkfifo(path, 0o600)
                os.chmod(path, self._mode & 0o666 | 0o600)
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                return [fd]
            os.close(fd)
        return []

    def _lock(self, directory: str, name: str, to: str = "") -> _Claim | None:
        """Lock a message, and move it *to*.  None: it is gone, or a living process holds it; `OSError`: trouble."""
        with contextlib.suppress(FileNotFoundError, BlockingIOError), contextlib.ExitStack() as undo:
            claim = _Claim(self, directory, name)
            undo.callback(claim.close)
            status = os.fstat(claim.fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a regular file")
            fcntl.flock(claim.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(status, os.lstat(claim.path)):  # not moved or replaced before we had the lock
                if to:
                    claim.move(to, name)
                undo.pop_all()
                return claim
        return None

    def _claim(self, name: str) -> _Claim | None:
        """Move a message from new/ to cur/, locked.  None and `OSError` as in `_lock`."""
        return self._lock("new", name, "cur")

    def _failed_folder(self) -> str:
        """Return the directory for what is given up, in a Maildir++ folder, made if need be."""
        if not os.path.isdir(self._path(".failed/new")):
            self._make_directories(".failed", ".failed/tmp", ".failed/cur", ".failed/new")
            _fsync(self._path(".failed"), self._path("."))
        return ".failed/new"

    def _clean(self, now: float) -> None:
        """Remove litter from tmp/; the log names its envelope."""
        for name in self._names("tmp"):
            with contextlib.suppress(OSError):
                old = now - os.lstat(self._path("tmp", name)).st_mtime > _LITTER_AGE
                if old and (claim := self._lock("tmp", name)):  # a young one's lock may be wanted by its writer
                    with contextlib.closing(claim):
                        envelope = os.pread(claim.fd, 1000, 0).split(b"\n")[:2]
                        os.unlink(claim.path)
                        _log.warning("removed tmp/%s, never committed: %s", name, _printable(b" ".join(envelope)))


class _NoEnvelope(Exception):
    """The file does not begin with an envelope."""


class _Claim:
    """An open message; once it is locked (`Maildir._lock`), nobody else may send, move or unlink it."""
    held: ClassVar[set[_Claim]] = set()  # open in this process
    retrying = threading.RLock()  # for what is unwritten, which belongs to no thread
    fromaddr = error = message_id = ""
    message = b""
    toaddrs: tuple[str, ...] = ()
    taken: Mapping[str, Reply] = {}  # what the relay said when it took the message for some
    unwritten: tuple[str, ...] | None = None  # the recipients left then, while the file can't be made to say so

    def __init__(self, queue: Maildir, directory: str, name: str) -> None:
        self.queue, self.directory, self.name = queue, directory, name
        # O_RDWR: NFS locks nothing else exclusively.  O_NONBLOCK: a FIFO must not stop us.
        self.fd = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        self.held.add(self)

    @property
    def path(self) -> str:
        return self.queue._path(self.directory, self.name)

    def age(self, now: float) -> float:
        return _age(self.name, self.fd, now)

    def read(self) -> None:
        """Learn envelope and message.  May raise `_NoEnvelope`."""
        size = os.fstat(self.fd).st_size
        head = os.pread(self.fd, _PIECE, 0)
        if head.count(b"\n") < 3:
            head = os.pread(self.fd, size, 0)
        if found := _ENVELOPE.match(head):
            self.fromaddr, self.toaddrs = "".join(_parse_addresses(found[1])[:1]), _parse_addresses(found[2])
        if not found or not self.toaddrs or not "".join((self.fromaddr, *self.toaddrs)).isprintable():
            raise _NoEnvelope("no readable envelope")
        self.error = _printable(found[3] or b"")
        start = found.end()  # a large message is read by itself, to be in memory once
        self.message = head[start:] if len(head) == size else os.pread(self.fd, size - start, start)
        if len(self.message) != size - start:  # over 2 GB (read(2))
            raise OSError(f"only {len(self.message)} bytes could be read")
        self.message_id = _printable(next(_fields(_headers_of(self.message), b"Message-Id"), "")).strip("<> ")

    def keep(self, toaddrs: tuple[str, ...], error: str) -> None:
        """Replace the file by one for *toaddrs* alone; that is locked before it is seen, or it would look abandoned."""
        if (toaddrs, error) == (self.toaddrs, self.error):
            return
        name = self.queue._write(self.fromaddr, toaddrs, self.message, error, sync=True)
        try:
            replacement = self.queue._lock("tmp", name)
            if replacement is None:
                raise OSError("cannot lock a new file")
            with contextlib.closing(replacement):
                os.rename(replacement.path, self.path)
                self.fd, replacement.fd = replacement.fd, self.fd  # the lock goes with it
        except OSError:
            self.queue._discard(name)
            raise
        self.toaddrs, self.error = toaddrs, error
        _fsync(self.queue._path("cur"))

    def record(self, waiting: tuple[str, ...], error: str = "") -> None:
        """Note that the relay has taken the message for all but *waiting*: here the window for a duplicate closes."""
        try:
            try:
                self.keep(waiting, error) if waiting else _insist(os.unlink, self.path)
            except OSError:  # NFS may say so of what it has done
                if waiting:
                    self.shorten(waiting)
                elif os.path.lexists(self.path):
                    raise
        except BaseException:  # and no earlier, or another thread would settle it meanwhile
            self.unwritten = waiting
            raise
        self.unwritten, self.toaddrs = None, waiting

    def shorten(self, toaddrs: tuple[str, ...]) -> None:
        """Write a shorter list over that in the file: for a disk that is too full for another file."""
        found = _ENVELOPE.match(os.pread(self.fd, 1 << 20, 0))
        line = f" {', '.join(toaddrs)}".encode().ljust(len(found[2])) if found else b""
        if not found or len(line) > len(found[2]):
            raise OSError("no room for the recipients that are left")
        os.pwrite(self.fd, line, found.start(2))
        os.fsync(self.fd)
        self.toaddrs = toaddrs

    def defer(self, due: float) -> None:
        self.move("new", f"{_DUE.sub('', self.name)},due={due:.0f}")

    def release(self) -> None:
        self.move("new", self.name)

    def let_go(self) -> None:
        """Release and close it, unless it is closed or unwritten; if that fails it is abandoned, which will do."""
        if self in self.held and self.unwritten is None:  # a fork holds nothing
            with contextlib.suppress(OSError):
                self.release()
            self.close()

    def requeue(self) -> None:
        self.move("new", _new_name())

    def give_up(self) -> None:
        self.move(self.queue._failed_folder(), _new_name())
        _fsync(self.queue._path(self.directory))

    def give_up_for(self, toaddrs: tuple[str, ...], error: str) -> None:
        """Put a copy for *toaddrs* in .failed/, for the others have another fate."""
        self.queue._store(self.queue._failed_folder(), self.fromaddr, toaddrs, self.message, error)

    def move(self, directory: str, name: str) -> None:
        os.rename(self.path, self.queue._path(directory, name))
        self.directory, self.name = directory, name

    def close(self) -> None:
        """Unlock and close.  Closing alone would not unlock it while a forked child holds a copy of the descriptor."""
        if self in self.held:
            self.held.discard(self)
            with contextlib.suppress(OSError):
                fcntl.flock(self.fd, fcntl.LOCK_UN)
            with contextlib.suppress(OSError):
                os.close(self.fd)

    @classmethod
    def close_in_child(cls) -> None:
        """Close the copies that a fork made, without unlocking: the locks are the parent's, and must end with it."""
        for claim in cls.held:
            os.close(claim.fd)
        cls.held.clear()
        cls.retrying = threading.RLock()  # the parent's may be held by a thread that the fork does not have


os.register_at_fork(after_in_child=_Claim.close_in_child)

# ------------------------------------------------------------------------------------- the fate of a message


@dataclasses.dataclass
class _Message:
    """What a transaction has sent: its content, or the name of the file in tmp/ that holds it."""
    message_id: str
    fromaddr: str
    toaddrs: tuple[str, ...]
    content: bytes = dataclasses.field(repr=False)  # not for a log
    name: str


def _events(
    message: _Message | _Claim, outcome: str, replies: Mapping[str, Reply], due: float = 0.0, details: str = ""
) -> Iterator[MailEvent]:
    """Yield the events that tell of *outcome*, after logging it: one for all recipients that have the same reply."""
    level = logging.ERROR if outcome == "failed" else logging.INFO
    for reply in dict.fromkeys(replies.values()):
        about = (message.message_id, message.fromaddr, tuple(a for a in replies if replies[a] == reply), str(reply))
        if _log.isEnabledFor(level):
            line = "%s message-id=<%s> from=<%s> to=<%s>%s reply=%s"
            quoted = json.dumps(about[3], ensure_ascii=False)
            _log.log(level, line, outcome, *about[:2], ">,<".join(about[2]), details, quoted)
        if outcome == "sent":
            yield MailSentEvent(*about)
        elif outcome == "failed":
            yield MailErrorEvent(*about, reply.status)
        else:
            yield MailDeferredEvent(*about, reply.status, due)


def _error_line(replies: Iterable[Reply]) -> str:
    """Return what the file says of the last of *replies*, without addresses: zope.sendmail would send it to all."""
    lines = [f"{reply.status} {reply}" for reply in replies]
    return re.sub(r'(?:"[^"]*"|[^\s<>"(]*)@[^\s<>)]*', "*", lines[-1]) if lines else ""


class _Courier(NamedTuple):
    """Sends claimed messages and settles them, recipient by recipient."""
    mailer: Mailer
    clock: Callable[[], float] = time.time
    max_age: float = _MAX_AGE
    soft_bounce: bool = False

    def deliver(self, claim: _Claim) -> Iterator[MailEvent]:
        """Yield events, each after the change to the queue that it tells of.  May raise `RelayUnavailable`.

        Else what goes wrong is logged, and the message deferred (without an envelope: given up), or `OSError` raised.
        """
        try:
            if claim.unwritten is None:
                claim.read()
                yield from self._attempt(claim)
            else:  # as good as new, once the file says who is left
                claim.record(claim.unwritten, claim.error)
                yield from self._report(claim, "sent", claim.taken)
                yield from self._defer(claim, {}) if claim.toaddrs else ()
        except RelayUnavailable:
            claim.let_go()
            raise
        except _NoEnvelope as error:
            claim.give_up()
            _log.error("%s: %s", _printable(claim.path), error)
            yield MailErrorEvent("", "", (), str(error), "5.6.0")
        except Exception as error:
            _log.error("%s: %s", _printable(claim.path), _reason(error))
            if claim.directory == "cur" and claim.unwritten is None:
                yield from self._defer(claim, dict.fromkeys(claim.toaddrs, Reply(451, f"4.3.0 {_reason(error)}")))
        finally:
            if claim.unwritten is None:  # or else it stays locked: nobody may send it again
                claim.close()

    def settle_unwritten(self, queue: Maildir) -> list[MailEvent]:
        """Write what could not be written before, as far as it can be now; return the events of it."""
        with _Claim.retrying:
            unwritten = [claim for claim in _Claim.held.copy() if claim.unwritten is not None]
            events: list[MailEvent] = []
            for claim in [claim for claim in unwritten if claim.queue.path == queue.path]:
                try:
                    events.extend(self.deliver(claim))  # which keeps those before an error
                except OSError as error:  # it is abandoned, for a processor
                    _log.error("%s: %s", _printable(claim.path), _reason(error))
            return events

    def _attempt(self, claim: _Claim) -> Iterator[MailEvent]:
        failed, deferred = dict[str, Reply](), dict[str, Reply]()
        for sent, others in _ask_in_groups(self.mailer, claim.fromaddr, claim.toaddrs, claim.message):
            if sent:
                claim.taken = sent
                claim.record(tuple(a for a in claim.toaddrs if a not in sent), _error_line(others.values()))
                yield from self._report(claim, "sent", sent)
            for address, reply in others.items():
                reply = reply.softened() if self.soft_bounce and reply.outcome == "failed" else reply
                too_old = claim.age(self.clock()) > self.max_age
                (failed if too_old or reply.outcome == "failed" else deferred)[address] = reply
        if failed and deferred:
            claim.give_up_for(tuple(failed), _error_line(failed.values()))
        elif failed:
            claim.keep(tuple(failed), _error_line(failed.values()))
            claim.give_up()
        if failed:
            yield from self._report(claim, "failed", failed)
        if deferred:
            claim.keep(tuple(deferred), _error_line(deferred.values()))
            yield from self._defer(claim, deferred)

    def _defer(self, claim: _Claim, replies: Mapping[str, Reply]) -> Iterator[MailEvent]:
        due = int(self.clock() + _backoff(claim.age(self.clock())))
        claim.defer(due)
        return self._report(claim, "deferred", replies, due)

    def _report(self, claim: _Claim, outcome: str, replies: Mapping[str, Reply], due: int = 0) -> Iterator[MailEvent]:
        return _events(claim, outcome, replies, due, f" relay={self.mailer} delay={claim.age(self.clock()):.1f}")


# ----------------------------------------------------------------------------------------------- deliveries


class _DataManager:
    """What one delivery has to do with one transaction (`transaction.interfaces.ISavepointDataManager`).

    `transaction` calls `abort` and `tpc_abort` at any time, even after a commit: they know only of messages that are
    not finished, and finish takes those away first.
    """

    def __init__(self, delivery: _Delivery, manager: Any) -> None:
        self.delivery = delivery  # Transaction.set_data goes by id(): while this lives, no other delivery has that one
        self.transaction_manager = manager  # of the interface
        self.messages: list[_Message] = []
        self.joined = self.committing = False
        self.pid = os.getpid()

    def drop(self, start: int) -> None:
        dropped, self.messages[start:] = self.messages[start:], []
        if self.delivery.queue and self.pid == os.getpid():  # what a fork aborts is its parent's
            for message in dropped:
                self.delivery.queue._discard(message.name)

    def savepoint(self) -> Any:
        length = len(self.messages)
        return types.SimpleNamespace(rollback=lambda: self.drop(length))

    def abort(self, _transaction: Any) -> None:
        self.joined = self.committing = False
        self.drop(0)

    tpc_abort = abort

    def tpc_begin(self, _transaction: Any) -> None:
        self.committing = True

    def tpc_vote(self, _transaction: Any) -> None:
        """Nothing: see `commit()`."""

    def commit(self, _transaction: Any) -> None:
        """Do all that can fail: it comes before any vote, and zope.sqlalchemy commits in its vote."""
        if self.delivery.queue:
            self.delivery.queue._sync([message.name for message in self.messages])

    def tpc_finish(self, current: Any) -> None:
        """Let the messages go.  Raises no `Exception`, for the databases have committed; what to tell is told later."""
        messages, self.messages = self.messages, []
        try:
            for event in self.delivery._finish(messages) if messages else ():
                # a hook only where it is needed: it makes `transaction` abort everything once more
                current.addAfterCommitHook(lambda _committed, event: notify(event), (event,))
        except Exception:  # a bug; the messages are where they are
            _log.critical("in doubt: mail of a committed transaction: %s", messages, exc_info=True)

    def sortKey(self) -> str:
        return f"~~sendmail:{id(self)}"  # after every database's: mail must not be visible before the data


class _Delivery:
    """What the two deliveries share."""

    def __init__(self, queue: _Queue | None, transaction_manager: Any) -> None:
        if transaction is None:
            raise ImportError(f"{type(self).__name__} needs the package transaction: pip install transaction")
        self._manager = transaction.manager if transaction_manager is None else transaction_manager
        self.queue: Any = queue if queue is None or isinstance(queue, Maildir) else Maildir(queue)

    def send(self, fromaddr: str, toaddrs: str | Iterable[str], message: _Content) -> str:
        """Send *message* when, and only when, the transaction commits; return its id (without angle brackets).

        *fromaddr* is an address, or '' (the null sender); *toaddrs* an address or several, of which duplicates count
        once.  *message* is bytes, text or a `Message`, which is sent without its Bcc; Message-Id and Date are added
        where missing.

        Raise `ValueError` for no recipients, an address that is no bare addr-spec (RFC 5322, 3.4.1), a malformed
        Message-Id, or a transaction that is being committed, `OSError` if the message can't be written, and what the
        transaction manager raises.
        """
        message_id, recipients, content = _prepare(fromaddr, toaddrs, message)
        current = self._manager.get()
        try:
            data: _DataManager = current.data(self)
        except KeyError:
            data = _DataManager(self, self._manager)
            current.set_data(self, data)
        if data.committing:
            raise ValueError("the transaction is being committed: too late to send")
        if not data.joined:  # new, or sent away by the rollback of a savepoint older than itself
            current.join(data)
            data.joined = True
        name = self.queue._write(fromaddr, recipients, content) if self.queue else ""
        data.messages.append(_Message(message_id, fromaddr, recipients, b"" if name else content, name))
        return message_id

    def _finish(self, messages: list[_Message]) -> Iterator[MailEvent]:
        """Show the messages of a committed transaction; one that can't be moved stays complete in tmp/."""
        names = [message.name for message in messages]
        try:
            failures = self.queue._publish(names)
        except BaseException:  # an interrupt; what it kept from being moved must be
            self.queue._publish(names)
            raise
        for message in [message for message in messages if message.name in failures]:
            path = self.queue._path("tmp", message.name)
            with contextlib.suppress(OSError):
                os.utime(path, (time.time() + 366 * 86400,) * 2)  # no litter for a year
            _log.critical("committed mail is stuck: move %s to new/ by hand", path)
            reply = Reply(554, f"5.3.0 stuck in {path}: {_reason(failures[message.name])}")
            messages.remove(message)
            yield from _events(message, "failed", dict.fromkeys(message.toaddrs, reply))


class QueuedMailDelivery(_Delivery):
    """Queue messages at commit, in *queue* (a `Maildir`, or its path), for a processor to send.

    *transaction_manager* is `transaction.manager` (thread-local) unless another is given.  Raise `ImportError` where
    `transaction` is not installed, and what `Maildir` raises.
    """

    def __init__(self, queue: _Queue, transaction_manager: Any = None) -> None:
        super().__init__(queue if isinstance(queue, Maildir) else os.fspath(queue), transaction_manager)  # no None

    def _finish(self, messages: list[_Message]) -> Iterator[MailEvent]:
        yield from super()._finish(messages)
        self.queue._wake()


class DirectMailDelivery(_Delivery):
    """Send messages by *mailer* while the transaction commits; what fails becomes a `MailErrorEvent` after it.

    A process that dies in the middle loses what it had not sent, unless *fallback* names a queue (a `Maildir`, or its
    path): then this is a queued delivery that makes the first attempt itself, and what can't be sent now stays there
    (`MailDeferredEvent`).  All else is as for `QueuedMailDelivery`.
    """

    def __init__(self, mailer: Mailer, transaction_manager: Any = None, *, fallback: _Queue | None = None) -> None:
        super().__init__(fallback, transaction_manager)
        self._mailer = mailer

    def _finish(self, messages: list[_Message]) -> Iterator[MailEvent]:
        if self.queue:
            yield from super()._finish(messages)  # first of all, in case this process dies
            yield from _Courier(self._mailer).settle_unwritten(self.queue)
        claims: dict[str, _Claim | None] = {}
        try:
            with _connected(self._mailer):
                for index, message in enumerate(messages):
                    several = messages[index : index + _AT_ONCE] if self.queue and index % _AT_ONCE == 0 else []
                    for name in [other.name for other in several]:  # before the first of them is sent
                        with contextlib.suppress(OSError):  # a processor has it, or will
                            claims[name] = self.queue._claim(name)
                    for event in self._attempt_now(message, claims.pop(message.name, None)):
                        message.toaddrs = tuple(a for a in message.toaddrs if a not in event.toaddrs)
                        yield event
                    message.toaddrs = ()
        except RelayUnavailable as error:
            outcome, reply = "deferred" if self.queue else "failed", Reply(451, f"4.4.1 {error}")
            for message in messages:
                yield from _events(message, outcome, dict.fromkeys(message.toaddrs, reply), time.time())
        finally:
            for claim in filter(None, claims.values()):
                claim.let_go()
        if self.queue:
            self.queue._wake()

    def _attempt_now(self, message: _Message, claim: _Claim | None) -> Iterator[MailEvent]:
        """Make the one attempt.  May raise `RelayUnavailable`."""
        if self.queue:
            try:
                yield from _Courier(self._mailer).deliver(claim) if claim else ()
            except OSError as error:  # it is abandoned, for a processor
                _log.error("%s: %s", _printable(message.name), _reason(error))
            return
        for sent, others in _ask_in_groups(self._mailer, message.fromaddr, message.toaddrs, message.content):
            yield from _events(message, "sent", sent)
            yield from _events(message, "failed", others)  # there is no later


# ------------------------------------------------------------------------------------------------ processor


@dataclasses.dataclass
class _Counts:
    """What a pass did, in messages; `outage` is why it ended early."""
    sent: int = 0
    deferred: int = 0
    failed: int = 0
    left: int = 0
    outage: RelayUnavailable | None = None


class _Listing(NamedTuple):
    """What is known of a directory since it was listed, so that an idle pass costs a `stat`, however deep the queue."""
    mtime: int = -1
    listed: float = 0.0
    valid_until: float = 0.0  # if the directory does not change
    size: int = 0


class QueueProcessorThread(threading.Thread):
    """Send what is due in *queue* (a `Maildir`, or its path) by *mailer*, every *interval* seconds and when woken.

    While the relay is unavailable, mail does not wake it, and the wait grows to 60 s (or *interval*, if longer).
    `start()` makes it a daemon thread, which interpreter exit stops and joins; `run()` does the same in this thread;
    `process()` makes one pass.  A pass takes at most *batch* messages, over *workers* connections.  A message that a
    reply would defer is given up if it is older than *max_age* seconds; *soft_bounce* defers what the relay refuses for
    good.
    There may be as many processors on a queue as you like.
    """

    def __init__(
        self, queue: _Queue, mailer: Mailer, interval: float = 3.0, *, batch: int | None = None, workers: int = 1,
        max_age: float = _MAX_AGE, soft_bounce: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(name="sendmail", daemon=True)
        self._queue = queue if isinstance(queue, Maildir) else Maildir(queue)
        self._mailer, self._interval = mailer, interval
        self._batch, self._workers, self._max_age, self._soft_bounce = batch, workers, max_age, soft_bounce
        self._clock: Callable[[], float] = time.time
        self._counting = threading.Lock()  # for the counts of a pass, which its workers share
        self._stopping = False
        self._make_bell()
        self._listings = {"cur": _Listing(), "new": _Listing()}
        self._not_before: dict[str, float] = {}  # what is left alone, and until when
        self._suspects: set[str] = set()  # at these the relay became unavailable: the others go first
        self._next_cleaning = 0.0

    def _make_bell(self) -> None:
        """Make the pipe that `stop()` writes to: a signal handler may, where an Event could dead-lock."""
        self._bell, self._pid = os.pipe(), os.getpid()
        for end in self._bell:
            os.set_blocking(end, False)
            weakref.finalize(self, os.close, end)

    def start(self) -> None:
        """Start the thread; interpreter exit stops and joins it."""
        atexit.register(self._stop_and_join)
        super().start()

    def stop(self) -> None:
        """Finish the message in hand, and start no other.  Returns at once, also in a signal handler."""
        self._stopping = True
        with contextlib.suppress(OSError):
            os.write(self._bell[1], b"\0")

    def _stop_and_join(self) -> None:
        if self.is_alive():  # or else this is a fork, which shares the bell
            self.stop()
            self.join()

    def run(self) -> None:
        """Make passes until `stop()`."""
        outage_began = float("inf")
        if self._pid != os.getpid():  # what is read from the bell of several forks is lost to the others
            self._make_bell()
        try:
            while not self._stopping:
                trigger = self._queue._open_trigger()  # anew, for somebody may have replaced it
                try:
                    outage = self._try_process()
                    outage_began = min(outage_began, self._clock()) if outage else float("inf")
                    lasted = min(self._clock() - outage_began, _OUTAGE_WAIT_MAX)  # so the wait doubles
                    self._wait(max(self._interval, lasted), [self._bell[0], *(() if outage else trigger)])
                finally:
                    for fd in trigger:
                        os.close(fd)
        finally:
            self._queue._wake()  # the others, if this one was woken in their place
            atexit.unregister(self._stop_and_join)

    def _try_process(self) -> RelayUnavailable | None:
        try:
            return self.process().outage
        except Exception as error:  # the queue can't be read, for now
            _log.error("cannot process %s: %s", self._queue.path, _reason(error))
            return None

    def _wait(self, seconds: float, fds: Sequence[int]) -> None:
        """Wait until one of *fds* is written to, and read it: before the next pass lists, so that no mail is missed."""
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        poll.poll(min(1000 * seconds, 1 << 30))
        for fd in fds:
            with contextlib.suppress(BlockingIOError):
                os.read(fd, 1 << 20)

    def process(self) -> _Counts:
        """Make one pass; return the number of messages `sent`, `deferred`, `failed` and `left` in the queue.

        A message counts under each that befell one of its recipients.  If the relay is unavailable, the pass ends, and
        `outage` says why.  Raise `OSError` if the queue can't be read.
        """
        courier = _Courier(self._mailer, self._clock, self._max_age, self._soft_bounce)
        if self._clock() >= self._next_cleaning:
            self._next_cleaning = self._clock() + 3600
            self._queue._clean(self._clock())
        released = self._recover(courier)
        due = self._look("new")
        self._suspects.intersection_update(due)
        due = sorted(due, key=self._suspects.__contains__)[: self._batch][::-1]  # for pop()
        counts = _Counts(left=sum(listing.size for listing in self._listings.values()) - released)  # now among the new
        try:
            if due and not self._stopping:
                with _connected(self._mailer):  # before any claim, and before the helpers
                    helpers = [threading.Thread(target=self._work_too, args=(courier, due, counts), daemon=True)
                               for _ in range(min(self._workers, len(due)) - 1)]  # fmt: skip
                    try:
                        with contextlib.suppress(RuntimeError):  # no more threads, as at interpreter exit
                            for helper in helpers:
                                helper.start()
                        self._work(courier, due, counts)
                    finally:
                        due.clear()  # an interrupt ends the work of all
                        for helper in [helper for helper in helpers if helper.ident]:
                            helper.join()
        except RelayUnavailable as error:
            counts.outage = error
        if counts.outage:
            _log.warning("relay unavailable, %d left in the queue: %s", counts.left, _reason(counts.outage))
        return counts

    def _recover(self, courier: _Courier) -> int:
        """Release what stands in cur/ and was abandoned by a process that died; return how many that is."""
        for event in courier.settle_unwritten(self._queue):
            notify(event)
        released = 0
        for name in self._look("cur"):
            try:
                if abandoned := self._queue._lock("cur", name):
                    with contextlib.closing(abandoned):
                        abandoned.release()
                    released += 1
            except OSError as error:
                self._leave("cur", name, error)
        return released

    def _look(self, directory: str) -> list[str]:
        """Return what is due in *directory*, in order of arrival: [], without listing it, if nothing can have changed.

        A change within the clock tick of the one before leaves the mtime as it is: younger than 2 s, it proves nothing.
        """
        now, mtime = self._clock(), os.stat(self._queue._path(directory)).st_mtime_ns
        known = self._listings[directory]
        if mtime == known.mtime and known.listed <= now < known.valid_until:
            return []
        names = self._queue._names(directory)
        due, waiting, next_due = _schedule(names, now) if directory == "new" else (list(names), 0, now + _BACKOFF_MAX)
        not_before = {name: when for name, when in tuple(self._not_before.items()) if now < when <= now + _BACKOFF_MIN}
        ready, self._not_before = sorted(name for name in due if name not in not_before), not_before
        valid_until = min([next_due, *not_before.values()]) if not ready and now - mtime / 1e9 > 2 else 0.0
        self._listings[directory] = _Listing(mtime, now, valid_until, len(due) + waiting)
        return ready

    def _work_too(self, courier: _Courier, due: list[str], counts: _Counts) -> None:
        """Work over one more connection; if there is none to be had, the first goes on alone."""
        with contextlib.suppress(RelayUnavailable), _connected(self._mailer):
            self._work(courier, due, counts)

    def _work(self, courier: _Courier, due: list[str], counts: _Counts) -> None:
        """Claim and deliver one message after the other, until there is none or the relay is unavailable."""
        while not self._stopping and not counts.outage:
            try:
                name = due.pop()
            except IndexError:
                return
            kinds: set[type] = set()
            try:
                claim = self._queue._claim(name)
                for event in courier.deliver(claim) if claim else ():
                    notify(event)
                    kinds.add(type(event))
            except RelayUnavailable as error:
                counts.outage = error
                kinds.add(RelayUnavailable)
                self._suspects.add(name)
            except Exception as error:
                self._leave("new", name, error)
            with self._counting:
                counts.sent += MailSentEvent in kinds
                counts.deferred += MailDeferredEvent in kinds
                counts.failed += MailErrorEvent in kinds
                counts.left -= bool(kinds) and not kinds & {MailDeferredEvent, RelayUnavailable}

    def _leave(self, directory: str, name: str, error: Exception) -> None:
        """Leave alone for a minute what can't be claimed or settled."""
        self._not_before[name] = self._clock() + _BACKOFF_MIN
        _log.error("leaving alone %s/%s for now: %s", directory, _printable(name), _reason(error))


# --------------------------------------------------------------------------------------------- command line

_HELP = """\
usage: python -m sendmail --maildir DIR [option ...]               send what is due, once; for cron
       python -m sendmail --maildir DIR --interval SECONDS         keep doing so
       python -m sendmail --maildir DIR -t < message               queue a message, as sendmail(8) does,
       python -m sendmail --maildir DIR [-f SENDER] RECIPIENT ...  or for these recipients
       python -m sendmail --maildir DIR --list [--json]            show the queue
       python -m sendmail --maildir DIR --requeue [NAME ...]       make failed and deferred messages due again

  --maildir DIR         the queue, made if it is missing (default: $SENDMAIL_MAILDIR)
  --interval SECONDS    stay, and look for mail that often, and whenever some is queued
  --batch N             messages in one pass, at most (default: all that are due)
  --workers N           connections to the relay (default: 1)
  --max-age DAYS        give up what the relay still defers after so long (default: 5)
  --soft-bounce         defer what the relay refuses for good
  --print               print what is due instead of sending it: it leaves the queue (to look at it, use --list)
  --hostname HOST, --port PORT    the relay (default: localhost, 25)
  --username NAME       log in, with the password in $SENDMAIL_PASSWORD or
  --password-file FILE  in the first line of FILE, read at every login
  --auth MECHANISM      CRAM-MD5, PLAIN, LOGIN or XOAUTH2 (default: the best of the first three)
  --no-tls, --force-tls, --implicit-tls    never use TLS, require STARTTLS, speak TLS from the start (port 465)
  --timeout SECONDS     for each step of the dialogue (default: 60); the reply to the data has ten minutes
  --domain DOMAIN       completes addresses without one (default: this host's name)
  --verbose             log what was sent or deferred, too
  --help, --version

of sendmail(8): -t takes the recipients from To, Cc and Bcc, besides those given; -i, -oi: a line with only a dot does
not end the message; -f, -r SENDER: envelope sender (default: you; <> is none); -F NAME: your name, for a missing From

exit status: 0 done, or stopped by a signal, even if messages were deferred or given up; 64 usage; 65 bad message, or no
message called NAME; 73 queue can't be opened or made; 74 input or output error; 75 relay unavailable; 130 interrupted
"""
# what --help says is what there is: the name of each option, and of its value
_OPTIONS = dict(re.findall(r"--([a-z-]+)(?: ([A-Z]+))?", _HELP))
_NUMBERS = {"SECONDS": float, "DAYS": float, "N": int, "PORT": int}
_SENDMAIL_OPTIONS = "A:B:C:F:GIL:N:O:R:UV:X:b:ce:f:h:imno:p:r:tv"  # Postfix's; -q is not getopt's kind
_TIMES, _SIZES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")), ((10**6, "MB"), (1000, "kB"), (1, "B"))
_ERASE = "\r\x1b[K"  # the line on a terminal


class _Exit(Exception):
    """Ends the command line, with a status and a line for people."""


def _parse(argv: list[str]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Return our options, those of sendmail(8), and the operands."""
    runs = [arg for arg in itertools.takewhile(lambda arg: arg != "--", argv) if arg.startswith("-q")]
    for run in runs:  # only an attached value is one
        argv.remove(run)
    os.environ.pop("POSIXLY_CORRECT", None)  # options may stand after recipients
    try:
        known = [name + "=" * bool(value) for name, value in _OPTIONS.items()]
        pairs, operands = getopt.gnu_getopt(argv, _SENDMAIL_OPTIONS, known)
    except getopt.GetoptError as error:
        raise _Exit(os.EX_USAGE, f"{error}; see --help") from None
    ours: dict[str, Any] = {name[2:]: value if _OPTIONS[name[2:]] else True for name, value in pairs if name[1] == "-"}
    theirs = {option + value * (option in ("-o", "-b")): value for option, value in pairs if option[1] != "-"}
    theirs.update(dict.fromkeys([*runs, *("--" for arg in argv if arg == "--" and "requeue" not in ours)], ""))
    for name, text in ours.items():
        if kind := _NUMBERS.get(_OPTIONS[name]):
            with contextlib.suppress(ValueError):
                ours[name] = kind(text)
            if not (isinstance(ours[name], kind) and 0 < ours[name] < 1e9):
                raise _Exit(os.EX_USAGE, f"--{name} takes a positive {kind.__name__}, not {text!r}")
    if "-bp" in theirs:
        ours["list"] = theirs.pop("-bp")
    injection = bool(theirs or (operands and "requeue" not in ours))
    modes = sum(name in ours for name in ("list", "requeue")) + injection + ("interval" in ours or "print" in ours)
    if modes > 1 or ("json" in ours and "list" not in ours):
        raise _Exit(os.EX_USAGE, "these options do not go together; see --help")
    if any(option.startswith("-b") and option != "-bm" for option in theirs):
        raise _Exit(os.EX_USAGE, "of -b only -bm and -bp are for this program")
    return ours, theirs, operands


def _make_mailer(options: Mapping[str, Any]) -> Mailer:
    if "print" in options:
        return StreamMailer()

    def password() -> str:
        if "password-file" not in options:
            return os.environ["SENDMAIL_PASSWORD"]
        with open(options["password-file"], encoding="utf-8") as file:
            return file.readline().rstrip("\r\n")

    names = ("hostname", "port", "username", "auth", "timeout", "no-tls", "force-tls", "implicit-tls")
    settings: Any = {name.replace("-", "_"): options[name] for name in names if name in options}
    if "password-file" in options or ("username" in options and "SENDMAIL_PASSWORD" in os.environ):
        settings["password"] = password
    return SMTPMailer(**settings)


def _process(queue: Maildir, options: Mapping[str, Any]) -> None:
    """Run a processor: for one pass, or until a signal; a second one ends it at once."""
    try:
        mailer = _make_mailer(options)
    except ValueError as error:
        raise _Exit(os.EX_USAGE, str(error)) from None
    processor = QueueProcessorThread(
        queue, mailer, options.get("interval", 3), batch=options.get("batch"), workers=options.get("workers", 1),
        max_age=options["max-age"] * 86400 if "max-age" in options else _MAX_AGE, soft_bounce="soft-bounce" in options,
    )  # fmt: skip

    def stop(signum: int, _frame: object) -> None:
        signal.signal(signum, signal.SIG_DFL)
        processor.stop()

    seen, total = set(), 0

    def progress(event: MailEvent) -> None:
        seen.add(event.message_id)
        print(f"{_ERASE}{len(seen)} of {total}", end="", file=sys.stderr, flush=True)

    with contextlib.ExitStack() as undo:
        main_thread = threading.current_thread() is threading.main_thread()
        for signum in (signal.SIGTERM, signal.SIGINT) if main_thread else ():
            undo.callback(signal.signal, signum, signal.signal(signum, stop))
        if "interval" in options:
            return processor.run()
        if sys.stderr and sys.stderr.isatty() and "verbose" not in options:
            total = sum(1 for _ in _all(queue, "new", "cur"))
            undo.callback(print, _ERASE, end="", file=sys.stderr)
            undo.callback(unsubscribe, subscribe(progress))
        if processor.process().outage:  # which the log has told
            raise _Exit(os.EX_TEMPFAIL, "")


def _addresses(text: str, domain: str) -> list[str]:
    """Return the addresses in *text*, completed with *domain*; what is none as it is, to be refused."""
    found = _parse_addresses(text, bare=False) if not re.search(r"[\0-\x1f]", text) else ()
    words = {word.strip(' "') for word in re.split("[,:;<>()]", text)}
    if any("@" not in address and address not in words for address in found):  # the first of several words
        return [text]
    return [address if "@" in address else f"{address}@{domain}" for address in found] or [text]


def _inject(queue: Maildir, options: Mapping[str, Any], flags: Mapping[str, str], operands: Iterable[str]) -> None:
    """Queue the message on standard input."""
    domain = options.get("domain") or socket.gethostname()
    recipients = [address for operand in operands for address in _addresses(operand, domain)]
    if not recipients and "-t" not in flags:
        raise _Exit(os.EX_USAGE, "no recipients: name them, or use -t; see --help")
    sender = flags.get("-f", flags.get("-r"))
    if sender is None:
        try:
            sender = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:  # as in many a container
            sender = f"uid{os.getuid()}"
    sender = "" if sender in ("", "<>") else _addresses(sender, domain)[0]
    try:
        lines = iter(sys.stdin.buffer.readline, b"")
        if not flags.keys() & {"-i", "-oi"}:
            lines = itertools.takewhile(lambda line: line.rstrip(b"\r\n") != b".", lines)
        message = b"".join(lines)
    except (OSError, ValueError, AttributeError) as error:  # closed, in one of three ways
        raise _Exit(os.EX_IOERR, f"cannot read the message from standard input: {_reason(error)}") from None
    if message.startswith(b"From "):  # of an mbox
        message = message.partition(b"\n")[2]
    headers = _headers_of(message)
    if "-t" in flags:
        resent = list(_fields(headers, b"Resent-(?:To|Cc|Bcc)"))
        for value in resent or [value for name in (b"To", b"Cc", b"Bcc") for value in _fields(headers, name)]:
            if _parse_addresses(value, bare=False) or value.rstrip(" ;,:") == value != "":  # or else an empty group
                recipients += _addresses(value, domain)
    message = _BCC.sub(b"", headers) + message[len(headers) :]
    if next(_fields(headers, b"From"), None) is None:
        author = sender or f"MAILER-DAEMON@{domain}"
        name = email.utils.formataddr((_printable(flags.get("-F", "")), ""))[:-2]  # it takes ASCII addresses alone
        message = _with_header_lines(message, f"From: {name}<{author}>" if name else f"From: {author}")
    queue.add(sender, recipients, message)


def _human(number: float, units: Sequence[tuple[int, str]]) -> str:
    """Return *number* in the largest of *units* that it fills."""
    size, unit = next((unit for unit in units if number >= unit[0]), units[-1])
    return f"{number / size:.0f} {unit}"


def _all(queue: Maildir, *directories: str) -> Iterator[tuple[str, str]]:
    """Yield directory and name of all that stands in *directories*, so far as these exist."""
    for directory in directories:
        with contextlib.suppress(FileNotFoundError):
            yield from [(directory, name) for name in sorted(queue._names(directory))]


def _entries(queue: Maildir) -> Iterator[dict[str, Any]]:
    """Yield what there is to show of each message."""
    now = time.time()
    for directory, name in _all(queue, "cur", "new", ".failed/new", ".failed/cur"):
        path = queue._path(directory, name)
        _, deferred, due = _schedule([name] if directory == "new" else [], now)
        entry: dict[str, Any] = {"name": name, "state": "deferred" if deferred else "due"}
        try:
            entry.update(age=_age(name, path, now), size=os.stat(path).st_size, sender="", recipients=())
            entry.update(due=due if deferred else None, error="")
            locked = directory == "cur" and queue._lock(directory, name)  # a pass of this moment leaves it to the next
            entry["state"] = "failed" if directory[0] == "." else "sending" if locked is None else entry["state"]
            with contextlib.closing(locked or _Claim(queue, directory, name)) as claim:
                claim.read()
                entry.update(sender=claim.fromaddr, recipients=claim.toaddrs, error=claim.error)
        except FileNotFoundError:  # gone by now
            continue
        except Exception as error:  # no message can stop the listing
            entry["error"] = _reason(error)
        yield entry


def _table(queue: Maildir) -> Iterator[str]:
    """Yield the lines that show the queue, for eyes."""
    entries = list(_entries(queue))
    longest = max((len(entry["name"]) for entry in entries), default=0)
    for entry in entries:
        wait = f" for {_human(entry['due'] - time.time(), _TIMES)}" if entry["state"] == "deferred" else ""
        age, size = _human(entry["age"], _TIMES), _human(entry["size"], _SIZES)
        yield f"{entry['name']:{longest}}  {age:>6}  {size:>6}  {entry['state']}{wait}"
        yield f"    <{entry['sender']}> to {', '.join(entry['recipients'])}"
        if entry["error"]:
            yield f"    {entry['error']}"
    states = [entry["state"] for entry in entries]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "none"
    yield f"messages: {counts}; oldest: {_human(max((entry['age'] for entry in entries), default=0), _TIMES)}"


def _fit(line: str) -> str:
    """Return *line*, parts of which others wrote, printable and no wider than the terminal."""
    line = "".join(c if c.isprintable() else "?" for c in line)
    width = os.get_terminal_size().columns if sys.stdout and sys.stdout.isatty() else 0  # 0: unknown
    return line if not width or len(line) <= width else f"{line[: width - 1]}…"


def _show(lines: Iterable[str]) -> None:
    if sys.stdout is None:
        raise OSError("standard output is closed")
    for line in lines:
        print(_encodable(line, sys.stdout), flush=True)


def _requeue(queue: Maildir, names: Sequence[str]) -> None:
    """Make failed and deferred messages due, all or those called *names*."""
    missing, trouble = set(names), None
    for directory, name in _all(queue, "new", ".failed/new", ".failed/cur"):
        if name in missing or (not names and (directory != "new" or _DUE.search(name))):
            try:
                if claim := queue._lock(directory, name):
                    with contextlib.closing(claim):
                        claim.requeue()
                    missing.discard(name)
            except OSError as error:
                trouble = error
    _fsync(queue._path("new"))
    queue._wake()
    if trouble:
        raise trouble
    if missing:
        raise _Exit(os.EX_DATAERR, f"not in the queue, or being sent: {', '.join(sorted(missing))}")


def _run(argv: list[str]) -> None:
    options, flags, operands = _parse(argv)
    if "help" in options or "version" in options:
        return _show([_HELP.rstrip() if "help" in options else f"sendmail.py {__version__}"])
    _log.setLevel(logging.INFO if "verbose" in options else logging.WARNING)
    path = options.get("maildir") or os.environ.get("SENDMAIL_MAILDIR")
    if not path:
        raise _Exit(os.EX_USAGE, "no queue: name it with --maildir or $SENDMAIL_MAILDIR; see --help")
    try:
        queue = Maildir(path, create=not options.keys() & {"list", "requeue"})
    except (OSError, ValueError) as error:
        raise _Exit(os.EX_CANTCREAT, _reason(error)) from None
    if "json" in options:
        _show(map(json.dumps, _entries(queue)))
    elif "list" in options:
        _show(map(_fit, _table(queue)))
    elif "requeue" in options:
        _requeue(queue, operands)
    elif flags or operands:
        _inject(queue, options, flags, operands)
    else:
        _process(queue, options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line *argv*, by default that of the process; return its exit status (see --help)."""
    handler = logging.StreamHandler()
    erase = _ERASE if sys.stderr and sys.stderr.isatty() else ""
    handler.setFormatter(logging.Formatter(f"{erase}sendmail: %(message)s"))
    _log.addHandler(handler)
    status = 0
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
    except _Exit as error:
        status, text = error.args
        _log.error(text) if text else None
    except KeyboardInterrupt:
        status = 130
    except (OSError, ValueError) as error:
        status = os.EX_IOERR if isinstance(error, OSError) else os.EX_DATAERR
        _log.error(_reason(error))
    try:
        sys.stdout.flush() if sys.stdout else None
    except OSError:  # which was told; let the interpreter not try it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _log.removeHandler(handler)
    return status


if __name__ == "__main__":
    sys.exit(main())
