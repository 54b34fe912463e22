"""Our Aurora against the official package: time, memory and FLOPs of a forecast and of training steps.

    python -m benchmarks.aurora --csv FILE --plot FILE
    python -m benchmarks.aurora --model 1.3b --grids 721x1440 --precision bf16 --device cuda

All contenders share their weights and take turns in one process, so that a slow moment meets all. On the CPU
peak memory is that of a process for each, after a first call. A step is forward, a mean absolute error and
backward; the optimizer is left out, as it is the same. Without the package, ours is measured alone.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from aeris.aurora import normalisation
from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.config import LEVELS_HPA
from aeris.aurora.model import AuroraPretrained, AuroraSmallPretrained
from aeris.aurora.swin3d import compile_blocks
from aeris.aurora.training.official import load_official
from aeris.log import console, run_program
from benchmarks.contest import Row, draw, ratios
from benchmarks.parts import seconds
from benchmarks.records import Better, Output, deliver, hardware
from swipe.backend import choose_device, keep_freed_memory

Work = Literal["forward", "step", "checkpointed"]
TINY = {"embed_dim": 64, "num_heads": 2, "encoder_depths": (2, 2, 2), "decoder_depths": (2, 2, 2)}
TINY |= {"encoder_num_heads": (1, 2, 4), "decoder_num_heads": (4, 2, 1)}
LESS: Better = "less"
NUMBERS = ("seconds", "gflop", "peak_mb")
OFFICIAL_POLICIES: dict[str, tuple[str, ...]] = {
    "default": (),
    "layers": ("Basic3DEncoderLayer", "Basic3DDecoderLayer"),
    "blocks": ("Swin3DTransformerBlock",),
}
"""Policy -> classes of the package that are computed again; none: its own choice, seven classes."""


@dataclass(frozen=True)
class Options:
    """Compare our Aurora with the official package on random data."""

    model: Literal["tiny", "small", "1.3b"] = "small"
    """tiny (width 64, for a quick look), AuroraSmallPretrained or AuroraPretrained."""
    grids: tuple[str, ...] = ("33x64", "65x128")
    """Rows x columns of the data."""
    levels: int = 13
    """Pressure levels, the highest ones left out."""
    works: tuple[Work, ...] = ("forward", "step", "checkpointed")
    """What to measure: a forecast, a training step, a step that stores less and computes it again."""
    ours: tuple[str, ...] = ("layers", "blocks")
    """Our checkpointing policies (aeris/aurora/checkpointing.py)."""
    official: tuple[str, ...] = ("default", "layers")
    """Those of the package: default, layers, blocks."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or each package's autocast: of the backbone in theirs, of everything in ours."""
    compile: bool = False
    """Compile every block of both with torch.compile."""
    rounds: int = 5
    """Timed calls of each, after one that is counted and one to warm up."""
    memory: bool = True
    """On the CPU, start a process for each contender to measure its memory."""
    device: str = "auto"
    """auto, cpu, cuda or xpu."""
    output: Annotated[Output, tyro.conf.arg(name="")] = field(default_factory=Output)
    """Where the rows go besides the screen."""
    alone: str = ""
    """Only measure the memory of this contender, such as "33x64 step ours -", in this process."""


@dataclass(frozen=True)
class Contender:
    """Who does what on which grid."""

    grid: str
    work: str
    package: str
    policy: str

    def __str__(self) -> str:
        return " ".join((self.grid, self.work, self.package, self.policy))


@dataclass
class Trial:
    """A contender at work: what to call, and what was found."""

    who: Contender
    model: nn.Module
    call: Callable[[], object]
    gflop: float = float("nan")
    peak_mb: float = float("nan")
    working_mb: float = float("nan")
    times: list[float] = field(default_factory=list)
    prediction: Any = None
    full: bool = False
    """Whether the device had too little memory."""


def contenders(options: Options, grid: str) -> list[Contender]:
    """List who takes part on a grid, the package first."""
    policies = {"official": options.official, "ours": options.ours}
    if load_official() is None:
        del policies["official"]
    for policy in {*policies.get("official", ())} - {*OFFICIAL_POLICIES}:
        raise ValueError(f"the package has no policy {policy!r}: choose from {', '.join(OFFICIAL_POLICIES)}")
    found = []
    for work in options.works:
        for package, own in policies.items():
            names = own if work == "checkpointed" else ("-",)
            found += [Contender(grid, work, package, policy) for policy in names]
    return found


