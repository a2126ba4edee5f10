"""``lamina-kv bench peers``: Lamina beside what else moves a KV cache, in one run.

Every system serves the same model and the same prompts in a process and an environment of its own;
they take turns, and whoever is not measured is stopped.
"""
