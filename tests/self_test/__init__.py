"""Tests of `simpo_megatron/self_test` and `tools/self_test.py`."""
