"""Training: optimizer, schedules, the pure step, the loop, metrics."""
