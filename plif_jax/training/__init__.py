"""Training: one pure step, sharded over devices, and the loop around it."""
