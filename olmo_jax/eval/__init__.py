"""Evaluation: tasks, the scores of continuations, metrics, and what becomes of them."""
