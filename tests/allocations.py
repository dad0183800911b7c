"""What a piece of work allocates on the CPU, and what it leaves to autograd."""

import torch


def sizes_of_allocations(run):
    """Bytes of every allocation, and the most that was held at a time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held, highest = 0, 0
    for _, change in changes:
        held += change
        highest = max(highest, held)
    return [change for _, change in changes if change > 0], highest


def saved(function):
    """The tensors that autograd holds between forward and backward, each once."""
    tensors = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: tensors.setdefault(t.data_ptr(), t), lambda t: t
    ):
        function()
    return list(tensors.values())
