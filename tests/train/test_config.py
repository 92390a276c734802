"""The configuration of a training: overrides, round trip, and refusals by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from andon.runtime.errors import ConfigError
from andon.train.config import differences, dump_config, load_config, override


def test_overrides_and_round_trip(tmp_path: Path) -> None:
    config = load_config("hvq", None, ["schedule.steps=7", "backbone.weights=random:2", "schedule.lr=1e-3", "seed=5"])
    assert (config.schedule.steps, config.schedule.lr, config.seed) == (7, 1e-3, 5)
    assert config.backbone.weights == "random:2"
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(config))
    assert load_config("hvq", path) == config
    assert load_config("hvq", None, ["schedule.amp=off"]).schedule.amp == "off", "a word, not YAML's truth value"
    path.write_text(dump_config(config).replace("amp: auto", "amp: off"))
    assert load_config("hvq", path).schedule.amp == "off"


def test_differences_are_settings_that_give_the_other() -> None:
    plain = load_config("hvq")
    other = load_config("hvq", None, ["schedule.steps=7", "augment.flips=[]"])
    found = differences(plain, other)
    assert found == {"schedule.steps": 7, "augment.flips": []} and differences(plain, plain) == {}
    assert override(plain, [f"{key}={json.dumps(value)}" for key, value in found.items()]) == other


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("schedule.stepps=7", "unknown key 'stepps'"),
        ("skedule.steps=7", "no section 'skedule'"),
        ("schedule.steps", "no value"),
        ("schedule.steps=many", "schedule.steps"),
        ("schedule.steps=-1", "schedule.steps"),
        ("schedule.lr=[", "not YAML"),
        ("schedule.lr=.inf", "schedule.lr"),
        ("schedule.decay=foo", "schedule.decay"),
        ("schedule.decay=step:0.8", "schedule.decay"),
        ("schedule.decay=step:0.8:x", "schedule.decay"),
        ("schedule.decay=inverse:-2:0.5", "schedule.decay"),
        ("schedule.amp=fp32", "schedule.amp"),
        ("schedule.ema=1", "schedule.ema"),
        ("schedule.max_seconds=0", "schedule.max_seconds"),
        ("seed=-1", "seed"),
        ("seed=4294967296", "seed"),
        ("size=0", "size"),
    ],
)
def test_bad_override_is_named(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        load_config("hvq", None, [setting])


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("hvq", "pot.lam=-1"),
        ("pwae", "loss.nu=0"),
        ("pwae", "loss.nu=0.01"),
        ("hgad", "betas=[0.9, 1.0]"),
        ("hgad", "score.delta=-0.1"),
        ("vpdm", "diffusion.beta=[0.0001, 1.5]"),
        ("vpdm", "diffusion.beta=[0.02, 0.0001]"),
        ("vpdm", "denoiser.multipliers=[1, 0]"),
        ("foct", "navigator.alternatives=[-1]"),
    ],
)
def test_a_number_that_means_nothing_to_a_method_is_refused(method: str, setting: str) -> None:
    """Else it is a fault, an infinite loss or an empty program, after the features are extracted."""
    with pytest.raises(ConfigError, match=setting.partition("=")[0].replace(".", r"\.")):
        load_config(method, None, [setting])


def test_bad_configuration_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(load_config("hvq")) + "colour: red\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:\d+: colour: unknown key"):
        load_config("hvq", path)
    path.write_text(dump_config(load_config("hvq")).replace("method: hvq", "method: other"))
    with pytest.raises(ConfigError, match="method"):
        load_config("hvq", path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config("hvq", tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="unknown method 'hvk'"):
        load_config("hvk")
