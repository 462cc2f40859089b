"""Clients that want a server's time and memory for nothing: `python -m helpers.attackers PORT SECONDS`.

They come from two addresses of their own. What the server answered is printed as a count of each status: 0 where it
hung up, -1 where it had not answered in the end.
"""

import asyncio
import json
import sys
import time
from collections import Counter

COUNT, HALF_BODIES = 16, 64
SIZE = 16 * 2**20  # bytes of the largest bodies
FITTING = 4 * 2**20  # of bodies that a server may take in
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


def filled(start: bytes, item: bytes, end: bytes, size: int = FITTING) -> bytes:
    """A body of about `size` bytes."""
    return start + item * ((size - len(start) - len(end)) // len(item)) + end


PROMPTS, MESSAGE = b'{"max_tokens":1,"prompt":[', b'{"role":"user","content":"x"}'
BODIES: dict[str, tuple[str, bytes]] = {
    "16 MiB of text": (TEXT, filled(b'{"prompt":"', b"hello world, ", b'"}', SIZE)),
    "8 texts of 2 MiB": (TEXT, filled(PROMPTS, filled(b'"', b"hello world, ", b'",', SIZE // 8), b'"x"]}', SIZE)),
    "prompts of one token, 16 MiB": (TEXT, filled(PROMPTS, b"[5],", b"[5]]}", SIZE)),
    "prompts of one token": (TEXT, filled(PROMPTS, b"[5],", b"[5]]}")),
    "prompts of one letter": (TEXT, filled(PROMPTS, b'"x",', b'"x"]}')),
    "one text": (TEXT, filled(b'{"prompt":"', b"x1 ", b'"}')),
    "one text without blanks": (TEXT, filled(b'{"prompt":"', b"a", b'"}')),
    "text that just fits the bound": (TEXT, filled(b'{"prompt":"', b"x1 ", b'"}', 600_000)),
    "escapes": (TEXT, filled(b'{"prompt":"', b"\\u4e2d", b'"}')),
    "token ids": (TEXT, filled(PROMPTS, b"5,", b"5]}")),
    "messages": (CHAT, filled(b'{"messages":[', MESSAGE + b",", MESSAGE + b"]}")),
    "a long message": (CHAT, filled(b'{"messages":[{"role":"user","content":"', b"word ", b'"}]}')),
    "empty lists": (CHAT, filled(b'{"messages":[', b"[],", b"[]]}")),
    "deep": (CHAT, filled(b'{"messages":', b"[", b"")),
    "metadata": (TEXT, filled(b'{"prompt":"x","max_tokens":1,"metadata":{"x":"', b"word ", b'"}}')),
}


async def ask(port: int, host: str, path: str, body: bytes, until: float, half: bool) -> int:
    """The status of the answer; a half body is held until `until`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(host, 0))
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
        writer.write(body[: len(body) // 2] if half else body)
        async with asyncio.timeout(max(0.1, until - time.monotonic())):
            if not half:
                await writer.drain()
            return int((await reader.readuntil(b"\r\n")).split()[1])
    except asyncio.IncompleteReadError:
        return 0
    finally:
        writer.transport.abort()


async def attack(number: int, port: int, until: float, outcomes: Counter[str], half: bool) -> None:
    """One request after the other, each with another body."""
    bodies, turn = [*BODIES.items()], number
    while time.monotonic() < until:
        name, (path, body) = bodies[turn % len(bodies)]
        turn += 1
        try:
            status = await ask(port, f"127.0.0.{2 + number % 2}", path, body, until, half)
        except TimeoutError:
            status = -1
        except OSError:
            status = 0
        outcomes[f"{name}{' (half)' if half else ''}: {status}"] += 1


async def main(port: int, seconds: float) -> None:
    outcomes, until = Counter[str](), time.monotonic() + seconds
    whole = [attack(number, port, until, outcomes, False) for number in range(COUNT)]
    half = [attack(number, port, until, outcomes, True) for number in range(HALF_BODIES)]
    await asyncio.gather(*whole, *half)
    print(json.dumps(dict(sorted(outcomes.items()))))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
