"""Transactional e-mail with a crash-safe Maildir queue, in one file.

A *delivery* takes a message, and gives its id.  The message goes out if, and only if, the
transaction commits; a queue in the file system keeps it through crashes; a *processor* relays it by
SMTP; *events* tell how it went:

    import transaction
    from sendmail import QueuedMailDelivery, QueueProcessorThread, SMTPMailer

    QueueProcessorThread("queue", SMTPMailer("localhost", 25)).start()
    delivery = QueuedMailDelivery("queue")
    delivery.send("app@example.com", ["ann@example.com"], "Subject: Hello\\n\\nHello, Ann.\\n")
    transaction.commit()

Without transactions, `Maildir("queue").add(...)` does it in one step; `python -m sendmail --help`
tells the rest.

Words
    envelope    the sender and the recipients, which the relay goes by; in the file, two lines before
                the message
    relay       the SMTP server that takes our messages
    reply       what the relay says of one recipient: sent (2xx), failed (5xx, but those that are about
                our login), deferred (all else: try later)
    claim       the right to send, move or unlink a message: an exclusive flock on its file
    pass        one walk of a processor through what is due

States: the directory is the state, a rename is the transition, a lock is the life of a claim
    tmp/        being written, not committed; older than 36 hours: litter
    new/        due
    cur/        claimed, by the process that holds the lock on it; abandoned, if nobody does
    deferred/   waiting for the Unix time (ten digits) that its name begins with, before a dot (but
                due at once, if there is none, or one over an hour ahead: a clock was wrong)
    .failed/    given up, kept for a person (a Maildir++ folder)

    send ─write─▶ tmp/ ─publish─▶ new/ ──claim──▶ cur/ ─(how a claim ends: see below)─▶
                                       deferred/ ─claim─▶ cur/
                                       deferred/, .failed/ ─requeue─▶ new/

How a claim ends
    remove      the relay took the message for every recipient      unlinked
    defer       some are to be tried later                          deferred/
    give_up     the rest was refused for good, or is too old, or    .failed/
                there is no readable envelope
    release     the relay is unavailable, or a claim was abandoned  new/
    requeue     a person wants it to be tried again                 new/, with a fresh name
    hold        what became of it can't be noted                    cur/, until the process ends

Guarantees, for what is queued
    1. Every recipient of a committed message stands in a complete file in new/, cur/, deferred/ or
       .failed/ until the relay has taken the message for that recipient.
    2. Only the holder of the lock on the inode now at that path moves, replaces or unlinks a message
       outside tmp/.
    3. A message in cur/ whose lock is free was abandoned, as by a process that died: the next pass
       of any processor takes it up (one that had trouble with it waits a minute).  A living
       processor, however slow its relay, is never robbed.
    4. commit() returning means durable: the file fsynced before its rename, the directory after it
       (if that last fsync fails, the log says so).
    5. A changed list of recipients replaces the file atomically (but see below), before the message
       is let go of; once the relay has taken it for some, the file without those comes first.
    6. A processor that dies causes a duplicate only of the message in hand (and of those that it
       holds), and only if the relay takes it without the unlink (or replacement) that follows its
       final reply.  No event, no QUIT, no log line of a success stands between the two.
    7. A queue whose creation was cut short is completed, if nothing else stands in it; a directory
       that is no Maildir is refused, untouched.

What can't be guaranteed
    Unlinks are not fsynced: a power cut may repeat the last few messages.  A crash, or a disk error,
    after the copy in .failed/ may try its recipients again.  A relay that took a message and died
    before saying so gets it again.  Where neither unlink nor replacement can be done, the process
    holds the message as long as it lives; the next one sends it again.  Where another file can't be
    written, as on a full disk, and between the groups of a hundred recipients of a large message,
    the shorter list is written over the longer one, and a power cut in that moment may splice two
    addresses.

    A process that dies after a database has committed, but before its own turn came, leaves the mail
    in tmp/, as litter.  If a database fails when it should finish, the transaction is in doubt, and
    its mail is dropped, as at any abort.  If the rename into new/ fails, committed mail stays in
    tmp/ for a year (or until a power cut), and a critical line in the log names the file.  A
    DirectMailDelivery without a fallback has no queue: what fails, or is not sent yet when the
    process dies, is lost.
"""

# SPDX-License-Identifier: MIT
# The file LICENSE goes with every copy.

from __future__ import annotations

import atexit
import collections
import contextlib
import copy
import dataclasses
import email.errors
import email.generator
import email.header
import email.message
import email.utils
import fcntl
import functools
import io
import itertools
import json
import logging
import math
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
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TextIO, TypeAlias, TypeVar

__all__ = [
    "MailEvent", "MailSentEvent", "MailDeferredEvent", "MailErrorEvent", "subscribe", "unsubscribe", "notify",
    "Reply", "RelayUnavailable", "Mailer", "SMTPMailer", "StreamMailer",
    "Maildir", "DirectMailDelivery", "QueuedMailDelivery", "QueueProcessorThread", "main",
]  # fmt: skip
__version__ = "2.0"

_BACKOFF_MIN = 60.0  # seconds to the next try of a deferred message, at least
_BACKOFF_MAX = 3600.0  # and at most
_LOOK_INTERVAL = 60.0  # seconds between two looks at deferred/
_MAX_AGE = 5 * 86400.0  # seconds; an older message is given up instead of deferred
_LITTER_AGE = 36 * 3600.0  # seconds (Maildir's rule for tmp/)
_OUTAGE_WAIT_MAX = 60.0  # seconds between two passes, while the relay is unavailable
_LOSSES_MAX = 3  # messages lost in a row, after which the relay is taken to be down
_FINAL_REPLY_TIMEOUT = 600.0  # seconds (RFC 5321, 4.5.3.2.6)
_PATIENCE = 5  # times the timeout, for what may come together with the final reply (RFC 5321, 4.5.3.2: five minutes)
_LAST_WORDS_TIMEOUT = 1.0  # seconds, for what the relay has said before a write failed
_REPLY_LINES = 1000  # of one reply, at most
_REPLY_LINE = 8192  # bytes of one line, at most
_GROUP = 100  # recipients at a time (RFC 5321, 4.5.3.1.8)
_CHUNK = 65536  # bytes that go out in one write, at most
_PIECE = 32_000  # bytes of a message; under 64 KB with dots stuffed and line ends made CRLF
_LARGE = 1 << 20  # bytes; a larger message is not written anew for each group of its recipients
_FSYNCS_AT_ONCE = 16  # of one commit
_Queue: TypeAlias = "Maildir | str | os.PathLike[str]"
_Content: TypeAlias = "bytes | str | email.message.Message"
_log = logging.getLogger("sendmail")


@functools.cache
def _transaction_package() -> Any:
    """Return the package `transaction`, imported when it is first needed; None if it is not installed."""
    try:
        import transaction
    except ImportError:
        return None
    return transaction


# --------------------------------------------------------------------------------------------------- events


@dataclasses.dataclass(frozen=True)
class MailEvent:
    """What became of a message, for some of its recipients.

    message_id  what `send()` returned: the Message-Id without angle brackets
    fromaddr    the envelope sender; '' is the null sender
    toaddrs     a tuple of recipients: those, and only those, that the event is about

    They are empty for a file in the queue that has no readable envelope.
    """

    message_id: str
    fromaddr: str
    toaddrs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MailSentEvent(MailEvent):
    """The relay took it, and is responsible for it from now on (RFC 5321, 4.2.5).

    response    its last reply, such as `250 2.0.0 Ok: queued as 4F1`
    """

    response: str


@dataclasses.dataclass(frozen=True)
class MailDeferredEvent(MailEvent):
    """Not yet: it stays in the queue, and will be tried again.

    error_message    the reply, such as `450 4.2.1 mailbox busy`
    delivery_status  its status (RFC 3463), such as `4.2.1`
    retry_at         the time of the next try (Unix time)
    """

    error_message: str
    delivery_status: str
    retry_at: float


@dataclasses.dataclass(frozen=True)
class MailErrorEvent(MailEvent):
    """Given up, for it was refused for good, or is too old; what was queued is kept in .failed/.

    error_message    the reply, such as `550 5.1.1 no such user`
    delivery_status  its status (RFC 3463), such as `5.1.1`
    """

    error_message: str
    delivery_status: str


_Handler = TypeVar("_Handler", bound=Callable[[Any], object])
_Tell: TypeAlias = Callable[[MailEvent], object]
_handlers: list[Callable[[Any], object]] = []


def subscribe(handler: _Handler) -> _Handler:
    """Call *handler* with every event of this process; return it, so this is a decorator, too.

    Handlers are called in the order of subscription.  Each runs after any commit that the event
    tells of, in a new transaction of its own (of `transaction.manager`): begun before it, committed
    after it, aborted if it raises.  One that raises is logged, and hurts nobody.
    """
    _handlers.append(handler)
    return handler


def unsubscribe(handler: Callable[[Any], object]) -> None:
    """Stop calling *handler*.  Raise `ValueError` if it is not subscribed."""
    _handlers.remove(handler)


def notify(event: MailEvent) -> None:
    """Call every handler with *event*, each in a new transaction; raise nothing of theirs but an interrupt.

    Deliveries and processors do so themselves; it is here for mailers, and for tests of handlers.
    """
    pid = os.getpid()
    for handler in tuple(_handlers):
        try:
            with _new_transaction():
                handler(event)
        except KeyboardInterrupt:
            raise
        except BaseException:  # it is anybody's code
            if os.getpid() != pid:  # the exit of a fork that the handler made
                raise
            _log.exception("event handler %r failed on %r", handler, event)


@contextlib.contextmanager
def _new_transaction() -> Iterator[None]:
    """Run the block in a new transaction, also where the commit of another is under way.

    An after-commit hook runs before the manager lets go of the finished transaction: `begin()`
    would abort and corrupt it there.  But the default manager is a thread-local with a replaceable
    one inside: lend it a fresh one.
    """
    transaction = _transaction_package()
    if transaction is None:
        yield
        return
    fresh = transaction.TransactionManager()
    outer = transaction.manager.manager
    transaction.manager.manager = fresh
    try:
        with fresh:
            yield
    finally:
        transaction.manager.manager = outer
        fresh.abort()  # what a failed commit has left behind


# ------------------------------------------------------------------------------------------------- envelope

# What would end an address early, in our files or in a command, must be in quotes (RFC 5322, 3.4.1).
_LOCAL_PART = r'(?:"(?:[^"\\]|\\.)*"|[^\s,<>"@()]+)'
_ADDR_SPEC = re.compile(_LOCAL_PART + r'@[^\s,<>"@]+')
_ADDR_SPECS = re.compile(rf"{_ADDR_SPEC.pattern}(?:, *{_ADDR_SPEC.pattern})*")
_MAILBOX = re.compile(_ADDR_SPEC.pattern + r'|[^\s,<>"@()]+')  # zope.sendmail takes a bare local part, too
# What a list of addresses is made of: quoted strings, <addresses>, domain literals, words, punctuation.
_ADDRESS_TOKEN = re.compile(
    r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|<(?:"(?:[^"\\]|\\.)*"|[^<>"])*>|\[[^\[\]]*\]|[^",;:<>()\[\]]+|.', re.DOTALL
)
_WORD = r"=\?[^?\s]{1,100}\?[bBqQ]\?[^?\s]{0,1000}\?="
_ENCODED_WORD = re.compile(rf"({_WORD})(?:\s+(?={_WORD}))?")  # RFC 2047; the space between two of them is no part
_ENHANCED_STATUS = re.compile(r"([245])(\.\d{1,3}\.\d{1,3})(?!\S)")  # RFC 2034, RFC 3463
_FIELD_NAME = re.compile(rb"[!-9;-~]+[ \t]*:")  # RFC 5322, 2.2
_FIELD_REST = rb"[ \t]*:([^\r\n]*(?:(?:\r\n|\r|\n)[ \t][^\r\n]*)*)"  # with the lines that are folded into it
_FIELD_END = rb"(?:\r\n|\r|\n|\Z)"
_BCC = re.compile(rb"(?i)(?<![^\r\n])(?:Resent-)?Bcc" + _FIELD_REST + _FIELD_END)
_ACTUALLY = re.compile(rb"(?i)(?<![^\r\n])X-Actually-(?:From|To)" + _FIELD_REST + _FIELD_END)
_BLANK_LINE = re.compile(rb"(\A|\r\n|\r(?!\n)|\n)(?:\r\n|\r|\n)")
_ENVELOPE = re.compile(rb"(?i)X-Zope-From:([^\n]*)\nX-Zope-To:([^\n]*)\n(?:X-Sendmail-Error:([^\n]*)\n)?")


def _printable(text: bytes | str) -> str:
    """Return *text* as one printable line of at most 1,000 characters, fit for a file, a log and a terminal."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
        text = " ".join(text.split())
    return text[:1000].strip()


def _encodable(text: str, stream: Any) -> str:
    """Return *text* with what *stream* can't take made `\\u...`."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _split_addresses(text: str) -> list[str]:
    """Return the addresses in *text*, a list as in a To header (RFC 5322, 3.4), each once.

    Display names, comments, and the names of groups are left out.  What is no address is returned
    as it is, for the caller to refuse.  The time that this takes is proportional to the text.
    """
    found = []
    words: list[str] = []  # of one mailbox: an address, or a display name and <address>
    depth = 0  # of comments
    for token in [*_ADDRESS_TOKEN.findall(text), ","]:
        if token == "(":
            depth += 1
        elif token == ")" and depth:
            depth -= 1
        elif depth:
            continue
        elif token in (",", ";"):
            in_brackets = [word[1:-1] for word in words if word[0] == "<"]
            if len(in_brackets) == 1:
                words = in_brackets
            found.append("".join(words).strip())
            words = []
        elif token == ":":
            words = []  # which were the name of a group
        else:
            words.append(token)
    if depth:
        return [text]
    return list(dict.fromkeys(filter(None, found)))


def _address(text: str) -> str:
    """Return the addr-spec of the one address that *text* is, with or without a display name.

    Raise `ValueError` if it is anything else, `TypeError` if it is no string.
    """
    if not isinstance(text, str):
        raise TypeError(f"an address must be a string, not {text!r}")
    addresses = [text]
    if text.endswith((">", ")")):
        addresses = _split_addresses(text)
    if not text.isprintable() or len(addresses) != 1 or not _ADDR_SPEC.fullmatch(addresses[0]):
        raise ValueError(f"not one address (local@domain, or Name <local@domain>): {_printable(text)!r}")
    return "".join(addresses)  # of an Enum, the value


def _headers_of(message: bytes) -> bytes:
    """Return the header section of *message*, up to the blank line; b'' if it begins with something else."""
    if not _FIELD_NAME.match(message):
        return b""
    end = _BLANK_LINE.search(message)
    if end is None:
        return message
    return message[: end.end(1)]


def _header_values(headers: bytes, name: str) -> list[str]:
    """Return the unfolded values of the headers called *name*, a regular expression."""
    found = re.findall(rb"(?i)(?<![^\r\n])" + name.encode() + _FIELD_REST, headers)
    return [" ".join(value.decode("utf-8", "replace").split()) for value in found]


def _first_header(headers: bytes, name: str) -> str:
    """Return the unfolded value of the first header called *name*; '' if there is none."""
    return "".join(_header_values(headers, name)[:1])


def _decoded_header(headers: bytes, name: str) -> str:
    """Return the same with its encoded words (RFC 2047) decoded.

    That is done word by word: `email` takes a time that grows with the square of their number.
    """
    return _ENCODED_WORD.sub(_decoded_word, _first_header(headers, name))


def _decoded_word(found: re.Match[str]) -> str:
    """Return the text of an encoded word, or the word itself where it can't be decoded."""
    try:
        return str(email.header.make_header(email.header.decode_header(found[1])))
    except (ValueError, LookupError, email.errors.MessageError):
        return found[0]


