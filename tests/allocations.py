"""What a piece of work allocates on the CPU."""

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
