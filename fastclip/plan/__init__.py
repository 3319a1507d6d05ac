"""What a training step needs, before there is a machine to run it: memory, FLOPs, messages, time from measured rates.

towers.py (a sample), setting.py (what is planned) -> memory.py, work.py -> rates.py, measure.py (time) -> report.py.
docs/scaling.md has the formulas and their error against measured steps.
"""
