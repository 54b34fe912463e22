"""What comes with published weights, the configuration and the statistics: read, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from aeris import published
from tests.published_files import write_config, write_statistics
from tests.test_published import WINDOW, Theirs, hand_over


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    """The 6-hourly model."""
    return hand_over(tmp_path_factory.mktemp("six"), 6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mlp_dim": 32}, "says hidden 32, the weights in .* have 24"),
        ({"PP_stages": 12}, "says layers 10, the weights in .* have 8"),
        ({"interval": None}, "model.interval is None; a positive number is needed"),
        ({"window_size": [6, 12]}, r"model.window_size is \[6, 12\]; two equal numbers"),
        ({"window_size": [7, 7]}, "7"),
        ({"head_dim": 5}, "heads of 5 do not divide a width of 16"),
        ({"sigma_min": 600}, "model.sigma_min 600 is not below"),
        ({"norm": "post"}, "model.norm is post; only weights with pre are known"),
        (
            {"layerwise_t_emb_after_mod_norm": False},
            "layerwise_t_emb_after_mod_norm is False; only weights with True",
        ),
    ],
)
def test_a_configuration_of_another_run_is_refused(
    changes: dict, words: str, six: Theirs, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "config.json", six.interval_h, WINDOW, **changes)
    with pytest.raises(ValueError, match=words):
        published.prepare(published.parse(six.words("none", "--config", config)))


def test_a_daily_configuration_is_not_for_six_hourly_weights(six: Theirs, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.json", 24, WINDOW)
    words = "of a 24-hourly model of 70 variables, 144 inputs; the weights are of 69, 142 inputs"
    with pytest.raises(ValueError, match=words):
        published.prepare(published.parse(six.words("none", "--config", config)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {interval: 6", "is not YAML"),
        ("- 1", "holds no settings, but list"),
        ("!!python/object/apply:os.system ['true']", "is not YAML: could not determine a constructor"),
    ],
)
def test_yaml_is_read_without_running_it(text: str, words: str, six: Theirs, tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        published.prepare(published.parse(six.words("none", "--config", path)))
    path.write_text(json.dumps(json.loads((six.path / "config.json").read_text())))  # JSON is YAML
    assert published.prepare(published.parse(six.words("none", "--config", path))).used > 0


def test_variables_in_another_order_are_refused(six: Theirs, tmp_path: Path) -> None:
    path = write_config(tmp_path / "config.json", six.interval_h, WINDOW)
    values = json.loads(path.read_text())
    names = values["data"]["dataset"]["variables"]
    for changed, words in [
        (
            [names[1], names[0], *names[2:]],
            "has u10 where a store has t2m; inputs are encoded by their place",
        ),
        ([*names[:-1], "cloudiness"], "no variable at the surface is called 'cloudiness'"),
    ]:
        values["data"]["dataset"]["variables"] = changed
        path.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=words):
            published.prepare(published.parse(six.words("none", "--config", path)))


def test_statistics_that_do_not_fit_are_refused(six: Theirs, tmp_path: Path) -> None:
    def with_changed(file: str, **values: object) -> list[str]:
        write_statistics(tmp_path, six.interval_h)
        with np.load(tmp_path / file) as old:
            table = {name: old[name] for name in old.files} | values
        np.savez(tmp_path / file, **{name: x for name, x in table.items() if x is not None})
        return six.words("none", "--statistics", tmp_path)

    hours = six.interval_h
    mean, std, change = "normalize_mean.npz", "normalize_std.npz", f"normalize_diff_std_{hours}.npz"
    sunshine = "toa_incident_solar_radiation"
    cases = [
        (std, {"temperature_850": None}, "lacks 1 of .* such as temperature_850"),
        (mean, {"temperature_850": [1, 2]}, "has not one number for temperature_850"),
        (change, {"geopotential_50": 0.0}, f"deviation of the {hours}-h change of z50 is 0"),
        (mean, {sunshine: 6.4e6}, r"the mean of toa_incident_solar_radiation is 6.4e\+06; about 1.2e6 J m-2"),
    ]
    for file, values, words in cases:
        with pytest.raises(ValueError, match=words):
            published.prepare(published.parse(with_changed(file, **values)))
    argv = with_changed("normalize_mean.npz", toa_incident_solar_radiation=300.0)
    assert published.prepare(published.parse(argv)).standards.forcing["solar"][0] == 300.0
    (tmp_path / f"normalize_diff_mean_{hours}.npz").unlink()
    with pytest.raises(ValueError, match=f"normalize_diff_mean_{hours}.npz is missing"):
        published.prepare(published.parse(argv))
    (tmp_path / "normalize_mean.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="normalize_mean.npz: "):
        published.prepare(published.parse(argv))
