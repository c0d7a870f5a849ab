"""The settings of a run: from flags, a YAML file and presets to checked, frozen dataclasses.

run.py           `Config` and its groups: model, training, optimizer, logging
checkpoint.py    the group of checkpoints
data.py          the group of the data: sources, lengths, and how rows become pairs
memory.py        the group of dtypes of the optimizer, host memory and FP8
megatron.py      the group of what is passed through to Megatron's configurations
refused.py       fields of Megatron's configurations that cannot be set, and why
stop.py          the group that stops a run before its end
profile.py       the group of traces, memory snapshots and garbage collection
layers.py        defaults, preset, file and flags as one set; settings that take the place of another
yaml_file.py     the file of --config as names and values
arguments.py     groups -> flags and YAML keys -> `Config`; flags win over the file, the file over the preset
data_tools.py    the flags of the tools that turn rows into pairs
megatron_lm.py   which of Megatron-LM's arguments work with preferences
other_names.py   the settings of TRL and Megatron-LM, and what does the same here: "did you mean"
presets.py       the hyperparameters of the SimPO paper, by model

The layout's group is `parallel/config.py`; the objectives' groups are the files of `objectives/`.
"""
