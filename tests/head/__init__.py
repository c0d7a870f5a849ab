"""Tests of `simpo_megatron/head`."""
