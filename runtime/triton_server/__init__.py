"""A bundle as a model repository of Triton Inference Server: written here, and run there without PyTorch."""
