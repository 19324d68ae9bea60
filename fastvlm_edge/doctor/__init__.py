"""What this machine is, whether it runs FastVLM, and what to do where it does not.

Standard library only, and Python 3.8 will do: it runs from a bare checkout on a board whose JetPack is too old for everything else.

`probe` asks the machine, `machine` and `libraries` put the answers into dataclasses, `check_*` turn those into findings, `report` prints.
"""
