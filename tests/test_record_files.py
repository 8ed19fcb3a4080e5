"""Which stored results belong to an evaluation, and that none is lost."""

import dataclasses
import inspect
import json
from pathlib import Path

import pytest

from agr_jax import attacks, losses
from agr_jax.attacks import named
from agr_jax.config import from_config_dict
from agr_jax.errors import OtherEvaluationError
from agr_jax.evaluation import record_files
from agr_jax.jobs import sweep
from agr_jax.journal import Journal
from agr_jax.report.run_records import read_run, read_runs
from agr_jax.threat import L1, Linf
from configs import digits_at

DOCS = Path(__file__).parents[1] / "docs"
CONFIG = from_config_dict(digits_at.get_config())
UNDER_L1 = dataclasses.replace(
    CONFIG, attack=dataclasses.replace(CONFIG.attack, norm="l1", epsilon=12.0)
)
ASKED = {"step": 20, "seed": 0}
# A name for each kind of attack.
NAMES = (
    "clean",
    "fgsm",
    "ifgsm5",
    "pgd20",
    "pgd20x5",
    "cw20",
    "mim10",
    "spsa10",
    "cw-l2@l2",
    "pgd20@l1",
    "pgd20-dense@l1",
    "slide20@l1",
    "autoattack",
    "fast@l2",
    "square@l1",
)


def entry(name, config=CONFIG, **changes):
    """An attack's entry as a file has it."""
    settings = named.describe(named.maker(config)(name))
    return json.loads(json.dumps({"accuracy": 0.5, "settings": {**settings, **changes}}))


def record(config=CONFIG, **entries):
    names = {name.replace("__", "@"): found for name, found in entries.items()}
    return {**ASKED, "environment": {"commit": "old"}, "attacks": names}


def reasons(stored, config=CONFIG, asked=ASKED):
    found = record_files.results(stored, named.maker(config), asked)
    return {result.name: result.reason for result in found}


def test_all_committed_records_are_recognised():
    found = 0
    for path in (*DOCS.glob("agr-small*/*/evaluations/*.json"), *DOCS.glob("evaluations/*.json")):
        stored = json.loads(path.read_text())
        known = reasons(stored, from_config_dict(stored["config"]), {"step": stored["step"]})
        assert set(known.values()) == {""}, path
        assert list(known) == list(stored["attacks"])
        found += len(known)
    assert found == 99


