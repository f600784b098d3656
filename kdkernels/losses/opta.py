"""OpTA: transports the features of a support set onto the queries of an episode."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional.ground_cost import ground_cost
from ..functional.sinkhorn import sinkhorn
from .registry import register


@register(
    "opta",
    paper="Poulakakis-Daktylidis and Jamali-Rad, BECLR, ICLR 2024",
    family="transport",
    status="source",
)
class OpTALoss(nn.Module):
    """Sharp cost of entropic transport from support [n, d] to queries [m, d], squared distances
    divided by their maximum, uniform marginals. `transport` gives the support's images."""

    def __init__(self, epsilon: float = 0.05, iterations: int = 1000, tolerance: float = 1e-4):
        super().__init__()
        self.epsilon = epsilon
        self.iterations = iterations
        self.tolerance = tolerance

    def _solve(self, support: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        cost = ground_cost(support, queries, "sqeuclidean")
        cost = cost / cost.amax((-2, -1), keepdim=True)
        return sinkhorn(
            cost,
            epsilon=self.epsilon,
            iterations=self.iterations,
            tolerance=self.tolerance,
            return_plan=True,
        )

    def transport(self, support: Tensor, queries: Tensor) -> Tensor:
        """Row-normalised plan times queries: where each support point goes, [n, d]."""
        plan = self._solve(support, queries)[1]
        return (plan / plan.sum(-1, keepdim=True)) @ queries.to(plan.dtype)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        return self._solve(student, teacher)[0].mean()
