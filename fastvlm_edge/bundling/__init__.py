"""One executable file for a board without a network: `targets`, `wheels`, `licences` and `archive` make it, `start`, `board` and `unit`
run on the board, from inside it (docs/bundle.md).
"""
