"""Softmax attention as one op, whose softmax is fp32 in every form.

    reference.py   the definition, in fp64
    torch_op.py    ditc::attention for PyTorch
    onnx_nodes.py  its form in a graph: plain nodes, or the standard Attention in opsets that have it

The op itself is never written to a file: torch.onnx.export gets the translation for the opset.
"""
