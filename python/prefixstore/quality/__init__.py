"""`kvkernels quality`: what a codec does to a model's answers."""
