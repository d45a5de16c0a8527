"""Mutated recipes, rows, config.json, adapters and headers through the readers that `quench check` and `plan` use.

`make fuzz` runs all of them and writes docs/results/fuzz.md; test_fuzz.py runs some of each in `make test`. A case is a
pure function of its kind and number, so a failing one is made again by `python -m tests.fuzz.run --only KIND --case N`.
"""
