"""bzip2 on all cores: a .bz2 file of many streams, one after the other, as Wikipedia's multistream dumps and pbzip2 make.

bzip2 packs small and unpacks slowly, some 30 MB/s a core. A file of one stream has to be unpacked from its beginning to
its end; those of many give work to as many cores.
"""

import re
from collections import deque
from collections.abc import Iterator
from typing import IO, Any

READ_BYTES = 2**20  # read at once
CHUNK_BYTES = 2**20  # unpacked at once
PIECE_BYTES = 2**21  # of the file, the most that is unpacked ahead as one
AHEAD_BYTES = 2**23  # the most that unpacking ahead makes of one piece; the rest is unpacked when it is wanted

_STREAM = re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")  # a header, then the first block's mark or, if empty, the end's
_MARK_BYTES = 10
GARBAGE = "something else follows where its bzip2 data ends"


def unpack_bz2(file: IO[bytes], threads: int, bar: Any) -> Iterator[bytes]:
    """The contents of a .bz2 file, piece by piece; ``threads`` streams are unpacked at once.

    ``bar``, if given, is a progress bar that counts the compressed bytes. Memory: up to 10 MiB a thread. Raises
    :class:`OSError`, :class:`ValueError` or :class:`EOFError` for a file that is damaged or cut short.

    The mark at which a piece was cut may stand within a stream by chance. So what was unpacked ahead counts only where the
    stream before has come to its end; else the piece belongs to that stream, and is unpacked in its turn.
    """
    from concurrent.futures import ThreadPoolExecutor  # bz2 lets other threads run while it works

    pool = ThreadPoolExecutor(threads)
    stream = None  # the decompressor of a stream whose end has not come yet
    try:
        for piece, begun in _begin_ahead(_pieces(file, bar), pool, threads + 1):
            if stream is not None:
                yield stream.decompress(piece, CHUNK_BYTES)
            elif begun is not None:
                stream, data = begun.result()
                yield data
            else:
                raise ValueError(GARBAGE)
            while not (stream.eof or stream.needs_input):
                yield stream.decompress(b"", CHUNK_BYTES)
            if stream.eof:
                if stream.unused_data:
                    raise ValueError(GARBAGE)
                stream = None
        if stream is not None:
            raise EOFError("it ends within a bzip2 stream; fetch it again")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pieces(file: IO[bytes], bar: Any) -> Iterator[tuple[bool, bytes]]:
    """(does a stream seem to begin here, bytes), in pieces that end before the next beginning."""
    rest, begins = b"", True
    while block := file.read(READ_BYTES):
        if bar is not None:
            bar.update(len(block))
        searched = max(0, len(rest) - _MARK_BYTES + 1)
        rest += block
        start = 0
        for mark in _STREAM.finditer(rest, searched):
            if mark.start() > start:
                yield begins, rest[start : mark.start()]
            start, begins = mark.start(), True
        rest = rest[start:]
        if len(rest) > PIECE_BYTES:  # keeps what may be the first part of a mark
            yield begins, rest[: -_MARK_BYTES + 1]
            rest, begins = rest[-_MARK_BYTES + 1 :], False
    if rest:
        yield begins, rest


def _begin_ahead(pieces: Iterator[tuple[bool, bytes]], pool: Any, ahead: int) -> Iterator[tuple[bytes, Any]]:
    """(piece, future of :func:`_begin_stream` if a stream seems to begin there), ``ahead`` of them under way."""
    under_way: deque = deque()
    for begins, piece in pieces:
        under_way.append((piece, pool.submit(_begin_stream, piece) if begins else None))
        if len(under_way) > ahead:
            yield under_way.popleft()
    yield from under_way


def _begin_stream(piece: bytes) -> tuple[Any, bytes]:
    import bz2

    stream = bz2.BZ2Decompressor()
    return stream, stream.decompress(piece, AHEAD_BYTES)
