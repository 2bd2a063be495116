"""Training: the runtime, the loop, optimizers, schedules and what is logged."""
