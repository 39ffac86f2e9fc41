"""Release memory of the cache when other processes need it.

python examples/memory_pressure.py
"""

import erllama

with erllama.Cache(
    ram="8GiB",
    pressure={
        "source": "system",  # the machine's memory, or the cgroup's limit if it is lower
        "interval": 5.0,
        "high_watermark": 0.85,
        "low_watermark": 0.75,
        "tiers": ("ram", "ram_file"),  # the disk has its own quota
    },
) as cache:
    print("watching:", cache.tier_names)


# A custom source: a function that returns the used and the total memory.
def batch_jobs() -> erllama.MemoryUsage:
    return erllama.MemoryUsage(used=10 * 2**30, total=64 * 2**30, name="batch jobs")


with erllama.Cache(ram="8GiB", pressure=erllama.Pressure(source=batch_jobs, interval=1.0)) as cache:
    print("blocks evicted so far:", cache.counters()["pressure_evictions"])
