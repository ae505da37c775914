"""Training: losses, the step of a global batch, optimizer, schedule, log and throughput."""
