"""`fastvlm-edge bench`: measure a model directory on this machine, record it, compare records, draw them.

`measure` runs in a process of its own for every load, `processes` starts those and gathers what they say into a `record`.
"""
