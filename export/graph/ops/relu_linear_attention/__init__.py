"""ReLU linear attention as one op: Sana's self-attention and DC-AE's EfficientViT blocks.

    reference.py      the definition, in fp64
    torch_op.py       ditc::relu_linear_attention for PyTorch
    onnx_function.py  ditc::ReluLinearAttention for ONNX
    kernels.py        Triton kernels; ptx.py compiles them ahead of time, triton_op.py launches them on torch tensors
    qdp.py            the fused kernel as TensorRT's quickly deployable plugin

Numerator and denominator come from the same product here. An attention whose denominator uses other q and k needs
another op in a folder of its own; Sana-Video, for example, rotates q and k in the numerator only.
"""
