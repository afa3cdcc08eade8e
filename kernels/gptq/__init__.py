"""GPTQ: codes on a fixed grid that minimise the error in the metric of the second moment."""

from .reference import FactorizationError, gptq, hessian_error

__all__ = ["FactorizationError", "gptq", "hessian_error"]
