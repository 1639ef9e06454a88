"""Sinkhorn-Knopp normalisation as one op: the stream mixing of manifold-constrained hyper-connections.

    reference.py      the definition, fp64
    torch_op.py       ditc::sinkhorn for PyTorch
    onnx_function.py  ditc::Sinkhorn for ONNX

Written out, 20 iterations are 120 nodes a call and two calls a modality and block. The function holds a Loop of
eight nodes instead.
"""
