"""What is written for others to load: weights, LoRA files, model cards, run records."""
