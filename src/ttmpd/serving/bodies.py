"""Bodies on their way in: many may arrive at once, slowly, as long as they take little memory together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from ttmpd.serving.requests import Limits


@dataclass(eq=False)
class _Arriving:
    """A body under way: the bytes that are there, and what ends its reading."""

    scope: anyio.CancelScope
    n_bytes: int = 0
    evicted: bool = False


@dataclass(eq=False)
class BodyReader:
    """Reads bodies, none of which takes a place among the requests that are worked on.

    A client that sends slowly holds a connection and the bytes that it has sent, nothing more. Where all bodies
    together would take more than ``limits.arriving_bytes``, the one that has been arriving for longest gives way.

    Args:
        limits: of a request, and of all bodies together.
    """

    limits: Limits
    _arriving: list[_Arriving] = field(default_factory=list)

    async def read(self, request: Request) -> bytes:
        """The whole body.

        Raises:
            HTTPException: it did not come within ``limits.body_seconds`` (408), the connection was closed before its
                end (400), or there was no room for it (503).
        """
        try:
            async with self._place() as place:
                chunks: list[bytes] = []
                async for chunk in request.stream():
                    chunks.append(chunk)
                    place.n_bytes += len(chunk)
                    self._make_room(place)
                return b"".join(chunks)
        except ClientDisconnect:
            raise HTTPException(400, "a body must arrive whole, but the connection was closed; send it again") from None

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[_Arriving]:
        with anyio.move_on_after(self.limits.body_seconds) as scope:
            place = _Arriving(scope)
            self._arriving.append(place)
            try:
                yield place
            finally:
                self._arriving.remove(place)
        if place.evicted:
            raise HTTPException(503, "the server must have room for a body, but others came faster; try again")
        if scope.cancelled_caught:
            rule = f"a body must arrive within {self.limits.body_seconds:g} s"
            raise HTTPException(408, f"{rule}; send it again", {"connection": "close"})

    def _make_room(self, place: _Arriving) -> None:
        """End the oldest of the other bodies, or this one where it is alone, while all take too much memory."""
        while sum(each.n_bytes for each in self._arriving if not each.evicted) > self.limits.arriving_bytes:
            oldest = next(each for each in self._arriving if not each.evicted)
            oldest.evicted = True
            oldest.scope.cancel()
            if oldest is place:
                return


def check_whole(body: bytes, content_type: str) -> None:
    """Refuse the body of a form that was cut off: without the mark that ends it, a file in it may be missing or short.

    Raises:
        HTTPException: it has no such mark (400), or the header names no boundary (422).
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary:
        raise HTTPException(
            422, "a form must name its boundary in the content type, but does not; let a library write it"
        )
    end = b"--" + boundary + b"--"
    if not (body.startswith(end) or b"\r\n" + end in body or b"\n" + end in body):
        raise HTTPException(400, "a form must end with its closing boundary, but was cut off; send it again")
