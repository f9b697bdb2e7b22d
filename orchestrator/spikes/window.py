"""Mean and standard deviation over the last n values, in O(1) a value. Shared by the rules that others published."""

import math
from collections import deque
from typing import Any


class Window:
    def __init__(self, size: int) -> None:
        self.values: deque[float] = deque(maxlen=size)
        self._sum = self._squares = 0.0

    def __len__(self) -> int:
        return len(self.values)

    @property
    def full(self) -> bool:
        return len(self.values) == self.values.maxlen

    def add(self, value: float) -> None:
        if self.full:
            old = self.values[0]
            self._sum -= old
            self._squares -= old * old
        self.values.append(value)
        self._sum += value
        self._squares += value * value

    @property
    def mean(self) -> float:
        return self._sum / len(self.values)

    @property
    def std(self) -> float:
        """Of a sample (n - 1)."""
        n = len(self.values)
        return math.sqrt(max(0.0, (self._squares - self._sum * self._sum / n) / (n - 1))) if n > 1 else 0.0

    def state(self) -> dict[str, Any]:
        return {"values": list(self.values), "sum": self._sum, "squares": self._squares}

    def restore(self, state: dict[str, Any]) -> None:
        self.values.clear()
        self.values.extend(state["values"])
        self._sum, self._squares = state["sum"], state["squares"]
