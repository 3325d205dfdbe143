"""Parts of a model whose steps are replayed from CUDA graphs: the host launches one in place of all their kernels."""
import contextlib
import copy
import functools
import logging
import weakref
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..core.kernels import builtin_only
from ..core.kernels.constants import keep_constants
from ..core.perturbation import Perturbation


class Graphs:
    """Stands in for the ``forward`` of a module in training: replays it, and its backward pass, from graphs.

    There is a graph for every form of the inputs (shapes, dtypes, autocast). The first step with a form shows which outputs
    the loss depends on, the second captures. All else goes the module's own way: evaluation, forms past the bound, a forward
    pass while another waits for its backward pass, and a module with hooks inside, which graphs would not run. Outputs are
    overwritten by the next step.

    Graphs read and write memory where it was when they were captured. Once a parameter or buffer lies elsewhere, as after
    :func:`liera_mm.set_adapter`, they are dropped.

    Args:
        module: The module. Its inputs and outputs are tensors, in lists, tuples or dicts.
        name: What the log calls it.
        most: How many graphs may be captured.
        capture: Makes a graph of a function and its inputs; by default :class:`CUDAGraphPair`.

    Attributes:
        failures (int): How many captures have failed in this process. All graphs from before are dropped: they draw random
            numbers from a generator that is not in use any more.
    """
    failures = 0

    def __init__(self, module: nn.Module, name: str, most: int, capture: Optional[Callable[..., Any]] = None):
        self.module, self.name, self.most, self.given = module, name, most, capture
        self.capture, self.pool, self.stream = capture or self._in_pool, None, None
        self.eager, self.captured, self.turn = module.forward, 0, 0
        self.state: Optional[List[Any]] = None
        self.forms: Dict[Any, Form] = {}
        self.waiting: Callable[[], Any] = lambda: None  # the step without a backward pass so far

    def __deepcopy__(self, memo: dict) -> 'Graphs':
        return Graphs(copy.deepcopy(self.module, memo), self.name, self.most, self.given)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs, tree = tree_flatten((args, kwargs))
        if (not (self.module.training and torch.is_grad_enabled()) or self.waiting() is not None
                or builtin_only() or torch.compiler.is_compiling()
                or not inputs or not all(isinstance(each, Tensor) for each in inputs)):
            return self.eager(*args, **kwargs)
        state, device = _state(self.module), inputs[0].device.type
        if state is None:
            return self.eager(*args, **kwargs)
        if state != self.state:
            self.state, self.forms, self.pool = state, {}, None
        key = (str(tree), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device),
               *((each.shape, each.stride(), each.dtype, each.device, each.requires_grad) for each in inputs))
        form = self.forms.get(key)
        if (form is None or form.graph is None) and self.captured >= self.most:
            return self.eager(*args, **kwargs)
        if form is None:
            form = self.forms[key] = Form(tree)
        if form.graph is None and form.known:
            self._capture(form, inputs)
        if form.graph is None:
            return form.watch(self.eager(*args, **kwargs))
        outputs = _Step.apply(self, form, len(inputs), *inputs, *form.parameters)
        return tree_unflatten(outputs, form.outputs)

    def _in_pool(self, *args: Any) -> 'CUDAGraphPair':
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        if self.pool is None:  # that of graphs that are gone may not be used again
            self.pool = torch.cuda.graph_pool_handle()
        return CUDAGraphPair(self.pool, self.stream, *args)

    def _capture(self, form: 'Form', inputs: Sequence[Tensor]) -> None:
        places = [(each._parameters, name) for each in self.module.modules()
                  for name, parameter in each._parameters.items() if parameter is not None and parameter.requires_grad]
        form.parameters, form.wanted = list(dict.fromkeys(owner[name] for owner, name in places)), sorted(form.used)

        def function(inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> List[Tensor]:
            before, stand_ins = [owner[name] for owner, name in places], dict(zip(form.parameters, parameters))
            try:
                for (owner, name), parameter in zip(places, before):
                    owner[name] = stand_ins[parameter]
                args, kwargs = tree_unflatten(inputs, form.inputs)
                return tree_flatten(self.eager(*args, **kwargs))[0]
            finally:
                for (owner, name), parameter in zip(places, before):
                    owner[name] = parameter

        self.captured += 1
        try:
            with _unchanged(self.module, inputs[0].device):
                form.graph = self.capture(function, inputs, form.parameters, form.wanted)
        except RuntimeError as error:
            self.most = 0
            print_log(f'LieRA  {self.name} stays without graphs: {error}', 'current', logging.WARNING)
            return
        shapes = ', '.join('x'.join(map(str, each.shape)) for each in inputs)
        last = '; none of other shapes will be' if self.captured == self.most else ''
        print_log(f'LieRA  {self.name}: inputs of {shapes} are replayed from a graph from now on{last}', 'current')


class Form:
    """Inputs of one form: how the outputs for them are used, and the graph once it is captured.

    Attributes:
        inputs, outputs (TreeSpec): How tensors lie in lists, tuples and dicts.
        differentiable (list[bool]): Which outputs require a gradient.
        used (set[int]): Outputs that a gradient came to.
        wanted (list[int]): Those at the time of the capture.
        parameters (list[Tensor]): What trains, in the order of the graph.
    """

    def __init__(self, inputs: Any):
        self.inputs, self.outputs, self.graph = inputs, None, None
        self.wanted: List[int] = []
        self.parameters: List[Tensor] = []
        self.differentiable: List[bool] = []
        self.used: Set[int] = set()

    @property
    def known(self) -> bool:
        """Whether a step has shown which outputs the loss depends on."""
        return self.outputs is not None and (bool(self.used) or not any(self.differentiable))

    def watch(self, result: Any) -> Any:
        """Look at outputs of the module itself, and later at which of them gradients come to."""
        outputs, tree = tree_flatten(result)
        if not self.known and all(isinstance(output, Tensor) for output in outputs):
            self.outputs, self.differentiable = tree, [output.requires_grad for output in outputs]
            for index, output in enumerate(outputs):
                if output.requires_grad:
                    output.register_hook(lambda _, index=index: self.used.add(index))
        return result


class _Step(torch.autograd.Function):

    @staticmethod
    def forward(ctx, graphs, form, count, *tensors):
        graphs.turn += 1
        graphs.waiting = weakref.ref(ctx)
        ctx.graphs, ctx.form, ctx.turn = graphs, form, graphs.turn
        ctx.set_materialize_grads(False)
        outputs = tuple(output.detach() for output in form.graph.run(tensors[:count]))
        ctx.mark_non_differentiable(*(output for output, wanted in zip(outputs, form.differentiable) if not wanted))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        graphs, form = ctx.graphs, ctx.form
        graphs.waiting = lambda: None
        if ctx.turn != graphs.turn:
            raise RuntimeError(f'{graphs.name} was replayed since, over what this backward pass needs: leave it out of the '
                               'modules that have graphs')
        graphs.turn += 1  # for this pass, too, is done over what it needs
        if any(grad is not None and index not in form.wanted for index, grad in enumerate(grads)):
            raise RuntimeError(f'the loss depends on an output of {graphs.name} that it did not depend on when a graph was '
                               'made of it: leave it out of the modules that have graphs')
        return None, None, None, *form.graph.gradients([grads[index] for index in form.wanted])


class CUDAGraphPair:
    """A function and its gradient as two CUDA graphs, between tensors that stay where they are.

    Args:
        pool, stream: Memory and stream that graphs can share of which one at a time is in use, from forward to backward.
        function: From inputs and parameters to outputs, in the autocast of now.
        inputs: Tensors of the form that the function will be given.
        parameters: Tensors that the function reads where they are.
        used: Indices of the outputs that will have a gradient.
    """

    def __init__(self, pool: Any, stream: torch.cuda.Stream, function: Callable[..., List[Tensor]], inputs: Sequence[Tensor],
                 parameters: Sequence[Tensor], used: Sequence[int]):
        self.inputs = [each.detach().clone().requires_grad_(each.requires_grad) for each in inputs]
        # Other leaves than the parameters, to which DistributedDataParallel ties streams
        leaves = [each.detach().requires_grad_() for each in parameters]
        self.wanted = [each.requires_grad for each in (*self.inputs, *leaves)]
        half = dict(dtype=torch.get_autocast_dtype('cuda'), enabled=torch.is_autocast_enabled('cuda'), cache_enabled=False)
        # Other threads, as that which pins memory for the dataloader, go on meanwhile
        record = functools.partial(torch.cuda.graph, pool=pool, stream=stream, capture_error_mode='thread_local')

        def forward() -> List[Tensor]:
            with torch.autocast('cuda', **half):
                return function(self.inputs, leaves)

        def backward(outputs: Sequence[Tensor], seeds: Sequence[Tensor]) -> List[Optional[Tensor]]:
            sources = [each for each in (*self.inputs, *leaves) if each.requires_grad]
            with torch.autocast('cuda', enabled=False):
                return torch.autograd.grad([outputs[index] for index in used], sources, seeds, allow_unused=True)

        self.constants: Dict[Any, Tensor] = {}
        self.graph, self.backward_graph, self.grads = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph(), []
        with _recovering(inputs[0].device, pool), keep_constants(self.constants):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # what is done once, is done here
                outputs = forward()
                if used:
                    backward(outputs, [torch.zeros_like(outputs[index]) for index in used])
                del outputs
            with record(self.graph):
                outputs = forward()
                self.seeds = [torch.empty_like(outputs[index]) for index in used]  # over what only this pass needed
            if used:
                with record(self.backward_graph):
                    self.grads = backward(outputs, self.seeds)
        self.outputs = [output.detach() for output in outputs]

    def run(self, inputs: Sequence[Tensor]) -> List[Tensor]:
        for own, given in zip(self.inputs, inputs):
            own.copy_(given)
        self.graph.replay()
        return self.outputs

    def gradients(self, seeds: Sequence[Optional[Tensor]]) -> List[Optional[Tensor]]:
        """Gradients by inputs and parameters, as new tensors, from those by the outputs that are used."""
        for own, given in zip(self.seeds, seeds):
            own.zero_() if given is None else own.copy_(given)
        self.backward_graph.replay()
        there = [grad is not None for grad in self.grads]
        copies = iter(torch._foreach_mul([grad for grad in self.grads if grad is not None], 1))
        grads = iter([next(copies) if each else None for each in there])
        return [next(grads) if each else None for each in self.wanted]


def _state(module: nn.Module) -> Optional[List[Any]]:
    """All that a graph relies on but its inputs; None where there are hooks in the module. It is asked for in every step."""
    state, queue = [Graphs.failures], [module]
    for each in queue:
        own = vars(each)  # a third of the time that nn.Module.modules() and attributes take
        queue += [child for child in own['_modules'].values() if child is not None]
        if each is not module and (own['_forward_hooks'] or own['_forward_pre_hooks'] or own['_backward_hooks']):
            return None
        state.append(own['training'])
        if isinstance(each, Perturbation):
            state.append(own['scale'])
        for tensors in (own['_parameters'], own['_buffers']):
            for tensor in tensors.values():
                if tensor is not None:
                    state += (tensor.data_ptr(), tensor.shape, tensor.requires_grad)
    return state


@contextlib.contextmanager
def _recovering(device: torch.device, pool: Any) -> Iterator[None]:
    """A context in which a capture can fail.

    torch would stay on its stream, draw no random number ever after, and not use memory again that two streams have used.
    """
    generator = torch.cuda.default_generators[device.index]
    before = generator.clone_state()
    with torch.cuda.stream(torch.cuda.current_stream(device)):
        try:
            yield
        except BaseException:
            generator.graphsafe_set_state(before)
            with contextlib.suppress(RuntimeError):  # if the capture got as far as this itself
                torch._C._cuda_endAllocateToPool(device.index, pool)
            Graphs.failures += 1
            raise


@contextlib.contextmanager
def _unchanged(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A context after which buffers and random numbers are as before."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with torch.random.fork_rng([device] if device.type == 'cuda' else []):
        yield
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
