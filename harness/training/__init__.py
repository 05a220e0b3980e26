"""Making the ReLU counterparts: text that the model writes itself, distillation, sparsity, checkpoints."""
