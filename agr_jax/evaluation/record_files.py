"""Stored results of evaluations: which belong to the evaluation that is asked for, and the others.

Two results are of the same evaluation if their records agree in what who asks knows (the step, the
images, the seed, ...) and the stored settings are those that the config gives the attack of that
name. A setting that is not stored is younger than the result and counts as its default. This is the
only place that says so: evaluations add to what is here, sweeps and reports use it.

Nothing that is stored is deleted. What does not belong to the evaluation stays in the file under
`earlier`, each attack with the `reason`; a file that cannot be read is renamed.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from agr_jax import distributed
from agr_jax.attacks import Attack, named
from agr_jax.errors import ConfigError
from agr_jax.files import write_atomically

Maker = Callable[[str], Attack | None]
# Settings that change how long an attack takes, not what it finds.
_SPEED_ALONE = {"batch_size"}


class Result(NamedTuple):
    """One attack's entry of a record.

    Attributes:
        name: of the attack, as it is called today.
        stored_name: as it was called when it was stored.
        entry: what is stored.
        reason: why it is not of the evaluation that is asked for; empty if it is.
    """

    name: str
    stored_name: str
    entry: Any
    reason: str


def results(record: Mapping[str, Any], meant: Maker, asked: Mapping[str, Any]) -> Iterator[Result]:
    """All entries of a record, each with the reason why it is of another evaluation, if it is.

    Args:
        record: a file's content, or one of the groups under `earlier`.
        meant: makes the attack that a name stands for, as `named.maker(config)`.
        asked: fields that the record must have: `step` or `epoch`, `seed`, `digests`, ...
    """
    attacks = record.get("attacks", {})
    whole = [
        f"{field}: {_shown(record.get(field))} there, {_shown(value)} here"
        for field, value in asked.items()
        if record.get(field) != value
    ]
    for stored_name, entry in attacks.items() if isinstance(attacks, Mapping) else ():
        name = current_name(stored_name, entry)
        reasons = [*whole, *why_other(name, entry, meant)]
        yield Result(name, stored_name, entry, "; ".join(reasons))


def why_other(name: str, entry: Any, meant: Maker) -> list[str]:
    """What keeps an entry from being a result of the attack that is meant by a name.

    Args:
        name: as it is called today, see `current_name`.
        entry: what is stored.
        meant: makes the attack that a name stands for, as `named.maker(config)`.

    Returns:
        One text for each difference; empty if it is such a result.
    """
    if not isinstance(entry, Mapping) or not isinstance(entry.get("accuracy"), int | float):
        return ["damaged: holds no accuracy"]
    settings = stored_settings(entry)
    if settings is None:
        return ["damaged: holds no settings"]
    try:
        attack = meant(name)
    except ConfigError:
        return [f"no attack is called {name} here"]
    expected = named.describe(attack)
    return list(_differences(settings, expected, default_settings(attack), attack))


def current_name(name: str, entry: Any) -> str:
    """What an entry's attack is called today.

    Earlier versions called the attack along the dense gradient `pgd20@l1`, which is now
    `pgd20-dense@l1`: the settings tell them apart.
    """
    settings = stored_settings(entry) if isinstance(entry, Mapping) else None
    threat = None if settings is None else _taken_apart(settings.get("threat"))
    is_dense = threat is not None and threat[0] == "L1" and threat[1].get("sparsity", 0) is None
    return named.dense_name(name) if is_dense else name


def attacks_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record's entries by what their attacks are called today."""
    attacks = record.get("attacks")
    attacks = attacks if isinstance(attacks, Mapping) else {}
    return {current_name(name, entry): entry for name, entry in attacks.items()}


