"""Mean and covariance of features that come a batch at a time, in float64, without holding them."""

import torch
from torch import Tensor


class Moments:
    """Count, sum and outer products of features less a shift c.

    With s = sum (x - c) and Q = sum (x - c)(x - c)^T over n rows, the mean is c + s / n and the covariance
    (Q - s s^T / n) / (n - 1). Any c gives the same; one near the mean loses no digits in the difference.
    """

    def __init__(self, shift: Tensor) -> None:
        """shift [dim], float64, where the sums are to be."""
        self.count = 0
        self._shift = shift
        self._sum = torch.zeros_like(shift)
        self._square = torch.zeros(len(shift), len(shift), dtype=torch.float64, device=shift.device)

    @classmethod
    def shifted_by(cls, batch: Tensor) -> "Moments":
        """Of nothing yet, shifted by the mean of a batch [B, dim], on its device if that has float64."""
        return cls((batch.cpu() if batch.device.type == "mps" else batch).double().mean(0))

    def add(self, features: Tensor, times: Tensor | None = None) -> None:
        """Take in features [B, dim], each as often as times [B], whole numbers, says: by default once."""
        centred = features.to(self._shift.device).double() - self._shift
        weighted = centred if times is None else centred * times.to(centred)[:, None]
        self.count += len(centred) if times is None else int(times.sum())
        self._sum += weighted.sum(0)
        self._square.addmm_(weighted.T, centred)

    @property
    def mean(self) -> Tensor:
        """[dim], float64."""
        return self._shift + self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """[dim, dim], float64, with n - 1 in the denominator."""
        return (self._square - torch.outer(self._sum, self._sum) / self.count) / (self.count - 1)
