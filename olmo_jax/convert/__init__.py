"""Checkpoints of this and other programs: reading any, writing PyTorch's, tensor by tensor."""
