"""What was measured, what was asked for, and the table of both."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

Verdict = Literal["pass", "FAIL", ""]
OURS = "fsmount"


@dataclass(frozen=True, slots=True)
class Sample:
    """One figure of one run: `measure` says what in which unit, `contender` whose."""

    scenario: str
    measure: str
    contender: str
    run: int
    value: float


@dataclass(frozen=True, slots=True)
class Ask:
    """fsmount's figure is to be at most `at_most` times the peer's; without a peer, at most `at_most`."""

    measure: str
    peer: str | None
    at_most: float


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table; `ratio` is fsmount's figure by this contender's, the median over the runs."""

    scenario: str
    measure: str
    contender: str
    median: float
    least: float
    most: float
    runs: int
    ratio: float | None
    asked: float | None
    verdict: Verdict


def rows(samples: Sequence[Sample], asks: Sequence[Ask]) -> Iterator[Row]:
    """A row a contender, fsmount's first; in the order in which the measures came."""
    keys = dict.fromkeys((sample.scenario, sample.measure) for sample in samples)
    for scenario, measure in keys:
        values: dict[str, dict[int, float]] = {}
        for sample in samples:
            if (sample.scenario, sample.measure) == (scenario, measure):
                values.setdefault(sample.contender, {})[sample.run] = sample.value
        ours = values.get(OURS, {})
        for contender, by_run in sorted(values.items(), key=lambda item: item[0] != OURS):
            shared = [ours[run] / value for run, value in by_run.items() if run in ours and value]
            ratio = median(shared) if shared and contender != OURS else None
            peer = None if contender == OURS else contender
            asked = next((a.at_most for a in asks if (a.measure, a.peer) == (measure, peer)), None)
            figure = ratio if peer else median(by_run.values())
            verdict: Verdict = ""
            if asked is not None and figure is not None:
                verdict = "pass" if figure <= asked else "FAIL"
            seen = list(by_run.values())
            middle = median(seen)
            yield Row(
                scenario, measure, contender, middle, min(seen), max(seen), len(seen), ratio, asked, verdict
            )


def table(lines: Sequence[Row], notes: Sequence[str]) -> str:
    """The rows as plain text, then what was skipped and why."""
    head = ("measure", "contender", "median", "least", "most", "runs", "ours/its", "asked", "")
    cells: list[tuple[str, ...]] = [head]
    shown = ""
    for row in lines:
        numbers = tuple(_number(value) for value in (row.median, row.least, row.most))
        measure = "" if row.measure == shown else row.measure
        shown = row.measure
        ratio, asked = _number(row.ratio), "" if row.asked is None else f"≤ {_number(row.asked)}"
        cells.append((measure, row.contender, *numbers, str(row.runs), ratio, asked, row.verdict))
    widths = [max(len(cell[column]) for cell in cells) for column in range(len(head))]
    text = [
        "  ".join(
            c.ljust(w) if n < 2 else c.rjust(w) for n, (c, w) in enumerate(zip(cell, widths, strict=True))
        )
        for cell in cells
    ]
    return "\n".join([line.rstrip() for line in text] + [""] * bool(notes) + list(notes))


def save(path: Path, lines: Sequence[Row], samples: Sequence[Sample], notes: Sequence[str]) -> None:
    """Everything as JSON: the rows, each sample, the notes."""
    content = {
        "schema": 1,
        "rows": [asdict(row) for row in lines],
        "samples": [asdict(sample) for sample in samples],
        "notes": list(notes),
    }
    path.write_text(json.dumps(content, indent=1))


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value and abs(value) < 0.01:
        return f"{value:.5f}"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"
