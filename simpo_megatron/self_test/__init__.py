"""Does everything that a run needs work on this machine? `tools/self_test.py`; README.md is the user's guide.

rows.py          a row of the table: its name, what it needs, what it found
registry.py      all rows; a new feature adds its rows here
run.py           runs rows one after the other, on ranks that may fail
guard.py         ends the program where the ranks no longer answer
ranks.py         what the ranks agree on after each row
models.py        tiny random models of every family, and an engine with one in a layout
gradients.py     rows: layouts and families against transformers
checkpoints.py   rows: resume, export, conversion, the folder of --save
family.py        rows: everything that a checkpoint given by the user must do
heads.py         rows: the head and its kernels against fp64
speed.py         rows: time, memory and host waits of the head and of a training step
environment.py   rows: versions and variables
report.py        the table, and the report as JSON and CSV
"""
