"""Replies of an endpoint kept on disk: one sqlite file that many processes share."""

from __future__ import annotations

import asyncio
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

KEEP_S = 0.5
"""Seconds that keeping a reply may take."""


class ReplyCache:
    """Replies by the hash of their request, in one sqlite file that many processes share. An error ends its use, with one warning."""

    def __init__(self, folder: Path) -> None:
        self._file = folder.expanduser() / "replies.sqlite3"
        self._db: Any = None
        self._broken = False
        self._thread: ThreadPoolExecutor | None = None  # one thread, so that waiting for another process's write holds up no other item

    async def get(self, key: str) -> str | None:
        found = await self._do("SELECT text FROM replies WHERE key = ?", (key,))
        return found[0] if found and isinstance(found[0], str) else None

    async def put(self, key: str, model: str, text: str, tokens: tuple[int, int] | None) -> None:
        if any("\ud800" <= c <= "\udfff" for c in text):  # half a surrogate pair, which no file can hold
            return
        await self._do("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?, ?)", (key, model, text, *(tokens or (None, None)), time.time()))

    async def _do(self, statement: str, values: tuple[Any, ...]) -> Any:
        if self._broken:
            return None
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="llmrl-cache")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._execute, statement, values)

    def _execute(self, statement: str, values: tuple[Any, ...]) -> Any:
        import sqlite3

        if self._broken:
            return None
        try:
            if self._db is None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                db = sqlite3.connect(self._file, timeout=KEEP_S, isolation_level=None, check_same_thread=False)
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose the last replies, not the file
                columns = "key TEXT PRIMARY KEY, model TEXT, text TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, made REAL"
                db.execute(f"CREATE TABLE IF NOT EXISTS replies ({columns})")
                self._db = db
            return self._db.execute(statement, values).fetchone()
        except (sqlite3.Error, OSError) as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):  # the low byte: the primary code
                return None  # another process writes: this reply is asked for, or not kept, and the next one may be
            self._broken = True
            print(f"llmrl: the reply cache {self._file} is not used any more: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return None
