from dirotq.kernels.w4a16_linear.kernel import builds

__all__ = ["builds"]
