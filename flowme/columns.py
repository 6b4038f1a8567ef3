"""Which column of a table is what: as the user names them, or by their NONMEM names."""

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any, NamedTuple

import pandas as pd

from flowme.table import StudyError, is_name

__all__ = ["Columns", "by_name", "find_columns", "names_in"]


_NONMEM = {
    "subject": "ID",
    "time": "TIME",
    "outcome": "DV",
    "amount": "AMT",
    "event": "EVID",
    "missing": "MDV",
    "compartment": "CMT",
    "rate": "RATE",
    "duration": "DUR",
    "additional": "ADDL",
    "interval": "II",
    "steady_state": "SS",
    "censored": "CENS",
    "limit": "LIMIT",
    "outcome_type": "DVID",
    "occasions": "OCC",
}


_OF_DOSES = ("duration", "additional", "interval", "steady_state")

# A period may have an effect of its own beside κ, and CMT may tell where a dose goes in one row
# and what was measured in another. No other column is two things at once.
_TOGETHER = (
    {"occasions", "covariates"},
    {"occasions", "time_varying"},
    {"compartment", "outcome_type"},
)


class Columns(NamedTuple):
    """The column of each role; `outcome`, `censored` and `limit` map the outcome to its column."""

    subject: str
    time: str
    outcome: dict[str, str]
    covariates: tuple[str, ...]
    time_varying: tuple[str, ...]
    censored: dict[str, str]
    limit: dict[str, str]
    amount: str | None = None
    event: str | None = None
    missing: str | None = None
    compartment: str | None = None
    rate: str | None = None
    duration: str | None = None
    additional: str | None = None
    interval: str | None = None
    steady_state: str | None = None
    outcome_type: str | None = None
    occasions: tuple[str, ...] = ()


def names_in(option: str, value: Any) -> tuple[Any, ...]:
    """The names in an option that is one name or several."""
    if isinstance(value, Mapping):
        raise StudyError([f"expected {option}= to be a name or several; got {value!r}"])
    if value is None:
        return ()
    alone = isinstance(value, str) or not isinstance(value, Iterable)
    names = (value,) if alone else tuple(value)
    for name in names:
        if not is_name(name):
            raise StudyError([f"expected names in {option}=; got {name!r}"])
    return names


def by_name(option: str, value: Any, otherwise: Any) -> dict[Any, Any]:
    """An option that maps names to something, or is one name or several, each with `otherwise`."""
    if isinstance(value, Mapping):
        return dict(value)
    return dict.fromkeys(names_in(option, value), otherwise)


def find_columns(
    frame: pd.DataFrame,
    named: Mapping[str, Any],
    covariates: tuple[str, ...],
    time_varying: tuple[str, ...],
) -> Columns:
    """The columns as named by the user or, where left out, by their NONMEM names."""
    if not isinstance(frame, pd.DataFrame):
        raise StudyError([f"expected a pandas DataFrame; got {type(frame).__name__}"])
    given = dict(named)
    for role, name in _NONMEM.items():
        if role in _OF_DOSES and given["amount"] is None:
            continue  # DUR, II or SS may be anything in a table without doses
        if given[role] is None and name in frame.columns:
            given[role] = name
        if given[role] is None and role in ("subject", "time", "outcome"):
            present = ", ".join(map(str, frame.columns))
            raise StudyError(
                [f"expected a column for {role}; got none. Name it: {role}=... (of: {present})"]
            )
    outcome = given.pop("outcome")
    outcome = (
        dict(outcome)
        if isinstance(outcome, Mapping)
        else {name: name for name in names_in("outcome", outcome)}
    )
    if named["outcome_type"] is None and list(outcome.values()) != ["DV"]:
        given["outcome_type"] = None  # DVID tells the kinds of DV apart, not of another column
    censored, limit = (
        _by_outcome(role, given.pop(role), outcome) for role in ("censored", "limit")
    )
    given["occasions"] = names_in("occasions", given["occasions"])
    columns = Columns(
        outcome=outcome,
        covariates=tuple(name for name in covariates if name not in time_varying),
        time_varying=time_varying,
        censored=censored,
        limit=limit,
        **given,
    )
    findings = _column_findings(frame, columns)
    if findings:
        raise StudyError(findings)
    return columns


