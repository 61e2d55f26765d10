"""OLMo-core's four MoE kernels, which need a GPU, in plain torch, so that its models run on a CPU.

`install()` puts them where olmo_core.ops.moe looks. `indices` sorts the (token, choice) pairs by
expert; a pair's token is index // top_k; its weight is looked up by the pair's index.
"""

import types

import torch


def gather(x, indices, bin_ids, weights, bins, top_k):
    out = x[indices.long() // top_k]
    return out if weights is None else out * weights[indices.long(), None].to(x.dtype)


def scatter(x, indices, bin_ids, weights, bins, top_k):
    out = torch.zeros(indices.numel(), x.shape[1], dtype=x.dtype)
    pairs = indices.long()
    out[pairs] = x if weights is None else (x.float() * weights[pairs, None].float()).to(x.dtype)
    return out.view(-1, top_k, x.shape[1]).sum(1)


def _slots(indices, bins, capacity):
    start = 0
    for expert, end in enumerate(bins.tolist()):
        yield expert, indices[start:end][:capacity].long()
        start = end


def binned_gather(x, indices, weights, bins, capacity, top_k):
    out = torch.zeros(bins.numel(), capacity, x.shape[1], dtype=x.dtype)
    for expert, pairs in _slots(indices, bins, capacity):
        rows = x[pairs // top_k]
        out[expert, : len(pairs)] = rows if weights is None else rows * weights[pairs, None]
    return out


def binned_scatter(x, indices, weights, bins, top_k):
    out = torch.zeros(indices.numel(), x.shape[2], dtype=x.dtype)
    for expert, pairs in _slots(indices, bins, x.shape[1]):
        rows = x[expert, : len(pairs)]
        out[pairs] = rows if weights is None else rows * weights[pairs, None]
    return out.view(-1, top_k, x.shape[2]).sum(1)


def install() -> None:
    """Has OLMo-core use these."""
    import olmo_core.ops.moe as ops

    ops.kernels = types.SimpleNamespace(
        gather=gather,
        scatter=scatter,
        binned_gather=binned_gather,
        binned_scatter=binned_scatter,
    )
