"""What control tells people, dashboards and routers. Nothing of it decides anything.

============  =====================================================================================
figures.py    What is published before anything has happened?
prompts.py    Where did the tokens of prompts come from, and what did that save?
misses.py     Why was a prefix not found?
spans.py      What is a trace told of lookups and transfers?
summary.py    What does the log say at the start and at the end?
residency.py  What do routers hear of which chunk is where?
============  =====================================================================================
"""
