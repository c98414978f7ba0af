"""All faults that are planted."""

from planted_faults.attention_faults import ATTENTION_FAULTS
from planted_faults.layer_faults import LAYER_FAULTS

FAULTS = [*ATTENTION_FAULTS, *LAYER_FAULTS]