def test_a_report_uses_all_committed_records():
    run = read_run(DOCS / "agr-small/base-0")
    assert {name: run.attacks[name].accuracy for name in run.attacks} == {
        "clean": 0.599,
        "pgd20": 0.3284,
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_record_from_before_a_field_is_the_same_evaluation(name):
    """Field by field, and before all fields that have a default."""
    attack = named.maker(CONFIG)(name)
    assert record_files.why_other(name, entry(name), named.maker(CONFIG)) == []
    fields = dataclasses.fields(attack) if attack is not None else ()
    at_default = [
        field.name
        for field in fields
        if field.default is not dataclasses.MISSING and getattr(attack, field.name) == field.default
    ]
    for absent in (*([one] for one in at_default), at_default):
        old = entry(name)
        for one in absent:
            del old["settings"][one]
        assert record_files.why_other(name, old, named.maker(CONFIG)) == [], absent
        assert list(record_files.attacks_of(record(**{name: old}))) == [name]


def test_every_attack_and_threat_can_gain_a_field():
    """Whatever fields they get later: all of their settings have a default, or are asked for."""
    for cls in vars(attacks).values():
        if inspect.isclass(cls) and "threat" in getattr(cls, "__dataclass_fields__", {}):
            absent = set(record_files.default_settings(cls))
            assert {field.name for field in dataclasses.fields(cls)} - absent == {"threat"}


@dataclasses.dataclass(frozen=True)
class YoungerPGD(attacks.PGD):
    """PGD as a later version may have it."""

    verdict_draws: int = 3
    schedule: tuple[float, ...] = (0.5, 0.25)


@dataclasses.dataclass(frozen=True)
class YoungerLinf(Linf):
    """Linf as a later version may have it."""

    box: bool = True


@pytest.mark.parametrize("changed", [False, True])
def test_a_field_that_an_attack_or_a_ball_gains_makes_no_difference(changed):
    YoungerPGD.__name__, YoungerLinf.__name__ = "PGD", "Linf"
    threat = YoungerLinf(CONFIG.attack.epsilon, box=not changed)
    younger = YoungerPGD(threat, steps=20, step_size=CONFIG.eval.step_size)
    old = entry("pgd20")
    found = record_files.why_other("pgd20", old, lambda name: younger)
    assert bool(found) is changed
    younger = dataclasses.replace(younger, threat=YoungerLinf(threat.epsilon), verdict_draws=4)
    assert record_files.why_other("pgd20", old, lambda name: younger) == [
        "verdict_draws: 3 there, 4 here"
    ]


@pytest.mark.parametrize(
    ("name", "stored", "reason"),
    [
        ("pgd20", entry("pgd20", steps=21), "steps: 21 there, 20 here"),
        ("pgd20", entry("pgd20", loss="margin"), "loss: margin there, cross_entropy here"),
        ("pgd20", entry("pgd20", targeted=True), "targeted: True there, False here"),
        ("pgd20", entry("pgd20", threat="Linf(epsilon=0.3)"), "threat: Linf(epsilon=0.3) there"),
        ("pgd20", entry("pgd20", threat="L2(epsilon=0.15)"), "threat: L2(epsilon=0.15) there"),
        ("pgd20", entry("pgd20", radius_decay=1), "radius_decay: 1 there, no such setting here"),
        ("pgd20", entry("cw20"), "loss: margin there"),
        ("clean", entry("pgd20"), "attack: PGD there, no such setting here"),
        ("foo5", entry("pgd20"), "no attack is called foo5 here"),
        ("pgd20", {"accuracy": 0.5}, "damaged: holds no settings"),
        ("pgd20", {"settings": {}}, "damaged: holds no accuracy"),
        ("pgd20", None, "damaged: holds no accuracy"),
        ("pgd20", [0.5], "damaged: holds no accuracy"),
        ("autoattack", entry("fast"), "version: fast there, standard here"),
    ],
)
def test_other_evaluations_stay_and_say_why(name, stored, reason):
    assert reason in reasons(record(**{name: stored}))[name]
    whole = record(**{name: stored, "fgsm": entry("fgsm")})
    same, earlier, moved = record_files.carry_over(whole, named.maker(CONFIG), ASKED)
    assert list(same) == ["fgsm"]
    assert [result.name for result in moved] == [name]
    (group,) = earlier
    assert group["environment"] == {"commit": "old"}
    kept = dict(group["attacks"][name])
    assert reason in kept.pop("reason")
    assert kept == (stored if isinstance(stored, dict) else {"stored": stored})
    # They stay at the next evaluation too, and are not moved again.
    following = {**ASKED, "environment": {}, "attacks": same, "earlier": earlier}
    same, again, moved = record_files.carry_over(following, named.maker(CONFIG), ASKED)
    assert (list(same), again, moved) == (["fgsm"], earlier, [])


@pytest.mark.parametrize(
    "changes", [{"step": 40}, {"seed": 1}, {"step": None}, {"digests": {"network": "0"}}]
)
def test_results_of_another_checkpoint_seed_or_network_stay(changes):
    asked = {**ASKED, "digests": {"network": "1"}}
    old = {**record(pgd20=entry("pgd20")), "digests": asked["digests"], **changes}
    same, earlier, moved = record_files.carry_over(old, named.maker(CONFIG), asked)
    assert same == {}
    assert [result.name for result in moved] == ["pgd20"]
    assert next(iter(changes)) in moved[0].reason
    assert {n: v for n, v in earlier[0].items() if n != "attacks"} == {
        n: v for n, v in old.items() if n != "attacks"
    }


def test_an_earlier_result_comes_back_with_its_settings():
    other = dataclasses.replace(CONFIG, eval=dataclasses.replace(CONFIG.eval, step_size=0.01))
    old = record(pgd20=entry("pgd20"))
    same, earlier, _ = record_files.carry_over(old, named.maker(other), ASKED)
    assert same == {}
    newer = {**record(pgd20=entry("pgd20", other)), "earlier": earlier}
    same, earlier, _ = record_files.carry_over(newer, named.maker(CONFIG), ASKED)
    assert same == {"pgd20": {"environment": {"commit": "old"}, **entry("pgd20")}}
    assert list(earlier[0]["attacks"]) == ["pgd20"]
    assert len(earlier) == 1


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"", b'{"attacks": [1]}'])
def test_a_damaged_file_is_renamed(tmp_path, capsys, content):
    path = tmp_path / "last.json"
    for number, kept in enumerate(("last.json.damaged", "last.json.damaged-2")):
        path.write_bytes(content)
        assert record_files.read(path) == {}
        assert not path.exists()
        assert (tmp_path / kept).read_bytes() == content
        assert kept in capsys.readouterr().out
        assert len(list(tmp_path.iterdir())) == number + 1
    assert record_files.read(path) == {}


def test_entries_of_autoattack_from_before_their_settings_were_stored():
    old = {
        "accuracy": 0.3,
        "title": "AutoAttack",
        "version": "standard",
        "attacks": ["apgd-ce", "apgd-t", "fab-t", "square"],
        "norm": "L1",
        "epsilon": CONFIG.eval.l1_epsilon,
    }
    assert record_files.why_other("autoattack@l1", old, named.maker(CONFIG)) == []
    alone = {**old, "version": "custom", "attacks": ["square"]}
    assert record_files.why_other("square@l1", alone, named.maker(CONFIG)) == []
    assert record_files.why_other("fab@l1", alone, named.maker(CONFIG))
    assert record_files.why_other("autoattack@l1", {**old, "epsilon": 1.0}, named.maker(CONFIG))
    # The number of images at a time changes the speed alone.
    faster = dataclasses.replace(CONFIG, eval=dataclasses.replace(CONFIG.eval, batch_size=7))
    assert record_files.why_other("fast", entry("fast", faster), named.maker(CONFIG)) == []


