"""`fastvlm-edge doctor`: what this machine is, whether FastVLM runs on it, and what to do if not.

Standard library only, for Python 3.8 too: it runs from a bare checkout on a board whose JetPack is too old for everything else.

`facts` reads the machine with the modules of `fastvlm_edge/machine`, `check_*` turn the facts into findings, and `report` prints them.
"""
