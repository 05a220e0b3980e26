"""A made-up study of three sizes, five schemes and two weight formats, with the effects of the claims between models.

The noise is that of `tests.planted`. Nothing in it was measured.
"""

from __future__ import annotations

from tests.planted import BYTES, Planted

SMALL, MIDDLE, LARGE = MODELS = ("planted-100m", "planted-400m", "planted-1.6b")
BETWEEN = {"loss_shrinks_with_size_text", "loss_shrinks_with_size_accuracy", "order_is_the_same", "bits_beat_channels"}
SCHEMES = ("teal", "wina", "topk", "dip", "prox")
LEVELS = (0.25, 0.5)
GAP = 0.3  # nats/token at half of the weights, from one scheme to the next
SHRINKS = 0.1  # nats/token for two doublings of the size
EIGHT = "int8-g32"  # 8.5 bits: as many bytes as half of the channels, nearly
FEW = 0.2  # nats/token that fewer bits lose less


class PlantedModels(Planted):
    """sign 1: losses shrink with size, all models have one order, fewer bits lose less; -1: the contrary of each.

    0: a byte of text and an answer cost as much on each model, the orders agree as far as `SAME_ORDER` asks for, on the
    edge, and 8 bits lose what half of the channels do by the best scheme.
    """

    def make(self) -> None:
        for model in MODELS:
            self.cell(model, "dense", 0.0)
            for level in LEVELS:
                for scheme, text in self.losses(model, level).items():
                    self.cell(model, scheme, level, text=text, wrong=self.wrong(model, level))
            half = self.losses(model, 0.5)
            bits = min(half.values()) - self.sign * FEW
            self.cell(model, "dense", 0.0, stored=EIGHT, text=bits)

    def losses(self, model: str, level: float) -> dict[str, float]:
        """Nats/token by scheme."""
        size = 1 - self.sign * SHRINKS * self.strength * MODELS.index(model)
        scale = BYTES.get(model, 4.0) / 4.0 * level / 0.5
        return {scheme: scale * (size + GAP * place) for place, scheme in enumerate(self.order(model, level))}

    def order(self, model: str, level: float) -> list[str]:
        """The schemes, best first. Neutral: one pair is turned round, at one level another on another model too."""
        order = list(SCHEMES)
        if self.sign < 0 and model != SMALL:
            return order[::-1]
        if self.sign == 0 and model == MIDDLE:
            order[0], order[1] = order[1], order[0]
        if self.sign == 0 and model == LARGE and level == 0.5:
            order[2], order[3] = order[3], order[2]
        return order

    def wrong(self, model: str, level: float) -> float:
        """Share of all answers that are lost; all models can do as much."""
        return level * (0.3 - 0.05 * self.sign * MODELS.index(model))