@pytest.mark.parametrize(
    ("config", "name", "today"),
    [
        (CONFIG, "pgd20@l1", "pgd20-dense@l1"),
        (CONFIG, "pgd20x5@l1=3", "pgd20x5-dense@l1=3"),
        (CONFIG, "cw20@l1", "cw20-dense@l1"),
        (UNDER_L1, "pgd20", "pgd20-dense"),
        (CONFIG, "slide20@l1", "slide20@l1"),
        (CONFIG, "fgsm@l1", "fgsm@l1"),
        (CONFIG, "pgd20", "pgd20"),
    ],
)
def test_old_names_under_l1_are_those_of_the_dense_attack(config, name, today):
    """An earlier version's `pgd20@l1` has stored that its gradient is dense."""
    old = entry(today, config)
    del old["settings"]["targeted" if "targeted" in old["settings"] else "loss"]
    stored = record(**{name: old})
    assert reasons(stored, config) == {today: ""}
    same, earlier, _ = record_files.carry_over(stored, named.maker(config), ASKED)
    assert (list(same), earlier) == ([today], [])


def test_a_sweep_and_a_report_have_the_same_rule(tmp_path):
    """Results of other settings are neither done nor shown; older ones are both."""
    planned = sweep.PlannedRun("run", CONFIG)
    folder = tmp_path / "run"
    (folder / "evaluations").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(CONFIG)))
    (folder / "metrics.jsonl").write_text(json.dumps({"epoch": CONFIG.epochs}) + "\n")
    old = entry("pgd20")
    del old["settings"]["draws"]
    wanted = sweep.Evaluation("", ("pgd20", "pgd20-dense@l1"), 30)
    dense = {**entry("pgd20-dense@l1"), "accuracy": 0.75}
    for changes, is_same in (({}, True), ({"step_size": 0.5}, False)):
        old["settings"] |= changes
        content = {"epoch": CONFIG.epochs, "examples": 30, "attacks": {"pgd20": old}}
        content["attacks"]["pgd20@l1"] = dense
        path = folder / "evaluations/last-first30.json"
        path.write_text(json.dumps(content))
        assert sweep._has(folder, planned, "last", wanted) is is_same
        found = read_run(folder).attacks
        assert set(found) == {"pgd20-dense@l1"} | ({"pgd20"} if is_same else set())
        assert found["pgd20-dense@l1"].accuracy == 0.75
        assert found["pgd20-dense@l1"].images == "30"
        reason = {} if is_same else {f"run/evaluations/{path.name}: pgd20": "step_size: 0.5 there"}
        problems = {name: text.split(",")[0] for name, text in read_runs(tmp_path)[1].items()}
        assert problems == reason
    drawn = {**content, "attacks": {"pgd20@l1": dense}, "selection": "30 drawn with seed 0 of 60"}
    path.with_name("last-drawn30.json").write_text(json.dumps(drawn))
    assert sweep._has(folder, planned, "last", sweep.Evaluation("", ("pgd20-dense@l1",), 30))
    assert not sweep._has(folder, planned, "last", sweep.Evaluation("", ("pgd20-dense@l1",), 0))
    # The first images of an image folder, as earlier versions took them, do not stand for it.
    data = dataclasses.replace(CONFIG.data, name="image_folder")
    planned = dataclasses.replace(planned, config=dataclasses.replace(CONFIG, data=data))
    wanted = sweep.Evaluation("", ("pgd20-dense@l1",), 30)
    assert sweep._has(folder, planned, "last", wanted)
    kept = path.rename(folder / "kept")
    assert read_run(folder).attacks["pgd20-dense@l1"].images == "30 drawn"
    kept.rename(path)
    path.with_name("last-drawn30.json").unlink()
    assert not sweep._has(folder, planned, "last", wanted)


def test_progress_from_before_a_setting_goes_on(tmp_path):
    Journal(tmp_path, {"steps": "20"})
    Journal(tmp_path, {"steps": "20", "draws": "0"}, {"draws": "0"})
    with pytest.raises(OtherEvaluationError, match="draws: '0' there, '2' here"):
        Journal(tmp_path, {"steps": "20", "draws": "2"}, {"draws": "0"})
    with pytest.raises(OtherEvaluationError, match="draws: None there, '0' here"):
        Journal(tmp_path, {"steps": "20", "draws": "0"})


def test_the_default_ball_of_l1_is_the_sparse_one():
    assert record_files.default_settings(L1(1.0)) == {"sparsity": 0.99}
    assert record_files.default_settings(attacks.PGD)["loss"] == losses.cross_entropy.__name__
    assert record_files.default_settings(None) == {}