def make_model(options: Options, who: Contender, like: nn.Module | None, device: torch.device) -> nn.Module:
    """Build a contender's model, with the weights of `like` if there is one."""
    classes: Any = (AuroraSmallPretrained, AuroraPretrained)
    if who.package == "official":
        classes = theirs().AuroraSmallPretrained, theirs().AuroraPretrained
    changes: dict[str, Any] = dict(TINY) if options.model == "tiny" else {}
    model: nn.Module = classes[options.model == "1.3b"](autocast=options.precision == "bf16", **changes)
    if like is not None:
        model.load_state_dict(like.state_dict(), assign=True)
    else:
        for name, parameter in model.named_parameters():
            if "ln_modulation" in name:  # zero in a new model, which makes every block the identity
                nn.init.normal_(parameter, std=0.1)
        model = model.to(device)
    training = who.work != "forward"
    return model.train(training).requires_grad_(training)


def set_policy(model: nn.Module, who: Contender) -> None:
    """Let a model store less, if that is the work."""
    if who.work != "checkpointed":
        return
    configure: Any = model.configure_activation_checkpointing
    if who.package == "ours":
        configure(who.policy)
    else:
        configure(*filter(None, (OFFICIAL_POLICIES[who.policy],)))


def compile_model(model: nn.Module) -> None:
    """Compile every block of the U-Net in place, of either package."""
    compile_blocks(model)
    for module in model.modules():
        if type(module).__name__ == "Swin3DTransformerBlock":
            module.compile()


@lru_cache(maxsize=2)
def make_batch(options: Options, grid: str, package: str, device: torch.device) -> Any:
    """Draw the input: noise of the size that every variable has."""
    rows, cols = map(int, grid.split("x"))
    levels, random = LEVELS_HPA[-options.levels :], torch.Generator().manual_seed(0)

    def draw(name: str, *shape: int) -> Tensor:
        x = torch.randn(*shape, rows, cols, generator=random)
        return (x * normalisation.scales[name] + normalisation.locations[name]).to(device)

    surf = {name: draw(name, 1, 2) for name in ("2t", "10u", "10v", "msl")}
    static = {name: draw(name) for name in ("lsm", "z", "slt")}
    atmos = {
        name: torch.stack([draw(f"{name}_{level}", 1, 2) for level in levels], dim=2) for name in "zuvtq"
    }
    lat, lon = torch.linspace(90, -90, rows), torch.arange(cols) * (360 / cols)
    kinds: Any = (Batch, Metadata) if package == "ours" else (theirs().Batch, theirs().Metadata)
    return kinds[0](surf, static, atmos, kinds[1](lat, lon, (datetime(2022, 1, 1),), levels))


def theirs() -> Any:
    """Return the official package, which must be there."""
    return load_official()


def loss_of(prediction: Any) -> Tensor:
    """Average what is predicted, in the sizes of the variables."""
    fields = [(value, normalisation.scales[name]) for name, value in prediction.surf_vars.items()]
    fields += [(value, normalisation.scales[f"{name}_500"]) for name, value in prediction.atmos_vars.items()]
    return torch.stack([(value / scale).abs().mean() for value, scale in fields]).mean()


def make_trial(options: Options, who: Contender, like: nn.Module | None, device: torch.device) -> Trial:
    """Build a contender and say what one call of it is."""
    model = make_model(options, who, like, device)
    batch = make_batch(options, who.grid, who.package, device)
    set_policy(model, who)

    def forward() -> Any:
        with torch.inference_mode():
            return model(batch)

    def step() -> None:
        loss_of(model(batch)).backward()
        model.zero_grad(set_to_none=True)

    return Trial(who, model, forward if who.work == "forward" else step)


def count(trial: Trial, device: torch.device) -> None:
    """Count the FLOPs of a call; on the CPU attention is written out, as its kernel there has no formula."""
    written_out = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    with FlopCounterMode(display=False) as counter, written_out:
        trial.prediction = trial.call()
    trial.gflop = counter.get_total_flops() / 1e9


def measure_alone(options: Options, device: torch.device) -> dict[str, float]:
    """Measure the greatest memory of this process while it does the work of `options.alone`, in MB.

    Raises:
        OSError: the system does not count it (it is read where Linux does).
    """
    who = Contender(*options.alone.split())
    trial = make_trial(options, who, None, device)
    load_official()  # so that both have imported the same
    trial.call()
    give_back()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    for _ in range(2):
        trial.call()
    peak = resident("VmHWM")
    return {"peak_mb": peak, "working_mb": peak - before}


def give_back() -> None:
    """Return freed memory to the system, where the C library can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident(kind: str) -> float:
    """Read memory of this process in MB from Linux: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(kind))
    return int(line.split()[1]) * 1024 / 1e6


