"""One executable file for a board without a network (docs/bundle.md).

`wheels`, `licences` and `archive` make it. `start` and `unit` run on the board, from inside the file; the commands there are in
`fastvlm_edge/bundle_entry.py`.
"""