def _message_id(headers: bytes) -> str:
    """Return the Message-Id without angle brackets."""
    return _printable(_first_header(headers, "Message-Id")).strip("<> ")


def _with_header_lines(message: bytes, *lines: str) -> bytes:
    """Return *message* with *lines* before it, set apart if it begins with no header."""
    if not _FIELD_NAME.match(message) and message[:1] not in (b"\n", b"\r"):
        message = b"\n" + message
    return "".join(f"{line}\n" for line in lines).encode() + message


def _serialise(message: _Content, addresses: Iterable[str]) -> bytes:
    """Return *message* as bytes; of a `Message`, a copy without Bcc."""
    if isinstance(message, bytes):
        return message
    if isinstance(message, str):
        return message.encode()
    if not isinstance(message, email.message.Message):
        raise TypeError(f"a message must be bytes, str or email.message.Message, not {message!r}")
    message = copy.deepcopy(message)  # for writing it sets boundaries, in its parts too
    del message["Bcc"], message["Resent-Bcc"]
    policy: Any = message.policy
    if hasattr(policy, "utf8") and not all(map(str.isascii, addresses)):
        policy = policy.clone(utf8=True)  # RFC 6532: such an address can't be written otherwise
    content = io.BytesIO()
    # not as_bytes(), whose arguments differ in subclasses
    email.generator.BytesGenerator(content, mangle_from_=False, policy=policy).flatten(message)
    return content.getvalue()


@dataclasses.dataclass
class _Draft:
    """A message that was checked, and is not committed yet.

    Until then it is in memory, or complete in tmp/: that is, under its *name* there.
    """

    message_id: str
    fromaddr: str
    toaddrs: tuple[str, ...]
    content: bytes = dataclasses.field(repr=False)  # not for a log
    name: str = ""  # of its file, once it has one


def _check(fromaddr: str, toaddrs: str | Iterable[str], message: _Content) -> _Draft:
    """Check the arguments of `send()`, and complete the message.  Raise `ValueError` or `TypeError`."""
    sender = ""
    if fromaddr != "":  # the null sender
        sender = _address(fromaddr)
    if isinstance(toaddrs, str):
        toaddrs = [toaddrs]
    if not isinstance(toaddrs, Iterable):
        raise TypeError(f"toaddrs must be addresses, not {toaddrs!r}")
    recipients = tuple(dict.fromkeys(map(_address, toaddrs)))
    if not recipients:
        raise ValueError("no recipients")
    content = _serialise(message, (sender, *recipients))
    headers = _headers_of(content)
    lines = []
    present = _header_values(headers, "Message-Id")
    if present:
        message_id = present[0]
    else:
        message_id = email.utils.make_msgid(domain=socket.gethostname())
        lines.append(f"Message-Id: {message_id}")
    if not message_id.isprintable() or not re.fullmatch(r"<[^<>\s]+>", message_id):
        raise ValueError(f"malformed Message-Id, not <left@right>: {_printable(message_id)!r}")
    if not _header_values(headers, "Date"):
        lines.append(f"Date: {email.utils.formatdate(localtime=True)}")
    if lines:
        content = _with_header_lines(content, *lines)
    return _Draft(message_id[1:-1], sender, recipients, content)


class _Envelope(NamedTuple):
    """What stands before a message in its file.

    fromaddr    the envelope sender; '' is the null sender
    toaddrs     the recipients that the relay has not taken it for yet
    error       why it was deferred or given up
    length      in bytes: there the message begins; 0 for repoze.sendmail's, which stands among the
                headers
    """

    fromaddr: str
    toaddrs: tuple[str, ...]
    error: str
    length: int


class _NoEnvelope(Exception):
    """The file has no readable envelope."""


def _addresses_in_file(line: str) -> list[str]:
    """Return the addresses in *line*: bare, as we write them, or with display names, as zope.sendmail may."""
    line = line.strip()
    if _ADDR_SPECS.fullmatch(line):
        return list(dict.fromkeys(_ADDR_SPEC.findall(line)))
    return _split_addresses(line)


def _parse_envelope(head: bytes) -> _Envelope:
    """Return the envelope in the *head* of a file: zope.sendmail's and ours, or repoze.sendmail's.

    Raise `_NoEnvelope` if there is none, or its addresses are not fit for a command.
    """
    found = _ENVELOPE.match(head)
    error = ""
    length = 0
    try:
        if found:
            senders = _addresses_in_file(found[1].decode())
            recipients = _addresses_in_file(found[2].decode())
            error = _printable(found[3] or b"")
            length = found.end()
        else:
            headers = _headers_of(head)
            senders = _addresses_in_file(_decoded_header(headers, "X-Actually-From"))
            recipients = _addresses_in_file(_decoded_header(headers, "X-Actually-To"))
    except UnicodeDecodeError:
        recipients = senders = []
    fit = all(address.isprintable() and _MAILBOX.fullmatch(address) for address in senders + recipients)
    if not fit or not recipients or len(senders) > 1:
        raise _NoEnvelope("no readable envelope")
    return _Envelope("".join(senders), tuple(recipients), error, length)


# -------------------------------------------------------------------------------------------------- mailers

# By these no message is refused: they are about our login (RFC 4954, 6), or end the connection (RFC 5321, 3.8).
_LOGIN_CODES = {530, 534, 535, 538}
_LOSS_CODES = {421, *_LOGIN_CODES}
_MECHANISMS = ("CRAM-MD5", "PLAIN", "LOGIN", "XOAUTH2")  # the best first; the last, which takes a token, only by name
_NO_RELAY = (
    smtplib.SMTPConnectError,
    smtplib.SMTPHeloError,
    smtplib.SMTPAuthenticationError,
    ConnectionRefusedError,
    socket.gaierror,
    socket.herror,
)
# HOST, HOST:PORT, or an IPv6 address
_RELAY = re.compile(r"(?:\[([^\]]+)\]|([^:\[\]]+))(?::(\d+))?|((?:[0-9A-Fa-f.]*:){2}[0-9A-Fa-f:.]*)")


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the relay says of a recipient (RFC 5321, 4.2).

    code    of three digits: 2xx is sent, 4xx try later, 5xx give up
    text    as it came, but made one printable line of at most 1,000 characters; it may begin with
            an enhanced status code (RFC 2034)
    relay   who said so (`host:port`), where that is known; it does not count for equality
    """

    code: int
    text: str
    relay: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        """Make the text fit for a file, a log and a terminal."""
        object.__setattr__(self, "text", _printable(self.text))

    def __str__(self) -> str:
        """Return the reply as a relay writes it."""
        return f"{self.code} {self.text}".rstrip()

    @property
    def outcome(self) -> str:
        """'sent' (2xx), 'failed' (5xx: give up) or 'deferred' (all else, and 53x: try later)."""
        if self.code // 100 == 2:
            return "sent"
        if self.code // 100 == 5 and self.code not in _LOGIN_CODES:
            return "failed"
        return "deferred"

    @property
    def status(self) -> str:
        """The enhanced status code (RFC 3463) in the text; if that has none of its class, what the code says."""
        digit = {"sent": "2", "failed": "5"}.get(self.outcome, "4")
        found = _ENHANCED_STATUS.match(self.text)
        if found and found[1] == str(self.code)[0]:
            return digit + found[2]
        return f"{digit}.0.0"

    def _softened(self) -> Reply:
        """Return this reply as one that says 'try later'."""
        return Reply(451, f"4{self.status[1:]} {self}", self.relay)


_ACCEPTED = Reply(250, "2.0.0 Ok")
_NOBODY = Reply(554, "5.5.1 no valid recipients")


class RelayUnavailable(Exception):
    """The relay can't be used now, and no message is to blame: what is in a queue keeps its place there.

    That is whatever goes wrong before MAIL: connection, DNS, TLS, banner, EHLO and AUTH; and a relay
    that three messages in a row were lost by.  Its text says why, in one line for people.  A mailer
    may raise it; a processor ends its pass there, and `process()` returns it as `outage`.  Between
    the groups of a hundred recipients of one message, after a loss, it defers that message instead.
    """


class Mailer(Protocol):
    """What deliveries and processors need.  One may be used by several threads at once.

    One that is a context manager is entered, by each thread, around several messages.
    """

    def send(self, fromaddr: str, toaddrs: Sequence[str], message: bytes) -> Mapping[str, Reply] | None:
        """Hand *message* to the relay; return a `Reply` for each recipient, or None: all accepted.

        fromaddr    the envelope sender, a bare addr-spec (RFC 5322, 3.4.1); '' is the null sender
        toaddrs     at most 100 of them (RFC 5321, 4.5.3.1.8), each once
        message     headers and body, with any line ends

        Who is not mentioned in what is returned was sent to.  Raise `RelayUnavailable` if no message
        is to blame; the exceptions of `smtplib`, as the mailers of zope.sendmail raise them, are
        understood; any other defers this message.
        """


def _reason(error: Any) -> str:
    """Return in one line what the exception *error* says."""
    if isinstance(error, smtplib.SMTPResponseException):
        return str(Reply(error.smtp_code, error.smtp_error))  # type: ignore[arg-type]
    return _printable(str(error)) or type(error).__name__


def _ask(mailer: Mailer, fromaddr: str, toaddrs: Sequence[str], message: bytes) -> dict[str, Reply]:
    """Let *mailer* send to one group.  Whatever it does becomes a reply for each recipient, or `RelayUnavailable`."""
    try:
        answer: Any = mailer.send(fromaddr, toaddrs, message)
    except RelayUnavailable:
        raise
    except _NO_RELAY as error:
        raise RelayUnavailable(_reason(error)) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a mailer is anybody's code
        if isinstance(error, SystemExit) and threading.current_thread() is threading.main_thread():
            raise  # it may be a signal handler's
        return {address: _reply_for(error, address) for address in toaddrs}
    # Who is not mentioned was sent to, as in smtplib.  So was who gets an unintelligible reply: the message was sent,
    # and must not be sent again for that.
    replies = dict.fromkeys(toaddrs, _ACCEPTED)
    intelligible = answer is None
    if isinstance(answer, Mapping):
        intelligible = True
        for address in answer.keys() & replies.keys():
            try:
                replies[address] = _as_reply(answer[address])
            except Exception:
                intelligible = False
    if not intelligible:
        _log.error("the mailer returned a %s that is no mapping of replies: taken for sent", type(answer).__name__)
    return replies


def _as_reply(reply: Any) -> Reply:
    """Return a `Reply`, also of smtplib's pair of code and text.  Raise `TypeError` or the like if it is none."""
    if isinstance(reply, tuple):
        reply = Reply(*reply)
    if not isinstance(reply, Reply) or not isinstance(reply.code, int):
        raise TypeError(f"no reply: {reply!r}")
    return reply


def _reply_for(error: BaseException, address: str) -> Reply:
    """Return what the exception of a mailer says of a recipient.  Nothing that is raised says 'sent'."""
    reply = Reply(451, f"4.3.0 {_reason(error)}")
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        reply = _as_reply(error.recipients.get(address, (451, "4.3.0 the mailer told nothing of this recipient")))
    elif isinstance(error, smtplib.SMTPResponseException):
        reply = Reply(error.smtp_code, error.smtp_error)  # type: ignore[arg-type]
    elif isinstance(error, OSError):
        reply = Reply(421, f"4.4.2 connection lost: {_reason(error)}")
    made_up = reply == Reply(500, "Line too long.")  # by smtplib
    if made_up or reply.outcome == "sent":  # it raises on a 2xx, too, where it wanted another answer
        reply = reply._softened()
    return reply


def _groups(toaddrs: Sequence[str]) -> list[Sequence[str]]:
    """Return *toaddrs* in groups of a hundred."""
    return [toaddrs[start : start + _GROUP] for start in range(0, len(toaddrs), _GROUP)]


@contextlib.contextmanager
def _connected(mailer: Any) -> Iterator[None]:
    """Enter *mailer* for the block, if it is a context manager.  Raise `RelayUnavailable` if it refuses."""
    if not hasattr(mailer, "__enter__"):
        yield
        return
    try:
        mailer.__enter__()
    except Exception as error:
        raise RelayUnavailable(_reason(error)) from error
    try:
        yield
    finally:
        with contextlib.suppress(Exception):  # the messages are settled by now
            mailer.__exit__(None, None, None)


def _wire_address(address: str, smtputf8: bool) -> bytes | None:
    """Return *address* as it goes on the wire; None if that takes the SMTPUTF8 (RFC 6531) that the relay lacks.

    A domain is IDNA-encoded if that can be undone: 'faß.de' would become fass.de, which is
    somebody else's.
    """
    local, at, domain = address.rpartition("@")
    if local.isascii() and not domain.isascii():
        with contextlib.suppress(UnicodeError):
            encoded = domain.encode("idna")
            if encoded.decode("idna") == domain.lower():
                return (local + at).encode() + encoded
    if smtputf8 or address.isascii():
        return address.encode()
    return None


def _wire_size(message: bytes) -> int:
    """Return the length of *message* as it goes on the wire: see `_wire_pieces()`; dots do not count (RFC 1870, 5)."""
    size = len(message) + message.count(b"\r") + message.count(b"\n") - 2 * message.count(b"\r\n")
    if message and not message.endswith((b"\r", b"\n")):
        size += 2
    return size


def _wire_pieces(message: bytes, dots: bool) -> Iterator[bytes]:
    """Yield *message* in pieces of at most 64 KB: CR, LF and CRLF made CRLF, and one put at the end if it lacks one.

    With *dots* it is as DATA takes it: dots stuffed, and the end marked (RFC 5321, 4.5.2).
    """
    start = 0
    before = b"\n"  # the octet before the piece
    last = False
    while not last:
        end = start + _PIECE
        if message[end - 1 : end + 1] == b"\r\n":  # one line end, not two
            end += 1
        last = end >= len(message)
        # each piece is converted behind the octet before it, so that a dot is seen to begin a line
        piece = before + message[start:end].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if last and not piece.endswith(b"\n"):
            piece += b"\n"
        if dots:
            piece = piece.replace(b"\n.", b"\n..")
        before = piece[-1:]
        if dots and last:
            piece += b".\n"
        yield piece[1:].replace(b"\n", b"\r\n")
        start = end


class _Lost(Exception):
    """The connection can't be used any more, and *reply* is what that means for the message on its way.

    *resend* is whether the relay ended it before it came to that message, by all that we know, or
    wants a new one: then the message may be sent again at once.
    """

    def __init__(self, reply: Reply, resend: bool = False) -> None:
        self.reply = reply
        self.resend = resend


