"""Softmax attention as one op, whose softmax is fp32 in every form.

    reference.py   the definition, fp64
    torch_op.py    ditc::attention for PyTorch
    onnx_nodes.py  what it becomes in a graph: plain nodes, or the standard Attention where the opset has it

The op itself never reaches a file: torch.onnx.export is given the translation that the opset asks for.
"""
