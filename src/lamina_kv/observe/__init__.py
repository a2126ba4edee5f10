"""What an operator can learn from outside. Knows no engine.

===========  =====================================================================================
metrics.py   Which figures are published, and who collects them?
traces.py    Which requests came, so that sizes can be tried on them later?
timeline.py  What happened when in each step, row by row?
spans.py     What was done for a request, in its OpenTelemetry trace?
files.py     How are the files of these made?
===========  =====================================================================================
"""
