"""Proof that a parallel layout computes what Hugging Face computes: `tools/verify_layout.py`."""
