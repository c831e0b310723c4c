"""From measurements to numbers that can be compared: medians, ratios, tables. Pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench_cases import GROUP_TITLES, Case, Contender, Group
from bench_record import Entry


@dataclass(frozen=True, slots=True)
class Metric:
    """A number that is compared; the less the better."""

    name: str
    #: Column of the table.
    title: str
    #: What one unit of the table is, in the metric's own.
    unit: float = 1.0
    digits: int = 2
    #: A time of the same work is told as "so many times as fast", the rest as a share.
    as_speed: bool = False


METRICS: tuple[Metric, ...] = (
    Metric("seconds per picture", "picture, s", digits=1, as_speed=True),
    Metric("seconds per UNet evaluation", "evaluation, s", digits=3, as_speed=True),
    Metric("seconds to first step, first start", "first start, s", digits=1),
    Metric("seconds to first step, second start", "second start, s", digits=1),
    Metric("peak memory of the process tree, bytes", "peak memory, GB", unit=1e9),
    Metric("bytes on disk", "on disk, GB", unit=1e9),
    Metric("bytes installed", "installed, GB", unit=1e9),
)
PICTURE, EVALUATION, COLD, WARM, PEAK, DISK, INSTALLED = (metric.name for metric in METRICS)

#: Values of one contender by metric; what was not measured is left out.
Values = dict[str, float]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of docs/performance.json: sdvino beside a group of peers in one number."""

    case: str
    isa: str
    metric: str
    sdvino: float
    peers: dict[str, float]
    #: To the best of these peers: how many times as fast for pictures and evaluations, sdvino's
    #: share of the peer's number for everything else.
    ratio: float
    against: Group


def summarize(starts: Sequence[Entry], *, cold: bool, disk: int, installed: int) -> Values:
    """Return the values of one contender from its fresh processes, the first start first.

    ``cold``: the first of them found no compiled models. With a single one there is no second
    start. Medians of what was measured more than once.
    """
    values: Values = {
        PICTURE: statistics.median(s for e in starts for s in e.measured.pictures),
        EVALUATION: statistics.median(e.measured.evaluation for e in starts),
        PEAK: statistics.median(e.peak for e in starts),
        DISK: disk,
        INSTALLED: installed,
    }
    if cold:
        values[COLD] = starts[0].measured.ready
    later = starts[1:] if cold else starts
    if later:
        values[WARM] = statistics.median(e.measured.ready for e in later)
    return values


def ratio(metric: Metric, own: float, best: float) -> float:
    """Return how ``own`` stands to the best peer's ``best``; nan where one of them is 0."""
    if own <= 0 or best <= 0:
        return math.nan
    return best / own if metric.as_speed else own / best


def rows_of(
    case: Case, isa: str, contenders: Sequence[Contender], values: Mapping[str, Values]
) -> list[Row]:
    """Return the comparisons of one case, by group of peers and metric.

    ``values`` is by contender. A metric that sdvino or every peer of a group lacks is left out.
    """
    rows = []
    own = values.get("sdvino", {})
    for group in ("default", "best", "torch"):
        names = [c.name for c in contenders if c.group == group and c.name in values]
        for metric in METRICS:
            peers = {n: values[n][metric.name] for n in names if metric.name in values[n]}
            if metric.name in own and peers:
                best = min(peers.values())
                value = ratio(metric, own[metric.name], best)
                found = own[metric.name]
                rows.append(Row(case.name, isa, metric.name, found, peers, value, group))
    return rows


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as docs/performance.json has them; a ratio that is none is null."""
    return [
        {**asdict(row), "ratio": None if math.isnan(row.ratio) else round(row.ratio, 4)}
        for row in rows
    ]


def table(
    contenders: Sequence[Contender], values: Mapping[str, Values], rows: Sequence[Row]
) -> str:
    """Return one case in Markdown: a line for each contender, then the ratios by group."""
    lines = [
        "| | " + " | ".join(metric.title for metric in METRICS) + " |",
        "|---" * (len(METRICS) + 1) + "|",
    ]
    lines += [_line(c.name, [_cell(m, values[c.name]) for m in METRICS]) for c in contenders]
    for group, title in GROUP_TITLES.items():
        by_metric = {row.metric: row for row in rows if row.against == group}
        if by_metric:
            cells = [_ratio_cell(m, by_metric.get(m.name)) for m in METRICS]
            lines.append(_line(f"**sdvino to the best of: {title}**", cells))
    return "\n".join(lines)


def _line(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def _cell(metric: Metric, values: Values) -> str:
    value = values.get(metric.name)
    return "-" if value is None else f"{value / metric.unit:.{metric.digits}f}"


def _ratio_cell(metric: Metric, row: Row | None) -> str:
    if row is None or math.isnan(row.ratio):
        return "-"
    return f"{row.ratio:.2f} x as fast" if metric.as_speed else f"{row.ratio:.2f} x"


@dataclass(frozen=True, slots=True)
class Growth:
    """y ~ factor * x ** exponent, and y ~ fixed + each * x."""

    exponent: float
    fixed: float
    each: float


def fit_growth(points: Sequence[tuple[float, float]]) -> Growth:
    """Fit both laws by least squares; the power law in logarithms.

    Raises ValueError for fewer than two different x, or where one of the numbers is not positive.
    """
    if len({x for x, _ in points}) < 2:
        raise ValueError("a growth needs measurements at two sizes")
    if any(x <= 0 or y <= 0 for x, y in points):
        raise ValueError("a growth needs positive numbers")
    exponent, _ = _line_through([(math.log(x), math.log(y)) for x, y in points])
    each, fixed = _line_through(points)
    return Growth(exponent, fixed, each)


def _line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return slope and intercept of the least squares line."""
    mean_x = statistics.mean(x for x, _ in points)
    mean_y = statistics.mean(y for _, y in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum(
        (x - mean_x) ** 2 for x, _ in points
    )
    return slope, mean_y - slope * mean_x
