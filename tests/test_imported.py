"""Attacks, threat models and data sets of one's own, which a config names MODULE:FUNCTION."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import small

from agr_jax import data
from agr_jax.attacks import named
from agr_jax.config import imported
from agr_jax.errors import ConfigError
from agr_jax.threat import Linf
from agr_jax.training import train_run

MINE = '''
"""What a user has beside their images."""
import dataclasses

import jax
import jax
import jax.numpy as jnp

from agr_jax.data import Dataset
from agr_jax.data.digits import read_digits
from agr_jax.threat import Linf


@dataclasses.dataclass(frozen=True)
class Noise:
    """The worst of a few random points."""

    threat: object
    tries: int = 3
    scale: float = 1.0

    def __call__(self, logits_fn, images, labels, key):
        points = images
        for index in range(self.tries):
            keys = jax.vmap(lambda k: jax.random.fold_in(k, index))(key)
            drawn = self.threat.random_start(keys, images)
            drawn = images + self.scale * (drawn - images)
            wrong = jnp.argmax(logits_fn(drawn), 1) != labels
            points = jnp.where(wrong[:, None, None, None], drawn, points)
        return points


def noise(threat):
    return Noise(threat)


def too_far(threat):
    return Noise(threat, scale=3.0)


def darker(threat):
    return lambda logits_fn, images, labels, key: images - 0.05


def black(threat):
    return lambda logits_fn, images, labels, key: jnp.zeros_like(images)


class Nameless:
    """Whose repr is an address, another one in each process."""

    def __call__(self, logits_fn, images, labels, key):
        return images


def nameless(threat):
    return Nameless()


def not_an_attack(threat):
    return 7


class Brighter(Linf):
    """Pixels only become brighter."""

    def project(self, candidates, images, *, box=True):
        return jnp.maximum(super().project(candidates, images, box=box), images)

    def random_start(self, key, images):
        return self.project(super().random_start(key, images), images)


def brighter(epsilon):
    return Brighter(epsilon)


def not_a_ball(epsilon):
    return epsilon


def digits(config):
    whole = read_digits()
    return Dataset("mine", whole.class_names, whole.train, whole.test, None, "a module", True)


def not_a_data_set(config):
    return config.data
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The module lies where the user stands, which Python does not look at by itself."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield
    sys.modules.pop("mine", None)
    imported.constant.cache_clear()


def test_a_run_with_all_three(mine, tmp_path):
    attacks = ("clean", "pgd3", "mine:noise", "mine:noise@linf=0.3")
    config = small(
        data__name="mine:digits", attack__norm="mine:brighter", eval__attacks=attacks, epochs=1
    )
    assert train_run(config, tmp_path / "run") == 0
    record = json.loads((tmp_path / "run/evaluations/last-first60.json").read_text())
    assert record["data"].startswith("mine: 256 + 355 images (+ 60 held out)")
    assert record["threat"] == {"norm": "mine:brighter", "epsilon": config.attack.epsilon}
    found = record["attacks"]
    assert list(found) == list(attacks)
    settings = found["mine:noise"]["settings"]
    assert settings["function"] == "mine:noise"
    assert "Brighter" in settings["threat"]
    assert found["mine:noise"]["correct"] <= found["clean"]["correct"]
    # The same evaluation is recognised.
    assert train_run(config, tmp_path / "run") == 0
    again = json.loads((tmp_path / "run/evaluations/last-first60.json").read_text())
    assert "earlier" not in again


def made(name, **changes):
    config = small()
    config = dataclasses.replace(config, **changes)
    return named.maker(config)(name)


def test_points_that_leave_the_ball_or_the_box_do_not_count(mine):
    images, labels = jnp.full([4, 2, 2, 1], 0.5), jnp.zeros(4, jnp.int32)
    keys = jnp.stack([jax.random.key(i) for i in range(4)])

    def always_wrong(x):
        return jnp.stack([x.mean((1, 2, 3)) - 9, jnp.zeros(len(x))], 1)

    for name in ("mine:too_far@linf=0.1", "mine:black@linf=0.1"):
        np.testing.assert_array_equal(made(name)(always_wrong, images, labels, keys), images)
    config = small(attack__norm="mine:brighter", attack__epsilon=0.1)
    darker = named.maker(config)("mine:darker")  # within the distance, and not in this ball
    np.testing.assert_array_equal(darker(always_wrong, images, labels, keys), images)
    moved = made("mine:noise@linf=0.1")(always_wrong, images, labels, keys)
    assert (np.abs(moved - images).max((1, 2, 3)) > 0.01).all()


def test_titles_and_settings_of_functions(mine):
    attack = made("mine:black@linf=0.25")
    assert attack.threat == Linf(0.25)
    assert named.describe(attack)["function"] == "mine:black"
    assert named.describe(made("mine:nameless"))["made"] == "Nameless"
    assert named.title("mine:black@linf=0.25") == "mine:black, Linf 0.25"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:noise", r"config\.eval\.attacks: cannot import 'nowhere:noise'"),
        ("mine:nothing", r"config\.eval\.attacks: cannot import 'mine:nothing'"),
        ("mine:not_an_attack", "mine:not_an_attack must return an attack.* got int"),
    ],
)
def test_what_is_no_attack(mine, name, message):
    with pytest.raises(ConfigError, match=message):
        made(name)


def test_what_is_no_ball_and_no_data_set(mine):
    config = small(attack__norm="mine:not_a_ball")
    with pytest.raises(ConfigError, match=r"attack\.norm: mine:not_a_ball must .* got float"):
        named.from_config(config)
    with pytest.raises(ConfigError, match=r"data\.name: mine:not_a_data_set must .* DataConfig"):
        data.from_config(small(data__name="mine:not_a_data_set"))


def test_autoattack_in_a_ball_of_ones_own_is_refused(mine):
    """Its mathematics is that of three norms."""
    config = small(attack__norm="mine:brighter", eval__attacks=("autoattack",))
    with pytest.raises(ConfigError, match=r"'autoattack': AutoAttack\.threat must be Linf, L2 or"):
        named.from_config(config)
