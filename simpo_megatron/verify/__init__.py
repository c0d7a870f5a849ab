"""Does a parallel layout compute what Hugging Face computes? `tools/verify_layout.py`; README.md is the user's guide.

compare.py          one batch through the layout and the reference, compared
random_weights.py   weights and pairs at random, where --hf-checkpoint is a config.json alone
report.py           the tolerances, and what a comparison found
reference.py        log-prob sums and gradients by transformers, one layer at a time
shards.py           the gradients that a rank holds, against the reference
layers.py           a converted checkpoint against transformers, layer by layer (`tools/verify_checkpoint.py --logits`)
"""
