"""Tests of simpo_megatron/checkpoint.

test_round_trip.py   every family there and back bit for bit, and Megatron-Core's logits from converted weights
test_verify.py       a flipped bit of any tensor or file is found and named
test_logits.py       --logits names the layer whose weights were changed
test_interrupted.py  kills, full disks, shards and workers: the bytes of an undisturbed conversion
test_hostile.py      broken and hostile input is one sentence, and nothing looks complete
test_folder.py       the tracker: what it may hold, and that it changes only after what it names is on the disk
test_memory.py       the working set stays within --max-memory
test_megatron_lm.py  Megatron-LM's own parser and loader take converted checkpoints
"""
