"""How a model is trained: task, optimizer, guard, validation, checkpoints."""
