"""Tests of `simpo_megatron/batch`."""
