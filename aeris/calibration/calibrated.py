"""The result of a calibration: `RUN/calibration.json`, the settings with which a run's spread fits its error.

Written by aeris.calibrate, read by aeris.forecast --calibrated. It belongs to the weights it was made with.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from aeris.config import from_dict
from aeris.diffusion.sampler import SamplerConfig
from aeris.forecasting.opening import find_checkpoint
from aeris.forecasting.perturbation import PerturbationConfig
from swipe import checkpoint as checkpoints

CALIBRATION, VERSION = "calibration.json", 1


class CalibrationError(ValueError):
    """There is no calibration, it is damaged, or it is one of other weights."""


def plain(config: Any) -> dict[str, Any]:
    """Return settings as JSON values; infinity is no JSON number."""
    values = dataclasses.asdict(config).items()
    return {name: str(value) if value == float("inf") else value for name, value in values}


def write(run_dir: Path, sampler: SamplerConfig, perturbation: PerturbationConfig, about: Any) -> Path:
    """Write the settings that were chosen, and how, atomically; return the path."""
    path = run_dir / CALIBRATION
    partial = path.with_name(path.name + ".partial")
    settings = {"sampler": plain(sampler), "perturbation": plain(perturbation)}
    partial.write_text(json.dumps({"version": VERSION, **settings, **about}, indent=2) + "\n")
    partial.replace(path)
    return path


def read(
    run_dir: Path, checkpoint: str = "", weights: str = "ema"
) -> tuple[SamplerConfig, PerturbationConfig]:
    """Read the settings a run was calibrated to.

    Args:
        run_dir: directory of the run.
        checkpoint: that is to be forecast with, by name or images; empty: the newest.
        weights: "ema" or "raw", likewise.

    Raises:
        CalibrationError: there is none, it is damaged, or it was made with other weights.
    """
    path = run_dir / CALIBRATION
    again = f"python -m aeris.calibrate {run_dir} --init ..."
    try:
        values = json.loads(path.read_text())
        if values["version"] != VERSION:
            raise ValueError(f"it is of version {values['version']}, not {VERSION}")
        open_ended = {name: float(x) if x == "inf" else x for name, x in values["sampler"].items()}
        sampler = from_dict(SamplerConfig, open_ended, "sampler")
        perturbation = from_dict(PerturbationConfig, values["perturbation"], "perturbation")
        made_with = (values["checkpoint"], values["weights"])
    except FileNotFoundError:
        raise CalibrationError(f"{run_dir} is not calibrated: {again}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CalibrationError(f"{path} cannot be read ({error}): make it anew with {again}") from None
    wanted = (checkpoint_name(run_dir, checkpoint), weights)
    if made_with != wanted:
        name, kind = made_with
        raise CalibrationError(
            f"{path} was made with the {kind} weights of {name}, not the {wanted[1]} weights of {wanted[0]}: "
            f"calibrate again, or forecast with --checkpoint {name} --weights {kind}"
        )
    return sampler, perturbation


def checkpoint_name(run_dir: Path, checkpoint: str) -> str:
    """Return the name of a checkpoint of a run, by name or images; of the newest if empty.

    Raises:
        ValueError: there is none.
    """
    found = find_checkpoint(run_dir, checkpoint)
    if found is None:
        complete = checkpoints.complete(run_dir / "checkpoints")
        if not complete:
            raise ValueError(f"{run_dir} has no complete checkpoint")
        found = complete[-1]
    return found.name
