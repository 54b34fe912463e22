"""Training of Aurora: what is refused before it starts and why, settings, the command line, curves."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from aeris.aurora import finetune
from aeris.aurora.checkpointing import POLICIES
from aeris.aurora.training import config as configs
from aeris.aurora.training.config import FineTuneConfig
from aeris.aurora.training.curves import plot_curves, shown_channels
from aeris.aurora.training.presets import PRESETS
from aeris.aurora.training.starting_weights import build
from aeris.aurora.variants import VARIANTS
from aeris.config import save
from aeris.run_directory import flag
from tests.aurora.tiny_runs import SMALL, go, small

BAD = [
    ({"train": {"batch": 3, "microbatch": 2}}, "no multiple of 1 ranks x --train.microbatch 2: 4 is"),
    ({"train": {"images": 0}}, "--train.images is 0"),
    ({"replay": {"size": -1}}, "--replay.size is -1"),
    ({"replay": {"size": 5}, "rollout": {"steps": 2}}, "pass 1 for both"),
    ({"replay": {"size": 5, "lead_h": 3}}, "a step alone takes 6 h"),
    ({"rollout": {"train": "adapters"}}, "pass --aurora.use-lora"),
    ({"rollout": {"train": "adapters"}, "aurora": {"use_lora": True}, "weights": "fresh"}, "frozen base"),
    ({"weights": ""}, "no weights to start from: pass --weights FILE.* or --weights fresh"),
    ({"data": {"paths": ()}}, "pass --data"),
    ({"data": {"paths": ("nowhere.nc",)}}, "nowhere.nc"),
    ({"data": {"train_period": ("1990-01-01", "1990-12-31")}}, "1990"),
    ({"data": {"validate_period": ("1990-01-01", "1990-12-31")}}, "1990"),
    ({"variant": "wave"}, "training of wave is not built"),
    ({"variant": "large"}, "no model 'large'"),
    ({"aurora": {"surf_vars": ("2t", "tp")}}, "none for tp.*--loss.weights"),
    ({"aurora": {"patch_size": 5}, "weights": "fresh"}, "16 columns do not divide into patches of 5"),
    ({"aurora": {"static_vars": ("lsm", "slt")}, "weights": "fresh"}, "slt"),
    ({"aurora": {"encoder_num_heads": (3, 4)}, "weights": "fresh"}, "3"),
    ({"loss": {"weights": (("z_501", 2.0),)}}, "for z_501, .* on levels 500, 850: z, u, v, t, q"),
    ({"parallel": {"shard": 2}}, "cannot be divided over 2"),
    ({"weights": "nowhere.ckpt"}, "no checkpoint nowhere.ckpt"),
    ({"weights": "hub:nothing"}, "published are aurora, pretrained"),
]


@pytest.mark.parametrize(("changes", "says"), BAD, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_bad_settings_are_refused_before_anything_is_written(
    changes: dict, says: str, weather: tuple[str, str], base: Path, tmp_path: Path
) -> None:
    """One error with advice, and no run directory."""
    config = small("one-step", weather, **({"weights": str(base)} | changes))
    with pytest.raises(ValueError, match=says) as caught:
        finetune.prepare(config, tmp_path / "run", "cpu")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_weights_of_another_model_are_refused_with_what_differs(
    weather: tuple[str, str], base: Path, tmp_path: Path
) -> None:
    """Shapes, blocks, adapters without a place, variables; a directory that is no run; a damaged file."""

    def refused(says: str, **changes: Any) -> None:
        config = small("one-step", weather, **({"weights": str(base)} | changes))
        with pytest.raises(ValueError, match=says):
            finetune.prepare(config, tmp_path / "run", "cpu")

    refused("do not fit the model: other shapes: .*instead of", aurora={"embed_dim": 32, "num_heads": 4})
    refused(r"it lacks \d+ weights: backbone.encoder_layers.0.blocks.1", aurora={"encoder_depths": (2, 2)})
    refused(
        r"no place for \d+ weights: backbone.encoder_layers.1.blocks.1", aurora={"encoder_depths": (1, 1)}
    )
    refused("encoder.surf_token_embeds.weights.10v.*--partial", aurora={"surf_vars": ("2t", "10u", "msl")})
    adapted = tmp_path / "adapted.ckpt"
    torch.save(build("tiny", dataclasses.replace(SMALL, use_lora=True), "cpu").state_dict(), adapted)
    refused("no place for .*lora_.*: pass --aurora.use-lora", weights=str(adapted))
    refused("is not a run directory", weights=str(tmp_path))
    (tmp_path / "cut.ckpt").write_bytes(base.read_bytes()[:1000])
    refused("cut off", weights=str(tmp_path / "cut.ckpt"))
    fits = small(
        "one-step", weather, 2, weights=str(base), partial=True, aurora={"surf_vars": ("2t", "10u", "msl")}
    )
    assert go(fits, tmp_path / "partial").images_seen == 2


def test_another_run_or_other_data_in_the_directory_are_refused(
    weather: tuple[str, str], base: Path, tmp_path: Path
) -> None:
    """What defines a run cannot change under its checkpoints; the differing settings are named."""
    go(small("one-step", weather, weights=str(base)), tmp_path)
    other = small("two-step", weather, weights=str(base), aurora={"drop_path": 0.1})
    with pytest.raises(
        ValueError, match=r"another run \(--aurora.drop-path 0.0 -> 0.1; --rollout.steps 1 -> 2"
    ):
        finetune.prepare(other, tmp_path, "cpu")
    shorter = small("one-step", (weather[0],), 8, weights=str(base), validate={"every_images": 0})
    finetune.prepare(shorter, tmp_path, "cpu")  # the same samples in fewer files
    fewer = small("one-step", weather, 8, weights=str(base), data={"train_period": ("2020-01-02", "2021")})
    with pytest.raises(ValueError, match=r"another run \(--train-period .*2020-01-01.* -> .*2020-01-02"):
        finetune.prepare(fewer, tmp_path, "cpu")
    run = finetune.prepare(shorter, tmp_path, "cpu")
    run.data.weather.levels = (500,)
    with pytest.raises(ValueError, match=r"other data: levels \[500.0, 850.0\] -> \[500.0\]"):
        run.resume()


def test_a_microbatch_belongs_to_a_run_that_draws_numbers(weather: tuple[str, str], tmp_path: Path) -> None:
    """They are keyed by the first image of a microbatch; without any, the microbatch may change."""
    (tmp_path / "checkpoints" / "images_000000000004" / "stage_000").mkdir(parents=True)
    (tmp_path / "checkpoints" / "images_000000000004" / ".complete").touch()
    for aurora in ({}, {"drop_path": 0.1}, {"drop_rate": 0.1}, {"stochastic": True}):
        save(small("one-step", weather, aurora=aurora), tmp_path / "config.json")
        other = small("one-step", weather, aurora=aurora, train={"microbatch": 2})
        if aurora:
            with pytest.raises(ValueError, match=r"another run \(--train.microbatch 1 -> 2\)"):
                configs.check_same_run(other, tmp_path)
        else:
            configs.check_same_run(other, tmp_path)


def test_configuration_survives_its_file(tmp_path: Path) -> None:
    """Nested tuples, None and all sections; an unknown setting or another program's run is refused."""
    stats = (("z", -3270.407, 65403.35),)
    config = small(
        "lora-replay",
        ("a", "b"),
        loss={"weights": (("2t", 1.0), ("z_500", 2.0))},
        aurora={"surf_stats": stats, "rollout_input_clipping": (("2t", 0.0, None),)},
    )
    save(config, tmp_path / "config.json")
    assert configs.load(tmp_path / "config.json") == config
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"strange": 1}))
    with pytest.raises(ValueError, match="unknown setting 'strange'"):
        configs.load(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="a run of another program"):
        configs.load(tmp_path / "config.json")


