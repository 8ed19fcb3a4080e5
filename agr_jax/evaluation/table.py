"""The records of an evaluation as a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agr_jax.attacks import named
from agr_jax.config.settings import LINF_EPSILON
from agr_jax.errors import CheckpointError
from agr_jax.evaluation import record_files


def render_table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as a Markdown table, accuracies in percent."""
    if not records:
        raise CheckpointError("nothing was evaluated")
    attacks = [record_files.attacks_of(record) for record in records]
    names = list(dict.fromkeys(name for found in attacks for name in found))
    titles = [named.title(name) for name in names]
    lines = [
        "| checkpoint | epoch | " + " | ".join(titles) + " |",
        "|---|---|" + "---|" * len(titles),
    ]
    for record, found in zip(records, attacks, strict=True):
        cells = [f"{100 * found[name]['accuracy']:.2f}" if name in found else "-" for name in names]
        lines.append(f"| {record['checkpoint']} | {record['epoch']} | " + " | ".join(cells) + " |")
    record = records[0]
    note = "" if record["complete_data"] else "; a SUBSET of the data set, not comparable"
    threat, settings = record["threat"], record["config"]["eval"]
    lines.append("")
    lines.append(
        f"% correct of {record['examples']} test images{_selection(record)}, {threat['norm']} "
        f"epsilon {threat['epsilon']:.4g}, seed {record['seed']}{note}"
    )
    radii = {"linf": LINF_EPSILON, "l2": settings["l2_epsilon"], "l1": settings["l1_epsilon"]}
    asked = [named.split(name) for name in names]
    others = {each.norm for each in asked if each.norm and each.epsilon is None}
    for norm in sorted(others - {threat["norm"]}):
        lines.append(f"columns {norm.capitalize()}: epsilon {radii[norm]:.4g}")
    for each, of_each in zip(records, attacks, strict=True):
        for name, found in of_each.items():
            lines += [
                f"warning ({each['checkpoint']}, {named.title(name)}): {message}"
                for message in found.get("warnings", [])
            ]
        lines += [
            f"earlier, not in this table ({each['checkpoint']}, {named.title(name)}): "
            f"{entry.get('reason')}"
            for group in each.get("earlier", [])
            for name, entry in record_files.attacks_of(group).items()
        ]
    return "\n".join(lines)


def _selection(record: Mapping[str, Any]) -> str:
    """Which test images, in brackets; nothing for all of them."""
    selection = record.get("selection", "all ")  # files of earlier versions do not say it
    return "" if selection.startswith("all ") else f" ({selection})"
