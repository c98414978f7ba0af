"""What each op means, in plain PyTorch: short, slow, and the only one of its kind."""