def test_command_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    weather: tuple[str, str],
    tmp_path: Path,
) -> None:
    """Presets and models in any order, overrides of both, lists, and a dry run as JSON."""
    found = finetune.parse(
        [
            *("lora-three-step", "--model", "tiny", "--weights", "some/where", "--data", "a.nc", "b.nc"),
            *("--train-period", "2001-01-01", "2001-12-31", "--aurora.drop-path", "0.1", "--static", "s.nc"),
            *("--loss.weights", "2t", "1.5", "--train.images", "7"),
        ]
    )
    config = found.config
    assert (config.variant, config.weights, found.run_dir) == (
        "tiny",
        "some/where",
        Path("runs/tiny-lora-three-step"),
    )
    assert config.aurora == dataclasses.replace(VARIANTS["tiny"].default, use_lora=True, drop_path=0.1)
    assert config.data.paths == ("a.nc", "b.nc") and config.data.static == "s.nc"
    assert config.data.train_period == ("2001-01-01", "2001-12-31") and config.train.images == 7
    assert config.data.validate_period == ("2022-01-01", "2022-12-31")
    assert config.loss.weights == (("2t", 1.5),) and config.rollout.steps == 3
    for name in PRESETS:
        parsed = finetune.parse([name, "--model", "pretrained"])
        assert parsed.preset == name and parsed.config.aurora.embed_dim == 512
        assert parsed.config.rollout == PRESETS[name]().config.rollout
    assert finetune.parse([]).config == PRESETS["one-step"]().of("small", VARIANTS["small"].default)
    with pytest.raises(ValueError, match="--model large is not known: choose one of aurora"):
        finetune.parse(["--model", "large"])
    monkeypatch.setattr(
        "sys.argv",
        [
            "finetune",
            "two-step",
            "--model",
            "tiny",
            "--data",
            *weather,
            "--weights",
            "fresh",
            "--dry-run",
            "--run-dir",
            str(tmp_path / "r"),
        ],
    )
    finetune.main()
    printed = json.loads(capsys.readouterr().out)
    assert printed["parameters"] == printed["trained"] > 5_000_000 and printed["samples"] == 21
    assert printed["config"]["rollout"]["gradient"] == "through" and not (tmp_path / "r").exists()


