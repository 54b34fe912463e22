"""Microsoft's Aurora: the model with its published weights, forecasts, training and comparison.

The names of the official package are here: `from aeris.aurora import ...`, not `from aurora import ...`.
`rollout` and `insolation` are the functions, not the modules of these names.
"""

from aeris.aurora.air_pollution import AuroraAirPollution
from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.config import AuroraConfig
from aeris.aurora.insolation import insolation
from aeris.aurora.model import (
    Aurora,
    Aurora12hPretrained,
    AuroraHighRes,
    AuroraPretrained,
    AuroraSmall,
    AuroraSmallPretrained,
)
from aeris.aurora.rollout import rollout
from aeris.aurora.tracker import Tracker
from aeris.aurora.v1p5 import AuroraV1p5, AuroraV1p5Ensemble, with_insolation
from aeris.aurora.variants import VARIANTS
from aeris.aurora.wave import AuroraWave

__all__ = [
    "VARIANTS",
    "Aurora",
    "Aurora12hPretrained",
    "AuroraAirPollution",
    "AuroraConfig",
    "AuroraHighRes",
    "AuroraPretrained",
    "AuroraSmall",
    "AuroraSmallPretrained",
    "AuroraV1p5",
    "AuroraV1p5Ensemble",
    "AuroraWave",
    "Batch",
    "Metadata",
    "Tracker",
    "insolation",
    "rollout",
    "with_insolation",
]
