"""One rank's training: task, step, DeepSpeed engine, checkpoints. Knows no Ray."""
