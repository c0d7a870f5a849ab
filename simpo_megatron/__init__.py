"""SimPO preference training on Megatron-Core."""
