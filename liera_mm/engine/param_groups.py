"""One group for all parameters of an optimizer that have the same settings.

Any ``paramwise_cfg`` makes MMEngine's default constructor give every parameter a group of its own, and an optimizer launches
its kernels for one group after another.
"""
from typing import Any, Dict, List, Sequence

import torch
from mmengine.optim import _ParamScheduler
from torch import Tensor
from torch.optim import Optimizer

Group = Dict[str, Any]
# What a group lists for each parameter, and a scheduler for each group. All the rest of a group are its settings
OF_PARAMETERS = 'params', 'param_names'
OF_GROUPS = 'base_values', '_last_value', 'min_values'


class MergedGroups:
    """Merges the groups of an optimizer that are equal but for their parameters, while it trains.

    Its state dict, and those of the schedulers by way of :meth:`split_schedulers`, keep the groups as they were built: a
    checkpoint is that of any training, and resumes with or without merging. For that, merging comes after resuming.

    Args:
        optimizer: The optimizer. One of torch's that keeps a second list of groups (``ZeroRedundancyOptimizer``), or another
            package's that is no ``torch.optim.Optimizer``, is left alone.
        schedulers: MMEngine's parameter schedulers of it.
    """

    def __init__(self, optimizer: Optimizer, schedulers: Sequence[_ParamScheduler] = ()):
        self.optimizer, self.schedulers, self.handles = optimizer, list(schedulers), []
        self.homes, self.sizes, self.firsts = [], [], []
        if not isinstance(optimizer, Optimizer) or hasattr(optimizer, 'consolidate_state_dict'):
            return
        self.merge()
        self.handles = [
            optimizer.register_state_dict_post_hook(
                lambda _, state: state.update(param_groups=self.split(state['param_groups']))),
            optimizer.register_load_state_dict_pre_hook(lambda *_: self.unmerge()),
            optimizer.register_load_state_dict_post_hook(lambda *_: self.merge()),
        ]

    def merge(self) -> None:
        groups, merged = self.optimizer.param_groups, []
        # Of every group: which merged one it is in, and its number of parameters. Of every merged group: its first one
        self.homes, self.sizes, self.firsts = [], [len(group['params']) for group in groups], []
        for index, group in enumerate(groups):
            home = next((home for home, first in enumerate(self.firsts) if self._equal(first, index)), len(merged))
            if home == len(merged):
                self.firsts.append(index)
                merged.append({**group, **{key: [] for key in OF_PARAMETERS if key in group}})
            for key in OF_PARAMETERS:
                if key in group:
                    merged[home][key].extend(group[key])
            self.homes.append(home)
        for scheduler in self.schedulers:
            for name, values in _of_groups(vars(scheduler)).items():
                setattr(scheduler, name, [values[first] for first in self.firsts] + values[len(groups):])
        groups[:] = merged

    def unmerge(self) -> None:
        for scheduler in self.schedulers:
            vars(scheduler).update(self._split_lists(vars(scheduler)))
        self.optimizer.param_groups[:] = self.split(self.optimizer.param_groups)
        self.homes, self.sizes, self.firsts = [], [], []

    def remove(self) -> None:
        """Have the optimizer and its schedulers as they would be without merging."""
        for handle in self.handles:
            handle.remove()
        if self.handles:
            self.unmerge()

    def split(self, merged: List[Group]) -> List[Group]:
        """The groups as they were built, with the settings that the merged ones have now; groups added since come last."""
        groups, starts = [], [0] * len(merged)
        for home, size in zip(self.homes, self.sizes):
            part = slice(starts[home], starts[home] + size)
            starts[home] += size
            groups.append({key: value[part] if key in OF_PARAMETERS else value for key, value in merged[home].items()})
        return groups + merged[len(self.firsts):]

    def split_schedulers(self, states: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
        """State dicts of the schedulers as they would be without merging."""
        return [{**state, **self._split_lists(state)} for state in states]

    def _split_lists(self, state: Dict[str, Any]) -> Dict[str, List[Any]]:
        return {name: [values[home] for home in self.homes] + values[len(self.firsts):]
                for name, values in _of_groups(state).items()}

    def _equal(self, a: int, b: int) -> bool:
        one, other = ({key: value for key, value in self.optimizer.param_groups[index].items() if key not in OF_PARAMETERS}
                      for index in (a, b))
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one) and all(
            values[a] == values[b] for scheduler in self.schedulers for values in _of_groups(vars(scheduler)).values())


def _of_groups(state: Dict[str, Any]) -> Dict[str, List[Any]]:
    return {name: state[name] for name in OF_GROUPS if name in state}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
