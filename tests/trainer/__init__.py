"""Tests of `simpo_megatron/trainer`."""
