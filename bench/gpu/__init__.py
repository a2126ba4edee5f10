"""The acceptance run: whether the CUDA path is right and fast on the GPU at hand.

- ``acceptance.py``: the command, the sections' order and their budgets
- ``plan.py``: how sections are run one after the other, whatever becomes of one
- ``report.py``: what is measured, what was promised, the table and the JSON
- ``lab.py``: what sections need of an engine on a device, and CUDA's
- ``pages.py``: caches of many layouts, and what copies must leave in their memory
- ``copies.py``: copies of a whole cache in pieces, and what they took
- ``sections/``: one file each
"""
