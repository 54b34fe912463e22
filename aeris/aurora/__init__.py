"""Microsoft's Aurora: the model with its published weights, forecasts, training and comparison."""

from aeris.aurora.batch import Batch as Batch
from aeris.aurora.batch import Metadata as Metadata
from aeris.aurora.config import AuroraConfig as AuroraConfig
from aeris.aurora.model import Aurora as Aurora
from aeris.aurora.variants import VARIANTS as VARIANTS
