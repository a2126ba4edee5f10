"""The policies there are. A new one is a file of its own, a name in ``words``, and a line here."""

from __future__ import annotations

from lamina_kv.push.proxy.routing.cache_aware import CacheAware
from lamina_kv.push.proxy.routing.least_loaded import LeastLoaded
from lamina_kv.push.proxy.routing.power_of_two import PowerOfTwo
from lamina_kv.push.proxy.routing.words import PolicyName, RoutingPolicy


def make_policy(name: PolicyName) -> RoutingPolicy:
    """The policy of that name, with a state of its own."""
    match name:
        case PolicyName.CACHE_AWARE:
            return CacheAware()
        case PolicyName.POWER_OF_TWO:
            return PowerOfTwo()
        case PolicyName.LEAST_LOADED:
            return LeastLoaded()
