"""The training program's parts: processes, engine, checkpoints, logging, and the loop that runs them."""
