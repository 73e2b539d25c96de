"""How a row changed in length and direction, by the definitions, in decimals of 80 digits: no cancellation can matter.

DoRA, arXiv 2402.09353, section 3.2.
"""

from decimal import Decimal, localcontext

from torch import Tensor


def _row(values: Tensor) -> list[Decimal]:
    return [Decimal(value) for value in values.double().tolist()]


def _dot(a: list[Decimal], b: list[Decimal]) -> Decimal:
    return sum((x * y for x, y in zip(a, b, strict=True)), Decimal(0))


def row_changes(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> tuple[list[float], list[float]]:
    """(‖V‖ − ‖W‖, 1 − cos(V, W)) of each row; a row without a direction before is 0, one without one after is 1."""
    lengthened, turned = [], []
    columns = [_row(column) for column in A.t()]
    with localcontext() as context:
        context.prec = 80
        for w, b in zip(map(_row, W), map(_row, B), strict=True):
            v = [x + Decimal(scaling) * _dot(b, column) for x, column in zip(w, columns, strict=True)]
            before, after = _dot(w, w).sqrt(), _dot(v, v).sqrt()
            lengthened.append(float(after - before))
            turned.append(float(1 - _dot(v, w) / (before * after)) if before and after else float(before > 0))
    return lengthened, turned
