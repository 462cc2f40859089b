"""HTTP/1.1 on a connection, bounded: the size of a head, how long a client may fall silent, or leave unread."""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from minisgl.errors import InvalidRequestError
from minisgl.server.errors import error_body

HEAD_LIMIT = 64 * 2**10
"""Bytes that the request line and the headers may have."""
READ_TIMEOUT = 30.0
"""Seconds between two pieces of a request; a client that falls silent in the middle of one is cut off."""

logger = logging.getLogger(__name__)


class BoundedConnection(h11.Connection):
    """h11's part of a connection, with a bound on every head; h11's own is on those that come in pieces."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, HEAD_LIMIT)
        self.too_large = False
        """Whether the last error was a head beyond the limit."""

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """What came next. Raises RemoteProtocolError for what is not HTTP, and for too large a head."""
        before = len(self.trailing_data[0]) if self.their_state is h11.IDLE else 0
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            self.too_large = error.error_status_hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise
        if isinstance(event, h11.Request) and before - len(self.trailing_data[0]) > HEAD_LIMIT:
            self.too_large = True
            raise h11.RemoteProtocolError("too large a head", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        return event


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol with bounds on time. Cutting a client off is to its request what its leaving would be.

    `write_timeout` is how long (s) the transport's buffer may stay full. A client that reads slowly, but does, empties
    it in time; one that does not holds pages of the KV cache for nothing.
    """

    def __init__(self, *args: Any, write_timeout: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn: BoundedConnection = BoundedConnection()
        self.write_timeout = write_timeout
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client came; it has to ask for something."""
        super().connection_made(transport)
        self._expect_more()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A piece of a request, or several requests."""
        super().data_received(data)
        state = self.conn.their_state
        if state is h11.SEND_BODY or (state is h11.IDLE and self.conn.trailing_data[0]):
            self._expect_more()
        elif self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def pause_writing(self) -> None:
        """The buffer is full: the client does not read as fast as we write."""
        super().pause_writing()
        self._writing = self.loop.call_later(self.write_timeout, self._cut_off, "did not read its answer")

    def resume_writing(self) -> None:
        """It has read on."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _unsupported_upgrade_warning(self) -> None:
        """A client that offers another protocol with every request, as Java's does HTTP/2, is just answered here."""
        logger.debug("an offer of another protocol is passed over")

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be read as HTTP, in OpenAI's form, and close: 431 (RFC 6585) for too large a head."""
        error, status = InvalidRequestError(msg, code="invalid_http"), HTTPStatus.BAD_REQUEST
        if self.conn.too_large:
            error = InvalidRequestError(
                f"URL and headers must have at most {HEAD_LIMIT} bytes", code="headers_too_large"
            )
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        body = msgspec.json.encode(error_body(error))
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        response = h11.Response(status_code=status, headers=headers, reason=status.phrase.encode())
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _expect_more(self) -> None:
        """The client has to go on within `READ_TIMEOUT`."""
        if self._reading is not None:
            self._reading.cancel()
        self._reading = self.loop.call_later(READ_TIMEOUT, self._on_silence)

    def _on_silence(self) -> None:
        if self.flow.read_paused:  # it is us who do not listen
            self._expect_more()
        elif self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:  # it has never asked for anything
            self.transport.close()
        else:
            self._cut_off("fell silent in the middle of a request")

    def _cut_off(self, why: str) -> None:
        logger.warning("%s:%s %s; it is cut off", *(self.client or ("-", 0)), why)
        self.transport.abort()
