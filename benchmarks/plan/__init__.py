"""What the constants of `fastvlm_edge/planning/predict.py` come from: published measurements (`published`) and the fit to them (`fit`)."""
