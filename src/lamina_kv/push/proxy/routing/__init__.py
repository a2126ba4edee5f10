"""Where a request goes: which decode engine, which prefill engine, or none.

===================  ===============================================================
``words``            candidates, choices, routes; what a policy is
``prompt``           which prefixes does a request have, and how many tokens
``prefixes``         which prefixes does one rank hold, as far as is known
``pace``             how many seconds do so many tokens take
``ranks``            what is a rank doing now
``least_loaded``     a policy: the least load
``power_of_two``     a policy: the less loaded of two
``cache_aware``      a policy: the longest prefix, weighed against load
``placement``        is the prompt computed by the decode engine itself
``router``           all of it together, as the dispatcher uses it
===================  ===============================================================

A policy is a file of a page, and has a name in ``words`` and a line in ``policies``. What engines
announce of their caches is in ``events``.
"""