def measure_memory(options: Options, trial: Trial, device: torch.device) -> None:
    """Measure the greatest memory of a call: in a process of its own on the CPU, else on the device."""
    if device.type != "cpu":
        accelerator = getattr(torch, device.type)
        accelerator.empty_cache()
        accelerator.reset_peak_memory_stats()
        before = accelerator.memory_allocated()
        trial.call()
        trial.peak_mb = accelerator.max_memory_allocated() / 1e6
        trial.working_mb = trial.peak_mb - before / 1e6
        return
    command = [sys.executable, "-m", "benchmarks.aurora", "--device", "cpu", "--alone", str(trial.who)]
    for name in ("model", "levels", "precision"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{trial.who}: measuring memory failed\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    trial.peak_mb, trial.working_mb = found["peak_mb"], found["working_mb"]


def attempt(work: Callable[[Trial, torch.device], object], trial: Trial, device: torch.device) -> None:
    """Do something with a trial unless it is out of the race; note if the device is full."""
    if not trial.full:
        try:
            work(trial, device)
        except torch.OutOfMemoryError:
            console.print(f"[red]out of memory: {trial.who}")
            trial.full = True
            trial.model.zero_grad(set_to_none=True)


def compare(options: Options, grid: str, device: torch.device) -> list[Row]:
    """Measure all contenders on one grid; return their rows."""
    trials: list[Trial] = []
    like: nn.Module | None = None
    for who in contenders(options, grid):
        if like is None:
            like = make_model(options, who, None, device)
        trials.append(make_trial(options, who, like, device))
    for trial in trials:
        console.print(f"counting and warming up: {trial.who}")
        attempt(count, trial, device)
    compare_predictions(trials)
    for trial in trials:
        if options.compile:
            compile_model(trial.model)
            attempt(call, trial, device)
        attempt(call, trial, device)
        if options.memory or device.type != "cpu":
            attempt(partial(measure_memory, options), trial, device)
    for number in range(options.rounds):
        console.print(f"round {number + 1} of {options.rounds}")
        for trial in trials:
            attempt(clock, trial, device)
    return [row_of(trial) for trial in trials]


def call(trial: Trial, device: torch.device) -> None:
    """Do the work once."""
    trial.call()


def clock(trial: Trial, device: torch.device) -> None:
    """Do the work once and note how long it takes."""
    trial.times.append(seconds(trial.call, device))


def compare_predictions(trials: list[Trial]) -> None:
    """Say how far the forecasts of the two packages are from each other, and forget them."""
    made = [trial for trial in trials if trial.prediction is not None]
    if len(made) == 2:
        far = difference(*(trial.prediction for trial in made))
        console.print(f"predictions differ by at most {far:.1e}, in the scales of the normalisation")
    for trial in made:
        trial.prediction = None


def difference(first: Any, second: Any) -> float:
    """Return the greatest difference of two predictions in the sizes of the variables."""
    far = [(first.surf_vars[k] - v) / normalisation.scales[k] for k, v in second.surf_vars.items()]
    far += [
        (first.atmos_vars[k] - v) / normalisation.scales[f"{k}_500"] for k, v in second.atmos_vars.items()
    ]
    return max(float(x.abs().max()) for x in far)


def row_of(trial: Trial) -> Row:
    """Return a row of the table."""
    who, times = trial.who, trial.times if not trial.full and trial.times else [float("nan")]
    row: Row = {"grid": who.grid, "work": who.work, "package": who.package, "policy": who.policy}
    # Working memory is what comes on top of the model and its input.
    row |= {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times)}
    return row | {"gflop": trial.gflop, "peak_mb": trial.peak_mb, "working_mb": trial.working_mb}


def report(options: Options, rows: list[Row], about: str) -> int:
    """Print the rows; write, draw and compare them where asked; return how many numbers are worse."""
    key, numbers = ("grid", "work", "package", "policy"), dict.fromkeys(NUMBERS, LESS)
    return deliver(rows, options.output, key=key, numbers=numbers, draw=draw, about=about, tables=tables)


def tables(rows: Sequence[Row]) -> list[Table]:
    """Lay the rows out for the screen, and below them how ours compares."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("contender", no_wrap=True)
    for column in ("s", "fastest", "GFLOP", "peak MB", "working MB"):
        table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows:
        name = " ".join(row[key] for key in ("grid", "work", "package", "policy"))
        numbers = (row[key] for key in ("seconds", "fastest", "gflop", "peak_mb", "working_mb"))
        table.add_row(name.removesuffix(" -"), *(f"{number:,.4g}" for number in numbers))
    said = Table.grid()
    for line in ratios(rows):
        said.add_row(line)
    return [table, said]


def main() -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, description=Options.__doc__)
    device = choose_device(options.device)
    warnings.filterwarnings("ignore", category=UserWarning)  # of old names inside the package
    if options.alone:
        print(json.dumps(measure_alone(options, device)))
        return
    if load_official() is None:
        console.print("microsoft-aurora is not installed: ours alone (docs/aurora.md says how to install it)")
    keep_freed_memory()
    rows = [row for grid in options.grids for row in compare(options, grid, device)]
    sizes = f"{options.model}, {options.levels} levels, {options.precision}"
    sys.exit(report(options, rows, f"{sizes}{', compiled' * options.compile}: {hardware(device)}") > 0)


if __name__ == "__main__":
    run_program(main)