def _by_outcome(role: str, columns: Any, outcome: Iterable[str]) -> dict[str, str]:
    """Outcome -> column, where one column may be named for all."""
    if columns is None or isinstance(columns, Mapping):
        return dict(columns or {})
    return dict.fromkeys(outcome, columns)


def _by_role(columns: Columns) -> dict[str, list[Any]]:
    """The columns of each role, as a list."""
    roles: dict[str, list[Any]] = {}
    for role, value in columns._asdict().items():
        if isinstance(value, dict):
            roles[role] = list(value.values())
        else:
            roles[role] = list(value) if isinstance(value, tuple) else [value] * (value is not None)
    return roles


def _column_findings(frame: pd.DataFrame, columns: Columns) -> list[str]:
    """What is wrong with the columns themselves, before any row is looked at."""
    roles = _by_role(columns)
    findings = [
        f"expected {role}= to name a column; got {name!r}"
        for role, names in roles.items()
        for name in names
        if not is_name(name)
    ]
    if findings:
        return findings
    present = ", ".join(map(str, frame.columns))
    findings = [
        f"expected column {name!r}; got a table without it. Its columns are: {present}"
        for name in dict.fromkeys(name for names in roles.values() for name in names)
        if name not in frame.columns
    ]
    if not frame.columns.is_unique:
        twice = sorted(set(map(str, frame.columns[frame.columns.duplicated()])))
        findings.append(f"expected distinct column names; got {', '.join(twice)} more than once")
    if not columns.outcome:
        findings.append("expected at least one outcome; got none")
    if columns.outcome_type is not None and len(columns.outcome) != 1:
        findings.append(
            f"expected one outcome column beside outcome_type; got {list(columns.outcome)}"
        )
    if len(set(columns.outcome.values())) < len(columns.outcome):
        findings.append(
            f"expected a column of its own for each outcome; got {columns.outcome}. "
            "Use outcome_type= for the column that tells them apart"
        )
    return [
        *findings,
        *_findings_of_roles(roles),
        *_findings_by_outcome("censored", columns.censored, columns.outcome),
        *_findings_by_outcome("limit", columns.limit, columns.outcome),
        *_limits_alone(columns),
    ]


def _findings_of_roles(roles: dict[str, list[Any]]) -> list[str]:
    """Columns that would be two things at once."""
    findings = []
    for (one, its), (other, others) in combinations(roles.items(), 2):
        shared = dict.fromkeys(name for name in its if name in others)
        if {one, other} not in _TOGETHER:
            findings += [
                f"expected one role for column {name!r}; got {one} and {other}. If both are "
                "meant, copy the column under another name"
                for name in shared
            ]
    occasions = roles["occasions"]
    if len(set(occasions)) < len(occasions):
        findings.append(f"expected different columns of occasions; got {occasions}")
    return findings


def _findings_by_outcome(role: str, columns: dict[str, str], outcome: dict[str, str]) -> list[str]:
    """What is wrong with the columns of a role that each outcome has by itself."""
    findings = []
    if len(outcome) > 1 and len(set(columns.values())) < len(columns):
        what = {"censored": "censoring", "limit": "limits"}[role]
        findings.append(
            f"expected a column of {what} for each outcome; got "
            f"{sorted(set(columns.values()))}. Write {role}={{outcome: column}}"
        )
    for name in columns:
        if name not in outcome:
            findings.append(f"expected {role} to name outcomes of {list(outcome)}; got {name!r}")
    return findings


def _limits_alone(columns: Columns) -> list[str]:
    """Limits of outcomes whose censoring is not told."""
    alone = {column: None for name, column in columns.limit.items() if name not in columns.censored}
    return [
        f"expected a column of -1, 0, 1 beside the limits in {column!r}; got none. "
        "Name it: censored=..."
        for column in alone
    ]