def stored_settings(entry: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The settings of an entry's attack, or `None` where it says nothing of them."""
    if isinstance(entry.get("settings"), Mapping):
        return dict(entry["settings"])
    if not {"version", "norm", "epsilon"} <= entry.keys():
        return None
    # Entries of AutoAttack in files of earlier versions.
    sequence = entry.get("attacks", []) if entry["version"] == "custom" else []
    threat = f"{entry['norm']}(epsilon={entry['epsilon']!r})"
    return {
        "attack": "AutoAttack",
        "threat": threat,
        "version": entry["version"],
        "attacks": sequence,
    }


def default_settings(of: Any) -> dict[str, Any]:
    """The defaults of a dataclass's fields, as `named.describe` writes them.

    They are what settings count as that a record does not have: a field that is younger than a
    record must have that default which leaves the attack as it was.
    """
    found = {}
    for field in dataclasses.fields(of) if dataclasses.is_dataclass(of) else ():
        if field.default is not dataclasses.MISSING:
            found[field.name] = named.describe_setting(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = named.describe_setting(field.default_factory())
    return found


def selection(record: Mapping[str, Any], path: Path) -> str:
    """Which test images a record is of, such as `first 1000 of 10000`; empty for all of them."""
    said = record.get("selection")
    if said is None:  # files of earlier versions
        return f"first {record.get('examples')}" if is_part(path) else ""
    return "" if str(said).startswith("all ") else str(said)


def file_title(path: Path) -> str:
    """A file's name without what says that it is of a part of the images: `last-table1`."""
    return re.sub(r"-(first|drawn)\d+$", "", path.stem)


def is_part(path: Path) -> bool:
    """Whether a file's name says that it is of a part of the test images."""
    return file_title(path) != path.stem


@distributed.decided_by_first
def read(path: Path) -> dict[str, Any]:
    """A file's content, or nothing where there is no file.

    A file that is no record is renamed, to `<name>.damaged`, `<name>.damaged-2`, ...

    Raises:
        OSError: if it is there, but cannot be read: writing over it would lose it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and isinstance(values.get("attacks", {}), dict):
            return values
    except FileNotFoundError:
        return {}
    except ValueError:  # no JSON, or no UTF-8
        pass
    aside = set_aside(path)
    distributed.say(f"{path} is damaged, and is kept as {aside.name}")
    return {}


def set_aside(path: Path) -> Path:
    """Renames a damaged file to a name that is free, which no reader looks for."""
    taken = 1
    aside = path.with_name(f"{path.name}.damaged")
    while aside.exists():
        taken += 1
        aside = path.with_name(f"{path.name}.damaged-{taken}")
    return path.rename(aside)


def carry_over(
    stored: Mapping[str, Any], meant: Maker, asked: Mapping[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]], list[Result]]:
    """What a new record takes from the file that it replaces.

    Args:
        stored: the file's content; it may be empty.
        meant: makes the attack that a name stands for in the new record.
        asked: what the new record has, see `results`.

    Returns:
        The entries of the same evaluation by name, each with the environment that it ran in; the
        groups for `earlier`, each a record with the attacks of other evaluations; and of those the
        ones that were no earlier ones until now.
    """
    same: dict[str, Any] = {}
    earlier: list[dict[str, Any]] = []
    moved: list[Result] = []
    own = {name: value for name, value in stored.items() if name != "earlier"}
    for group in [own, *earlier_groups(stored)]:
        if not isinstance(group.get("attacks"), Mapping):
            earlier += [dict(group)] if group else []
            continue
        others = {}
        for result in results(group, meant, asked):
            reason = result.reason
            if not reason and result.name in same:
                reason = "the same evaluation, done again since"
            if not reason:
                entry = {name: value for name, value in result.entry.items() if name != "reason"}
                environment = {n: group[n] for n in ("environment",) if n in group}
                same[result.name] = {**environment, **entry}
                continue
            is_entry = isinstance(result.entry, Mapping)
            entry = dict(result.entry) if is_entry else {"stored": result.entry}
            others[result.stored_name] = {**entry, "reason": reason}
            if group is own:
                moved.append(result._replace(reason=reason))
        if others:
            earlier.append({**group, "attacks": others})
    return same, earlier, moved


def earlier_groups(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a file has of other evaluations: records, each with its own `attacks`."""
    groups = record.get("earlier", [])
    groups = groups if isinstance(groups, list) else [groups]
    return [group if isinstance(group, dict) else {"stored": group} for group in groups]


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record, whole or not at all."""
    write_atomically(path, json.dumps(record, indent=2) + "\n")


def _differences(
    stored: Mapping[str, Any],
    expected: Mapping[str, Any],
    defaults: Mapping[str, Any],
    attack: Attack | None,
) -> Iterator[str]:
    """How stored settings differ from those expected; one that is absent counts as its default."""
    for name in [*expected, *(n for n in stored if n not in expected)]:
        if name in _SPEED_ALONE:
            continue
        if name not in expected:
            yield f"{name}: {_shown(stored[name])} there, no such setting here"
            continue
        theirs, ours = stored.get(name, defaults.get(name, "nothing")), expected[name]
        inner = getattr(attack, name, None)
        apart = _taken_apart(theirs)
        if apart is not None and dataclasses.is_dataclass(inner) and not isinstance(inner, type):
            kind, fields = apart
            wanted = {field.name: getattr(inner, field.name) for field in dataclasses.fields(inner)}
            if kind == type(inner).__name__ and {**default_settings(inner), **fields} == wanted:
                continue
        elif _plain(theirs) == _plain(ours):
            continue
        yield f"{name}: {_shown(theirs)} there, {_shown(ours)} here"


def _taken_apart(text: Any) -> tuple[str, dict[str, Any]] | None:
    """`L1(epsilon=12.0, sparsity=None)` as its name and fields; `None` for another text."""
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            return None
        return call.func.id, {k.arg or "": ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, TypeError):
        return None


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(value))


def _shown(value: Any) -> str:
    """In a message, where a digest of 64 digits would say nothing."""
    text = str(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
