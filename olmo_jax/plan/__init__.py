"""Ahead-of-time compilation for machines that are not there: memory, FLOPs, traffic, roofline."""
