"""The boards that fastvlm-edge knows, for `build`, `plan`, `bundle` and `doctor`. Standard library only, for Python 3.8 too.

`targets` has the names that `--target` accepts, with one row for each. It draws on `chips` (compute capabilities, modules), on `rates`
(clocks, bandwidth and power modes, for `plan`) and on `systems` (Python, glibc and CUDA, for `bundle`). `jetpacks` has what each JetPack
brings.
"""
