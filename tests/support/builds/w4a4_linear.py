from dirotq.kernels.w4a4_linear.kernel import builds

__all__ = ["builds"]
