from dirotq.kernels.humming_linear.kernel import builds

__all__ = ["builds"]
