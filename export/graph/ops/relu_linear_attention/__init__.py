"""ReLU linear attention as one op: Sana's self-attention and DC-AE's EfficientViT blocks.

    reference.py      the definition, fp64
    torch_op.py       ditc::relu_linear_attention for PyTorch
    onnx_function.py  ditc::ReluLinearAttention for ONNX
    kernels.py        Triton kernels; ptx.py compiles them ahead of time, triton_op.py launches them on torch tensors
    qdp.py            TensorRT's quickly deployable plugin over the fused kernel

This form takes its denominator from the numerator's product. An attention whose denominator has other q and k
(Sana-Video rotates them in the numerator only) is another op, in a folder of its own.
"""
