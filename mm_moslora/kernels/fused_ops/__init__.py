"""RMS norm, gated activation and rotary embedding: PyTorch, Triton and C++."""
