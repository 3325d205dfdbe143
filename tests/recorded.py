"""A stand-in for CUDA graphs, for machines without a GPU."""
import torch


class Recorded:
    """Computes anew what a graph would replay, from the memory in which inputs and parameters were."""
    def __init__(self, function, inputs, parameters, used):
        self.inputs = [each.detach().clone().requires_grad_(each.requires_grad) for each in inputs]
        self.leaves = [each.detach().requires_grad_() for each in parameters]
        self.function, self.used = function, used
        self.outputs = function(self.inputs, self.leaves)  # as in a capture

    def run(self, inputs):
        with torch.enable_grad():
            for own, given in zip(self.inputs, inputs):
                own.data.copy_(given)
            self.result = self.function(self.inputs, self.leaves)
        for own, new in zip(self.outputs, self.result):
            own.data.copy_(new)
        return self.outputs

    def gradients(self, seeds):
        sources = [each for each in (*self.inputs, *self.leaves) if each.requires_grad]
        seeds = [torch.zeros_like(self.result[index]) if seed is None else seed for index, seed in zip(self.used, seeds)]
        found = iter(torch.autograd.grad([self.result[index] for index in self.used], sources, seeds, allow_unused=True))
        return [next(found) if each.requires_grad else None for each in (*self.inputs, *self.leaves)]
