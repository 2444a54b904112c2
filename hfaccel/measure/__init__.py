"""Timing with stable windows, memory, workloads, the host."""
