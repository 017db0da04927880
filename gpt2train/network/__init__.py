"""The parts of the network that are more than a line of torch; `model` puts them together.

The rooms:

    attention   causal self-attention: heads, rotary positions, the cache of keys and values
    flexible    the same by FlexAttention, which leaves out what a mask of documents hides
    documents   which of a packed sequence's documents a token is of: mask and positions
    layers      linear maps and embeddings that draw no initial values of their own
    loss        the output matrix and the cross-entropy in one, without the logits
    loss_kernel its softmax and gradient as a Triton kernel, for CUDA
    float8      matrix products in fp8, by torchao
"""
