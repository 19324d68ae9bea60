"""`fastvlm-edge bench`: measure a model directory on this machine, and record, compare and draw the figures.

`measure` runs in a new process for every load of the model. `processes` starts these processes and collects their figures in a `record`.
"""
