"""The policies there are, by their names. A new one is a file of its own, and a line here."""

from __future__ import annotations

from enum import StrEnum

from lamina_kv.push.proxy.routing.cache_aware import CacheAware
from lamina_kv.push.proxy.routing.least_loaded import LeastLoaded
from lamina_kv.push.proxy.routing.power_of_two import PowerOfTwo
from lamina_kv.push.proxy.routing.words import RoutingPolicy


class PolicyName(StrEnum):
    """As ``--policy`` has it."""

    CACHE_AWARE = "cache_aware"
    POWER_OF_TWO = "power_of_two"
    LEAST_LOADED = "least_loaded"


def make_policy(name: PolicyName) -> RoutingPolicy:
    """The policy of that name, with a state of its own."""
    match name:
        case PolicyName.CACHE_AWARE:
            return CacheAware()
        case PolicyName.POWER_OF_TWO:
            return PowerOfTwo()
        case PolicyName.LEAST_LOADED:
            return LeastLoaded()
