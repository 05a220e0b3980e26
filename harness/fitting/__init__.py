"""What methods learn from: calibration text, and the activations of the patched model on it."""
