"""Tests of `simpo_megatron/config`."""
