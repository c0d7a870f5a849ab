"""Tests of `simpo_megatron.on_policy` and of its programs in tools/."""
