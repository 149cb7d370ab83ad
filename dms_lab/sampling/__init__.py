"""The pure part of generation: nothing here knows of batches, caches or clocks.

config    the words, checked           sampler   which token a chain takes next           stopping   when a chain is done
"""

from dms_lab.sampling.config import SamplingConfig
from dms_lab.sampling.sampler import ChainGenerator, Sampler, chain_generator
from dms_lab.sampling.stopping import StopRule

__all__ = ["ChainGenerator", "Sampler", "SamplingConfig", "StopRule", "chain_generator"]