def test_errors_name_flags_that_exist(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every setting an error may name has the flag it would print, and checkpointing every policy."""
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        finetune.parse(["--help"])
    flags = set(re.findall(r"--[a-z0-9][\w.-]*", capsys.readouterr().out))

    def settings(config: Any, prefix: str = "") -> Iterator[str]:
        for entry in dataclasses.fields(config):
            value = getattr(config, entry.name)
            nested = dataclasses.is_dataclass(value)
            yield from settings(value, f"{prefix}{entry.name}.") if nested else [f"{prefix}{entry.name}"]

    names = list(settings(FineTuneConfig()))
    assert [name for name in names if flag(name, configs.FLAGS) not in flags] == []
    assert set(configs.FLAGS) <= set(names)
    assert get_args(configs.Checkpointing) == tuple(POLICIES)
    assert "--faults.spike" in flags and "--faults.dumps" not in flags, "no flag that does nothing"


def test_the_start_says_what_the_self_test_found(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    weather: tuple[str, str],
    tmp_path: Path,
) -> None:
    """And not that it was left out."""
    monkeypatch.setattr("aeris.run.self_test", lambda groups, device, pipeline: "9 kinds checked")
    config = small("one-step", weather, weights="fresh")
    finetune.prepare(config, tmp_path / "a", "cpu")
    assert "\n9 kinds checked\nstarting from fresh weights\n" in capsys.readouterr().out
    without = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, self_test=False))
    finetune.prepare(without, tmp_path / "b", "cpu")
    assert "kinds checked" not in capsys.readouterr().out


def test_what_trains_all_weights_has_no_adapters() -> None:
    """Also of models that have them by default; only pretraining starts from fresh weights unasked."""
    assert VARIANTS["high-res"].default.use_lora
    for name, preset in PRESETS.items():
        for variant, model in VARIANTS.items():
            config = preset().of(variant, model.default)
            assert config.aurora.use_lora == (config.rollout.train == "adapters"), (name, variant)
            assert config.weights == ("fresh" if name == "pretrain" else "")


def test_presets_are_the_published_setups() -> None:
    """The numbers that define them."""
    two, lora, replay = (PRESETS[name]() for name in ("two-step", "lora-three-step", "lora-replay"))
    assert (two.config.rollout.steps, two.config.rollout.gradient) == (2, "through")
    assert (lora.config.rollout.steps, lora.config.rollout.gradient) == (3, "push-forward")
    assert lora.config.rollout.train == replay.config.rollout.train == "adapters"
    assert lora.aurora == {"use_lora": True, "lora_mode": "single"}
    assert (replay.config.replay.size, replay.config.replay.fresh_every) == (200, 10)
    for preset in (two, lora, replay):
        optimizer = preset.config.optimizer
        assert (optimizer.lr, optimizer.weight_decay, optimizer.warmup_images) == (5e-5, 5e-6, 1_000)
    assert PRESETS["pretrain"]().config.optimizer.lr == 5e-4


def test_curves_are_drawn(tmp_path: Path) -> None:
    """From a log with two steps and something unknown; an empty log is an error."""
    pytest.importorskip("matplotlib")
    log = tmp_path / "log.jsonl"
    log.write_text('{"images_seen": 1, "loss": 0.5}\n')
    with pytest.raises(ValueError, match="no scores yet"):
        plot_curves(log, tmp_path / "curves.png")
    names = ("2t", "msl", "z500", "t850", "u300")
    for images in (0, 10, 20):
        rmse = {name: [5.0 - images / 10, None if images == 0 else 6.0] for name in names}
        part = {"rmse": rmse, "mae": rmse}
        scores = {"validation": part} | ({"training": part} if images else {})
        with log.open("a") as file:
            file.write(json.dumps({"images_seen": images, "scores": scores}) + "\n")
    plot_curves(log, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert shown_channels(list(names)) == ["2t", "msl", "t850", "u300", "z500"]
