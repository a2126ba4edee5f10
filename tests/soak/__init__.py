"""What only shows after a long time or a sudden end: kills, damage, leaks. Run by ``make soak``,
and a little of it by ``make test``.

``LAMINA_SOAK_CYCLES``, ``LAMINA_SOAK_ENGINE_CYCLES``, ``LAMINA_SOAK_SERVER_CYCLES``,
``LAMINA_SOAK_REQUESTS`` and ``LAMINA_SOAK_PUSH_REQUESTS`` say how much, ``LAMINA_SOAK_SEED`` which
histories; a test's name ends in the seed of its own.
"""
