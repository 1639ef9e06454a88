"""Sinkhorn-Knopp normalisation as one op: the stream mixing of manifold-constrained hyper-connections.

    reference.py      the definition, in fp64
    torch_op.py       ditc::sinkhorn for PyTorch
    onnx_function.py  ditc::Sinkhorn for ONNX

Written out, 20 iterations are 120 nodes per call, and a block makes two calls per modality. The function holds a Loop
of eight nodes instead.
"""