class _Dialogue(smtplib.SMTP):
    """A connection to the relay: up to AUTH it is smtplib's, from MAIL on as few writes as the relay takes.

    CHUNKING (RFC 3030)    MAIL, RCPT and BDAT with the message in one write, then all replies
      over 64 KB           MAIL and RCPT in one write; if a recipient is accepted, the chunks
    PIPELINING (RFC 2920)  MAIL, RCPT and DATA in one write; after the replies the message
    neither                each command by itself

    Nothing of a message is sent before the last reply to the one before.  Every reply is read under
    one deadline, however the relay serves it.
    """

    sock: Any
    user: Any

    def __init__(self, relay: tuple[str, int], ehlo_name: str | None, timeout: float, **options: Any) -> None:
        """Connect, and read the banner.  Raise what smtplib raises: `SMTPConnectError`, other `OSError`s."""
        self.relay = "%s:%d" % relay
        self._received = bytearray()  # and not read
        self._broken: OSError | None = None  # why nothing can be written any more
        self._carried = False  # a message before the one on its way
        self._data_written = False  # of the message on its way, or a part of it
        self._awaited = ""  # the reply: to 'MAIL', to 'RCPT' or DATA, or to the 'data'; '' for any other
        super().__init__(*relay, ehlo_name, timeout=timeout, **options)

    def getreply(self) -> tuple[int, bytes]:
        """Read a reply, as smtplib does, but under one deadline."""
        try:
            reply = self._read_reply(self.timeout)
        except OSError:
            self.close()
            raise
        self.sock.settimeout(self.timeout)
        return reply

    def start_tls(self, context: ssl.SSLContext) -> None:
        """Change to TLS (RFC 3207); what has come in clear by now is not believed."""
        self.starttls(context=context)
        self._received.clear()

    def auth_xoauth2(self, challenge: bytes | None = None) -> str:
        """Return what this mechanism says, which smtplib has not: user and token; then, to a refusal, nothing."""
        if challenge is None:
            return f"user={self.user}\1auth=Bearer {self.password}\1\1"
        return ""

    def transact(
        self, fromaddr: str, toaddrs: Sequence[str], message: bytes, chunking: bool = True
    ) -> dict[str, Reply]:
        """Do one mail transaction (RFC 5321, 3.3); return a reply for each recipient.

        Raise `_Lost` if the relay wants no more messages on a connection that carried others before:
        this one should be tried on another.
        """
        replies: dict[str, Reply] = {}
        self._data_written = False
        self._awaited = "MAIL"
        try:
            self._transact(fromaddr, toaddrs, message, replies, chunking)
        except _Lost as lost:
            self.close()
            if self._carried and lost.resend:
                raise
            for address in toaddrs:
                if address not in replies or replies[address].outcome == "sent":  # not refused by itself
                    replies[address] = lost.reply
        except BaseException:
            self.close()
            raise
        return replies

    def _transact(
        self, fromaddr: str, toaddrs: Sequence[str], message: bytes, replies: dict[str, Reply], chunking: bool
    ) -> None:
        """Send in one of the four ways (see the class); fill *replies*.

        Raise `_Lost` where the connection can't be used any more.
        """
        size = _wire_size(message)
        mail, recipients = self._commands(fromaddr, toaddrs, message, size, replies)
        if not recipients:
            return
        envelope = b"".join([mail, *recipients.values()])
        # of more recipients, the replies could fill the buffers both ways
        pipelining = self.has_extn("pipelining") and len(recipients) <= _GROUP
        chunking = chunking and pipelining and self.has_extn("chunking")
        verdict = _NOBODY
        if chunking and size <= _CHUNK:
            self._data_written = True
            self._write(b"".join([envelope, b"BDAT %d LAST\r\n" % size, *_wire_pieces(message, dots=False)]))
            accepted = self._ask_envelope(mail, recipients, True, replies)
            verdict = self._answer(final=True)
        elif chunking:
            self._write(envelope)
            accepted = self._ask_envelope(mail, recipients, True, replies)
            if accepted:
                verdict = self._send_chunks(message, size)
        elif pipelining:
            self._write(envelope + b"DATA\r\n")
            accepted = self._ask_envelope(mail, recipients, True, replies)
            verdict = self._send_data(message, accepted, written=True)
        else:
            accepted = self._ask_envelope(mail, recipients, False, replies)
            if accepted:
                verdict = self._send_data(message, accepted, written=False)
        replies.update(dict.fromkeys(accepted, verdict))
        self._carried = True
        if verdict.outcome == "sent" and not accepted:  # a chunk for nobody was taken: this is not RFC 3030's dialogue
            self.close()
        elif verdict.outcome != "sent" and (chunking or not self._data_written):  # else the transaction is over
            self._reset()

    def _reset(self) -> None:
        """End a transaction that may be open, or the next would be nested in it (RFC 5321, 4.1.1.5)."""
        self._data_written = False
        self._awaited = ""
        self._write(b"RSET\r\n")
        try:
            refused = self._answer().outcome != "sent"
        except _Lost:
            refused = True
        if refused:
            self.close()

    def _commands(
        self, fromaddr: str, toaddrs: Sequence[str], message: bytes, size: int, replies: dict[str, Reply]
    ) -> tuple[bytes, dict[str, bytes]]:
        """Return MAIL, and RCPT for each recipient; fill *replies* for those that the relay can't serve."""
        smtputf8 = self.has_extn("smtputf8")
        sender = _wire_address(fromaddr, smtputf8)
        limit = self.esmtp_features.get("size", "")[:20]
        refusal = Reply(553, "5.6.7 an address needs SMTPUTF8, which the relay does not offer", self.relay)
        if limit.isdecimal() and 0 < int(limit) < size:
            refusal = Reply(552, f"5.3.4 {size} bytes are more than the relay takes ({limit})", self.relay)
            sender = None
        recipients = {}
        for address in toaddrs:
            recipient = _wire_address(address, smtputf8)
            if sender is None or recipient is None:
                replies[address] = refusal
            else:
                recipients[address] = b"RCPT TO:<%s>\r\n" % recipient
        mail = b"MAIL FROM:<%s>" % (sender or b"")
        if self.has_extn("size"):
            mail += b" SIZE=%d" % size
        if self.has_extn("8bitmime") and not message.isascii():
            mail += b" BODY=8BITMIME"
        if not b"".join((mail, *recipients.values())).isascii():
            mail += b" SMTPUTF8"
        return mail + b"\r\n", recipients

    def _ask_envelope(
        self, mail: bytes, recipients: Mapping[str, bytes], written: bool, replies: dict[str, Reply]
    ) -> list[str]:
        """Fill *replies* with those to MAIL and RCPT, which may be *written* already; return who is accepted."""
        sender = self._answer_to(mail, written)
        if self._carried and sender.code // 100 == 4:  # relays limit the messages of a connection
            raise _Lost(sender, resend=True)
        self._awaited = "RCPT"
        replies.update(dict.fromkeys(recipients, sender))
        for address, command in recipients.items():
            if sender.outcome == "sent":
                replies[address] = self._answer_to(command, written)
            elif written:
                self._answer()
        return [address for address in recipients if replies[address].outcome == "sent"]

    def _send_chunks(self, message: bytes, size: int) -> Reply:
        """Send a large *message* by BDAT (RFC 3030); return the reply to the last chunk, or the first refusal."""
        self._data_written = True
        self._awaited = "data"
        chunks = sent = 0
        for chunk in _wire_pieces(message, dots=False):
            chunks += 1
            sent += len(chunk)
            last = b" LAST" if sent == size else b""
            self._write(b"BDAT %d%s\r\n%s" % (len(chunk), last, chunk))
        for _ in range(chunks - 1):
            reply = self._answer()
            if reply.outcome != "sent":
                raise _Lost(reply)  # what the relay makes of the other chunks is nobody's business
        return self._answer(final=True)

    def _send_data(self, message: bytes, accepted: Sequence[str], written: bool) -> Reply:
        """Send *message* by DATA, which may be *written* already; return the reply to it."""
        reply = self._answer_to(b"DATA\r\n", written, go_ahead=354)
        if reply.outcome == "sent":
            raise self._loss(f"unexpected reply to DATA: {reply}")
        if reply.code != 354:
            return reply
        self._data_written = True
        if not accepted:  # a relay may say 354 though it has no recipient; then it gets nothing (RFC 2920, 3.1)
            message = b""
        for piece in _wire_pieces(message, dots=True):
            self._write(piece)
        reply = self._answer(final=True)
        if not accepted:
            return _NOBODY
        return reply

    def is_quiet(self) -> bool:
        """Return whether the relay is there, and has said nothing unasked: that would be taken for the next reply."""
        quiet = False
        try:
            self.sock.settimeout(0)
            self._received += self.sock.recv(_REPLY_LINE)
        except (BlockingIOError, ssl.SSLWantReadError):
            quiet = not self._received
        except OSError:
            pass
        return quiet

    def _write(self, data: bytes) -> None:
        """Write *data*, under the timeout.

        If that fails, what the relay has said by then is read first: it is the reason, and Linux
        keeps it behind a reset.
        """
        if self._broken is None:
            try:
                self.sock.settimeout(self.timeout)
                self.sock.sendall(data)
            except OSError as error:
                self._broken = error

    def _answer_to(self, command: bytes, written: bool, go_ahead: int = 0) -> Reply:
        """Return the reply to *command*, which is written first, unless it was *written* with others."""
        if not written:
            self._write(command)
        return self._answer(go_ahead=go_ahead)

    def _answer(self, final: bool = False, go_ahead: int = 0) -> Reply:
        """Return the next reply.  Raise `_Lost` where there is none, or none that we could go on after."""
        if final:
            self._awaited = "data"
        if self._broken is not None:
            seconds = _LAST_WORDS_TIMEOUT
        elif final:
            seconds = _FINAL_REPLY_TIMEOUT
        elif self._data_written:  # a relay may keep all its replies until it has done with the data (RFC 2920, 3.2)
            seconds = _PATIENCE * self.timeout
        else:
            seconds = self.timeout
        try:
            code, text = self._read_reply(seconds)
        except OSError as error:
            raise self._loss(self._broken or error) from error
        reply = Reply(code, text, self.relay)  # type: ignore[arg-type]
        if code == 421:
            raise _Lost(reply, resend=self._awaited in ("MAIL", "RCPT"))
        understood = 200 <= code < 300 or 400 <= code < 600 or code == go_ahead
        # what was not written whole was not accepted, whatever this is the answer to
        if not understood or (final and self._broken is not None and reply.outcome == "sent"):
            raise self._loss(f"unexpected reply: {reply}")
        return reply

    def _loss(self, reason: Any) -> _Lost:
        """Return what the loss of the connection means; *reason* is an `OSError`, or what was said."""
        text = f"4.4.2 connection lost: {_reason(reason)}"
        if self._data_written:
            text += "; the relay may have taken the message"
        disconnected = isinstance(reason, OSError) and not isinstance(reason, TimeoutError)
        # a relay that says nothing at all to a message has dropped the connection before, for its limits
        untaken = self._awaited == "MAIL" or (self._awaited == "RCPT" and not self._data_written)
        return _Lost(Reply(421, text, self.relay), resend=disconnected and untaken)

    def _read_reply(self, seconds: float) -> tuple[int, bytes]:
        """Read one reply (RFC 5321, 4.2), all of it within *seconds*.  Raise `OSError` if it does not come."""
        deadline = time.monotonic() + seconds
        texts = []
        for _ in range(_REPLY_LINES):
            line = self._read_line(deadline)
            if not line[:3].isdigit() or line[3:4] not in (b"", b" ", b"-") or len(line) > _REPLY_LINE:
                return -1, line[:200]
            texts.append(line[4:])
            if line[3:4] != b"-":
                return int(line[:3]), b"\n".join(texts)
        raise smtplib.SMTPServerDisconnected("a reply of more than 1,000 lines")

    def _read_line(self, deadline: float) -> bytes:
        """Return the next line, without its end.

        *deadline* is a time of `time.monotonic()`.  Raise `OSError` if the line has not come by then.
        """
        while b"\n" not in self._received:
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                raise TimeoutError("timed out")
            if len(self._received) > _REPLY_LINE:
                raise smtplib.SMTPServerDisconnected("a line without an end")
            if hasattr(socket, "TCP_QUICKACK"):  # or a relay that writes each reply by itself waits 40 ms for our ACK
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            self.sock.settimeout(seconds)
            data = self.sock.recv(_CHUNK)
            if not data:
                raise smtplib.SMTPServerDisconnected("closed by the relay")
            self._received += data
        line, _, rest = self._received.partition(b"\n")
        self._received = rest
        return bytes(line).rstrip(b"\r")


class _TLSDialogue(_Dialogue, smtplib.SMTP_SSL):
    """The same, with TLS from the start (RFC 8314, 3.3)."""


