"""How much of what an adapter does to the logits is left in another form of the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

LOWEST_EFFECT = 1e-12


@dataclass
class EffectSums:
    """Sums over positions of the inner products that the shares come from (:func:`assessment.rounding.survival` says
    what they mean).
    """

    rows: int = 0
    effect: float = 0.0
    left: float = 0.0
    aside: float = 0.0
    noise: float = 0.0

    def add(self, base: Tensor, bent: Tensor, rounded: Tensor, rounded_base: Tensor) -> None:
        """More positions: logits [N, V] of the base, the bent model, the bent model rounded and the base rounded."""
        b, m, r, q = (each - each.mean(-1, keepdim=True) for each in (base, bent, rounded, rounded_base))
        effect = m - b
        self.rows += len(b)
        self.effect += float((effect * effect).sum())
        self.left += float(((r - q) * effect).sum())
        self.aside += float(((q - b) * effect).sum())
        self.noise += float(((q - b) ** 2).sum())

    def shares(self) -> dict[str, float | None]:
        """``survives``, ``towards``, ``noise_towards`` and ``noise``; None each for an adapter without an effect."""
        if self.effect <= LOWEST_EFFECT * self.rows:
            return dict.fromkeys(("survives", "towards", "noise_towards", "noise"))
        survives, aside = self.left / self.effect, self.aside / self.effect
        return {
            "survives": survives,
            "towards": survives + aside,
            "noise_towards": aside,
            "noise": (self.noise / self.effect) ** 0.5,
        }
