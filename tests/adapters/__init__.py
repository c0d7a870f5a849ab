"""Adapters against PEFT and transformers."""