def _number(name: str, value: Any, kind: Any = (int, float)) -> Any:
    """Return *value*, a positive number.  Raise `TypeError` or `ValueError`, naming it, if it is none."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, not {value!r}")
    return value


def _parse_relays(hostname: str, default_port: int | str) -> list[tuple[str, int]]:
    """Return host and port of each relay in *hostname*.  Raise `ValueError`."""
    if not isinstance(hostname, str):
        raise TypeError(f"hostname must be a string, not {hostname!r}")
    relays = []
    for text in hostname.split(","):
        found = _RELAY.fullmatch(text.strip())
        if not found:
            raise ValueError(f"hostname must be HOST or HOST:PORT, or several with commas between, not {hostname!r}")
        port = str(found[3] or default_port)  # digits, as they come from a configuration file, will do
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"port must be a number from 1 to 65535, not {port!r}")
        relays.append((found[1] or found[2] or found[4], int(port)))
    return relays


class _Kept(threading.local):
    """What a thread keeps of a mailer: the connection, the process that made it, how often the mailer was entered."""

    dialogue: Any = None
    pid = 0
    depth = 0


class SMTPMailer:
    """Send by SMTP (RFC 5321) to a relay.  Several threads may use one mailer at once.

    As a context manager, which connects when it is entered, it keeps one connection per thread for
    all that is sent inside; outside, each message has a connection of its own.

    hostname      a relay, `HOST` or `HOST:PORT`, or several in order of preference, with commas
                  between; a connection goes to the first that is ready
    port          the default port, a number or its digits
    username      log in (RFC 4954) by this name
    password      a string, or a callable that is asked at every login
    no_tls        never use TLS
    force_tls     require STARTTLS (RFC 3207), which else is used where the relay offers it
    implicit_tls  speak TLS from the start (RFC 8314), as on port 465
    auth          the one mechanism to use, CRAM-MD5, PLAIN, LOGIN or XOAUTH2; by default the relay's
                  best of the first three
    timeout       in seconds, for each step: connecting, a write, a whole reply; five times that for
                  a reply to what went out together with the data, and ten minutes for the one to the
                  data (RFC 5321, 4.5.3.2)
    context       verifies, in place of the system's authorities

    Certificate and host name are verified wherever TLS is required or a password is sent, and no
    password crosses another connection, unless *no_tls*.

    Raise `ValueError` or `TypeError` for what is wrong or contradicts itself.
    """

    def __init__(
        self,
        hostname: str = "localhost",
        port: int | str = 25,
        username: str | None = None,
        password: str | Callable[[], str] | None = None,
        no_tls: bool = False,
        force_tls: bool = False,
        implicit_tls: bool = False,
        *,
        auth: str | None = None,
        timeout: float = 60,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._relays = _parse_relays(hostname, port)
        self._timeout = _number("timeout", timeout)
        self._auth = str(auth or "").upper()
        if self._auth and self._auth not in _MECHANISMS:
            raise ValueError(f"auth must be one of {', '.join(_MECHANISMS)}, not {auth!r}")
        for name, value in (("no_tls", no_tls), ("force_tls", force_tls), ("implicit_tls", implicit_tls)):
            if isinstance(value, str):  # of a configuration file, where "false" would be true
                raise TypeError(f"{name} must be True or False, not {value!r}")
        if no_tls and (force_tls or implicit_tls):
            raise ValueError("no_tls contradicts force_tls and implicit_tls")
        if (username is None) != (password is None):
            raise ValueError("username and password go together: one is missing")
        if password is not None and not isinstance(password, str) and not callable(password):
            raise TypeError(f"password must be a string or a callable, not {type(password).__name__}")
        self._username = username
        self._password = password
        self._implicit_tls = implicit_tls
        self._starttls = not no_tls and not implicit_tls
        self._verified = force_tls or implicit_tls or (username is not None and not no_tls)
        self._context = self._checked(context)
        self._kept = _Kept()
        self._latest_relay = "%s:%d" % self._relays[0]
        self._ehlo_name: str | None = None  # looked up once, for that may be slow

    def _checked(self, context: ssl.SSLContext | None) -> ssl.SSLContext:
        """Return *context*, or the system's.  Raise `ValueError` if it does not verify where it must."""
        if context is None:
            context = ssl.create_default_context()
            if not self._verified:  # RFC 7435: better than nothing
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
        elif self._verified and not context.check_hostname:
            raise ValueError("a context must verify certificate and host name where TLS is required or a password sent")
        return context

    def __enter__(self) -> SMTPMailer:
        """Connect, unless this thread is connected.  Raise `RelayUnavailable` if no relay can be used."""
        self._leave_parents_dialogue()
        if not self._is_connected():
            self._connect()
        self._kept.depth += 1
        return self

    def __exit__(self, *_exc_info: object) -> None:
        """Close the connection that was kept, once all that was entered is left; nothing can fail here."""
        self._leave_parents_dialogue()
        self._kept.depth = max(self._kept.depth - 1, 0)  # of a fork that leaves what its parent entered
        if self._kept.depth == 0 and self._is_connected():
            with contextlib.suppress(OSError):  # the reply to a QUIT is nobody's business
                self._kept.dialogue._write(b"QUIT\r\n")
                self._kept.dialogue.close()

    def send(self, fromaddr: str, toaddrs: Sequence[str], message: bytes) -> dict[str, Reply]:
        """Send *message*; return a `Reply` for each of *toaddrs*, whatever becomes of it from MAIL on.

        The arguments are those of `Mailer.send()`.  Raise `RelayUnavailable` for what goes wrong
        before MAIL, and `ValueError` for an address with control characters.
        """
        if not "".join((fromaddr, *toaddrs)).isprintable():
            raise ValueError("an address holds control characters")
        replies: dict[str, Reply]
        with self:
            if not self._kept.dialogue.is_quiet():  # the relay has dropped it: no message is to blame
                self._kept.dialogue.close()
                self._connect()
            try:
                replies = self._kept.dialogue.transact(fromaddr, toaddrs, message)
            except _Lost:
                self._connect()
                # by DATA, for Dovecot's submission hangs up on a chunk whose sender is refused
                replies = self._kept.dialogue.transact(fromaddr, toaddrs, message, chunking=False)
        return replies

    def _is_connected(self) -> bool:
        """Return whether this thread has a connection."""
        return self._kept.dialogue is not None and self._kept.dialogue.sock is not None

    def _leave_parents_dialogue(self) -> None:
        """In a fork, close its copy of the connection: it has no part in its parent's dialogue."""
        if self._kept.pid != os.getpid() and self._kept.dialogue is not None:
            self._kept.dialogue.close()
            self._kept.depth = 0

    def _connect(self) -> None:
        """Connect to the first relay that is ready for MAIL.  Raise `RelayUnavailable` if none is."""
        troubles = []
        for relay in self._relays:
            try:
                dialogue = self._connect_to(relay)
            except RelayUnavailable as error:
                troubles.append(str(error))
                continue
            if dialogue.relay != self._latest_relay:
                _log.warning("using relay %s: %s", dialogue.relay, "; ".join(troubles) or "it is back")
            self._latest_relay = dialogue.relay
            self._kept.dialogue = dialogue
            self._kept.pid = os.getpid()
            return
        raise RelayUnavailable("; ".join(troubles))

    def _connect_to(self, relay: tuple[str, int]) -> _Dialogue:
        """Return a connection that is ready for MAIL.  Raise `RelayUnavailable` for whatever goes wrong."""
        dialogue: _Dialogue | None = None
        try:
            if self._implicit_tls:
                dialogue = _TLSDialogue(relay, self._ehlo_name, self._timeout, context=self._context)
            else:
                dialogue = _Dialogue(relay, self._ehlo_name, self._timeout)
            self._ehlo_name = dialogue.local_hostname
            dialogue.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or the last piece waits for an ACK
            self._greet(dialogue)
            if self._username is not None:
                self._login(dialogue)
            if not dialogue.is_quiet():
                raise RelayUnavailable("the relay says more than it was asked")
            return dialogue
        except Exception as error:
            if dialogue is not None:
                dialogue.close()
            hint = self._hint(error, dialogue is None)
            raise RelayUnavailable("%s:%d: %s%s" % (*relay, _reason(error), hint)) from error

    def _hint(self, error: Exception, before_banner: bool) -> str:
        """Return what to do about *error*, for those who meet it first."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return " (for an authority of your own, set SSL_CERT_FILE)"
        if isinstance(error, ssl.SSLError) and self._implicit_tls:
            return " (does this port speak TLS from the start? else without --implicit-tls)"
        silent = isinstance(error, (TimeoutError, smtplib.SMTPServerDisconnected, ConnectionResetError))
        if silent and before_banner and not self._implicit_tls:
            return " (no SMTP greeting: a port that speaks TLS from the start, such as 465, takes --implicit-tls)"
        return ""

    def _greet(self, dialogue: _Dialogue) -> None:
        """Say EHLO and, where it is wanted and offered, STARTTLS and EHLO again: the latest EHLO counts."""
        reply = dialogue.ehlo()
        if self._starttls and dialogue.has_extn("starttls"):
            try:
                dialogue.start_tls(self._context)
                reply = dialogue.ehlo()
            except smtplib.SMTPResponseException as error:
                refused = error.smtp_code // 100 in (4, 5) and error.smtp_code != 421
                if self._verified or not refused:
                    raise
        if reply[0] != 250:
            raise smtplib.SMTPHeloError(*reply)
        if self._verified and not isinstance(dialogue.sock, ssl.SSLSocket):
            raise RelayUnavailable("TLS is required, but STARTTLS is not offered")

    def _login(self, dialogue: _Dialogue) -> None:
        """Log in by one mechanism, once: after a second try on a 535, accounts get locked."""
        offered = dialogue.esmtp_features.get("auth", "").upper().split()
        mechanism = self._auth or next((m for m in _MECHANISMS[:3] if m in offered), "PLAIN")
        if mechanism not in offered:
            raise RelayUnavailable(f"AUTH {mechanism} is not offered")
        dialogue.user = self._username
        dialogue.password = self._ask_password()
        method = f"auth_{mechanism.lower().replace('-', '_')}"
        reply = dialogue.auth(mechanism, getattr(dialogue, method))
        if reply[0] != 235:  # smtplib takes a 503, too, which would say that we had logged in before
            raise smtplib.SMTPAuthenticationError(*reply)

    def _ask_password(self) -> str:
        """Return the password.  Raise `RelayUnavailable` if it can't be had, without a word of it."""
        password: Any = self._password
        if callable(password):
            try:
                password = password()
            except OSError as error:
                raise RelayUnavailable(f"no password: {_reason(error)}") from None
            except Exception as error:  # whose text may show a part of it
                raise RelayUnavailable(f"no password: {type(error).__name__} where it is read") from None
        if not isinstance(password, str) or not f"{self._username}{password}".isascii():
            raise RelayUnavailable("username and password must be ASCII text")
        return password


@dataclasses.dataclass
class StreamMailer:
    """Print, which counts as sent: for a first try, and for development.

    stream      takes text; None is what is standard output at that moment
    """

    stream: TextIO | None = None

    def send(self, fromaddr: str, toaddrs: Sequence[str], message: bytes) -> None:
        """Print envelope and message.  Raise `RelayUnavailable` if the stream does not take them."""
        body = message.decode("utf-8", "replace").replace("\r\n", "\n").rstrip()
        text = f"MAIL FROM:<{fromaddr}> RCPT TO:<{'>,<'.join(toaddrs)}>\n{body}\n\n"
        stream: Any = self.stream or sys.stdout  # which is None where it is closed
        try:
            stream.write(_encodable(text, stream))
            stream.flush()
        except (OSError, ValueError, AttributeError) as error:  # closed, in one of three ways
            raise RelayUnavailable(f"cannot print: {_reason(error)}") from error


# -------------------------------------------------------------------------------------------------- Maildir

_ESSENTIAL = {"tmp", "new", "cur"}
_FAILED = (".failed", ".failed/tmp", ".failed/cur", ".failed/new")
_FOR_NEW_MAIL = ("tmp", "new")  # the way of what is queued
_ALL_DIRECTORIES = ("tmp", "new", "cur", "deferred", *_FAILED)
_ARRIVAL = re.compile(r"(\d+)(?:\.M(\d{6})P)?")  # of a name: the seconds and, if it is ours, the microseconds
_DUE = re.compile(r"\A(\d{10})\.(?!M\d+P)")  # what comes before the name in deferred/, but not a name itself
_OLDEST = 1577836800  # 2020: before it there was no such queue, so a time that is older tells that a clock was wrong
_counter = itertools.count()


def _new_name() -> str:
    """Return a file name, unique for ever (Maildir's rule); sorted, names are in order of arrival."""
    seconds, micros = divmod(time.time_ns() // 1000, 1_000_000)
    unique = f"{next(_counter)}R{os.urandom(4).hex()}"  # R: containers may share host name and pid
    host = socket.gethostname().replace("/", r"\057").replace(":", r"\072").replace(",", r"\054")
    return f"{seconds}.M{micros:06}P{os.getpid()}Q{unique}.{host}"


def _arrival(name: str, status: os.stat_result) -> float:
    """Return the Unix time at which a message arrived: by its name or, where that tells nothing, by its file."""
    found = _ARRIVAL.match(name)
    arrival = 0.0
    if found:
        arrival = int(found[1]) + int(found[2] or 0) / 1e6
    for other in (status.st_mtime, status.st_ctime):
        if arrival < _OLDEST:
            arrival = other
    return arrival


def _due_time(name: str, now: float) -> float:
    """Return the time at which a message in deferred/ is due: 0, if its name tells none, or a wrong one."""
    found = _DUE.match(name)
    if found is None or int(found[1]) > now + _BACKOFF_MAX:
        return 0.0
    return float(found[1])


def _backoff(age: float) -> float:
    """Return the seconds to the next try of a message: as many as it is old, within bounds, as in Postfix."""
    return min(max(age, _BACKOFF_MIN), _BACKOFF_MAX)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Give an `OSError` of the block the name of the file, if it has none: which disk is full?"""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise


def _fsync(path: str) -> None:
    """Make a file or a directory durable.  Raise `OSError` if it can't be; then never try that again."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        with _naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def _fsync_all(paths: Sequence[str]) -> None:
    """Make files durable, side by side where they are many: a disk takes many fsyncs together.

    Raise the first `OSError`; no fsync is tried again, for the second one would say yes.
    """
    waiting = collections.deque(paths)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while True:
                _fsync(waiting.popleft())
        except IndexError:  # nothing waits any more
            pass
        except BaseException as error:
            errors.append(error)

    threads = []
    with contextlib.suppress(RuntimeError):  # there are no more threads, as at interpreter exit: fewer will do
        for _ in range(min(len(paths) - 3, _FSYNCS_AT_ONCE - 1)):  # three take no longer than a thread is worth
            thread = threading.Thread(target=work)
            thread.start()
            threads.append(thread)
    work()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


_fork_lock = threading.RLock()  # held while a claim is opened or closed: a fork waits for that
_claimed: set[int] = set()  # the descriptors of this process's claims


def _close_in_child() -> None:
    """Close the copies that a fork made, without unlocking: the locks are the parent's, and must end with it."""
    for fd in _claimed:
        with contextlib.suppress(OSError):
            os.close(fd)
    _claimed.clear()
    _fork_lock.release()


os.register_at_fork(before=_fork_lock.acquire, after_in_parent=_fork_lock.release, after_in_child=_close_in_child)


def _close(fd: int) -> None:
    """Unlock and close *fd*: a close alone would leave the lock to a forked child that holds a copy."""
    with _fork_lock:
        if fd in _claimed:
            _claimed.discard(fd)
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)
            with contextlib.suppress(OSError):
                os.close(fd)


def _read_head(fd: int) -> bytes:
    """Return the beginning of a file: envelope and headers at least, if they take no more than 16 MB."""
    head = b""
    for size in (_CHUNK, _CHUNK << 4, _CHUNK << 8):
        head = os.pread(fd, size, 0)
        if len(head) < size or _BLANK_LINE.search(head):
            break
    return head


