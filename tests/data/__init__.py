"""Tests of `simpo_megatron.data`, one file a module."""
