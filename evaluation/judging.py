"""Judging many traces: concurrent, appended to a file line by line, resumable, within a budget.

The file (judgements.jsonl) holds one JSON object a judgement: {key, judge, id, scores, quality, reasons, failure, failed, spent}. `key`
names judge and case by their content, so a line is found again whatever else has changed; `spent` are the counters since the line
before. A killed process loses at most the calls that were in flight; none of those that came back is made again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from llmrl.evaluation.dimensions import Case, EndpointJudge, Judge, Judgement, messages, price_of
from llmrl.records import InputError

DOWN_AFTER = 12
"""Failures of the endpoint in a row after which judging stops: it is down, or refuses everything."""
BYTES_PER_TOKEN = 3.5
"""Of a judge's prompt, for the estimate of cost: English and formulas lie between 3 and 4."""
REPLY_TOKENS = (40, 250)
"""Of a reply without and with reasons, for the estimate."""
_FINAL = ("", "reply", "case")


def case_key(judge: Judge, case: Case) -> str:
    told = [case.problem, case.trace] if judge.blind else [case.problem, case.trace, case.gold, case.correct]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]
    return f"{judge.key}/{case.id}/{digest}"


@dataclass
class Judged:
    """What came of a list of cases."""

    by_id: dict[str, Judgement]
    """Every case that was asked for, failed ones too."""
    not_asked: int = 0
    """Left out because the budget was used up."""
    why: str = ""
    reused: int = 0
    """Judgements found in the file."""
    spent: dict[str, float] = field(default_factory=dict)
    """Counters over all processes that wrote to the file for this judge."""


