"""Tests of `simpo_megatron/verify`."""
