"""Granularities: which sites each is made of, and how many units they have."""

from models.config import DecoderConfig
from models.sites import Site

# The sites that make up each granularity, in the order of the results' site axis. Those of the
# direction granularity are the user's.
SITES: dict[str, tuple[Site, ...]] = {
    "layer": (Site.LAYER,),
    "module": (Site.ATTENTION, Site.MLP),
    "head": (Site.HEAD,),
    "token": (Site.RESIDUAL, Site.ATTENTION, Site.MLP),
    "neuron": (Site.NEURON,),
    "direction": (),
}
GRANULARITIES = tuple(SITES)
MODULE_SITES = SITES["module"]
TOKEN_SITES = SITES["token"]


def group_count(config: DecoderConfig, group_size: int) -> int:
    """Number of groups of so many adjacent neurons in a layer; the last may be smaller."""
    return -(-config.intermediate_size // group_size)
