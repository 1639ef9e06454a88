"""ReLU linear attention with rotary positions: the self-attention of SANA-Video.

    reference.py      the definition, in fp64
    torch_op.py       ditc::rotary_linear_attention for PyTorch
    onnx_function.py  ditc::RotaryLinearAttention for ONNX
    kernels.py        Triton kernels; ptx.py compiles them ahead of time, triton_op.py launches them on torch tensors
    qdp.py            the fused kernel as TensorRT's quickly deployable plugin

q and k are rotated after the ReLU, in the numerator only: the denominator keeps them as they are, so that it stays
positive. So the two are no products of the same matrices, and a row of ones in v cannot give the denominator. What is
the same as without positions comes from the folder relu_linear_attention.
"""
