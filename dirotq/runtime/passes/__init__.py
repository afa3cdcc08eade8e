"""What we change in a block's graph before Inductor compiles it: one pass serves every family.

A pass takes the graph as dynamo traced it (torch's own functions, parameters as placeholders),
changes it in place and returns how many places it changed. It recognizes what stands next to
``dirotq::quant_linear``, by what is computed and not by whose class computes it.
"""

from torch.fx import GraphModule

from dirotq.kernels.attention import Mode, redirect

from . import graph, norm_rope, normed_attention, prologues, sites

PASSES = (graph.drop_inert, sites.rewrite, norm_rope.rewrite, prologues.rewrite)


def rewritten(module: GraphModule, attention: Mode = "exact") -> GraphModule:
    """Apply all passes to a graph, in place, and return it."""
    for rewrite in PASSES:
        rewrite(module)
    redirect.replace(module.graph, attention)
    normed_attention.rewrite(module)
    module.graph.lint()
    module.recompile()
    return module