class Maildir:
    """A queue on disk: a Maildir, with a directory more for what is deferred (see the states above).

    path        of the queue; a relative one is that of the moment
    create      whether it is made, or completed, where it is missing

    Directories are made 0700 and files 0600; where `new/` (or, while that is missing, the queue) has
    wider rights, what is made follows them.  No link is followed inside the queue.

    Raise `ValueError` for a directory that is something else, `FileNotFoundError` if there is none
    and none is to be made, and other `OSError`s.
    """

    def __init__(self, path: str | os.PathLike[str], create: bool = True) -> None:
        self.path = os.fspath(path)
        if self.path and not os.path.isabs(self.path):  # the process may change its directory
            self.path = os.path.join(os.getcwd(), self.path)  # not abspath(), for '..' may follow a link
        self._durable: set[str] = set()  # folders that were made durable
        if create and not os.path.lexists(self.path):
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.path, 0o700)
        present = set(os.listdir(self.path))
        missing = _ESSENTIAL - present
        if missing and (present - _ESSENTIAL or not create):
            raise ValueError(f"{self.path} is not a Maildir, for it has no {min(missing)}; left as it is")
        self._refuse_links()
        model = self._path("new")
        if "new" in missing:
            model = self.path
        self._mode = stat.S_IMODE(os.stat(model).st_mode)
        for directory in missing:
            self._make_directory(directory)
        _fsync(self._path("."))  # whoever made what is there: it may have died before it could
        with contextlib.suppress(PermissionError):
            _fsync(self._path(".."))

    def add(self, fromaddr: str, toaddrs: str | Iterable[str], message: _Content) -> str:
        """Queue a message without a transaction; return its id (without angle brackets).

        On return it is durable (see guarantee 4), and a waiting processor has been woken.  The
        arguments are those of `QueuedMailDelivery.send()`.  Raise `ValueError` or `TypeError` as that
        does, and `OSError` if the message can't be written.
        """
        draft = _check(fromaddr, toaddrs, message)
        self._refuse_links(_FOR_NEW_MAIL)
        self._store("new", draft.fromaddr, draft.toaddrs, draft.content)
        self._wake()
        return draft.message_id

    def _path(self, *parts: str) -> str:
        """Return the path of something in the queue."""
        return "/".join((self.path, *parts))

    def _names(self, directory: str) -> Iterator[str]:
        """Yield the names of the messages in *directory*: dot-files, links, FIFOs and the like are none."""
        try:
            fd = os.open(self._path(directory), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            if directory in _ESSENTIAL:
                raise
            return
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    if entry.name[0] != "." and entry.is_file(follow_symlinks=False):
                        yield entry.name
        finally:
            os.close(fd)

    def _refuse_links(self, directories: Iterable[str] = _ALL_DIRECTORIES) -> None:
        """Raise `OSError` if one of *directories* is a link: it would lead us to somebody's other files."""
        for directory in directories:
            if os.path.islink(self._path(directory)):
                raise OSError(f"{self._path(directory)} is a link: nothing is done in this queue")

    def _make_directory(self, directory: str) -> None:
        """Make *directory*, if it is missing, with the rights of the queue."""
        path = self._path(directory)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
            self._durable.clear()
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                os.fchmod(fd, self._mode | 0o700)
            finally:
                os.close(fd)

    def _folder(self, top: str, *inside: str) -> str:
        """Return the last of *top* and the directories *inside* it, which are made if missing, and durable."""
        directories = (top, *inside)
        for directory in directories:
            self._make_directory(directory)
        self._refuse_links(directories)
        if top not in self._durable:
            self._durable.add(top)
            self._secure(top, ".")
        return directories[-1]

    def _write(self, fromaddr: str, toaddrs: Iterable[str], message: bytes, error: str = "", sync: bool = False) -> str:
        """Write a complete file in tmp/, envelope first; return its name."""
        name = _new_name()
        path = self._path("tmp", name)
        envelope = f"X-Zope-From: {fromaddr}\nX-Zope-To: {', '.join(toaddrs)}\n"
        if error or message[:17].lower() == b"x-sendmail-error:":  # the message's own would pass for ours
            envelope += f"X-Sendmail-Error: {error}\n"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:
            with _naming(path), open(os.open(path, flags, 0o600), "wb") as file:
                if self._mode & 0o066:
                    os.fchmod(file.fileno(), self._mode & 0o666 | 0o600)
                file.writelines((envelope.encode(), message))
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

    def _publish(self, name: str, directory: str = "new") -> None:
        """Move a complete file out of tmp/: this commits it, for from here on it is in the queue.

        A process that dies before the rename leaves litter; one that dies after it, a message that
        any processor sends.  Raise `OSError` if the file stays.
        """
        try:
            os.rename(self._path("tmp", name), self._path(directory, name))
        except OSError:  # NFS may say so of what it has done; but then it is not in tmp/ any more
            if name in os.listdir(self._path("tmp")):
                raise

    def _secure(self, *directories: str) -> None:
        """Make *directories* durable; if one can't be, what is there goes out all the same, if the power stays on."""
        for directory in directories:
            try:
                _fsync(self._path(directory))
            except OSError as error:
                _log.error("cannot make %s durable: %s", self._path(directory), _reason(error))

    def _store(self, directory: str, fromaddr: str, toaddrs: Iterable[str], message: bytes, error: str = "") -> None:
        """Put a complete file in *directory*, durably; if that fails, what was written is litter."""
        name = self._write(fromaddr, toaddrs, message, error, sync=True)
        self._publish(name, directory)
        self._secure(directory)

    def _wake(self) -> None:
        """Wake the processors that wait on the trigger."""
        with contextlib.suppress(OSError):  # ENXIO: nobody waits
            fd = os.open(self._path("trigger"), os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            with open(fd, "wb", buffering=0) as trigger:
                if stat.S_ISFIFO(os.fstat(fd).st_mode):
                    trigger.write(b"\0")

    def _open_trigger(self) -> int:
        """Return the FIFO that `_wake` writes to, both ends open (or it would read as ended); -1: there is none."""
        path = self._path("trigger")
        with contextlib.suppress(OSError):  # the interval will do
            with contextlib.suppress(FileExistsError):
                os.mkfifo(path, 0o600)
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                with contextlib.suppress(OSError):  # somebody else's
                    os.fchmod(fd, self._mode & 0o666 | 0o600)
                return fd
            os.close(fd)
        return -1

    def _lock(self, directory: str, name: str) -> _Claim | None:
        """Open and lock a message.  None: it is gone, or a living process holds it.  Raise `OSError` for trouble.

        open      gets the inode that is at the path now; no link leads it elsewhere, no FIFO stops it
        fstat     tells whether that is a file: nothing else is ever moved, sent or unlinked
        flock     lets one process in, and out of it when it dies, however it dies
        lstat     tells whether that inode is still at the path: between open and flock another process
                  may have sent, moved or replaced the message, and let go of it

        From here on the path is ours: who opens it now fails to lock it.
        """
        path = self._path(directory, name)
        claim = None
        with _fork_lock:
            try:  # O_RDWR: NFS locks nothing else exclusively.  O_NONBLOCK: a FIFO must not stop us
                fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            except FileNotFoundError:
                return None
            _claimed.add(fd)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a regular file")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(status, os.lstat(path)):  # or else it was moved or replaced before we had the lock
                claim = _Claim(self, directory, name, fd)
        except (BlockingIOError, FileNotFoundError):
            pass
        finally:
            if claim is None:
                _close(fd)
        return claim

    def _claim(self, directory: str, name: str) -> _Claim | None:
        """Move a message from new/ or deferred/ to cur/, locked.  None and `OSError` as in `_lock`."""
        claim = self._lock(directory, name)
        if claim is None:
            return None
        if directory == "deferred":
            name = _DUE.sub("", name)
        try:
            claim.move("cur", name)
        except BaseException:
            claim.close()
            raise
        return claim

    def _remove_litter(self, now: float) -> None:
        """Remove from tmp/ what was never committed; the log names its envelope."""
        for name in list(self._names("tmp")):
            with contextlib.suppress(OSError):  # it is gone, or somebody else's
                if now - os.lstat(self._path("tmp", name)).st_mtime < _LITTER_AGE:
                    continue  # its writer may want the lock
                claim = self._lock("tmp", name)
                if claim is not None:
                    with contextlib.closing(claim):
                        envelope = os.pread(claim.fd, 1000, 0).split(b"\n")[:2]
                        os.unlink(claim.path)
                        _log.warning("removed tmp/%s, never committed: %s", name, _printable(b" ".join(envelope)))


@dataclasses.dataclass
class _Claim:
    """A message whose file is open and locked: nobody else may send, move or unlink it.

    It is made by `Maildir._claim` (or `_lock`, which leaves the file where it is), and ends with
    `close()`, whatever happens.  Before that, one of `remove`, `defer`, `give_up`, `release`,
    `requeue` and `hold` leads the message to its next state; if none does, the next pass finds it
    abandoned.
    """

    queue: Maildir
    directory: str
    name: str
    fd: int
    arrival: float = 0.0  # Unix time
    fromaddr: str = ""
    toaddrs: tuple[str, ...] = ()
    error: str = ""
    message_id: str = ""
    message: bytes = b""
    held: bool = False
    pid: int = dataclasses.field(default_factory=os.getpid)
    outcomes: set[str] = dataclasses.field(default_factory=set)  # that were reported: 'sent', 'deferred', 'failed'

    @property
    def path(self) -> str:
        """Where the file is now."""
        return self.queue._path(self.directory, self.name)

    def own_path(self) -> str:
        """Return where the file is.  Raise `OSError` in a fork, which has no part in its parent's claims."""
        if self.pid != os.getpid():
            raise OSError(f"{self.path} is claimed by another process")
        return self.path

    def read(self) -> None:
        """Learn envelope and message (in cur/).  Raise `_NoEnvelope`, or `OSError` if the file can't be read whole."""
        status = os.fstat(self.fd)
        self.arrival = _arrival(self.name, status)
        size = status.st_size
        head = _read_head(self.fd)
        self.fromaddr, self.toaddrs, self.error, start = _parse_envelope(head)
        headers = _headers_of(head[start:])
        self.message = os.pread(self.fd, size - start, start)
        if len(self.message) != size - start:  # over 2 GB (read(2))
            raise OSError(f"only {len(self.message)} bytes could be read")
        if start == 0:
            self.message = _ACTUALLY.sub(b"", headers) + self.message[len(headers) :]
        self.message_id = _message_id(headers)

    def note(self, toaddrs: Iterable[str], error: str, in_place: bool = False) -> None:
        """Note in the file that only *toaddrs* are left, durably.  Raise `OSError` if these can't be noted."""
        toaddrs = tuple(toaddrs)
        if (toaddrs, error) == (self.toaddrs, self.error):
            return
        try:
            if in_place:
                self.shorten(toaddrs)
            else:
                self.replace(toaddrs, error)
        except OSError as trouble:
            if in_place:  # there is no room for the list, or it is repoze.sendmail's
                self.replace(toaddrs, error)
                return
            _log.error("%s: %s", _printable(self.path), _reason(trouble))
            if toaddrs != self.toaddrs:  # an error line alone is not worth it
                self.shorten(toaddrs)

    def replace(self, toaddrs: tuple[str, ...], error: str) -> None:
        """Replace the file by one for *toaddrs* alone; that is locked before it is seen, or it would look abandoned."""
        name = self.queue._write(self.fromaddr, toaddrs, self.message, error, sync=True)
        try:
            successor = self.queue._lock("tmp", name)
            if successor is None:
                raise OSError(f"cannot lock tmp/{name}")
            with contextlib.closing(successor):
                os.rename(successor.path, self.own_path())
                replaced = self.fd
                self.fd = successor.fd
                successor.fd = replaced
        except OSError:
            self.queue._discard(name)
            raise
        self.toaddrs = toaddrs
        self.error = error
        self.queue._secure("cur")

    def shorten(self, toaddrs: tuple[str, ...]) -> None:
        """Write a shorter list over that in the file.  Raise `OSError` if that can't be done."""
        self.own_path()
        found = _ENVELOPE.match(_read_head(self.fd))
        line = f" {', '.join(toaddrs)}".encode()
        if not found or len(line) > len(found[2]):
            raise OSError("no room for the recipients that are left")
        if os.pwrite(self.fd, line.ljust(len(found[2])), found.start(2)) < len(found[2]):
            raise OSError("the shorter list of recipients could not be written whole")
        os.fsync(self.fd)
        self.toaddrs = toaddrs

    def remove(self) -> None:
        """The relay has taken the message for every recipient."""
        with contextlib.suppress(FileNotFoundError):  # a person removed it, or NFS says so of what it has done
            os.unlink(self.own_path())

    def defer(self, due: int) -> None:
        """The recipients that are left are to be tried again at *due* (Unix time)."""
        self.move(self.queue._folder("deferred"), f"{due:010}.{self.name}")

    def give_up(self) -> None:
        """The recipients that are left were refused for good, or the message is too old."""
        self.move(self.queue._folder(*_FAILED), _new_name())
        self.queue._secure(self.directory, "cur")

    def give_up_for(self, toaddrs: Iterable[str], error: str) -> None:
        """Put a copy for *toaddrs* in .failed/, for the others have another fate."""
        self.queue._store(self.queue._folder(*_FAILED), self.fromaddr, toaddrs, self.message, error)

    def release(self) -> None:
        """The relay is unavailable, or the process that held the message has died."""
        self.move("new", self.name)

    def requeue(self) -> None:
        """A person wants it to be tried again, as if it were new."""
        self.move("new", _new_name())

    def hold(self, error: Exception) -> None:
        """What became of it can't be noted: keep the lock, so that this process does not send it again."""
        self.held = True
        _log.critical(
            "what became of %s can't be noted: %s; it is held until this process ends: remove it, or the"
            " recipients that are done, by hand",
            _printable(self.path),
            _reason(error),
        )

    def move(self, directory: str, name: str) -> None:
        """Move the file, from one state to another.  Raise `OSError` if it stays."""
        os.rename(self.own_path(), self.queue._path(directory, name))
        self.directory = directory
        self.name = name

    def close(self) -> None:
        """End the claim, unless it is held, or its parent's in a fork (whose descriptor is closed by now)."""
        if not self.held and self.pid == os.getpid():
            _close(self.fd)


# ------------------------------------------------------------------------------------- the fate of a message


@dataclasses.dataclass
class _Counts:
    """What a pass did, in messages.

    A message counts as `sent`, `deferred` and `failed` if that befell one of its recipients.
    """

    claimed: int = 0
    sent: int = 0
    deferred: int = 0
    failed: int = 0
    left: int = 0  # in new/, cur/ and deferred/, when the pass ended
    cut_short: bool = False  # by *batch*
    outage: RelayUnavailable | None = None  # that ended it early


def _report(
    tell: _Tell,
    outcome: str,
    message: _Draft | _Claim,
    replies: Mapping[str, Reply],
    mailer: object = None,
    delay: float = 0.0,
    due: float = 0.0,
) -> None:
    """Log *outcome*, and tell an event of it: one for all recipients that have the same reply."""
    level = logging.INFO
    if outcome == "failed":
        level = logging.ERROR
    addresses_by_reply: dict[Reply, list[str]] = {}
    for address, reply in replies.items():
        addresses_by_reply.setdefault(reply, []).append(address)
    for reply, addresses in addresses_by_reply.items():
        if _log.isEnabledFor(level):
            relay = reply.relay or type(mailer).__name__  # not its str(), which may show a password
            quoted = json.dumps(str(reply), ensure_ascii=False)
            _log.log(level, "%s message-id=<%s> from=<%s> to=<%s> relay=%s delay=%.1f reply=%s", outcome,
                     message.message_id, message.fromaddr, ">,<".join(addresses), relay, delay, quoted)  # fmt: skip
        about = (message.message_id, message.fromaddr, tuple(addresses), str(reply))
        if outcome == "sent":
            tell(MailSentEvent(*about))
        elif outcome == "failed":
            tell(MailErrorEvent(*about, reply.status))
        else:
            tell(MailDeferredEvent(*about, reply.status, due))


def _sent_and_others(replies: Mapping[str, Reply]) -> tuple[dict[str, Reply], dict[str, Reply]]:
    """Return those of *replies* that say 'sent', and all the others."""
    sent = {}
    others = {}
    for address, reply in replies.items():
        if reply.outcome == "sent":
            sent[address] = reply
        else:
            others[address] = reply
    return sent, others


def _error_line(replies: Mapping[str, Reply]) -> str:
    """Return what the file says of the last of *replies*, without addresses: zope.sendmail would send it to all."""
    line = ""
    for reply in replies.values():
        line = f"{reply.status} {reply}"
    return re.sub(r'(?:"[^"]*"|[^\s<>"(]*)@[^\s<>)]*', "*", line)


@dataclasses.dataclass
class _Courier:
    """Sends claimed messages, and settles them, recipient by recipient: for one pass, or one commit.

    What is on disk follows each reply at once: first who was sent to is struck out, then who failed
    gets a copy in .failed/, then who is deferred keeps the file.  Only after each of these an event
    tells of it.
    """

    queue: Maildir
    mailer: Mailer
    tell: _Tell
    clock: Callable[[], float] = time.time
    max_age: float = _MAX_AGE
    soft_bounce: bool = False
    counts: _Counts = dataclasses.field(default_factory=_Counts)
    losses: int = 0  # messages in a row that the relay has lost, and answered in no other way
    latest_loss: Reply | None = None

    def deliver(self, claim: _Claim) -> None:
        """Send a claimed message, settle it, and end the claim.

        Raise `RelayUnavailable`, or `OSError` if it can't be settled; what else goes wrong is logged,
        and the message deferred or, without an envelope, given up.
        """
        self.counts.claimed += 1
        try:
            with contextlib.closing(claim):
                self._send(claim)
        finally:
            self.counts.sent += "sent" in claim.outcomes
            self.counts.deferred += "deferred" in claim.outcomes
            self.counts.failed += "failed" in claim.outcomes
        if self.losses >= _LOSSES_MAX:
            raise RelayUnavailable(f"{self.losses} messages in a row had no answer of their own: {self.latest_loss}")

    def _send(self, claim: _Claim) -> None:
        """Send a claimed message, and settle it.  Raise as `deliver` does."""
        try:
            claim.read()
            self._attempt(claim)
        except RelayUnavailable:
            claim.release()
            raise
        except _NoEnvelope as error:
            claim.give_up()
            _log.error("%s: %s", _printable(claim.path), error)
            self.tell(MailErrorEvent("", "", (), str(error), "5.6.0"))
            claim.outcomes.add("failed")
        except Exception as error:
            _log.error("%s: %s", _printable(claim.path), _reason(error))
            self._defer(claim, dict.fromkeys(claim.toaddrs, Reply(451, f"4.3.0 {_reason(error)}", "none")))

    def _attempt(self, claim: _Claim) -> None:
        """Send to one group of recipients after the other, and settle the message by their replies."""
        failed: dict[str, Reply] = {}
        deferred: dict[str, Reply] = {}  # where an outage ends it, these two stay unsettled: the file still names them
        answers: list[Reply] = []
        groups = _groups(claim.toaddrs)
        for number, group in enumerate(groups):
            try:
                replies = _ask(self.mailer, claim.fromaddr, group, claim.message)
            except RelayUnavailable as error:
                if not any(answer.code in _LOSS_CODES for answer in answers):
                    raise
                for rest in groups[number:]:  # it may be this message that the relay hangs up on
                    deferred.update(dict.fromkeys(rest, Reply(421, f"4.4.1 {error}")))
                break
            answers += replies.values()
            sent, others = _sent_and_others(replies)
            if sent:
                # a large message is not written anew for each group
                in_place = group is not groups[-1] and len(claim.message) > _LARGE
                self._settle_sent(claim, sent, _error_line(others), in_place)
                if claim.held:
                    return
            for address, reply in others.items():
                if self.soft_bounce and reply.outcome == "failed":
                    reply = reply._softened()
                if reply.outcome == "failed" or self.clock() - claim.arrival > self.max_age:
                    failed[address] = reply
                else:
                    deferred[address] = reply
        self._count_loss(answers)
        if failed:
            self._settle_failed(claim, failed, deferred)
        elif deferred:
            claim.note(deferred, _error_line(deferred))
        if deferred and not claim.held:
            self._defer(claim, deferred)

    def _count_loss(self, answers: Sequence[Reply]) -> None:
        """Remember whether these *answers* to a message were none of its own."""
        if all(answer.code in _LOSS_CODES for answer in answers):
            self.losses += 1
            self.latest_loss = answers[-1]
        else:
            self.losses = 0

    def _settle_sent(self, claim: _Claim, sent: Mapping[str, Reply], error: str, in_place: bool) -> None:
        """Note that the relay has taken the message for some: here the window for a duplicate closes."""
        waiting = [address for address in claim.toaddrs if address not in sent]
        try:
            if waiting:
                claim.note(waiting, error, in_place)
            else:
                claim.remove()
        except Exception as trouble:
            claim.hold(trouble)
        self._tell(claim, "sent", sent)

    def _settle_failed(self, claim: _Claim, failed: Mapping[str, Reply], deferred: Mapping[str, Reply]) -> None:
        """Give up for those who are *failed*: by a copy, if others are *deferred*, who keep the file."""
        if deferred:
            claim.give_up_for(failed, _error_line(failed))
            try:
                claim.note(deferred, _error_line(deferred))
            except Exception as trouble:  # or else there would be one more copy at each attempt
                claim.hold(trouble)
        else:
            claim.note(failed, _error_line(failed))
            claim.give_up()
        self._tell(claim, "failed", failed)

    def _defer(self, claim: _Claim, replies: Mapping[str, Reply]) -> None:
        """Keep the message for a later try, and tell who waits for it, and why."""
        now = self.clock()
        due = int(now + _backoff(now - claim.arrival))
        claim.defer(due)
        self._tell(claim, "deferred", replies, due)

    def _tell(self, claim: _Claim, outcome: str, replies: Mapping[str, Reply], due: float = 0.0) -> None:
        """Count *outcome*, and tell of it: always after the change on disk, never before."""
        claim.outcomes.add(outcome)
        _report(self.tell, outcome, claim, replies, self.mailer, self.clock() - claim.arrival, due)


# ----------------------------------------------------------------------------------------------- deliveries


def _as_queue(queue: _Queue, name: str = "queue") -> Maildir:
    """Return *queue*, which may be its path.  Raise `TypeError` if it is neither, and what `Maildir` raises."""
    if isinstance(queue, Maildir):
        return queue
    if not isinstance(queue, (str, os.PathLike)):
        raise TypeError(f"{name} must be a Maildir or its path, not {queue!r}")
    return Maildir(queue)


def _as_mailer(mailer: Any) -> Any:
    """Return *mailer*.  Raise `TypeError` if it can't send."""
    if isinstance(mailer, type) or not callable(getattr(mailer, "send", None)):
        raise TypeError(f"mailer must be an object with a method send, not {mailer!r}")
    return mailer


class _Memory:
    """The messages of a transaction wait here for its end, and are sent in its commit.

    There is no file: what can't be sent then, or is under way when the process dies, is lost.
    """

    def __init__(self, mailer: Mailer) -> None:
        self.mailer = mailer

    def put(self, draft: _Draft) -> None:
        """Nothing: it is in memory."""

    def discard(self, drafts: Sequence[_Draft]) -> None:
        """Nothing: who forgets them has done all."""

    def secure(self, drafts: Sequence[_Draft]) -> None:
        """Nothing: memory is not durable."""

    def finish(self, drafts: Sequence[_Draft], events: list[MailEvent]) -> None:
        """Let the messages of a committed transaction go, and add what becomes of them to *events*."""
        waiting = [(draft, group) for draft in drafts for group in _groups(draft.toaddrs)]
        try:
            with _connected(self.mailer):
                while waiting:
                    draft, group = waiting[0]
                    sent, others = _sent_and_others(_ask(self.mailer, draft.fromaddr, group, draft.content))
                    _report(events.append, "sent", draft, sent, self.mailer)
                    _report(events.append, "failed", draft, others, self.mailer)  # there is no later
                    del waiting[0]
        except BaseException as error:  # an outage, or an interrupt
            for draft, group in waiting:
                _report(events.append, "failed", draft, dict.fromkeys(group, _not_sent(error)), self.mailer)
            if not isinstance(error, RelayUnavailable):
                raise


def _not_sent(error: BaseException) -> Reply:
    """Return the reply to a message that *error*, an outage or an interrupt, came in the way of."""
    return Reply(451, f"4.4.1 {_reason(error)}")


class _Spool:
    """The messages of a transaction wait in tmp/; they are published in its commit, for a processor to send.

    With a *mailer*, the first attempt is made in the commit, too.
    """

    def __init__(self, queue: Maildir, mailer: Mailer | None = None) -> None:
        self.queue = queue
        self.mailer = mailer
        self.directories: Sequence[str] = _FOR_NEW_MAIL  # that messages may pass through here
        if mailer is not None:
            self.directories = _ALL_DIRECTORIES

    def put(self, draft: _Draft) -> None:
        """Write a message in tmp/, which need not be durable yet.  Raise `OSError` if it can't be written."""
        self.queue._refuse_links(self.directories)
        draft.name = self.queue._write(draft.fromaddr, draft.toaddrs, draft.content)
        draft.content = b""

    def discard(self, drafts: Sequence[_Draft]) -> None:
        """Unlink messages that are not to be sent."""
        for draft in drafts:
            self.queue._discard(draft.name)

    def secure(self, drafts: Sequence[_Draft]) -> None:
        """Make messages durable.  Raise `OSError` if they can't be: nothing is committed yet."""
        _fsync_all([self.queue._path("tmp", draft.name) for draft in drafts])

    def finish(self, drafts: Sequence[_Draft], events: list[MailEvent]) -> None:
        """Publish the messages of a committed transaction, try them at once if that is wanted, and wake a processor."""
        try:
            stuck = self.publish(drafts)
        except BaseException:  # an interrupt; what it kept from being published must be
            self.publish(drafts)
            raise
        for draft in drafts:
            if draft.name in stuck:
                self.tell_stuck(draft, stuck[draft.name], events)
        if self.mailer is not None:
            self.try_at_once(self.mailer, [draft for draft in drafts if draft.name not in stuck], events)
        self.queue._wake()

    def publish(self, drafts: Sequence[_Draft]) -> dict[str, OSError]:
        """Publish committed messages; return those that could not be moved, and stay complete in tmp/."""
        stuck = {}
        for draft in drafts:
            try:
                self.queue._publish(draft.name)
            except OSError as error:
                stuck[draft.name] = error
        self.queue._secure("new")
        return stuck

    def tell_stuck(self, draft: _Draft, error: OSError, events: list[MailEvent]) -> None:
        """Tell people of committed mail that can't be published, and keep it from being taken for litter."""
        path = self.queue._path("tmp", draft.name)
        in_a_year = time.time() + 366 * 86400
        with contextlib.suppress(OSError):
            os.utime(path, (in_a_year, in_a_year))  # until then it is no litter
        _log.critical("committed mail is stuck: move %s to new/ by hand", path)
        reply = Reply(554, f"5.3.0 stuck in {path}: {_reason(error)}", "none")
        _report(events.append, "failed", draft, dict.fromkeys(draft.toaddrs, reply))

    def try_at_once(self, mailer: Mailer, drafts: Sequence[_Draft], events: list[MailEvent]) -> None:
        """Make the first attempt, as a processor would; what can't be sent now is left to one."""
        courier = _Courier(self.queue, mailer, events.append)
        waiting = list(drafts)
        first = len(events)  # that tells of the message in hand
        try:
            with _connected(mailer):
                while waiting:
                    first = len(events)
                    try:
                        claim = self.queue._claim("new", waiting[0].name)
                        if claim is not None:
                            courier.deliver(claim)
                    except OSError as error:  # a processor will
                        _log.error("%s: %s", waiting[0].name, _reason(error))
                    del waiting[0]
        except BaseException as error:  # an outage, or an interrupt
            told = {address for event in events[first:] for address in event.toaddrs}
            for draft in waiting:
                untold = [address for address in draft.toaddrs if address not in told]
                replies = dict.fromkeys(untold, _not_sent(error))
                _report(events.append, "deferred", draft, replies, mailer, due=time.time())
                told.clear()  # it was of the first of them
            if not isinstance(error, RelayUnavailable):
                raise


@dataclasses.dataclass
class _Savepoint:
    """How many messages there were (`transaction.interfaces.IDataManagerSavepoint`)."""

    data: _DataManager
    length: int

    def rollback(self) -> None:
        """Drop what was sent after the savepoint."""
        self.data.drop(self.length)


class _DataManager:
    """What one delivery has to do with one transaction (`transaction.interfaces.ISavepointDataManager`).

    send() adds to it · commit() does all that can fail · tpc_finish() lets the messages go · abort()
    and tpc_abort() forget them · savepoint() counts them, and its rollback forgets the later ones.

    `transaction` calls `abort` and `tpc_abort` at any time, even after a commit: they know only of
    messages that are not finished, and finish takes those away first.
    """

    def __init__(self, delivery: _Delivery) -> None:
        self.delivery = delivery  # Transaction.set_data goes by id(): while this lives, no other delivery has that one
        self.transaction_manager = delivery._manager  # of the interface
        self.drafts: list[_Draft] = []
        self.joined = False
        self.committing = False
        self.pid = os.getpid()

    def drop(self, start: int) -> None:
        """Forget the messages from number *start* on."""
        dropped = self.drafts[start:]
        del self.drafts[start:]
        if self.pid == os.getpid():  # what a fork aborts is its parent's
            self.delivery._outbox.discard(dropped)

    def savepoint(self) -> _Savepoint:
        """Return what can undo all that follows."""
        return _Savepoint(self, len(self.drafts))

    def abort(self, _transaction: Any) -> None:
        """Forget all messages, unless they are finished."""
        self.joined = False
        self.committing = False
        self.drop(0)

    tpc_abort = abort

    def tpc_begin(self, _transaction: Any) -> None:
        """From here on it is too late to send."""
        self.committing = True

    def commit(self, _transaction: Any) -> None:
        """Do all that can fail: it comes before any vote, and zope.sqlalchemy commits in its vote."""
        self.delivery._outbox.secure(self.drafts)

    def tpc_vote(self, _transaction: Any) -> None:
        """Nothing: see `commit()`."""

    def tpc_finish(self, current: Any) -> None:
        """Let the messages go.  Raises no `Exception`, for the databases have committed; what to tell is told later."""
        drafts = self.drafts
        self.drafts = []
        events: list[MailEvent] = []
        try:
            if drafts:
                self.delivery._outbox.finish(drafts, events)
        except Exception:  # a bug; the messages are where they are
            _log.critical("in doubt: mail of a committed transaction: %s", drafts, exc_info=True)
        finally:
            if events:  # or else no hook: it makes `transaction` abort everything once more
                current.addAfterCommitHook(lambda _committed: list(map(notify, events)))

    def sortKey(self) -> str:
        """Return what puts mail after every database: it must not be visible before the data."""
        return f"~~sendmail:{id(self)}"


class _Delivery:
    """What the two deliveries share."""

    def __init__(self, outbox: _Memory | _Spool, transaction_manager: Any) -> None:
        package = _transaction_package()
        if package is None:
            raise ImportError(f"{type(self).__name__} needs the package transaction: pip install transaction")
        self._outbox = outbox
        self._manager = transaction_manager
        if transaction_manager is None:
            self._manager = package.manager

    def send(self, fromaddr: str, toaddrs: str | Iterable[str], message: _Content) -> str:
        """Send *message* when, and only when, the transaction commits; return its id (without angle brackets).

        fromaddr    an address, or '' (the null sender)
        toaddrs     an address or several, of which duplicates count once
        message     bytes, text (which is sent as UTF-8) or a `Message`, which is sent without its
                    Bcc, and not changed; Message-Id and Date are added where missing

        An address is an addr-spec (RFC 5322, 3.4.1), or one with a display name, which is left out.

        Raise `ValueError` for no recipients, what is not one address, a malformed Message-Id, or a
        transaction that is being committed; `TypeError` for other types; `OSError` if the message
        can't be written; and what the transaction manager raises.
        """
        draft = _check(fromaddr, toaddrs, message)
        current = self._manager.get()
        try:
            data: _DataManager = current.data(self)
        except KeyError:
            data = _DataManager(self)
            current.set_data(self, data)
        if data.committing:
            raise ValueError("the transaction is being committed: too late to send")
        if not data.joined:  # new, or sent away by the rollback of a savepoint older than itself
            current.join(data)
            data.joined = True
        self._outbox.put(draft)
        data.drafts.append(draft)
        return draft.message_id


class DirectMailDelivery(_Delivery):
    """Send messages by *mailer* while the transaction commits; what fails becomes a `MailErrorEvent` after it.

    mailer               a `Mailer`
    transaction_manager  and all else as for `QueuedMailDelivery`
    fallback             a queue (a `Maildir`, or its path)

    A process that dies in the middle loses what it had not sent, unless there is a *fallback*: then
    this is a queued delivery that makes the first attempt itself, and what can't be sent now stays
    in the queue (`MailDeferredEvent`), for a processor.
    """

    def __init__(self, mailer: Mailer, transaction_manager: Any = None, *, fallback: _Queue | None = None) -> None:
        outbox: _Memory | _Spool = _Memory(_as_mailer(mailer))
        if fallback is not None:
            outbox = _Spool(_as_queue(fallback, "fallback"), mailer)
        super().__init__(outbox, transaction_manager)


class QueuedMailDelivery(_Delivery):
    """Queue messages while the transaction commits, for a processor to send.

    queue                a `Maildir`, or its path
    transaction_manager  by default `transaction.manager`, which is thread-local

    Raise `ImportError` where `transaction` is not installed, `TypeError` for a queue that is neither,
    and what `Maildir` raises.
    """

    def __init__(self, queue: _Queue, transaction_manager: Any = None) -> None:
        super().__init__(_Spool(_as_queue(queue)), transaction_manager)


# ------------------------------------------------------------------------------------------------ processor


def _is_ahead(moment: float, now: float, at_most: float) -> bool:
    """Return whether *moment* is yet to come.  What is further ahead than *at_most* is not: a clock was set back."""
    return now < moment <= now + at_most


class QueueProcessorThread(threading.Thread):
    """Send what is due in a queue, again and again.

    `start()` makes it a daemon thread, which interpreter exit stops and joins; `run()` does the same
    in this thread; `process()` makes one pass.  One processor is one connection; there may be as
    many processors on a queue as you like.

    queue        a `Maildir`, or its path
    mailer       a `Mailer`
    interval     in seconds, between two passes; mail that is queued wakes it before that
    batch        the load on the relay: so many messages in any interval, and in one pass, at most
    max_age      in seconds; an older message is given up where a reply would defer it
    soft_bounce  whether what the relay refuses for good is deferred, too

    While the relay is unavailable, mail does not wake it, and the wait grows to 60 s (or *interval*,
    if longer).

    Raise `TypeError` or `ValueError` for a wrong argument, and what `Maildir` raises.
    """

    def __init__(
        self,
        queue: _Queue,
        mailer: Mailer,
        interval: float = 3.0,
        *,
        batch: int | None = None,
        max_age: float = _MAX_AGE,
        soft_bounce: bool = False,
    ) -> None:
        """Take the arguments that are described above."""
        super().__init__(name="sendmail", daemon=True)
        self._mailer = _as_mailer(mailer)
        self._interval = _number("interval", interval)
        self._batch: float = math.inf
        if batch is not None:
            self._batch = _number("batch", batch, int)
        self._max_age = _number("max_age", max_age)
        self._soft_bounce = soft_bounce
        self._queue = _as_queue(queue)
        self._clock: Callable[[], float] = time.time
        self._stopping = False
        self._make_bell()
        self._finished: collections.deque[float] = collections.deque()  # when, of the latest *batch* messages
        self._retries: collections.deque[str] = collections.deque()  # what is due in deferred/, in order
        self._waiting = 0  # messages in deferred/, when it was last looked at, and by what was done here since
        self._left_alone: dict[str, float] = {}  # what can't be claimed or settled, and until when
        self._next_look = 0.0
        self._next_cleaning = 0.0
        self._outage_began = 0.0  # 0: there is none

    def _make_bell(self) -> None:
        """Make the pipe that `stop()` writes to: a signal handler may, where an Event could dead-lock."""
        self._pid = os.getpid()
        self._bell = os.pipe()
        for end in self._bell:
            os.set_blocking(end, False)
            weakref.finalize(self, os.close, end)

    def start(self) -> None:
        """Start the thread; interpreter exit stops and joins it.

        That may take as long as the message in hand, up to ten minutes for each reply once its data
        was sent, unless a second Ctrl-C ends it.
        """
        atexit.register(self._stop_and_join)
        super().start()

    def stop(self) -> None:
        """Finish the message in hand, and start no other.  Returns at once, also in a signal handler."""
        self._stopping = True
        with contextlib.suppress(OSError):
            os.write(self._bell[1], b"\0")

    def _stop_and_join(self) -> None:
        """Stop the thread, and wait for it: at interpreter exit."""
        if self.is_alive():  # or else this is a fork, which shares the bell
            self.stop()
            self.join()

    def run(self) -> None:
        """Make passes until `stop()`."""
        if self._pid != os.getpid():  # what is read from the bell of several forks is lost to the others
            self._make_bell()
        woken = False
        try:
            while not self._stopping:
                trigger = self._queue._open_trigger()  # anew, for somebody may have replaced it
                try:
                    counts = self._try_pass(woken)
                    woken = self._wait(trigger, counts)
                finally:
                    if trigger >= 0:
                        os.close(trigger)
        finally:
            self._queue._wake()  # the others, if this one was woken in their place
            atexit.unregister(self._stop_and_join)

    def _try_pass(self, woken: bool) -> _Counts:
        """Make a pass, and say when an outage is over."""
        try:
            counts = self._pass(self._allowance(), woken)
        except Exception as error:  # the queue can't be read, for now
            _log.error("cannot process %s: %s", self._queue.path, _reason(error))
            return _Counts()
        if counts.outage is not None:
            self._outage_began = self._outage_began or self._clock()
        else:
            if self._outage_began and counts.claimed:
                _log.warning("the relay is back, after %.0f s", self._clock() - self._outage_began)
            self._outage_began = 0.0
        return counts

    def _wait(self, trigger: int, counts: _Counts) -> bool:
        """Wait for the next pass, the latest one having done *counts*; return whether mail has come.

        What was written to wake us is read before that pass lists, so that no mail is missed.
        """
        seconds = self._interval
        poll = select.poll()
        poll.register(self._bell[0], select.POLLIN)
        if trigger >= 0 and not self._outage_began:
            poll.register(trigger, select.POLLIN)
        if self._outage_began:  # the wait doubles, for it is as long as the outage has lasted
            seconds = max(seconds, min(self._clock() - self._outage_began, _OUTAGE_WAIT_MAX))
        elif counts.cut_short and self._allowance() >= 1:
            seconds = 0.0
        elif counts.cut_short:  # until the next message may go
            seconds = self._finished[0] + self._interval - self._clock()
        ready = [fd for fd, _ in poll.poll(min(1000 * max(seconds, 0), 1 << 30))]
        for fd in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(fd, 1 << 20)
        return trigger in ready

    def process(self) -> _Counts:
        """Make one pass; return an object with these attributes, of which the first four count messages.

        sent, deferred, failed  a message counts under each that befell one of its recipients
        left                    in new/, cur/ and deferred/, when the pass ends
        outage                  None, or the `RelayUnavailable` that ended the pass early

        Raise `OSError` if the queue can't be read.
        """
        return self._pass(self._batch)

    def _pass(self, budget: float, woken: bool = False) -> _Counts:
        """Take up dead claims; connect, if anything is due; send at most *budget* messages."""
        queue = self._queue
        queue._refuse_links()
        self._remove_litter_hourly()
        in_cur = self._take_up_dead_claims()
        courier = _Courier(queue, self._mailer, notify, self._clock, self._max_age, self._soft_bounce)
        counts = courier.counts
        fresh = self._fresh()
        if not fresh:
            self._look_at_deferred()
        due = bool(fresh or self._retries)
        if due and self._may_go_on(counts, budget):
            try:
                with _connected(self._mailer):  # before any claim
                    self._work(courier, fresh, budget, woken)
            except RelayUnavailable as error:
                counts.outage = error
        counts.cut_short = due and counts.claimed >= budget
        if due or self._left_alone:
            counts.left = self._left()
        else:  # new/ is empty, and cur/ as it was
            counts.left = in_cur + self._waiting
        if counts.outage is not None:
            _log.warning("relay unavailable, %d left in the queue: %s", counts.left, _reason(counts.outage))
        return counts

    def _work(self, courier: _Courier, fresh: Sequence[str], budget: float, woken: bool) -> None:
        """Deliver what is *fresh*, then one retry after the other; but what is new by then goes before each."""
        self._deliver_fresh(courier, fresh, budget, woken)
        self._look_at_deferred()
        while self._retries and self._may_go_on(courier.counts, budget):
            claim = self._claim("deferred", self._retries.popleft())
            if claim is not None:
                self._deliver(courier, claim)
            self._deliver_fresh(courier, self._fresh(), budget)

    def _deliver_fresh(self, courier: _Courier, names: Sequence[str], budget: float, woken: bool = False) -> None:
        """Deliver what is called *names* in new/; a processor that was *woken* for several wakes the next one."""
        wake_next = woken and len(names) > 1
        for name in names:
            if not self._may_go_on(courier.counts, budget):
                return
            claim = self._claim("new", name)
            if claim is not None:
                if wake_next:
                    self._queue._wake()
                    wake_next = False
                self._deliver(courier, claim)

    def _may_go_on(self, counts: _Counts, budget: float) -> bool:
        """Return whether a pass may take another message."""
        return counts.claimed < budget and not self._stopping

    def _claim(self, directory: str, name: str) -> _Claim | None:
        """Claim a message.  None: it is somebody else's, or trouble, and left alone for now."""
        try:
            claim = self._queue._claim(directory, name)
        except OSError as error:
            self._leave_alone(directory, name, error)
            return None
        if directory == "deferred":
            self._waiting -= 1
        return claim

    def _deliver(self, courier: _Courier, claim: _Claim) -> None:
        """Deliver one message, and keep account."""
        deferred = courier.counts.deferred
        try:
            courier.deliver(claim)
        except OSError as error:
            self._leave_alone(claim.directory, claim.name, error)
        finally:
            self._waiting += courier.counts.deferred - deferred
            if self._batch < math.inf:
                self._finished.append(self._clock())

    def _left(self) -> int:
        """Return how many messages the queue holds (in deferred/: by the latest look, and what was done here since)."""
        self._look_at_deferred()
        return self._waiting + sum(1 for directory in ("new", "cur") for _ in self._queue._names(directory))

    def _allowance(self) -> float:
        """Return how many messages may be sent now, so that there are no more than *batch* in any interval."""
        now = self._clock()
        while self._finished and not now - self._interval < self._finished[0] <= now:
            self._finished.popleft()
        return self._batch - len(self._finished)

    def _remove_litter_hourly(self) -> None:
        """Remove litter, unless that was done less than an hour ago."""
        now = self._clock()
        if not _is_ahead(self._next_cleaning, now, 3600):
            self._next_cleaning = now + 3600
            self._left_alone.clear()
            self._queue._remove_litter(now)

    def _take_up_dead_claims(self) -> int:
        """Release what stands in cur/ and was abandoned by a process that died; return how many there were in it."""
        names = list(self._queue._names("cur"))
        for name in names:
            if self._is_left_alone(name):
                continue
            try:
                abandoned = self._queue._lock("cur", name)
                if abandoned is not None:
                    with contextlib.closing(abandoned):
                        abandoned.release()
            except OSError as error:
                self._leave_alone("cur", name, error)
        return len(names)

    def _fresh(self) -> list[str]:
        """Return what stands in new/, in order of arrival."""
        return sorted(name for name in self._queue._names("new") if not self._is_left_alone(name))

    def _look_at_deferred(self) -> None:
        """Learn what is due in deferred/, unless that is known.

        It is asked once a minute, or when the first message known to be in it falls due; and not
        before what was found due the last time has had its turn.
        """
        now = self._clock()
        if self._retries or _is_ahead(self._next_look, now, _LOOK_INTERVAL):
            return
        self._next_look = now + _LOOK_INTERVAL
        due = []
        self._waiting = 0
        for name in self._queue._names("deferred"):
            self._waiting += 1
            due_time = _due_time(name, now)
            if due_time > now:
                self._next_look = min(self._next_look, due_time)
            elif not self._is_left_alone(name):
                due.append(name)
        self._retries.extend(sorted(due))

    def _is_left_alone(self, name: str) -> bool:
        """Return whether the message called *name* was trouble less than a minute ago."""
        return _is_ahead(self._left_alone.get(name, 0.0), self._clock(), _LOOK_INTERVAL)

    def _leave_alone(self, directory: str, name: str, error: Exception) -> None:
        """Leave alone for a minute what can't be claimed or settled, under both names that it may have."""
        until = self._clock() + _LOOK_INTERVAL
        self._left_alone.update({name: until, _DUE.sub("", name): until})
        _log.error("leaving alone %s/%s for now: %s", directory, _printable(name), _reason(error))


# --------------------------------------------------------------------------------------------- command line

_ALL = "pass list requeue inject"
# name, what stands for its value in the help, the modes that it means something in, and what the help says
_OPTIONS: tuple[tuple[str, str, str, str], ...] = (
    ("maildir", "DIR", _ALL, "the queue, made if it is missing\n(default: $SENDMAIL_MAILDIR)"),
    ("interval", "SECONDS", "pass", "stay, look for mail that often, and when some is queued"),
    ("workers", "N", "pass", "processors, each with a connection (default: 1)"),
    ("batch", "N", "pass", "messages that each of them sends in any interval,\nor in its one pass, at most"),
    ("max-age", "DAYS", "pass", "give up what is still deferred then (default: 5)"),
    ("soft-bounce", "", "pass", "defer what the relay refuses for good"),
    ("print", "", "pass", "print what is due, which leaves the queue, instead of\nsending it (see also --list)"),
    ("hostname", "HOST", "pass", "the relay, HOST or HOST:PORT, or several, in order of\n"
     "preference, with commas between (default: localhost)"),
    ("port", "PORT", "pass", "its port (default: 25)"),
    ("username", "NAME", "pass", "log in, with the password in $SENDMAIL_PASSWORD, or"),
    ("password-file", "FILE", "pass", "in the first line of FILE, read at every login"),
    ("auth", "MECHANISM", "pass", "CRAM-MD5, PLAIN, LOGIN or XOAUTH2\n(default: the best of the first three)"),
    ("no-tls", "", "pass", "never use TLS"),
    ("force-tls", "", "pass", "require STARTTLS"),
    ("implicit-tls", "", "pass", "speak TLS from the start, as on port 465"),
    ("timeout", "SECONDS", "pass", "for each step of the dialogue (default: 60); five\n"
     "times that once the data is out, and ten minutes\nfor the reply to it"),
    ("list", "", "list", "show the queue,"),
    ("json", "", "list", "as a JSON object for each message"),
    ("requeue", "", "requeue", "make failed and deferred messages due again"),
    ("domain", "DOMAIN", "inject", "completes addresses without one (default: this\nhost's name)"),
    ("verbose", "", _ALL, "log what was sent or deferred, too"),
    ("help", "", _ALL, "show this"),
    ("version", "", _ALL, "show the version"),
)  # fmt: skip
_USAGE = """\
usage: python -m sendmail --maildir DIR [option ...]        send what is due
       python -m sendmail --maildir DIR --interval SECONDS  keep doing so
       python -m sendmail --maildir DIR -t < message        queue a message, or
       python -m sendmail --maildir DIR [-f SENDER] RECIPIENT ...  for these
       python -m sendmail --maildir DIR --list [--json]     show the queue
       python -m sendmail --maildir DIR --requeue [NAME ...]      try again

%s

of sendmail(8), to queue a message:
  -t                    take the recipients from To, Cc and Bcc, too
  -i, -oi               a line with only a dot does not end the message
  -f SENDER, -r SENDER  envelope sender (default: you; <> is none)
  -F NAME               your name, for a missing From
others are ignored, but -bp, which is --list.

exit status: 0 done, or stopped by a signal, even if messages were deferred or
given up; 64 usage; 65 bad message, or no message called NAME; 73 the queue
can't be opened or made; 74 input or output error; 75 relay unavailable;
130 interrupted"""
_WITH_VALUE = "ABCFLNORVXbefhopr"  # of the options of sendmail(8), by Postfix
_WITHOUT_VALUE = "GIUcimntv"
_KINDS: Mapping[str, Callable[[str], float]] = {"SECONDS": float, "DAYS": float, "N": int}
_TIMES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
_SIZES = ((10**6, "MB"), (1000, "kB"), (1, "B"))


class _Exit(Exception):
    """Ends the command line; the arguments are a status (of sysexits.h) and a line for people, which may be empty."""


@dataclasses.dataclass
class _Arguments:
    """A command line, understood.

    mode        what to do: 'pass', 'list', 'requeue' or 'inject'
    ours        our options, without the dashes, and their values: numbers, text, or '' where none is taken
    theirs      the options of sendmail(8), with their dash, and their values
    operands    recipients, or the names of messages
    """

    mode: str
    ours: dict[str, Any]
    theirs: dict[str, str]
    operands: list[str]


def _help() -> str:
    """Return the text of --help, in 80 columns."""
    lines = []
    for name, value, _, text in _OPTIONS:
        head = f"  --{name} {value}"
        for line in text.split("\n"):
            lines.append(f"{head:24}{line}")
            head = ""
    return _USAGE % "\n".join(lines)


def _usage(text: str) -> _Exit:
    """Return what ends a command line that makes no sense."""
    return _Exit(os.EX_USAGE, f"{_printable(text)}; see --help")


def _parse(argv: Sequence[str]) -> _Arguments:
    """Understand *argv*: options and operands, in any order.  Raise `_Exit` if it makes no sense."""
    takes_value = {name: value != "" for name, value, *_ in _OPTIONS}
    ours: dict[str, str] = {}
    theirs: dict[str, str] = {}
    operands: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--":
            theirs[word] = ""
            operands += words
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if name == "password":
                raise _usage("everybody could see a password here: use --password-file FILE")
            if name not in takes_value:
                raise _usage(f"there is no option --{name}")
            if equals and not takes_value[name]:
                raise _usage(f"--{name} takes no value")
            if takes_value[name] and not equals:
                value = _next_word(words, f"--{name}")
            ours[name] = value
        elif word.startswith("-") and word != "-":
            _parse_letters(word[1:], words, theirs)
        else:
            operands.append(word)
    return _understood(ours, theirs, operands)


def _next_word(words: Iterator[str], option: str) -> str:
    """Return the next of *words*, the value of *option*.  Raise `_Exit` if there is none."""
    for word in words:
        return word
    raise _usage(f"{option} takes a value")


def _parse_letters(letters: str, words: Iterator[str], theirs: dict[str, str]) -> None:
    """Put options of sendmail(8), as many as stand in one word, into *theirs*.  Raise `_Exit` for an unknown one."""
    while letters:
        option = f"-{letters[0]}"
        value = letters[1:]
        if letters[0] in _WITH_VALUE:
            value = value or _next_word(words, option)
            letters = ""
        elif letters[0] == "q":  # whose value is never a word by itself
            letters = ""
        elif letters[0] in _WITHOUT_VALUE:
            letters = value
            value = ""
        else:
            raise _usage(f"there is no option {option}")
        if option in ("-o", "-b"):
            option += value
        theirs[option] = value


def _understood(ours: Mapping[str, str], theirs: dict[str, str], operands: list[str]) -> _Arguments:
    """Return what is to be done.  Raise `_Exit` where options do not go together, or have a wrong value.

    A stray word must not turn a daemon into a sender.
    """
    options: dict[str, Any] = dict(ours)
    mode = "pass"
    if "-bp" in theirs:
        theirs = {}
        options["list"] = ""
    if "list" in options:
        mode = "list"
    elif "requeue" in options:
        mode = "requeue"
        theirs.pop("--", None)
    elif theirs or operands:
        mode = "inject"
    stray = list(theirs)
    if mode == "list":
        stray += operands
    elif mode == "inject":
        stray = [option for option in theirs if option.startswith("-b") and option != "-bm"]
    for name, value, modes, _ in _OPTIONS:
        if name in options and mode not in modes.split():
            stray.append(f"--{name}")
        elif name in options and value in _KINDS:
            options[name] = _number_from(name, _KINDS[value], options[name])
    if stray:
        doing = {"pass": "sending what is due", "inject": f"queueing a message ({' '.join([*theirs, *operands])})"}
        what = doing.get(mode, f"--{mode}")
        raise _usage(f"{stray[0]} does not go together with {what}")
    return _Arguments(mode, options, theirs, operands)


def _number_from(name: str, kind: Callable[[str], float], text: str) -> float:
    """Return the positive number that *text* says.  Raise `_Exit` if it is none."""
    with contextlib.suppress(ValueError):
        number = kind(text)
        if 0 < number < 1e9:
            return number
    raise _usage(f"--{name} takes a positive number, not {text!r}")


def _first_line(path: str) -> str:
    """Return the first line of a file, without its end: a password.  Raise `OSError` or `UnicodeError`."""
    with open(path, encoding="utf-8") as file:
        return file.readline().rstrip("\r\n")


def _make_mailer(options: Mapping[str, Any]) -> Mailer:
    """Return the mailer that the command line describes.  Raise `ValueError` or `OSError` if there can be none."""
    if "print" in options:
        return StreamMailer()
    names = ("hostname", "port", "username", "auth", "timeout")
    settings: dict[str, Any] = {name: options[name] for name in names if name in options}
    if "password-file" in options:
        os.close(os.open(options["password-file"], os.O_RDONLY))  # better now than at the first login
        settings["password"] = functools.partial(_first_line, options["password-file"])
    elif "username" in options:
        settings["password"] = os.environ.get("SENDMAIL_PASSWORD")
    return SMTPMailer(
        no_tls="no-tls" in options,
        force_tls="force-tls" in options,
        implicit_tls="implicit-tls" in options,
        **settings,
    )


def _make_processors(queue: Maildir, options: Mapping[str, Any]) -> list[QueueProcessorThread]:
    """Return the processors that the command line describes.  Raise `_Exit` if there can be none."""
    try:
        mailer = _make_mailer(options)
    except (OSError, ValueError) as error:
        raise _Exit(os.EX_USAGE, _reason(error)) from None
    processors = []
    for _ in range(options.get("workers", 1)):
        processor = QueueProcessorThread(
            queue,
            mailer,
            options.get("interval", 3.0),
            batch=options.get("batch"),
            max_age=options.get("max-age", 5) * 86400,
            soft_bounce="soft-bounce" in options,
        )
        processors.append(processor)
    return processors


def _process(queue: Maildir, options: Mapping[str, Any]) -> None:
    """Run the processors: for one pass, or until a signal; a second one ends them at once."""
    processors = _make_processors(queue, options)

    def stop(signum: int, _frame: object) -> None:
        signal.signal(signum, signal.SIG_DFL)
        for processor in processors:
            processor.stop()

    def work(processor: QueueProcessorThread) -> bool:
        """Return whether the relay could be used."""
        if "interval" in options:
            processor.run()
            return True
        return processor.process().outage is None  # which the log has told

    with contextlib.ExitStack() as undo:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                undo.callback(signal.signal, signum, signal.signal(signum, stop))
        if len(processors) == 1:
            results = [work(processors[0])]
        else:
            import concurrent.futures  # which takes its time

            pool = undo.enter_context(concurrent.futures.ThreadPoolExecutor(len(processors)))
            results = list(pool.map(work, processors))
    if not all(results):
        raise _Exit(os.EX_TEMPFAIL, "")


def _completed(text: str, domain: str) -> list[str]:
    """Return the addresses in *text*, those without a domain completed with *domain*."""
    addresses = _split_addresses(text)
    return [f"{a}@{domain}" if re.fullmatch(_LOCAL_PART, a) else a for a in addresses]


def _read_message(flags: Mapping[str, str]) -> bytes:
    """Return the message on standard input.  Raise `_Exit` if it can't be read."""
    try:
        lines = iter(sys.stdin.buffer.readline, b"")
        if not flags.keys() & {"-i", "-oi"}:
            lines = itertools.takewhile(lambda line: line.rstrip(b"\r\n") != b".", lines)
        message = b"".join(lines)
    except (OSError, ValueError, AttributeError) as error:  # closed, in one of three ways
        raise _Exit(os.EX_IOERR, f"cannot read the message from standard input: {_reason(error)}") from None
    return re.sub(rb"\A(?:>*From [^\n]*\n)+", b"", message)  # of an mbox


def _user() -> str:
    """Return the name of who runs this."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # as in many a container
        return f"uid{os.getuid()}"


def _inject(queue: Maildir, arguments: _Arguments) -> None:
    """Queue the message on standard input."""
    flags = arguments.theirs
    domain = arguments.ours.get("domain") or socket.gethostname()
    recipients = []
    for operand in arguments.operands:
        if re.search(r"[\0-\x1f]", operand):
            raise ValueError(f"not an address: {_printable(operand)!r}")
        recipients += _completed(operand, domain) or [operand]
    if not recipients and "-t" not in flags:
        raise _usage("no recipients: name them, or use -t")
    sender = flags.get("-f", flags.get("-r", _user()))
    sender = ",".join(_completed(sender, domain))  # several are refused below
    message = _read_message(flags)
    headers = _headers_of(message)
    if "-t" in flags:
        resent = _header_values(headers, "Resent-(?:To|Cc|Bcc)")
        for value in resent or _header_values(headers, "(?:To|Cc|Bcc)"):
            recipients += _completed(value, domain)
    message = _BCC.sub(b"", headers) + message[len(headers) :]
    if not _header_values(headers, "From"):
        author = sender or f"MAILER-DAEMON@{domain}"
        name = _printable(flags.get("-F", ""))
        if name:
            author = email.utils.formataddr((name, ""))[:-2] + f"<{author}>"  # it takes ASCII addresses alone
        message = _with_header_lines(message, f"From: {author}")
    queue.add(sender, recipients, message)


def _is_locked(fd: int) -> bool:
    """Return whether somebody holds the lock of a file.  If not, we do, until *fd* is closed."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _entry(queue: Maildir, directory: str, name: str, now: float) -> dict[str, Any]:
    """Return what there is to show of a message.  Raise `FileNotFoundError` if it is gone."""
    path = queue._path(directory, name)
    status = os.lstat(path)
    entry: dict[str, Any] = {
        "name": name,
        "state": "due",
        "age": now - _arrival(_DUE.sub("", name), status),
        "size": status.st_size,
        "due": None,
        "message_id": "",
        "subject": "",
        "sender": "",
        "recipients": (),
        "error": "",
    }
    if directory.startswith("."):
        entry["state"] = "failed"
    elif directory == "deferred" and _due_time(name, now) > now:
        entry["state"] = "deferred"
        entry["due"] = _due_time(name, now)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb"):
            head = _read_head(fd)
            if directory == "cur" and _is_locked(fd):
                entry["state"] = "sending"
        envelope = _parse_envelope(head)
        headers = _headers_of(head[envelope.length :])
        entry.update(sender=envelope.fromaddr, recipients=envelope.toaddrs, error=envelope.error)
        entry.update(message_id=_message_id(headers), subject=_decoded_header(headers, "Subject"))
    except FileNotFoundError:
        raise
    except Exception as error:  # no message can stop the listing
        entry["error"] = _reason(error)
    return entry


def _entries(queue: Maildir, troubles: list[str]) -> Iterator[dict[str, Any]]:
    """Yield what there is to show of each message; *troubles* gets what can't be shown."""
    now = time.time()
    for directory in ("cur", "new", "deferred", ".failed/new", ".failed/cur"):
        try:
            names = sorted(queue._names(directory))
        except OSError as error:
            troubles.append(_reason(error))
            continue
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # gone by now
                yield _entry(queue, directory, name, now)


def _human(number: float, units: Sequence[tuple[int, str]]) -> str:
    """Return *number* in the largest of *units* that it fills."""
    size, unit = next((unit for unit in units if number >= unit[0]), units[-1])
    return f"{number / size:.0f} {unit}"


def _table(entries: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines that show the queue, for eyes."""
    counts: collections.Counter[str] = collections.Counter()
    oldest = 0.0
    for entry in entries:
        state = entry["state"]
        counts[state] += 1
        oldest = max(oldest, entry["age"])
        if entry["due"]:
            state += f" for {_human(entry['due'] - time.time(), _TIMES)}"
        yield entry["name"]
        yield f"    {state}, {_human(entry['age'], _TIMES)} old, {_human(entry['size'], _SIZES)}"
        yield f"    <{entry['sender']}> to {', '.join(entry['recipients'])}"
        if entry["error"]:
            yield f"    {entry['error']}"
    total = ", ".join(f"{count} {state}" for state, count in counts.items())
    if total:
        yield f"messages: {total}; oldest: {_human(oldest, _TIMES)}"
    else:
        yield "messages: none"


def _fit(line: str) -> str:
    """Return *line*, parts of which others wrote, printable and no wider than the terminal."""
    line = "".join(c if c.isprintable() else "?" for c in line)
    if sys.stdout.isatty():
        width = os.get_terminal_size().columns
        if 0 < width < len(line):  # 0: unknown
            line = line[: width - 1] + "…"
    return line


def _show(lines: Iterable[str]) -> None:
    """Print *lines*, each at once.  Raise `OSError` if they are not taken."""
    if sys.stdout is None:
        raise OSError("standard output is closed")
    for line in lines:
        print(_encodable(line, sys.stdout), flush=True)


def _list(queue: Maildir, as_json: bool) -> None:
    """Show the queue.  Raise `_Exit` if a part of it may not be read."""
    troubles: list[str] = []
    entries = _entries(queue, troubles)
    if as_json:
        _show(map(json.dumps, entries))
    else:
        _show(map(_fit, _table(entries)))
    if troubles:
        raise _Exit(os.EX_IOERR, f"not shown: {'; '.join(troubles)}")


def _requeue(queue: Maildir, names: Sequence[str]) -> None:
    """Make failed and deferred messages due, all or those called *names*."""
    missing = {_DUE.sub("", name) for name in names}  # a due time changes at every try
    trouble: OSError | None = None
    for directory in ("deferred", ".failed/new", ".failed/cur"):
        for name in sorted(queue._names(directory)):
            lasting_name = _DUE.sub("", name)
            if names and lasting_name not in missing:
                continue
            try:
                claim = queue._lock(directory, name)
                if claim is not None:
                    with contextlib.closing(claim):
                        claim.requeue()
                    missing.discard(lasting_name)
            except OSError as error:
                trouble = error
    queue._secure("new")
    queue._wake()
    if trouble is not None:
        raise trouble
    if missing:
        raise _Exit(os.EX_DATAERR, f"neither failed nor deferred: {', '.join(sorted(missing))}")


def _become_owner(path: str, undo: contextlib.ExitStack) -> None:
    """As root, become the owner of the queue until *undo*, so that nothing in it ends up root's."""
    if os.geteuid() != 0 or not os.path.exists(path):
        return
    status = os.stat(path)
    if status.st_uid == 0:
        return
    # what is imported only when it is needed may be out of the reach of that user
    import concurrent.futures.thread  # noqa: F401
    import encodings.idna  # noqa: F401

    undo.callback(os.setgroups, os.getgroups())
    undo.callback(os.setegid, os.getegid())
    undo.callback(os.seteuid, 0)
    try:
        user = pwd.getpwuid(status.st_uid)
        os.initgroups(user.pw_name, user.pw_gid)
        os.setegid(user.pw_gid)
    except KeyError:  # as in many a container
        os.setgroups([])
        os.setegid(status.st_gid)
    os.seteuid(status.st_uid)


def _run(argv: Sequence[str], handler: logging.Handler, undo: contextlib.ExitStack) -> None:
    """Do what *argv* asks for; *undo* gets what is to be undone after it.

    Raise `_Exit`, `OSError`, `ValueError` for a message, and `MemoryError` for a large one.
    """
    arguments = _parse(argv)
    options = arguments.ours
    if "help" in options:
        return _show([_help()])
    if "version" in options:
        return _show([f"sendmail.py {__version__}"])
    if "interval" in options and not os.environ.get("JOURNAL_STREAM"):
        handler.setFormatter(logging.Formatter("%(asctime)s sendmail: %(message)s"))
    if "verbose" in options:
        _log.setLevel(logging.INFO)
    path = options.get("maildir") or os.environ.get("SENDMAIL_MAILDIR")
    if not path or path.startswith("--"):
        raise _usage("no queue: name it with --maildir or $SENDMAIL_MAILDIR")
    try:
        _become_owner(path, undo)
        new = not os.path.lexists(path)
        queue = Maildir(path, create=arguments.mode in ("pass", "inject"))
    except (OSError, ValueError) as error:
        raise _Exit(os.EX_CANTCREAT, f"cannot open the queue: {_reason(error)}") from None
    if new:
        _log.warning("made a new queue: %s", queue.path)
    if arguments.mode == "list":
        _list(queue, "json" in options)
    elif arguments.mode == "requeue":
        _requeue(queue, arguments.operands)
    elif arguments.mode == "inject":
        _inject(queue, arguments)
    else:
        _process(queue, options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status (see --help, and sysexits.h).

    argv        the arguments, without the name of the program; by default those of the process

    The process is left as it was found: its signal handlers, its logger and its user.  Handlers that
    were subscribed before get the events.
    """
    if argv is None:
        argv = sys.argv[1:]
    status = 0
    with contextlib.ExitStack() as undo:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("sendmail: %(message)s"))
        undo.callback(_log.removeHandler, handler)
        undo.callback(_log.setLevel, _log.level)
        _log.addHandler(handler)
        _log.setLevel(logging.WARNING)
        try:
            _run(argv, handler, undo)
        except KeyboardInterrupt:
            status = 130
        except BrokenPipeError:  # who reads our output has seen enough
            pass
        except (_Exit, OSError, ValueError, MemoryError) as error:
            status = _tell_trouble(error)
    _give_up_output()
    return status


def _tell_trouble(error: Exception) -> int:
    """Log *error* in a line for people; return the exit status."""
    status = os.EX_DATAERR
    text = _reason(error)
    if isinstance(error, _Exit):
        status, text = error.args
    elif isinstance(error, OSError):
        status = os.EX_IOERR
    elif isinstance(error, MemoryError):
        status = os.EX_IOERR
        text = "out of memory: the message is too large for this machine"
    if text:
        _log.error(text)
    return status


def _give_up_output() -> None:
    """Let the interpreter not try again to write what it could not."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
