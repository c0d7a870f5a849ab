"""The study: every objective from one SFT model, with the same data, steps and seeds, measured in one table.

__main__.py  the command line: data, SFT, reference log-probs, runs, cost, report
plan.py      which runs there are, and the flags of each
runs.py      trains and measures the runs, some at a time; a finished run is not repeated
measure.py   what is measured of a trained model
cost.py      time and memory of a step, beside DPO with a reference model in memory
report.py    the table, and the page with the plots

README.md has the results. Run it with `bash examples/study/run.sh`.
"""
