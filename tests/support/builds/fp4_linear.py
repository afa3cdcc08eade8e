from dirotq.kernels.fp4_linear.kernel import builds

__all__ = ["builds"]
