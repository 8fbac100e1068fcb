"""Which rank gets which rows of a step."""

from __future__ import annotations

from collections.abc import Sequence


def dealt(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of the rows of each rank, in ascending order: every row once, and about as many tokens each.

    The longest row that is left goes to the rank with the fewest tokens (R. L. Graham, "Bounds on multiprocessing
    timing anomalies", 1969), so no rank has more than 4/3 of what the best deal would give the fullest one. A function
    of the arguments alone; a rank may get nothing.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        # Of rows without tokens, which cost a little too, no rank gets all.
        rank = min(range(ranks), key=lambda rank: (tokens[rank], len(shares[rank])))
        shares[rank].append(row)
        tokens[rank] += lengths[row]
    return [sorted(share) for share in shares]
