"""Tests of `simpo_megatron/objectives`."""
