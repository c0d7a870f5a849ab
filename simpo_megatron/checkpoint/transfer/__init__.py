"""Runs the plan of a conversion: byte ranges from file to file, in bounded memory. No torch but to change a dtype.

moves.py      the plan as data: units of work, the move of a tensor, pieces as large as a buffer, rectangles of bytes
cut.py        cuts a tensor's move into pieces
execute.py    runs one unit: read, hash, write, and a journal of what is on the disk
processes.py  runs units in this process or in several; every conversion and every verification goes through it
publish.py    a conversion from its checks to its publication: --resume, --overwrite, --shard
progress.py   the progress bar
"""
