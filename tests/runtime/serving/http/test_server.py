"""The socket that the server listens on."""

from __future__ import annotations

import asyncio
import socket

from ditc.runtime.serving.http.server import ServerOptions, listen


def test_answers_in_several_parts_are_not_held_back() -> None:
    """Each answer took 44 ms while connections waited for acknowledgements of its first part."""

    async def is_sent_at_once() -> int:
        connected: asyncio.Queue[socket.socket] = asyncio.Queue()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connected.put_nowait(writer.get_extra_info("socket"))

        with listen(ServerOptions(port=0)) as listener:
            listener.listen()
            async with await asyncio.start_server(accept, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                accepted = await connected.get()
                found = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                writer.close()
        return found

    assert asyncio.run(is_sent_at_once())