class JudgementFile:
    """See the module's docstring. Without a path nothing is kept. For one process at a time, others are refused."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.found: dict[str, Judgement] = {}
        self._spent: dict[str, dict[str, float]] = {}
        self._file: IO[bytes] | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._locked(path.open("ab"))
        try:
            self._read(path)
        except InputError:
            self._file.close()
            raise

    def _locked(self, file: IO[bytes]) -> IO[bytes]:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however it ends
        except OSError as error:
            file.close()
            raise InputError(f"{self.path}: another process judges into this file; wait for it, or name another --out") from error
        return file

    def _read(self, path: Path) -> None:
        raw = path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        for number, line in enumerate(raw[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                if row["key"] is not None:
                    self.found[row["key"]] = Judgement(*(row[name] for name in ("scores", "quality", "reasons", "failure", "failed")))
                spent = self._spent.setdefault(row["judge"], {})
                for name, amount in row["spent"].items():
                    spent[name] = spent.get(name, 0.0) + amount
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{path}: line {number} is no judgement ({error}); remove the line or the file") from error
        if whole < len(raw):
            os.truncate(path, whole)  # a torn last line

    def spent(self, judge: Judge) -> dict[str, float]:
        return dict(self._spent.get(judge.key, {}))

    def total(self) -> dict[str, float]:
        """Over all judges."""
        names = {name for spent in self._spent.values() for name in spent}
        return {name: sum(spent.get(name, 0.0) for spent in self._spent.values()) for name in names}

    def write(self, judge: Judge, case: Case, judgement: Judgement, spent: dict[str, float]) -> None:
        key = case_key(judge, case)
        self.found[key] = judgement
        self._line(judge, {"key": key, "judge": judge.key, "name": judge.name, "id": case.id, **asdict(judgement)}, spent)

    def write_spent(self, judge: Judge, spent: dict[str, float]) -> None:
        """What was spent without a judgement: calls before a limit ended their retries."""
        if spent:
            self._line(judge, {"key": None, "judge": judge.key}, spent)

    def _line(self, judge: Judge, row: dict[str, Any], spent: dict[str, float]) -> None:
        total = self._spent.setdefault(judge.key, {})
        for name, amount in spent.items():
            total[name] = total.get(name, 0.0) + amount
        if self._file is not None:
            row = {**row, "spent": spent}
            self._file.write(json.dumps(row).encode() + b"\n")
            self._file.flush()

    def __enter__(self) -> JudgementFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()


def judge_cases(cases: Sequence[Case], judge: Judge, file: JudgementFile, *, workers: int = 16, each: Callable[[int], None] = lambda n: None) -> Judged:
    """Asks for the cases in their order, `workers` at a time, those that the file has judged left out.

    each: called with the number of cases that are done. On Ctrl-C nothing new is asked, and what is in flight is waited for and written.
    Raises InputError after DOWN_AFTER failures of the endpoint in a row: what came before is in the file.
    """
    job = _Job(cases, judge, file, each)
    if isinstance(judge, EndpointJudge):
        judge.spent_before(file.total())  # limits are of the whole job, all judges together
    return _run(lambda: job.run(workers))


class _Job:
    def __init__(self, cases: Sequence[Case], judge: Judge, file: JudgementFile, each: Callable[[int], None]) -> None:
        self.judge, self.file, self.each = judge, file, each
        self.result = Judged({})
        self.todo: list[Case] = []
        for case in cases:
            known = file.found.get(case_key(judge, case))
            if known is not None and known.failed in _FINAL:
                self.result.by_id[case.id] = known
                self.result.reused += 1
            else:
                self.todo.append(case)
        self.todo.reverse()  # taken from the end
        self.stop, self.in_a_row, self.last = "", 0, ""
        self.counted: dict[str, float] = {}

    async def run(self, workers: int) -> Judged:
        self.each(len(self.result.by_id))
        self.counted = dict(getattr(self.judge, "counters", {}))  # a judge may have worked on another pool before
        tasks = [asyncio.create_task(self.work()) for _ in range(min(workers, len(self.todo)))]
        try:
            await asyncio.shield(asyncio.gather(*tasks))
        except asyncio.CancelledError:
            self.stop = "interrupted"
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        finally:
            self.file.write_spent(self.judge, self._since())
            if isinstance(self.judge, EndpointJudge):
                await self.judge.close()
        if self.in_a_row >= DOWN_AFTER:
            good = sum(j.quality is not None for j in self.result.by_id.values())
            raise InputError(
                f"the judge {self.judge.name} failed {self.in_a_row} times in a row; {good} judgements are there, and with a file of judgements "
                f"(--out) the same command goes on from them. The last failure: {self.last}"
            )
        self.result.spent = self.file.spent(self.judge)
        return self.result

    async def work(self) -> None:
        while self.todo and not self.stop:
            case = self.todo.pop()
            judgement = await self.judge.judge(case)
            if judgement.failed == "limit":
                self.stop, self.result.why = "limit", judgement.failure or ""
                self.result.not_asked += 1
                continue
            self.file.write(self.judge, case, judgement, self._since())
            self.result.by_id[case.id] = judgement
            self.each(len(self.result.by_id))
            if judgement.failed not in ("endpoint", "timeout"):
                self.in_a_row = 0
            else:
                self.in_a_row, self.last = self.in_a_row + 1, judgement.failure or ""
                self.stop = "down" if self.in_a_row >= DOWN_AFTER else self.stop
        if self.stop == "limit":
            self.result.not_asked += len(self.todo)
            self.todo.clear()

    def _since(self) -> dict[str, float]:
        now = dict(getattr(self.judge, "counters", {}))
        new = {name: value - self.counted.get(name, 0.0) for name, value in now.items() if value != self.counted.get(name, 0.0)}
        self.counted = now
        return new


def _run(make: Callable[[], Any]) -> Any:
    """asyncio.run, in a thread of its own where a loop runs already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(make())
    box: list[Any] = []

    def inside() -> None:
        try:
            box.extend((asyncio.run(make()), None))
        except BaseException as error:  # handed to the caller's thread, whatever it is
            box.extend((None, error))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    if box[1] is not None:
        raise box[1]
    return box[0]


def cost(cases: Sequence[Case], judge: EndpointJudge, file: JudgementFile) -> dict[str, Any]:
    """What judging will take, as far as it can be told before: {calls, judged_before, prompt_tokens, completion_tokens, usd}.

    Tokens are estimates from lengths; usd is None where no price is known. Retries and repaired replies come on top.
    """
    todo = [c for c in cases if not ((known := file.found.get(case_key(judge, c))) is not None and known.failed in _FINAL)]
    size = sum(len(m["content"].encode()) for c in todo for m in messages(c, blind=judge.blind, reasons=judge.reasons, max_chars=judge.max_chars))
    read, written = round(size / BYTES_PER_TOKEN), REPLY_TOKENS[judge.reasons] * len(todo)
    prices = judge.usd_per_mtok or price_of(judge.model)
    usd = None if prices is None else (read * prices[0] + written * prices[1]) / 1e6
    return {"judge": judge.name, "calls": len(todo), "judged_before": len(cases) - len(todo), "prompt_tokens": read, "completion_tokens": written,
            "usd_per_mtok": prices, "usd": usd}  # fmt: skip
