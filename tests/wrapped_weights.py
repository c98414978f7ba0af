"""Weights that keep their numbers in other tensors, as quantising libraries' do."""

import torch


class WrappedWeight(torch.Tensor):
    """Claims to be a float tensor on the CPU, but has no memory: its numbers are int8."""

    @staticmethod
    def __new__(cls, codes, scales):
        return torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, strides=codes.stride(), dtype=scales.dtype, device=codes.device
        )

    def __init__(self, codes, scales):
        self.codes, self.scales = codes, scales

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            input, weight, *bias = args
            return function(input, weight.codes * weight.scales, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scales)
        raise NotImplementedError(function)


def wrap(weight):
    """A wrapped parameter with about the same numbers; a vector is wrapped as one row."""
    scales = weight.detach().abs().amax(-1, keepdim=True) / 127
    codes = (weight.detach() / scales).round().to(torch.int8)
    return torch.nn.Parameter(WrappedWeight(codes, scales), requires_grad=False)


def wrap_linears(model):
    """Replace the weights of all linear layers but the last."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            module.weight = wrap(module.weight)
