"""What a layout costs before it runs: memory.py estimates one, layouts.py lists those that fit. No torch, no process group."""
