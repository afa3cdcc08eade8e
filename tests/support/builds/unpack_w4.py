from dirotq.kernels.unpack_w4.kernel import builds

__all__ = ["builds"]
