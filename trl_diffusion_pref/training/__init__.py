"""transformers' training loop for a denoiser; knows no algorithm."""
