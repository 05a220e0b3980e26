"""What a method decides, applied to the model: by masks, the definition, or by kernels; the ledger counts it."""
