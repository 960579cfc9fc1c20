"""Post-mortems: reruns a recorded step, or examines a checkpoint."""
