"""The routed experts of a Mixture-of-Experts layer: all forward, weight gradients of the trained ones only."""

from esft_kernels.activation import Activation
from esft_kernels.autograd_op import RECOMPUTE, expert_mlp
from esft_kernels.backend import Gradients, Needs
from esft_kernels.backends.resolve import BACKENDS, resolve_backend
from esft_kernels.compiled_op import routed_mlp
from esft_kernels.formats.resolve import FORMATS, resolve_format
from esft_kernels.pools import ExpertPools, ExpertWeights, QuantizedWeights, dequantize, quantize, split_pools
from esft_kernels.routing import Routing, expert_order, route

__all__ = [
    "BACKENDS",
    "FORMATS",
    "RECOMPUTE",
    "Activation",
    "ExpertPools",
    "ExpertWeights",
    "Gradients",
    "Needs",
    "QuantizedWeights",
    "Routing",
    "dequantize",
    "expert_mlp",
    "expert_order",
    "quantize",
    "resolve_backend",
    "resolve_format",
    "route",
    "routed_mlp",
    "split_pools",
]
