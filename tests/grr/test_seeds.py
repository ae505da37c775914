"""Seeds out of numbers and names."""

from grr.seeds import derive_seed


def test_seeds_are_mixed_well():
    seeds = {derive_seed(a, b) for a in range(30) for b in range(30)} | {derive_seed(0, "a"), derive_seed(0, "b")}
    assert len(seeds) == 902
    assert all(0 <= s < 2**63 for s in seeds)
