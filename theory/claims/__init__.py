"""The claims: what is stated, where it holds, how it is checked. Importing the package fills the registry."""

from theory.claims import bounds, dataset, errata, flows, identities, real, related
from theory.claims.registry import Claim, Context, Outcome, all_claims, find

__all__ = [
    "Claim",
    "Context",
    "Outcome",
    "all_claims",
    "bounds",
    "dataset",
    "errata",
    "find",
    "flows",
    "identities",
    "real",
    "related",
]
